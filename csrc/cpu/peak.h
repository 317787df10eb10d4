// What the processor gives when nothing stands in the way: the rooflines that benchmarks divide by.
#pragma once
#include "isa.h"
#include "tile_gemm.h"

namespace sslkernels::SSLK_ISA {

// The accumulators of the micro-kernel, and operands that stay in registers too.
template <bool kBf16>
double multiply_add_loop(int64_t iterations) {
  constexpr int kSteps = 128;
  Block<kVecs> c;
  clear<kVecs>(c);
  Vec left[kRows], right[kVecs];
  for (int r = 0; r < kRows; r++) left[r] = broadcast(1e-3f * r);
  for (int v = 0; v < kVecs; v++) right[v] = broadcast(1e-3f * v);
  for (int64_t i = 0; i < iterations * kSteps; i++) {
    SSLK_UNROLL for (int v = 0; v < kVecs; v++) opaque(right[v]);  // or the products would leave the loop
    SSLK_UNROLL for (int r = 0; r < kRows; r++) SSLK_UNROLL for (int v = 0; v < kVecs; v++) c[r][v] =
        multiply_add<kBf16>(c[r][v], left[r], right[v]);
  }
  SSLK_UNROLL for (int r = 0; r < kRows; r++) SSLK_UNROLL for (int v = 0; v < kVecs; v++) opaque(c[r][v]);
  return 2.0 * iterations * kSteps * kRows * kPanel * (kBf16 ? 2 : 1);
}

double peak_multiply_add(bool bf16, int64_t iterations) {
  return bf16 && kHasBf16 ? multiply_add_loop<kHasBf16>(iterations) : multiply_add_loop<false>(iterations);
}

double peak_exp(int64_t iterations) {
  constexpr int kCount = 4096;
  alignas(64) static thread_local float x[kCount];
  for (int64_t i = 0; i < iterations; i++) {
    for (int at = 0; at < kCount; at += kLanes) store(x + at, exp2(load(x + at) - broadcast(1.f)));
    asm volatile("" : : "m"(x));
  }
  return static_cast<double>(kCount) * iterations;
}

Peak peak() { return {peak_multiply_add, peak_exp}; }

}  // namespace sslkernels::SSLK_ISA

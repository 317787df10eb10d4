// What the processor gives when nothing stands in the way: the rooflines that benchmarks divide by.
#pragma once
#include "isa.h"
#include "tile_gemm.h"

namespace sslkernels::SSLK_ISA {

// The micro-kernel with both operands in the first-level cache.
template <bool kBf16>
double multiply_add_loop(int64_t iterations) {
  constexpr int kSteps = 128;
  alignas(64) static uint32_t a[kSteps * kPanel], b[kSteps * kPanel];
  for (int64_t i = 0; i < iterations; i++) {
    Block<kVecs> c;
    clear<kVecs>(c);
    multiply<kBf16, kVecs, 1, kPanel>(kSteps, a, b, c);
    SSLK_UNROLL for (int r = 0; r < kRows; r++) SSLK_UNROLL for (int v = 0; v < kVecs; v++) use(c[r][v]);
  }
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

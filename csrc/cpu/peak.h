// What the processor gives when nothing stands in the way: the rooflines that benchmarks divide by.
#pragma once
#include "isa.h"
#if defined(__AMX_BF16__)
#include "amx.h"
#endif
#include "tile_gemm.h"

namespace sslkernels::SSLK_ISA {

// More chains of sums than hide the latency of one, and operands that stay in registers too.
template <bool kBf16>
double multiply_add_loop(int64_t iterations) {
  constexpr int kSteps = 128, kChains = 12;
  Vec chains[kChains], left = broadcast(1e-3f), right = broadcast(1e-3f);
  SSLK_UNROLL for (int i = 0; i < kChains; i++) chains[i] = Vec{}, opaque(chains[i]);  // or they would be one
  for (int64_t step = 0; step < iterations * kSteps; step++) {
    opaque(right);  // or the products would leave the loop
    SSLK_UNROLL for (int i = 0; i < kChains; i++) chains[i] = multiply_add<kBf16>(chains[i], left, right);
  }
  SSLK_UNROLL for (int i = 0; i < kChains; i++) opaque(chains[i]);
  return 2.0 * iterations * kSteps * kChains * kLanes * (kBf16 ? 2 : 1);
}

double peak_multiply_add(bool bf16, int64_t iterations) {
#if defined(__AMX_BF16__)
  if (bf16) return multiply_tiles_loop(iterations);
#endif
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

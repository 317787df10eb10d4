// The register-tiled micro-kernel: kRows x (kLanes * V) accumulators, one reduction step after the other.
//
// Operands are read as 32-bit words. A word is one float, or two bf16 that are neighbours along the reduction, so fp32
// and bf16 share every loop and differ only in multiply_add and in how the words were packed.
#pragma once
#include "vec.h"

namespace sslkernels::SSLK_ISA {

template <int V>
using Block = Vec[kRows][V];

template <int V>
SSLK_INLINE void clear(Block<V>& c) {
  SSLK_UNROLL for (int r = 0; r < kRows; r++) SSLK_UNROLL for (int v = 0; v < V; v++) c[r][v] = Vec{};
}

// A word in every lane.
SSLK_INLINE Vec broadcast_word(const uint32_t* word) { return broadcast(*reinterpret_cast<const Float*>(word)); }

template <bool kBf16>
SSLK_INLINE Vec multiply_add(Vec c, Vec a, Vec b) {
#if defined(__AVX512BF16__)
  if constexpr (kBf16) return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
#endif
  return c + a * b;
}

// c[r][v] += sum over k < steps of A(r, k) B(k, v): word (r, k) of A lies at a[r * kRowStride + k * kStepStride], step
// k of B is the kPanel words from b + k * kPanel on.
template <bool kBf16, int V, int kRowStride, int kStepStride>
SSLK_INLINE void multiply(int64_t steps, const uint32_t* a, const uint32_t* b, Block<V>& c) {
#pragma GCC unroll 4  // so that the end of the loop can be predicted
  for (int64_t k = 0; k < steps; k++, a += kStepStride, b += kPanel) {
    Vec right[V];
    SSLK_UNROLL for (int v = 0; v < V; v++) right[v] = load(b + kLanes * v);
    SSLK_UNROLL for (int r = 0; r < kRows; r++) SSLK_UNROLL for (int v = 0; v < V; v++) c[r][v] =
        multiply_add<kBf16>(c[r][v], broadcast_word(a + r * kRowStride), right[v]);
  }
}

}  // namespace sslkernels::SSLK_ISA

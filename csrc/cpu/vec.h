// The vector vocabulary of the kernels, at the width of the instruction set this file is compiled for.
//
// Everything here lives in namespace sslkernels::SSLK_ISA, and no standard-library function that could be emitted out
// of line is used: such a symbol would be merged across the differently compiled copies, and run on a processor without
// the instructions.
#pragma once
#ifndef SSLK_ISA
#error "define SSLK_ISA, the namespace of the instruction set, before including a kernel header"
#endif

#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define SSLK_INLINE inline __attribute__((always_inline))
#define SSLK_UNROLL _Pragma("GCC unroll 16")

namespace sslkernels::SSLK_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 8;  // 16 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 4;  // 8 accumulators of 16 registers
#else
constexpr int kLanes = 4, kRows = 4;
#endif
constexpr int kVecs = 2;                // vectors side by side in a block of the micro-kernel
constexpr int kPanel = kLanes * kVecs;  // columns of a block, and rows packed together
#if defined(__AVX512BF16__)
constexpr bool kHasBf16 = true;
#else
constexpr bool kHasBf16 = false;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes), may_alias));
typedef float VecUnaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t VecInt __attribute__((vector_size(4 * kLanes), may_alias));
typedef uint32_t VecWord __attribute__((vector_size(4 * kLanes), may_alias));
typedef uint64_t VecLong __attribute__((vector_size(4 * kLanes), may_alias));
typedef float Float __attribute__((may_alias));

SSLK_INLINE Vec load(const void* p) { return *static_cast<const Vec*>(p); }
SSLK_INLINE void store(void* p, Vec v) { *static_cast<Vec*>(p) = v; }
SSLK_INLINE Vec load_unaligned(const void* p) { return *static_cast<const VecUnaligned*>(p); }
SSLK_INLINE void store_unaligned(void* p, Vec v) { *static_cast<VecUnaligned*>(p) = v; }
// Past the caches, to an aligned place, in no order that another thread could rely on.
SSLK_INLINE void stream(void* p, Vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(static_cast<float*>(p), v);
#elif defined(__AVX2__)
  _mm256_stream_ps(static_cast<float*>(p), v);
#elif defined(__x86_64__)
  _mm_stream_ps(static_cast<float*>(p), v);
#else
  store(p, v);
#endif
}
SSLK_INLINE Vec broadcast(float x) { return x - Vec{}; }
SSLK_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }

// a * b + c, rounded once where the processor can: spelt out where both passes must find the same bits, since the
// compiler contracts a product only next to its sum.
SSLK_INLINE Vec fused(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// Hides from the compiler what v holds, without moving it out of its register.
SSLK_INLINE void opaque(Vec& v) {
#if defined(__AVX512F__)
  asm volatile("" : "+v"(v));
#elif defined(__x86_64__)
  asm volatile("" : "+x"(v));
#elif defined(__aarch64__)
  asm volatile("" : "+w"(v));
#else
  asm volatile("" : "+m"(v));
#endif
}

// The upper half of the lanes folded onto the lower, again and again, until one is left.
template <class Fold>
SSLK_INLINE float reduce(Vec v, const Fold& fold) {
  float lanes[kLanes];
  store_unaligned(lanes, v);
  SSLK_UNROLL for (int half = kLanes / 2; half > 0; half /= 2) SSLK_UNROLL for (int i = 0; i < half; i++) lanes[i] =
      fold(lanes[i], lanes[i + half]);
  return lanes[0];
}
SSLK_INLINE float sum(Vec v) {
  return reduce(v, [](float a, float b) { return a + b; });
}
SSLK_INLINE float maximum(Vec v) {
  return reduce(v, [](float a, float b) { return a > b ? a : b; });
}

SSLK_INLINE VecInt lane_index() {
  VecInt v{};
  for (int i = 0; i < kLanes; i++) v[i] = i;
  return v;
}

#if defined(__AVX512F__)
constexpr __mmask16 kAllLanes = 0xffff;  // the unmasked intrinsics raise a false warning in gcc 12 (its bug 105593)
#endif

typedef uint32_t Quad __attribute__((vector_size(16), aligned(4), may_alias));

SSLK_INLINE void transpose(Quad (&row)[4]) {
  const Quad a = __builtin_shuffle(row[0], row[1], Quad{0, 4, 1, 5}),
             b = __builtin_shuffle(row[2], row[3], Quad{0, 4, 1, 5});
  const Quad c = __builtin_shuffle(row[0], row[1], Quad{2, 6, 3, 7}),
             d = __builtin_shuffle(row[2], row[3], Quad{2, 6, 3, 7});
  row[0] = __builtin_shuffle(a, b, Quad{0, 1, 4, 5});
  row[1] = __builtin_shuffle(a, b, Quad{2, 3, 6, 7});
  row[2] = __builtin_shuffle(c, d, Quad{0, 1, 4, 5});
  row[3] = __builtin_shuffle(c, d, Quad{2, 3, 6, 7});
}

// The lower halves of 64-bit lanes times a 32-bit constant.
SSLK_INLINE VecLong multiply_wide(VecWord a, uint32_t constant) {
#if defined(__AVX512F__)
  return (VecLong)_mm512_maskz_mul_epu32(0xff, (__m512i)a, _mm512_set1_epi64(constant));
#elif defined(__AVX2__)
  return (VecLong)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(constant));
#elif defined(__x86_64__)
  return (VecLong)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(constant));
#else
  return ((VecLong)a & 0xffffffff) * constant;
#endif
}

// The even lanes of one vector and the odd lanes of another.
SSLK_INLINE VecWord even_and_odd(VecWord even, VecWord odd) {
#if defined(__AVX512F__)
  return (VecWord)_mm512_mask_blend_epi32(0xaaaa, (__m512i)even, (__m512i)odd);
#elif defined(__AVX2__)
  return (VecWord)_mm256_blend_epi32((__m256i)even, (__m256i)odd, 0xaa);
#else
  return (VecWord)(((VecLong)even & 0xffffffff) | ((VecLong)odd & (0xffffffffull << 32)));
#endif
}

// 2^x with a relative error of 1.5e-7 for |x| <= 126; below -126 it is 0 or a denormal. The fraction goes through a
// minimax polynomial of degree 5 on [-0.5, 0.5].
SSLK_INLINE Vec exp2(Vec x) {
#if defined(__AVX512F__)
  const Vec whole = _mm512_maskz_roundscale_ps(kAllLanes, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Vec magic = broadcast(12582912.f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Vec shifted = x + magic, whole = shifted - magic;
#endif
  const Vec f = x - whole;
  Vec p = broadcast(1.327647199e-3f);
  p = p * f + 9.675541334e-3f;
  p = p * f + 5.550713273e-2f;
  p = p * f + 2.402211972e-1f;
  p = p * f + 6.931469671e-1f;
  p = p * f + 1.000000072f;
#if defined(__AVX512F__)
  return _mm512_maskz_scalef_ps(kAllLanes, p, whole);
#else
  const Vec scaled = (Vec)((VecWord)p + ((VecWord)shifted << 23));
  return x < broadcast(-126.f) ? Vec{} : scaled;
#endif
}

}  // namespace sslkernels::SSLK_ISA

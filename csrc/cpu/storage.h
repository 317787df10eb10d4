// The dtypes that tensors are stored in, read and written as floats.
#pragma once
#include "../dtype.h"
#include "vec.h"

namespace sslkernels::SSLK_ISA {

SSLK_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

SSLK_INLINE float from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
SSLK_INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
SSLK_INLINE float from_bf16(uint16_t h) { return from_bits(uint32_t{h} << 16); }
SSLK_INLINE uint16_t to_bf16(float x) {  // to nearest, ties to even
  const uint32_t bits = to_bits(x);
  return x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
SSLK_INLINE float from_fp16(uint16_t h) {
  // The exponent moves into fp32's place. Denormals count units of 2^-24: no number here is denormal in fp32, which a
  // processor may be set to flush.
  const uint32_t magnitude = h & 0x7fffu, exponent = h & 0x7c00u;
  const uint32_t normal = (magnitude << 13) + (exponent == 0x7c00u ? 0x70000000u : 0x38000000u);
  const uint32_t small = to_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return from_bits((exponent ? normal : small) | (h & 0x8000u) << 16);
}
SSLK_INLINE uint16_t to_fp16(float x) {
  const uint32_t sign = to_bits(x) >> 16 & 0x8000;
  const float magnitude = from_bits(to_bits(x) & 0x7fffffff);
  if (x != x) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 65520.f) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude < 0x1p-14f)  // denormal: the addition rounds at the last place of fp16
    return static_cast<uint16_t>(sign | (to_bits(magnitude + 0.5f) - to_bits(0.5f)));
  const uint32_t bits = to_bits(magnitude);
  return static_cast<uint16_t>(sign | ((bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13));
}

struct Fp32 {
  typedef float Storage;
  static float load(float x) { return x; }
  static float store(float x) { return x; }
};
struct Bf16 {
  typedef uint16_t Storage;
  static float load(uint16_t x) { return from_bf16(x); }
  static uint16_t store(float x) { return to_bf16(x); }
};
struct Fp16 {
  typedef uint16_t Storage;
  static float load(uint16_t x) { return from_fp16(x); }
  static uint16_t store(float x) { return to_fp16(x); }
};

struct Fp64 {
  typedef double Storage;
  static double load(double x) { return x; }
  static double store(double x) { return x; }
};

// f(type) with the type that the inputs are stored in.
template <class F>
SSLK_INLINE void with_storage(Dtype dtype, const F& f) {
  if (dtype == Dtype::kFloat32) f(Fp32{});
  if (dtype == Dtype::kBFloat16) f(Bf16{});
  if (dtype == Dtype::kFloat16) f(Fp16{});
}

// The same where float64 is one of them.
template <class F>
SSLK_INLINE void with_any_storage(Dtype dtype, const F& f) {
  if (dtype == Dtype::kFloat64) f(Fp64{});
  with_storage(dtype, f);
}

}  // namespace sslkernels::SSLK_ISA

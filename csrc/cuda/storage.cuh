// The dtypes that tensors are stored in, read and written by a GPU, eight neighbours at a time where they are aligned.
#pragma once
#include "cuda/platform.h"
#include "rounding.h"

namespace sslkernels {

constexpr int kVector = 8;  // elements a thread moves at a time

struct Fp32 {
  using Storage = float;
  using Real = float;
  static __device__ __forceinline__ float load(float x) { return x; }
  static __device__ __forceinline__ float store(float x) { return x; }
};
struct Fp64 {
  using Storage = double;
  using Real = double;
  static __device__ __forceinline__ double load(double x) { return x; }
  static __device__ __forceinline__ double store(double x) { return x; }
};
struct Bf16 {
  using Storage = uint16_t;
  using Real = float;
  static __device__ __forceinline__ float load(uint16_t x) { return __uint_as_float(uint32_t{x} << 16); }
  static __device__ __forceinline__ uint16_t store(float x) {
    const uint32_t bits = __float_as_uint(x);
    return x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  static __device__ __forceinline__ uint16_t stochastic(float x, uint32_t random) { return stochastic_bf16(x, random); }
};
struct Fp16 {
  using Storage = uint16_t;
  using Real = float;
  static __device__ __forceinline__ float load(uint16_t x) { return __half2float(__ushort_as_half(x)); }
  static __device__ __forceinline__ uint16_t store(float x) {
    const uint32_t sign = __float_as_uint(x) >> 16 & 0x8000;
    return x != x ? static_cast<uint16_t>(sign | 0x7e00) : __half_as_ushort(__float2half_rn(x));
  }
  static __device__ __forceinline__ uint16_t stochastic(float x, uint32_t random) { return stochastic_fp16(x, random); }
};

template <class T>
constexpr bool kIs16Bits = sizeof(typename T::Storage) == 2;

template <class T>
__device__ __forceinline__ void load8(const void* from, float (&x)[kVector]) {
  constexpr int kWords = kVector * sizeof(typename T::Storage) / 16;
  alignas(16) typename T::Storage raw[kVector];
#pragma unroll
  for (int w = 0; w < kWords; w++) reinterpret_cast<uint4*>(raw)[w] = load16(static_cast<const uint4*>(from) + w);
#pragma unroll
  for (int i = 0; i < kVector; i++) x[i] = T::load(raw[i]);
}

template <class Storage>
__device__ __forceinline__ void store8(const Storage (&raw)[kVector], void* to) {
#pragma unroll
  for (int w = 0; w < static_cast<int>(sizeof(raw)) / 16; w++)
    store16(static_cast<uint4*>(to) + w, reinterpret_cast<const uint4*>(raw)[w]);
}

__device__ __forceinline__ bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace sslkernels

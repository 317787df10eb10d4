// The loops of patch masking, compiled once per instruction set.
#pragma once
#include "patch_mask.h"
#include "philox_vector.h"
#include "storage.h"

namespace sslkernels::SSLK_ISA {

inline void token_keys(uint64_t seed, uint64_t sample, int64_t tokens, uint32_t* keys) {
  static_assert(2 * kLanes * 4 <= kKeyBlock);
  const VecWord zero{}, lanes = (VecWord)lane_index();
  const VecWord low = zero + static_cast<uint32_t>(sample), high = zero + static_cast<uint32_t>(sample >> 32);
  const VecWord stream = zero + uint32_t{kPhiloxPatchMask};
  for (int64_t at = 0; at * 4 < tokens; at += 2 * kLanes) {  // four tokens share a counter
    const VecWord counter = lanes + static_cast<uint32_t>(at);
    WordPair c[4] = {{counter, counter + uint32_t{kLanes}}, {low, low}, {high, high}, {stream, stream}};
    philox(c, seed, PhiloxVector{});
    store_blocks(c[0].a, c[1].a, c[2].a, c[3].a, keys + at * 4);
    store_blocks(c[0].b, c[1].b, c[2].b, c[3].b, keys + (at + kLanes) * 4);
  }
}

inline void copy_bytes(void* to, const void* from, int64_t bytes) {
  constexpr int64_t kVec = sizeof(Vec);
  char* target = static_cast<char*>(to);
  const char* source = static_cast<const char*>(from);
  int64_t at = 0;
  for (; at + 4 * kVec <= bytes; at += 4 * kVec) {
    const Vec a = load_unaligned(source + at), b = load_unaligned(source + at + kVec),
              c = load_unaligned(source + at + 2 * kVec), d = load_unaligned(source + at + 3 * kVec);
    store_unaligned(target + at, a);
    store_unaligned(target + at + kVec, b);
    store_unaligned(target + at + 2 * kVec, c);
    store_unaligned(target + at + 3 * kVec, d);
  }
  for (; at + kVec <= bytes; at += kVec) store_unaligned(target + at, load_unaligned(source + at));
  for (; at < bytes; at += 2) __builtin_memcpy(target + at, source + at, 2);  // no element is smaller
}

inline void zero_bytes(void* to, int64_t bytes) {
  constexpr int64_t kVec = sizeof(Vec);
  char* target = static_cast<char*>(to);
  int64_t at = 0;
  for (; at + kVec <= bytes; at += kVec) store_unaligned(target + at, Vec{});
  for (; at < bytes; at += 2) __builtin_memset(target + at, 0, 2);
}

// Whole cache lines past the caches, the ends of the row through them.
inline void stream_bytes(void* to, const void* from, int64_t bytes) {
  constexpr int64_t kLine = 64, kVec = sizeof(Vec);
  char* target = static_cast<char*>(to);
  const char* source = static_cast<const char*>(from);
  int64_t at = min(bytes, -static_cast<int64_t>(reinterpret_cast<uintptr_t>(to)) & (kLine - 1));
  copy_bytes(target, source, at);
  for (; at + kLine <= bytes; at += kLine)
    SSLK_UNROLL for (int64_t v = 0; v < kLine; v += kVec) stream(target + at + v, load_unaligned(source + at + v));
  copy_bytes(target + at, source + at, bytes - at);
}

inline void stream_zeros(void* to, int64_t bytes) {
  constexpr int64_t kLine = 64, kVec = sizeof(Vec);
  char* target = static_cast<char*>(to);
  int64_t at = min(bytes, -static_cast<int64_t>(reinterpret_cast<uintptr_t>(to)) & (kLine - 1));
  zero_bytes(target, at);
  for (; at + kLine <= bytes; at += kLine)
    SSLK_UNROLL for (int64_t v = 0; v < kLine; v += kVec) stream(target + at + v, Vec{});
  zero_bytes(target + at, bytes - at);
}

// ---- arithmetic on rows of any dtype; Real is what sums are formed in

template <class F>
SSLK_INLINE void with_rows(Dtype dtype, const F& f) {
  with_any_storage(dtype, [&](auto type) {
    typedef decltype(type) Type;
    f(type, decltype(Type::load({})){});
  });
}

inline void add_rows(Dtype dtype, void* to, const void* a, const void* b, int64_t columns) {
  with_rows(dtype, [&](auto type, auto) {
    typedef typename decltype(type)::Storage Storage;
    auto* out = static_cast<Storage*>(to);
    const auto *x = static_cast<const Storage*>(a), *y = static_cast<const Storage*>(b);
#pragma GCC ivdep
    for (int64_t d = 0; d < columns; d++) out[d] = type.store(type.load(x[d]) + type.load(y[d]));
  });
}

inline void stream_sum(Dtype dtype, void* to, const void* a, const void* b, int64_t columns) {
  constexpr int64_t kBlock = 1024;
  alignas(64) double block[kBlock];  // room for any dtype
  for (int64_t at = 0; at < columns; at += kBlock) {
    const int64_t count = min(kBlock, columns - at), begin = at * itemsize(dtype);
    add_rows(dtype, block, static_cast<const char*>(a) + begin, static_cast<const char*>(b) + begin, count);
    stream_bytes(static_cast<char*>(to) + begin, block, count * itemsize(dtype));
  }
}

inline void accumulate_row(Dtype dtype, void* part, const void* row, int64_t columns) {
  with_rows(dtype, [&](auto type, auto real) {
    auto* sum = static_cast<decltype(real)*>(part);
    const auto* x = static_cast<const typename decltype(type)::Storage*>(row);
#pragma GCC ivdep
    for (int64_t d = 0; d < columns; d++) sum[d] += type.load(x[d]);
  });
}

inline void flush_part(Dtype dtype, double* total, void* part, int64_t columns) {
  with_rows(dtype, [&](auto, auto real) {
    auto* sum = static_cast<decltype(real)*>(part);
    for (int64_t d = 0; d < columns; d++) {
      total[d] += sum[d];
      sum[d] = 0;
    }
  });
}

inline void round_row(Dtype dtype, void* to, const double* total, int64_t columns) {
  with_rows(dtype, [&](auto type, auto real) {
    auto* out = static_cast<typename decltype(type)::Storage*>(to);
    for (int64_t d = 0; d < columns; d++) out[d] = type.store(static_cast<decltype(real)>(total[d]));
  });
}

PatchMaskKernel patch_mask_kernel() {
  return {token_keys,
          {copy_bytes, zero_bytes, add_rows},
          {stream_bytes, stream_zeros, stream_sum},
          accumulate_row,
          flush_part,
          round_row};
}

}  // namespace sslkernels::SSLK_ISA

// What the kernels of the contrastive core share: a chunk of products S = query key^T that a matrix multiplication has
// left in memory, the pairs in it that are set apart, sums in a fixed order, and the operands of the multiplication.
//
// A thread takes eight neighbouring columns. The rows of S are padded so that these are always aligned; what lies in
// the padding is read but never used.
#pragma once
#include "cuda/platform.h"
#include "cuda/storage.cuh"
#include "dtype.h"

namespace sslkernels {
namespace contrast {

constexpr int kRowThreads = 128;  // of a block that reduces one row
constexpr int kWalkThreads = 64;  // of a block that walks down the rows
constexpr int kSegment = 32;      // rows that it walks
constexpr int kPackRows = 8;      // rows of a block, one a warp, that prepares operands
constexpr int kSumThreads = 256;  // of the one block that adds the sums of others
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kNormalizeEps = 1e-12f;  // NORMALIZE_EPS in reference.py
constexpr float kFp16Lift = 16384;       // fp16 tiles hold numbers up to 1 multiplied by this: small ones stay normal

// A chunk of the products: so many rows from `first` on.
struct Chunk {
  float* products;
  int64_t stride;  // a multiple of kVector
  int64_t first, rows;
};

// Which pairs are set apart: from the softmax they are left out, to the sigmoid they belong together.
struct Pairs {
  int64_t columns;
  bool diagonal;        // row i and column i
  const int64_t* skip;  // or null; (rows, skips): columns of each row, those that do not exist are ignored
  int64_t skips;
  const int64_t* query_ids;  // or null; pairs of equal ids
  const int64_t* key_ids;
};

// The weights that the next product multiplies with the embeddings, and what they are stored in.
struct Weights {
  void* data;  // rows padded as those of the products
  Dtype dtype;
};

// ---- masks of eight neighbouring columns

__device__ __forceinline__ unsigned bit_of(uint64_t distance) {
  return distance < kVector ? 1u << static_cast<unsigned>(distance) : 0;
}

__device__ __forceinline__ unsigned inside8(const Pairs& pairs, int64_t column) {
  const int64_t left = pairs.columns - column;
  return left >= kVector ? (1u << kVector) - 1 : (1u << static_cast<unsigned>(left)) - 1;
}

__device__ __forceinline__ void load_ids(const Pairs& pairs, int64_t column, int64_t (&ids)[kVector]) {
  if (!pairs.key_ids) return;
#pragma unroll
  for (int i = 0; i < kVector; i++) ids[i] = column + i < pairs.columns ? pairs.key_ids[column + i] : 0;
}

// Those that are set apart; among them may be some that do not exist.
__device__ __forceinline__ unsigned special8(const Pairs& pairs, int64_t row, int64_t column,
                                             const int64_t (&ids)[kVector]) {
  const auto from = static_cast<uint64_t>(column);
  unsigned special = pairs.diagonal ? bit_of(static_cast<uint64_t>(row) - from) : 0;
  for (int64_t s = 0; s < pairs.skips; s++)
    special |= bit_of(static_cast<uint64_t>(pairs.skip[row * pairs.skips + s]) - from);
  if (pairs.query_ids) {
    const int64_t id = pairs.query_ids[row];
#pragma unroll
    for (int i = 0; i < kVector; i++) special |= static_cast<unsigned>(ids[i] == id) << i;
  }
  return special;
}

__device__ __forceinline__ void load_weights(const void* from, Dtype dtype, float (&x)[kVector]) {
  if (dtype == Dtype::kFloat32) load8<Fp32>(from, x);
  if (dtype == Dtype::kBFloat16) load8<Bf16>(from, x);
  if (dtype == Dtype::kFloat16) load8<Fp16>(from, x);
}

template <class T>
__device__ __forceinline__ void convert8(const float (&x)[kVector], void* to) {
  alignas(16) typename T::Storage raw[kVector];
#pragma unroll
  for (int i = 0; i < kVector; i++) raw[i] = T::store(x[i]);
  store8(raw, to);
}

__device__ __forceinline__ void store_weights(const float (&x)[kVector], void* to, Dtype dtype, int64_t at) {
  if (dtype == Dtype::kFloat32) convert8<Fp32>(x, static_cast<float*>(to) + at);
  if (dtype == Dtype::kBFloat16) convert8<Bf16>(x, static_cast<uint16_t*>(to) + at);
  if (dtype == Dtype::kFloat16) convert8<Fp16>(x, static_cast<uint16_t*>(to) + at);
}

// ---- sums in a fixed order

template <class T, class Combine>
__device__ __forceinline__ T warp_reduce(T x, const Combine& combine) {
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) x = combine(x, x.shuffled(lanes));
  return x;
}

// Of a block of kThreads; every thread has the result.
template <int kThreads, class T, class Combine>
__device__ __forceinline__ T block_reduce(T x, const Combine& combine) {
  constexpr int kWarps = kThreads / 32;
  SSLK_SHARED(T, parts, [kWarps]);
  x = warp_reduce(x, combine);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  x = parts[0];
#pragma unroll
  for (int w = 1; w < kWarps; w++) x = combine(x, parts[w]);
  return x;
}

struct Sum {
  double value;
  __device__ __forceinline__ Sum shuffled(int lanes) const { return {__shfl_xor_sync(~0u, value, lanes)}; }
};
struct Add {
  __device__ __forceinline__ Sum operator()(Sum a, Sum b) const { return {a.value + b.value}; }
};

// Of products x that are seen one after another: the largest, and the sum of 2^(steepness (x - largest)), which is 0
// where there was none.
struct Online {
  float largest, sum;
  __device__ __forceinline__ Online shuffled(int lanes) const {
    return {__shfl_xor_sync(~0u, largest, lanes), __shfl_xor_sync(~0u, sum, lanes)};
  }
};
struct Merge {
  float steepness;
  __device__ __forceinline__ Online operator()(Online a, Online b) const {
    if (b.sum == 0) return a;
    if (a.sum == 0) return b;
    const float largest = fmaxf(a.largest, b.largest);
    return {largest,
            a.sum * exp2f((a.largest - largest) * steepness) + b.sum * exp2f((b.largest - largest) * steepness)};
  }
};

// The scale as kernels use it: logits grow with sign * product.
struct Scale {
  float value, sign, steepness;  // the latter in base 2
  __device__ __forceinline__ explicit Scale(const float* scale)
      : value(*scale), sign(value < 0 ? -1.f : 1.f), steepness(fabsf(value) * kLog2e) {}
};

__device__ __forceinline__ Online nothing() { return {-INFINITY, 0}; }

__device__ __forceinline__ double logsumexp(Online row, Scale scale) {
  if (row.sum == 0) return -static_cast<double>(INFINITY);
  return fabs(static_cast<double>(scale.value)) * row.largest + log(static_cast<double>(row.sum));
}

__device__ __forceinline__ float peak_logit(Online row, Scale scale) {
  return row.sum == 0 ? -INFINITY : scale.value * (scale.sign * row.largest);
}

// ---- operands

// Rows converted and, if asked, divided by max(length, 1e-12): a warp a row. Rows of `out` are padded with zeros to
// `stride`, a multiple of kVector.
__global__ void __launch_bounds__(32 * kPackRows)
    contrast_pack_kernel(const void* __restrict__ x, Dtype from, int64_t rows, int64_t dim, bool normalize, void* out,
                         Dtype to, int64_t stride) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kPackRows + threadIdx.x / 32;
  if (row >= rows) return;
  const int64_t bytes = from == Dtype::kFloat32 ? 4 : 2;
  const auto* source = static_cast<const unsigned char*>(x) + row * dim * bytes;
  const bool wide = dim % kVector == 0 && aligned(x);
  const auto load = [&](int64_t at, float (&values)[kVector]) {
    if (wide) return load_weights(source + at * bytes, from, values);
#pragma unroll
    for (int i = 0; i < kVector; i++) {
      const int64_t element = at + i;
      float value = 0;
      if (element < dim) {
        if (from == Dtype::kFloat32) value = reinterpret_cast<const float*>(source)[element];
        if (from == Dtype::kBFloat16) value = Bf16::load(reinterpret_cast<const uint16_t*>(source)[element]);
        if (from == Dtype::kFloat16) value = Fp16::load(reinterpret_cast<const uint16_t*>(source)[element]);
      }
      values[i] = value;
    }
  };
  float values[kVector], length = 1;
  const int64_t begin = threadIdx.x % 32 * kVector;
  if (normalize) {
    Sum squares{0};
    for (int64_t at = begin; at < dim; at += 32 * kVector) {
      load(at, values);
      float part = 0;
#pragma unroll
      for (int i = 0; i < kVector; i++) part += values[i] * values[i];
      squares.value += part;
    }
    length = fmaxf(static_cast<float>(sqrt(warp_reduce(squares, Add{}).value)), kNormalizeEps);
  }
  for (int64_t at = begin; at < dim; at += 32 * kVector) {
    load(at, values);
#pragma unroll
    for (int i = 0; i < kVector; i++) values[i] = values[i] / length;
    store_weights(values, out, to, row * stride + at);
  }
}

// sums += factor * part, the factor being `constant` times the number on the device, if there is one.
__global__ void __launch_bounds__(kRowThreads)
    contrast_accumulate_kernel(float* __restrict__ sums, const float* __restrict__ part, int64_t count, float constant,
                               const float* __restrict__ factor) {
  const float by = factor ? constant * *factor : constant;
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x) * kVector;
  if (at >= count) return;
  if (at + kVector <= count && aligned(sums)) {
    float x[kVector], y[kVector];
    load8<Fp32>(sums + at, x);
    load8<Fp32>(part + at, y);
#pragma unroll
    for (int i = 0; i < kVector; i++) x[i] = fmaf(by, y[i], x[i]);
    convert8<Fp32>(x, sums + at);
    return;
  }
  for (int64_t i = at; i < at + kVector && i < count; i++) sums[i] = fmaf(by, part[i], sums[i]);
}

}  // namespace contrast
}  // namespace sslkernels

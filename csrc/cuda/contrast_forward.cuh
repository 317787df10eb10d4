// Forward over a chunk of products: log-sum-exps along rows and columns, softmaxes, and sums of softplus.
#pragma once
#include "cuda/contrast_chunk.cuh"

namespace sslkernels {
namespace contrast {

// ---- softmax

struct RowResults {
  double* logsumexp;
  float *peak, *skipped;  // or null
};

__device__ __forceinline__ void reduce_row(const float* row, const Pairs& pairs, int64_t i, Scale scale,
                                           Online& state) {
  int64_t ids[kVector];
  float x[kVector];
  for (int64_t j = threadIdx.x * kVector; j < pairs.columns; j += kRowThreads * kVector) {
    load8<Fp32>(row + j, x);
    load_ids(pairs, j, ids);
    const unsigned kept = inside8(pairs, j) & ~special8(pairs, i, j, ids);
    Online next = nothing();
#pragma unroll
    for (int k = 0; k < kVector; k++) {
      x[k] *= scale.sign;
      if (kept >> k & 1) next.largest = fmaxf(next.largest, x[k]);
    }
    next.largest = fmaxf(next.largest, state.largest);
    if (state.sum != 0) next.sum = state.sum * exp2f((state.largest - next.largest) * scale.steepness);
#pragma unroll
    for (int k = 0; k < kVector; k++)
      if (kept >> k & 1) next.sum += exp2f((x[k] - next.largest) * scale.steepness);
    state = next;
  }
}

// The softmax of a row, multiplied by `lift`, where the products were or elsewhere.
__device__ __forceinline__ void write_softmax(const float* row, const Pairs& pairs, int64_t i, Scale scale,
                                              Online state, float lift, const Weights& weights, int64_t begin) {
  const float factor = state.sum == 0 ? 0 : lift / state.sum;
  int64_t ids[kVector];
  float x[kVector];
  for (int64_t j = threadIdx.x * kVector; j < pairs.columns; j += kRowThreads * kVector) {
    load8<Fp32>(row + j, x);
    load_ids(pairs, j, ids);
    const unsigned kept = inside8(pairs, j) & ~special8(pairs, i, j, ids);
#pragma unroll
    for (int k = 0; k < kVector; k++)
      x[k] = kept >> k & 1 ? factor * exp2f((scale.sign * x[k] - state.largest) * scale.steepness) : 0;
    store_weights(x, weights.data, weights.dtype, begin + j);
  }
}

// A block a row: its log-sum-exp, its largest logit, and the logit of the first column that it skips. With `weights`,
// which may be the products themselves, its softmax besides.
__global__ void __launch_bounds__(kRowThreads)
    contrast_rows_kernel(const Chunk chunk, const Pairs pairs, const float* scale_ptr, const RowResults results,
                         const Weights weights, float lift) {
  const Scale scale(scale_ptr);
  const int64_t r = blockIdx.x, i = chunk.first + r;
  const float* row = chunk.products + r * chunk.stride;
  if (threadIdx.x == 0 && results.skipped) {  // before the softmax takes the products' place, see the barrier below
    const int64_t column = pairs.skips ? pairs.skip[i * pairs.skips] : -1;
    results.skipped[i] = column >= 0 && column < pairs.columns ? scale.value * row[column] : -INFINITY;
  }
  Online state = nothing();
  reduce_row(row, pairs, i, scale, state);
  state = block_reduce<kRowThreads>(state, Merge{scale.steepness});
  if (threadIdx.x == 0) {
    results.logsumexp[i] = logsumexp(state, scale);
    if (results.peak) results.peak[i] = peak_logit(state, scale);
  }
  if (weights.data) write_softmax(row, pairs, i, scale, state, lift, weights, r * chunk.stride);
}

// The columns of a segment of the chunk's rows: each thread owns eight and walks down. parts: (segments, 2, stride),
// the largest products and the sums.
__global__ void __launch_bounds__(kWalkThreads)
    contrast_columns_kernel(const Chunk chunk, const Pairs pairs, const float* scale_ptr, float* parts) {
  const Scale scale(scale_ptr);
  const int64_t j = (static_cast<int64_t>(blockIdx.x) * kWalkThreads + threadIdx.x) * kVector;
  if (j >= pairs.columns) return;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * kSegment;
  const int64_t end = begin + kSegment < chunk.rows ? begin + kSegment : chunk.rows;
  float largest[kVector], sum[kVector], x[kVector];
  int64_t ids[kVector];
  load_ids(pairs, j, ids);
#pragma unroll
  for (int k = 0; k < kVector; k++) largest[k] = -INFINITY, sum[k] = 0;
  for (int64_t r = begin; r < end; r++) {
    load8<Fp32>(chunk.products + r * chunk.stride + j, x);
    const unsigned kept = ~special8(pairs, chunk.first + r, j, ids);
#pragma unroll
    for (int k = 0; k < kVector; k++) {
      if (!(kept >> k & 1)) continue;
      // one exponential: of the distance to the largest so far, for whichever of the two is smaller
      const float value = scale.sign * x[k], higher = fmaxf(value, largest[k]);
      const bool first = sum[k] == 0, rises = value > largest[k];
      const float ratio = exp2f((rises ? largest[k] - higher : value - higher) * scale.steepness);
      sum[k] = first ? 1 + (value - value) : rises ? fmaf(sum[k], ratio, 1.f) : sum[k] + ratio;
      largest[k] = higher;
    }
  }
  float* part = parts + blockIdx.y * 2 * chunk.stride + j;
  convert8<Fp32>(largest, part);
  convert8<Fp32>(sum, part + chunk.stride);
}

struct ColumnResults {
  double* logsumexp;
  float* peak;  // or null
};

// A thread a column: the segments of a chunk are merged into `total`, (2, stride), and after the last chunk the results
// are written.
__global__ void __launch_bounds__(kRowThreads)
    contrast_merge_kernel(const float* parts, int64_t segments, int64_t stride, int64_t columns, bool first, bool last,
                          const float* scale_ptr, float* total, const ColumnResults results) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (j >= columns) return;
  const Scale scale(scale_ptr);
  const Merge merge{scale.steepness};
  Online state = first ? nothing() : Online{total[j], total[stride + j]};
  for (int64_t s = 0; s < segments; s++)
    state = merge(state, Online{parts[2 * s * stride + j], parts[(2 * s + 1) * stride + j]});
  total[j] = state.largest;
  total[stride + j] = state.sum;
  if (!last) return;
  results.logsumexp[j] = logsumexp(state, scale);
  if (results.peak) results.peak[j] = peak_logit(state, scale);
}

// ---- sigmoid

// A block a row: the sum of softplus(-y logit), y being 1 for the pairs that are set apart and -1 for all others.
__global__ void __launch_bounds__(kRowThreads)
    contrast_sigmoid_rows_kernel(const Chunk chunk, const Pairs pairs, const float* scale_ptr, const float* bias_ptr,
                                 double* loss) {
  const float scale = *scale_ptr, bias = *bias_ptr;
  const int64_t r = blockIdx.x, i = chunk.first + r;
  const float* row = chunk.products + r * chunk.stride;
  Sum sum{0};
  int64_t ids[kVector];
  float x[kVector];
  for (int64_t j = threadIdx.x * kVector; j < pairs.columns; j += kRowThreads * kVector) {
    load8<Fp32>(row + j, x);
    load_ids(pairs, j, ids);
    const unsigned inside = inside8(pairs, j), special = special8(pairs, i, j, ids);
    float part = 0;
#pragma unroll
    for (int k = 0; k < kVector; k++) {
      if (!(inside >> k & 1)) continue;
      const float logit = fmaf(scale, x[k], bias), towards = special >> k & 1 ? -logit : logit;
      part += (towards > 0 ? towards : 0) + log1pf(exp2f(-fabsf(towards) * kLog2e));
    }
    sum.value += part;
  }
  sum = block_reduce<kRowThreads>(sum, Add{});
  if (threadIdx.x == 0) loss[i] = sum.value;
}

}  // namespace contrast
}  // namespace sslkernels

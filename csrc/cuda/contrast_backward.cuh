// Backward over a chunk of products: they become the gradients of the logits, which two products with the embeddings
// turn into theirs.
#pragma once
#include "cuda/contrast_chunk.cuh"

namespace sslkernels {
namespace contrast {

// What a row or a column brings to its weights: weight * 2^(steepness (sign s - shift) - rest).
struct alignas(16) Term {
  float shift, rest, weight, unused;
};

__device__ __forceinline__ Term load_term(const Term* at) {
  const uint4 raw = load16(at);
  return {__uint_as_float(raw.x), __uint_as_float(raw.y), __uint_as_float(raw.z), 0};
}

// The log-sum-exp in units of the products and what that rounds away, so that differences of products are exact.
__global__ void __launch_bounds__(kRowThreads)
    contrast_terms_kernel(const double* __restrict__ logsumexp, const double* __restrict__ grad, int64_t count,
                          const float* __restrict__ scale_ptr, Term* __restrict__ terms) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (i >= count) return;
  const double scale = fabs(static_cast<double>(*scale_ptr)), lse = logsumexp[i];
  const auto quotient = static_cast<float>(lse / scale);
  const float shift = isfinite(quotient) ? quotient : 0;
  const bool empty = lse == -static_cast<double>(INFINITY);
  const double rest = empty ? 0 : (lse - scale * shift) * 1.4426950408889634;
  const uint4 raw = {__float_as_uint(shift), __float_as_uint(static_cast<float>(rest)),
                     __float_as_uint(empty ? 0 : static_cast<float>(grad[i])), 0};
  store16(terms + i, raw);
}

// What the weights are multiplied by before they are stored, and what the products with them are multiplied by.
struct Factors {
  float lift, back;
};

// One block. fp16 weights are brought close to the largest number there is, whatever the gradients' size.
__global__ void __launch_bounds__(kSumThreads)
    contrast_factors_kernel(const double* __restrict__ grad_rows, int64_t rows, const double* __restrict__ grad_columns,
                            int64_t columns, const float* __restrict__ scale, Dtype dtype, Factors* factors) {
  struct Largest {
    double value;
    __device__ __forceinline__ Largest shuffled(int lanes) const { return {__shfl_xor_sync(~0u, value, lanes)}; }
  };
  const auto larger = [](Largest a, Largest b) { return Largest{fmax(a.value, b.value)}; };
  double lift = 1;
  if (dtype == Dtype::kFloat16) {
    Largest row{0}, column{0};
    for (int64_t i = threadIdx.x; i < rows; i += kSumThreads) row = larger(row, {fabs(grad_rows[i])});
    for (int64_t j = threadIdx.x; grad_columns && j < columns; j += kSumThreads)
      column = larger(column, {fabs(grad_columns[j])});
    // of a pair at most the sum, which is at most twice the larger
    const double largest = 2 * block_reduce<kSumThreads>(larger(row, column), larger).value;
    lift = largest > 0 ? fmin(fmax(kFp16Lift / largest, 0x1p-100), 0x1p100) : 1;
  }
  if (threadIdx.x == 0) *factors = {static_cast<float>(lift), static_cast<float>(*scale / lift)};
}

// The gradient of each logit, by the two losses. A `Thread` holds what its eight columns bring, and what the row brings
// that it has entered.
struct Softmax {
  const float* scale_ptr;
  const Term *row_terms, *column_terms;  // the latter or null

  struct Thread {
    Scale scale;
    Term row, column[kVector];

    __device__ __forceinline__ Thread(const Softmax& loss, int64_t j, int64_t columns) : scale(loss.scale_ptr) {
#pragma unroll
      for (int k = 0; k < kVector; k++)
        column[k] = loss.column_terms && j + k < columns ? load_term(loss.column_terms + j + k) : Term{0, 0, 0, 0};
    }
    __device__ __forceinline__ void enter(const Softmax& loss, int64_t i) { row = load_term(loss.row_terms + i); }
    __device__ __forceinline__ float part(const Term& term, float product) const {
      return term.weight * exp2f((product - term.shift) * scale.steepness - term.rest);
    }
    __device__ __forceinline__ float gradient(const Softmax& loss, float product, bool special, int k) const {
      if (special) return 0;
      const float towards = scale.sign * product, g = part(row, towards);
      return loss.column_terms ? g + part(column[k], towards) : g;
    }
  };
};

struct Sigmoid {
  const float *scale_ptr, *bias_ptr;
  const double* grad_rows;

  struct Thread {
    float scale, bias, weight;

    __device__ __forceinline__ Thread(const Sigmoid& loss, int64_t, int64_t)
        : scale(*loss.scale_ptr), bias(*loss.bias_ptr), weight(0) {}
    __device__ __forceinline__ void enter(const Sigmoid& loss, int64_t i) {
      weight = static_cast<float>(loss.grad_rows[i]);
    }
    __device__ __forceinline__ float gradient(const Sigmoid&, float product, bool special, int) const {
      const float logit = fmaf(scale, product, bias), y = special ? 1.f : -1.f;
      return -y * weight / (1 + exp2f(y * logit * kLog2e));
    }
  };
};

// A segment of rows and 512 columns: the products become the gradients of the logits, lifted. For each block the sums
// of gradient times product, and of gradients, go to partials: (2, blocks).
template <class Loss>
__global__ void __launch_bounds__(kWalkThreads)
    contrast_gradient_kernel(const Chunk chunk, const Pairs pairs, const Loss loss, const Factors* factors,
                             const Weights weights, double* partials) {
  const int64_t j = (static_cast<int64_t>(blockIdx.x) * kWalkThreads + threadIdx.x) * kVector;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * kSegment;
  const int64_t end = begin + kSegment < chunk.rows ? begin + kSegment : chunk.rows;
  Sum by_scale{0}, by_bias{0};
  if (j < pairs.columns) {
    const float lift = factors->lift;
    typename Loss::Thread thread(loss, j, pairs.columns);
    const unsigned inside = inside8(pairs, j);
    int64_t ids[kVector];
    load_ids(pairs, j, ids);
    float x[kVector];
    for (int64_t r = begin; r < end; r++) {
      const int64_t at = r * chunk.stride + j;
      load8<Fp32>(chunk.products + at, x);
      thread.enter(loss, chunk.first + r);
      const unsigned special = special8(pairs, chunk.first + r, j, ids);
      float scaled = 0, plain = 0;
#pragma unroll
      for (int k = 0; k < kVector; k++) {
        const float g = inside >> k & 1 ? thread.gradient(loss, x[k], special >> k & 1, k) : 0;
        scaled = inside >> k & 1 ? fmaf(g, x[k], scaled) : scaled;
        plain += g;
        x[k] = lift * g;
      }
      store_weights(x, weights.data, weights.dtype, at);
      by_scale.value += scaled;
      by_bias.value += plain;
    }
  }
  by_scale = block_reduce<kWalkThreads>(by_scale, Add{});
  __syncthreads();
  by_bias = block_reduce<kWalkThreads>(by_bias, Add{});
  if (threadIdx.x != 0) return;
  const int64_t blocks = static_cast<int64_t>(gridDim.x) * gridDim.y;
  const int64_t block = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  partials[block] = by_scale.value;
  partials[blocks + block] = by_bias.value;
}

// One block for each of two sums: adds the partial ones of a chunk to `totals` and writes the result as it stands.
__global__ void __launch_bounds__(kSumThreads)
    contrast_totals_kernel(const double* __restrict__ partials, int64_t count, bool first, double* totals,
                           float* grad_scale, float* grad_bias) {
  Sum sum{0};
  for (int64_t i = threadIdx.x; i < count; i += kSumThreads) sum.value += partials[blockIdx.x * count + i];
  sum = block_reduce<kSumThreads>(sum, Add{});
  if (threadIdx.x != 0) return;
  const double total = first ? sum.value : totals[blockIdx.x] + sum.value;
  totals[blockIdx.x] = total;
  float* const out = blockIdx.x == 0 ? grad_scale : grad_bias;
  if (out) *out = static_cast<float>(total);
}

}  // namespace contrast
}  // namespace sslkernels

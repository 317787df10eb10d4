// Two kernels in the form that those in csrc/cuda have, and with bugs to choose from, each of which the harness must
// find: log-sum-exp of rows (shared memory, barriers, shuffles, a vote, atomics), and a product on tensor cores (copies
// on the way while the last ones are multiplied).
#pragma once
#include <type_traits>

#include "cuda/platform.h"

namespace sslkernels::example {

enum class Bug {
  kNone,
  kDivergentBarrier,     // half of the threads miss a barrier
  kTwoBarriers,          // the halves meet at different ones
  kLeavesEarly,          // a thread has left the kernel when the others meet
  kMissingBarrier,       // between writing and reading shared memory
  kShuffleForBarrier,    // a shuffle where lanes read what others have written
  kUninitialisedShared,  // a static variable is read before it is written
  kBlockBefore,          // a variable is expected to hold what the block before left in it
  kReadsOutOfBounds,     // global memory, one element too far
  kWritesOutOfBounds,    // dynamic shared memory, one element too far
  kMisaligned,           // 16 bytes at once from an address that is not a multiple of it
  kRaceBetweenBlocks,    // += where atomicAdd is due
  kMissingWait,          // a copy on the way is read
  kCopiesTooEarly,       // a copy is started into memory that another lane may still read
  kThrows,               // not a bug: a kernel's exception on the CPU
};

// f(std::integral_constant<Bug, bug>()), or without a bug where `bug` is not one of kBugs.
template <Bug... kBugs, class F>
void with_bug(Bug bug, const F& f) {
  const bool found = ((bug == kBugs && (f(std::integral_constant<Bug, kBugs>()), true)) || ...);
  if (!found) f(std::integral_constant<Bug, Bug::kNone>());
}

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float warp_max(float x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lanes));
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

// A block to a row. x is (gridDim.x, columns); logsumexp has an element for each row; total is their sum, positives the
// number of x > 0. Both are added to. Dynamic shared memory: a float for each warp.
template <Bug kBug>
__global__ void __launch_bounds__(1024)
    row_logsumexp_kernel(const float* __restrict__ x, float* __restrict__ logsumexp, float* __restrict__ total,
                         int* __restrict__ positives, int columns) {
  SSLK_DYNAMIC_SHARED(float, of_warp);
  SSLK_SHARED(float, row_max);
  SSLK_SHARED(int, row_positives, [1]);
  const int thread = threadIdx.x, threads = blockDim.x, warp = thread / 32, lane = thread % 32, warps = threads / 32;
  const float* row = x + static_cast<int64_t>(blockIdx.x) * columns;

  float largest = -INFINITY;
  int end = columns;
  if constexpr (kBug == Bug::kReadsOutOfBounds) end++;
  for (int i = thread; i < end; i += threads) largest = fmaxf(largest, row[i]);
  largest = warp_max(largest);
  if (lane == 0) of_warp[kBug == Bug::kWritesOutOfBounds ? warp + 1 : warp] = largest;
  if (thread == 0 && kBug != Bug::kUninitialisedShared && (kBug != Bug::kBlockBefore || blockIdx.x == 0)) {
    row_positives[0] = 0;
  }
  __syncthreads();
  if (warp == 0) {
    largest = warp_max(lane < warps ? of_warp[lane] : -INFINITY);
    if (lane == 0) row_max = largest;
  }
  if constexpr (kBug == Bug::kDivergentBarrier) {
    if (thread < threads / 2) __syncthreads();
  } else if constexpr (kBug == Bug::kTwoBarriers) {
    if (thread < threads / 2) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if constexpr (kBug != Bug::kMissingBarrier) {
    __syncthreads();
  }
  largest = row_max;

  float sum = 0;
  for (int i = thread; i - lane < columns; i += threads) {
    const float value = i < columns ? row[i] : -INFINITY;
    sum += __expf(value - largest);
    const unsigned ballot = __ballot_sync(kAllLanes, value > 0);
    if (lane == 0) atomicAdd(&row_positives[0], __popc(ballot));
  }
  sum = warp_sum(sum);
  if (lane == (kBug == Bug::kShuffleForBarrier)) of_warp[warp] = sum;
  if constexpr (kBug == Bug::kShuffleForBarrier) {
    __shfl_sync(kAllLanes, sum, 0);
    if (lane == 0) of_warp[warp] += 0.f;
  }
  if (kBug == Bug::kLeavesEarly && thread == threads - 1) return;
  if constexpr (kBug == Bug::kThrows) {
#if !defined(__CUDACC__)
    if (thread == 33) throw std::runtime_error("thread 33 has had enough");
#endif
  }
  __syncthreads();
  if (warp == 0) {
    sum = warp_sum(lane < warps ? of_warp[lane] : 0.f);
    if (lane == 0) {
      const float result = largest + __logf(sum);
      logsumexp[blockIdx.x] = result;
      if constexpr (kBug == Bug::kRaceBetweenBlocks) {
        *total += result;
      } else {
        atomicAdd(total, result);
      }
      atomicAdd(positives, row_positives[0]);
    }
  }
}

inline void row_logsumexp(const float* x, float* logsumexp, float* total, int* positives, int rows, int columns,
                          int threads, cudaStream_t stream, Bug bug = Bug::kNone) {
  if (rows == 0) return;
  with_bug<Bug::kDivergentBarrier, Bug::kTwoBarriers, Bug::kLeavesEarly, Bug::kMissingBarrier, Bug::kShuffleForBarrier,
           Bug::kUninitialisedShared, Bug::kBlockBefore, Bug::kReadsOutOfBounds, Bug::kWritesOutOfBounds,
           Bug::kRaceBetweenBlocks, Bug::kThrows>(bug, [&](auto chosen) {
    SSLK_LAUNCH(row_logsumexp_kernel<chosen()>, rows, threads, threads / 32 * sizeof(float), stream, x, logsumexp,
                total, positives, columns);
  });
}

// c = a b^T; a is (m, depth), b is (n, depth), c is (m, n). A warp to a tile of 16 x 8; sizes are multiples of the
// tile's, depth of 16. Dynamic shared memory: two stages of 16 rows of a and 8 of b.
constexpr int kTileRows = 16, kTileColumns = 8, kStep = 16, kStageElements = (kTileRows + kTileColumns) * kStep;

template <class T, Bug kBug>
__global__ void __launch_bounds__(32)
    product_kernel(const T* __restrict__ a, const T* __restrict__ b, float* __restrict__ c, int n, int depth) {
  SSLK_DYNAMIC_SHARED(T, stages);
  const int lane = threadIdx.x, group = lane / 4, pair = lane % 4;
  const T* a_tile = a + static_cast<int64_t>(blockIdx.x) * kTileRows * depth;
  const T* b_tile = b + static_cast<int64_t>(blockIdx.y) * kTileColumns * depth;

  const auto copy_step = [&](T* stage, int step) {
    for (int i = lane; i < kStageElements / 8; i += 32) {
      const int row = i / 2, column = i % 2 * 8;
      const T* from = row < kTileRows ? a_tile + static_cast<int64_t>(row) * depth
                                      : b_tile + static_cast<int64_t>(row - kTileRows) * depth;
      cp_async16(stage + row * kStep + column, from + step + column);
    }
    cp_async_commit();
  };

  float sum[4] = {0, 0, 0, 0};
  copy_step(stages, 0);
  for (int step = 0, at = 0; step < depth; step += kStep, at ^= 1) {
    if (step + kStep < depth) {
      copy_step(stages + (at ^ 1) * kStageElements, step + kStep);
      if constexpr (kBug != Bug::kMissingWait) cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncwarp();
    // two neighbours to a word
    const uint32_t* a_words = reinterpret_cast<const uint32_t*>(stages + at * kStageElements);
    const uint32_t* b_words = a_words + kTileRows * kStep / 2;
    const uint32_t left[4] = {a_words[group * 8 + pair], a_words[(group + 8) * 8 + pair], a_words[group * 8 + pair + 4],
                              a_words[(group + 8) * 8 + pair + 4]};
    const uint32_t right[2] = {b_words[group * 8 + pair], b_words[group * 8 + pair + 4]};
    mma_m16n8k16<T>(sum, left, right);
    if constexpr (kBug != Bug::kCopiesTooEarly) __syncwarp();
  }
  float* c_tile = c + static_cast<int64_t>(blockIdx.x) * kTileRows * n + blockIdx.y * kTileColumns;
#pragma unroll
  for (int r = 0; r < 4; r++) c_tile[static_cast<int64_t>(group + r / 2 * 8) * n + pair * 2 + r % 2] = sum[r];
}

template <class T>
void product(const T* a, const T* b, float* c, int m, int n, int depth, cudaStream_t stream, Bug bug = Bug::kNone) {
  if (m == 0 || n == 0) return;
  with_bug<Bug::kMissingWait, Bug::kCopiesTooEarly>(bug, [&](auto chosen) {
    SSLK_LAUNCH((product_kernel<T, chosen()>), dim3(m / kTileRows, n / kTileColumns), 32,
                2 * kStageElements * sizeof(T), stream, a, b, c, n, depth);
  });
}

// out = the sums of four neighbours.
template <Bug kBug>
__global__ void sum4_kernel(const float* __restrict__ x, float* __restrict__ out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const float4 v = *reinterpret_cast<const float4*>(x + 4 * i + (kBug == Bug::kMisaligned ? 1 : 0));
  out[i] = (v.x + v.y) + (v.z + v.w);
}

inline void sum4(const float* x, float* out, int n, cudaStream_t stream, Bug bug = Bug::kNone) {
  if (n == 0) return;
  with_bug<Bug::kMisaligned>(
      bug, [&](auto chosen) { SSLK_LAUNCH(sum4_kernel<chosen()>, (n + 63) / 64, 64, 0, stream, x, out, n); });
}

}  // namespace sslkernels::example

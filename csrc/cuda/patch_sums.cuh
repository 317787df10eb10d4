// Sums over a batch of gradients, in a fixed order: of each position over all samples, and of all rows that a mask
// token stood for. A block walks through some rows of some samples and leaves partial sums, which a second kernel adds
// up.
#pragma once
#include <algorithm>

#include "cuda/patch_rows.cuh"

namespace sslkernels {
namespace patch_mask {

constexpr int kSumThreads = 128, kAhead = 2;  // loads on the way at a time
constexpr int kTotalColumns = 32, kTotalLanes = 32;
constexpr int64_t kSumBlocks = 2048;  // enough to fill a GPU, whichever it is: sums are the same on all

// The shape of both steps. Rows are those of a sample, prefix included.
struct SumPlan {
  int64_t samples, rows, units;  // units of a row
  unsigned threads, column_blocks;
  int64_t tile, tiles;        // rows that a block adds up, and their number
  int64_t segment, segments;  // samples that a block adds up, and their number

  SumPlan(int64_t samples, int64_t rows, int64_t units) : samples(samples), rows(rows), units(units) {
    const auto quotient = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    threads = static_cast<unsigned>(std::min<int64_t>(kSumThreads, quotient(units, 32) * 32));
    column_blocks = static_cast<unsigned>(quotient(units, threads));
    const int64_t across = rows * column_blocks;
    segment = quotient(samples, std::clamp<int64_t>(quotient(kSumBlocks, across), 1, samples));
    segments = quotient(samples, segment);
    tile = quotient(across * segments, kSumBlocks);
    tiles = quotient(rows, tile);
  }
};

// What a block sums, and where to. Positions' sums go by row from `first_position` on; null where nobody wants them.
template <class T>
struct Sums {
  const int64_t* ids_restore;
  int64_t tokens, prefix, num_keep, first_position;
  typename T::Real* of_masked;     // (segments, tiles, D)
  typename T::Real* of_positions;  // (segments, positions, D), or null where there is one segment:
  char* positions;                 // (positions, D) as they are stored

  __device__ __forceinline__ bool is_masked(int64_t sample, int64_t row) const {
    return row >= prefix && ids_restore[sample * tokens + row - prefix] >= num_keep;
  }
};

template <class T, class Unit>
__device__ __forceinline__ void store_numbers(typename T::Real* to, const Numbers<T, Unit>& numbers) {
#pragma unroll
  for (int i = 0; i < Numbers<T, Unit>::kCount; i++) to[i] = numbers.value[i];
}

// A block to (tile, segment, columns).
template <class T, class Unit>
__global__ void __launch_bounds__(kSumThreads)
    patch_sum_kernel(const Rows grad, const Sums<T> sums, const SumPlan plan) {
  using Values = Numbers<T, Unit>;
  const int64_t column = int64_t{blockIdx.z} * blockDim.x + threadIdx.x, segment = blockIdx.y;
  if (column >= plan.units) return;
  const int64_t first_row = blockIdx.x * plan.tile, end_row = min(first_row + plan.tile, plan.rows);
  const int64_t first_sample = segment * plan.segment, end_sample = min(first_sample + plan.segment, plan.samples);
  const int64_t dim = plan.units * Values::kCount, element = column * Values::kCount;
  const int64_t positions = plan.rows - sums.first_position;
  Values masked(filled<Unit>(0));
  for (int64_t row = first_row; row < end_row; row++) {
    const bool all = (sums.of_positions || sums.positions) && row >= sums.first_position;
    Values position(filled<Unit>(0));
    for (int64_t sample = first_sample; sample < end_sample; sample += kAhead) {
      bool is_masked[kAhead];
      Unit unit[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; i++)
        is_masked[i] = sums.of_masked && sample + i < end_sample && sums.is_masked(sample + i, row);
#pragma unroll
      for (int i = 0; i < kAhead; i++)
        unit[i] = is_masked[i] || (all && sample + i < end_sample)
                      ? load_unit<Unit>(grad.row(sample + i, row) + Rows::offset<Unit>(column))
                      : filled<Unit>(0);
#pragma unroll
      for (int i = 0; i < kAhead; i++) {
        const Values values(unit[i]);
        if (is_masked[i]) masked += values;
        if (all) position += values;
      }
    }
    if (!all) continue;
    const int64_t at = row - sums.first_position;
    if (sums.of_positions)
      store_numbers(sums.of_positions + (segment * positions + at) * dim + element, position);
    else
      store_unit(sums.positions + (at * plan.units + column) * sizeof(Unit), position.unit());
  }
  if (sums.of_masked) store_numbers(sums.of_masked + (segment * plan.tiles + blockIdx.x) * dim + element, masked);
}

// totals (rows, dim): the sums of parts (count, rows, dim). A block of (columns, lanes) to kTotalColumns of a row.
template <class T>
__global__ void __launch_bounds__(kTotalColumns* kTotalLanes)
    patch_total_kernel(const typename T::Real* parts, int64_t count, int64_t rows, int64_t dim,
                       typename T::Storage* totals) {
  using Real = typename T::Real;
  SSLK_SHARED(Real, of_lane, [kTotalLanes][kTotalColumns]);
  const int64_t row = blockIdx.x % rows, column = blockIdx.x / rows * kTotalColumns + threadIdx.x;
  Real sum = 0;
  if (column < dim) {
    const Real* const part = parts + row * dim + column;
#pragma unroll 4
    for (int64_t i = threadIdx.y; i < count; i += blockDim.y) sum += part[i * rows * dim];
  }
  of_lane[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= dim) return;
  for (unsigned lane = 1; lane < blockDim.y; lane++) sum += of_lane[lane][threadIdx.x];
  totals[row * dim + column] = T::store(sum);
}

}  // namespace patch_mask
}  // namespace sslkernels

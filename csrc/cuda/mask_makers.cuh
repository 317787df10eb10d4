// The mask makers on a GPU: every sample by a warp, which is a block of its own.
#pragma once
#include "block_mask.h"
#include "cuda/platform.h"
#include "multi_block_mask.h"
#include "span_mask.h"

namespace sslkernels {
namespace masks {

constexpr unsigned kLanes = 32;

struct WarpTeam {
  __device__ __forceinline__ uint32_t lane() const { return threadIdx.x; }
  __device__ __forceinline__ uint32_t lanes() const { return kLanes; }
  __device__ __forceinline__ uint32_t sum(uint32_t x) const {
#pragma unroll
    for (int distance = 16; distance; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
  }
  __device__ __forceinline__ void sync() const { __syncwarp(); }
  __device__ __forceinline__ void add(uint32_t* word, uint32_t bits) const { atomicOr(word, bits); }
  __device__ __forceinline__ uint32_t next(uint32_t* counter) const { return atomicAdd(counter, 1u); }
  __device__ __forceinline__ void smallest(uint64_t* order, uint32_t n, uint32_t) const { sort(order, n); }

  // Bitonic: within blocks of `size` the first pass makes of two ascending halves what the later ones order.
  __device__ __forceinline__ void sort(uint64_t* order, uint32_t n) const {
    const uint32_t padded = static_cast<uint32_t>(power_of_two(n));
    for (uint32_t i = n + lane(); i < padded; i += kLanes) order[i] = ~uint64_t{0};
    for (uint32_t size = 2; size <= padded; size *= 2)
      for (uint32_t distance = size / 2; distance; distance /= 2) {
        sync();
        for (uint32_t i = lane(); i < padded / 2; i += kLanes) {
          const uint32_t a = i / distance * 2 * distance + i % distance;
          const uint32_t b = distance == size / 2 ? a ^ (size - 1) : a + distance;
          const uint64_t x = order[a], y = order[b];
          if (x > y) order[a] = y, order[b] = x;
        }
      }
    sync();
  }
};

// Which samples there are and what they draw: sample i is number ids[i], or i where there are no ids. All of it is
// read on the device.
struct Samples {
  int64_t count, tokens;
  const int64_t* seed;
  const int64_t* ids;
  uint32_t stream;
  uint64_t* scratch;  // Scratch::size(tokens) for each

  __device__ __forceinline__ Draws draws() const {
    const int64_t id = ids ? ids[blockIdx.x] : static_cast<int64_t>(blockIdx.x);
    return {static_cast<uint64_t>(*seed), static_cast<uint64_t>(id), stream};
  }
  __device__ __forceinline__ Scratch memory() const {
    return Scratch(scratch + blockIdx.x * Scratch::size(tokens), tokens);
  }
};

// What nobody could check on the host is brought into range.
__device__ __forceinline__ uint32_t clamped(int64_t x, int64_t limit) {
  return static_cast<uint32_t>(x < 0 ? 0 : x < limit ? x : limit);
}

__global__ void __launch_bounds__(kLanes)
    block_mask_kernel(const Samples samples, const __grid_constant__ BlockMaskJob job, const int64_t* wanted,
                      bool* mask) {
  block_mask(WarpTeam{}, job, samples.draws(), clamped(wanted[blockIdx.x], samples.tokens), samples.memory(),
             mask + blockIdx.x * samples.tokens);
}

__global__ void __launch_bounds__(kLanes)
    multi_block_mask_kernel(const Samples samples, const MultiBlockJob job, const MultiBlockRow first) {
  multi_block_mask(WarpTeam{}, job, samples.draws(), samples.memory(), row_of(job, first, blockIdx.x));
}

__global__ void __launch_bounds__(kLanes) span_mask_kernel(const Samples samples, const SpanMaskJob job,
                                                           const int64_t* lengths, const int64_t* asked, bool* mask) {
  const int64_t spans = asked ? int64_t{clamped(asked[blockIdx.x], samples.tokens)} : -1;
  span_mask(WarpTeam{}, job, samples.draws(), clamped(lengths[blockIdx.x], samples.tokens), spans, samples.memory(),
            mask + blockIdx.x * samples.tokens);
}

inline void launch_block_mask(const Samples& samples, const BlockMaskJob& job, const int64_t* wanted, bool* mask,
                              cudaStream_t stream) {
  SSLK_LAUNCH(block_mask_kernel, static_cast<unsigned>(samples.count), kLanes, 0, stream, samples, job, wanted, mask);
}

inline void launch_multi_block_mask(const Samples& samples, const MultiBlockJob& job, const MultiBlockRow& first,
                                    cudaStream_t stream) {
  SSLK_LAUNCH(multi_block_mask_kernel, static_cast<unsigned>(samples.count), kLanes, 0, stream, samples, job, first);
}

inline void launch_span_mask(const Samples& samples, const SpanMaskJob& job, const int64_t* lengths,
                             const int64_t* asked, bool* mask, cudaStream_t stream) {
  SSLK_LAUNCH(span_mask_kernel, static_cast<unsigned>(samples.count), kLanes, 0, stream, samples, job, lengths, asked,
              mask);
}

}  // namespace masks
}  // namespace sslkernels

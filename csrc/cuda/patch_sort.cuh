// Sorts distinct 64-bit words by one block, in place: the bitonic network in the form in which every comparison leaves
// the smaller word in front. What would lie behind the last word never moves then, so that any count will do.
// The block's threads are whole warps.
#pragma once
#include "cuda/platform.h"

namespace sslkernels {
namespace patch_mask {

constexpr uint32_t kSortChunk = 4096;  // words that shared memory holds at a time
constexpr uint32_t kWarpReach = 32;    // words that are at most so far apart are compared by the warp they belong to

// Compares words `half` apart, or, to merge runs of `half` words that are both ascending, each with its mirror image.
__device__ __forceinline__ void compare_words(uint64_t* words, uint32_t count, uint32_t half, bool mirrored) {
  if (count < 2) return;
  const uint32_t pairs = ((count - 1) & ~(2 * half - 1)) / 2 + half;
  for (uint32_t pair = threadIdx.x; pair < pairs; pair += blockDim.x) {
    const uint32_t low = 2 * pair - (pair & (half - 1)), high = mirrored ? low ^ (2 * half - 1) : low + half;
    if (high >= count) continue;
    const uint64_t a = words[low], b = words[high];
    if (b < a) {
      words[low] = b;
      words[high] = a;
    }
  }
}

// The comparisons from `half` on down; those that come after them reach `next` words far.
__device__ __forceinline__ void merge_words(uint64_t* words, uint32_t count, uint32_t half, bool mirrored,
                                            uint32_t next) {
  for (; half > 0; half /= 2) {
    compare_words(words, count, half, mirrored);
    mirrored = false;
    if (half > kWarpReach || (half == 1 && next > kWarpReach))
      __syncthreads();
    else
      __syncwarp();
  }
}

// Words in shared memory. A barrier has to come before and after it.
__device__ __forceinline__ void sort_shared(uint64_t* words, uint32_t count) {
  for (uint32_t run = 1; run < count; run *= 2) merge_words(words, count, run, true, 2 * run);
}

// Calls step(words in shared memory, their number) for each chunk of the words in global memory.
template <class Step>
__device__ __forceinline__ void each_chunk(uint64_t* words, uint32_t count, uint64_t* chunk, const Step& step) {
  for (uint32_t first = 0; first < count; first += kSortChunk) {
    const uint32_t size = min(count - first, kSortChunk);
    for (uint32_t i = threadIdx.x; i < size; i += blockDim.x) chunk[i] = words[first + i];
    __syncthreads();
    step(chunk, size);
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < size; i += blockDim.x) words[first + i] = chunk[i];
    __syncthreads();
  }
}

// Words in global memory, of which `chunk`, kSortChunk words of shared memory, holds a part at a time. A barrier has to
// come before it.
__device__ __forceinline__ void sort_global(uint64_t* words, uint32_t count, uint64_t* chunk) {
  each_chunk(words, count, chunk, [](uint64_t* part, uint32_t size) { sort_shared(part, size); });
  for (uint32_t run = kSortChunk; run < count; run *= 2) {
    for (uint32_t half = run; half >= kSortChunk; half /= 2) {
      compare_words(words, count, half, half == run);
      __syncthreads();
    }
    each_chunk(words, count, chunk,
               [](uint64_t* part, uint32_t size) { merge_words(part, size, kSortChunk / 2, false, 0); });
  }
}

}  // namespace patch_mask
}  // namespace sslkernels

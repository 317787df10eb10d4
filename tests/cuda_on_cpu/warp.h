// Barriers, shuffles and votes. Whoever comes last to a meeting does the work for all lanes.
//
// As in CUDA's contract, __syncthreads and __syncwarp order memory and shuffles and votes do not: a shuffle where a
// __syncwarp is due is a race to ThreadSanitizer.
#pragma once
#include <type_traits>

#include "block.h"

namespace cuda_on_cpu {

inline unsigned lane() { return current_thread->lane; }

inline void sync_warp(unsigned mask, const Where& where) {
  if (!mask) current_block->fail("the mask is empty", where);
  Warp& warp = *current_thread->warp;
  const unsigned lowest = __builtin_ctz(mask);
  char* clock = &warp.clock[lowest][warp.turn[lowest] % 2];  // by turns, as in Block::sync_threads
  publish(clock);
  current_block->meet(mask, nullptr, nullptr, where);
  observe(clock);
}

template <class T>
struct Exchange {
  T value, result;
  unsigned source;
};

// What lane `source` passed; poison if that lane takes no part.
template <class T>
T shuffle(unsigned mask, T value, unsigned source, const Where& where) {
  static_assert(std::is_arithmetic_v<T> || sizeof(T) <= 4, "CUDA shuffles numbers of 16, 32 and 64 bits");
  Exchange<T> exchange{value, value, source};
  const auto combine = [](void* const* operands, unsigned lanes) {
    for (unsigned i = 0; i < kWarpSize; i++) {
      if (!(lanes >> i & 1)) continue;
      auto& mine = *static_cast<Exchange<T>*>(operands[i]);
      if (lanes >> mine.source & 1) {
        mine.result = static_cast<Exchange<T>*>(operands[mine.source])->value;
      } else {
        poison(&mine.result, sizeof(T));
      }
    }
  };
  current_block->meet(mask, &exchange, combine, where);
  return exchange.result;
}

inline void check_width(int width, const Where& where) {
  if (width < 1 || width > 32 || (width & (width - 1))) current_block->fail("the width is no power of two", where);
}

struct Vote {
  bool holds;
  unsigned ballot;
};

inline unsigned ballot(unsigned mask, bool holds, const Where& where) {
  Vote vote{holds, 0};
  const auto combine = [](void* const* operands, unsigned lanes) {
    unsigned ballot = 0;
    for (unsigned i = 0; i < kWarpSize; i++)
      if (lanes >> i & 1) ballot |= static_cast<unsigned>(static_cast<Vote*>(operands[i])->holds) << i;
    for (unsigned i = 0; i < kWarpSize; i++)
      if (lanes >> i & 1) static_cast<Vote*>(operands[i])->ballot = ballot;
  };
  current_block->meet(mask, &vote, combine, where);
  return vote.ballot;
}

}  // namespace cuda_on_cpu

using CudaWhere = cuda_on_cpu::Where;

inline void __syncthreads(CudaWhere where = CudaWhere::here()) {
  cuda_on_cpu::current_block->sync_threads(false, where);
}
inline int __syncthreads_count(int holds, CudaWhere where = CudaWhere::here()) {
  return static_cast<int>(cuda_on_cpu::current_block->sync_threads(holds != 0, where));
}
inline int __syncthreads_or(int holds, CudaWhere where = CudaWhere::here()) {
  return cuda_on_cpu::current_block->sync_threads(holds != 0, where) != 0;
}
inline int __syncthreads_and(int holds, CudaWhere where = CudaWhere::here()) {
  return cuda_on_cpu::current_block->sync_threads(holds == 0, where) == 0;
}
inline void __syncwarp(unsigned mask = ~0u, CudaWhere where = CudaWhere::here()) {
  cuda_on_cpu::sync_warp(mask, where);
}

// Within sections of `width` lanes; a lane that would read outside its section gets its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CudaWhere where = CudaWhere::here()) {
  cuda_on_cpu::check_width(width, where);
  const unsigned first = cuda_on_cpu::lane() & ~(width - 1u);
  return cuda_on_cpu::shuffle(mask, value, first + (source & (width - 1u)), where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CudaWhere where = CudaWhere::here()) {
  cuda_on_cpu::check_width(width, where);
  const unsigned lane = cuda_on_cpu::lane(), within = lane & (width - 1u);
  return cuda_on_cpu::shuffle(mask, value, within >= delta ? lane - delta : lane, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CudaWhere where = CudaWhere::here()) {
  cuda_on_cpu::check_width(width, where);
  const unsigned lane = cuda_on_cpu::lane(), within = lane & (width - 1u);
  return cuda_on_cpu::shuffle(mask, value, delta < width - within ? lane + delta : lane, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, CudaWhere where = CudaWhere::here()) {
  cuda_on_cpu::check_width(width, where);
  // unlike the others it may reach into lower sections
  const unsigned lane = cuda_on_cpu::lane(), source = lane ^ static_cast<unsigned>(lanes),
                 end = (lane | (width - 1u)) + 1;
  return cuda_on_cpu::shuffle(mask, value, source < end ? source : lane, where);
}

inline unsigned __ballot_sync(unsigned mask, int holds, CudaWhere where = CudaWhere::here()) {
  return cuda_on_cpu::ballot(mask, holds != 0, where);
}
inline int __any_sync(unsigned mask, int holds, CudaWhere where = CudaWhere::here()) {
  return cuda_on_cpu::ballot(mask, holds != 0, where) != 0;
}
inline int __all_sync(unsigned mask, int holds, CudaWhere where = CudaWhere::here()) {
  return cuda_on_cpu::ballot(mask, holds != 0, where) == mask;
}

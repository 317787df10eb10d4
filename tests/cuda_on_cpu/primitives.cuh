// Each intrinsic in the form of a kernel whose result is known in closed form.
#pragma once
#include "cuda/platform.h"

namespace sslkernels::primitives {

constexpr int kShuffles = 9;

// out is (kShuffles, 32): what each lane gets when every lane passes its number.
__global__ void shuffle_kernel(int* out) {
  const int lane = threadIdx.x;
  const auto store = [&](int row, int value) { out[row * 32 + lane] = value; };
  store(0, __shfl_sync(0xffffffffu, lane, 5));
  store(1, __shfl_sync(0xffffffffu, lane, lane + 3, 8));
  store(2, __shfl_up_sync(0xffffffffu, lane, 3));
  store(3, __shfl_up_sync(0xffffffffu, lane, 2, 8));
  store(4, __shfl_down_sync(0xffffffffu, lane, 3));
  store(5, __shfl_down_sync(0xffffffffu, lane, 2, 8));
  store(6, __shfl_xor_sync(0xffffffffu, lane, 21));
  store(7, __shfl_xor_sync(0xffffffffu, lane, 12, 8));
  // the halves shuffle on their own, in different branches and not equally often
  int value = lane;
  if (lane < 16) {
    for (int i = 0; i < 3; i++) value = __shfl_xor_sync(0x0000ffffu, value, 1);
  } else {
    value = __shfl_xor_sync(0xffff0000u, value, 2);
  }
  store(8, value);
}

// out: ballot of odd lanes, any, all, and the same within the upper half; then threads that a block's barriers counted.
__global__ void vote_kernel(unsigned* out) {
  const unsigned thread = threadIdx.x, lane = thread % 32;
  const unsigned odd = __ballot_sync(0xffffffffu, lane % 2);
  const int any = __any_sync(0xffffffffu, lane == 7), all = __all_sync(0xffffffffu, lane == 7);
  unsigned half = 0;
  if (lane >= 16) half = __ballot_sync(0xffff0000u, lane == 20);
  const int count = __syncthreads_count(thread % 3 == 0);
  const int some = __syncthreads_or(thread == 40), every = __syncthreads_and(thread != 40);
  if (thread == 31) {
    out[0] = odd, out[1] = any, out[2] = all, out[3] = half;
    out[4] = count, out[5] = some, out[6] = every;
  }
}

// integers: sum, greatest, least, or, times counted modulo 10; all threads of all blocks add to them.
__global__ void atomic_kernel(int* integers, unsigned* word, unsigned long long* large, float* sum) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  SSLK_SHARED(int, of_block);
  if (threadIdx.x == 0) of_block = 0;
  __syncthreads();
  atomicAdd(&of_block, i);
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(&integers[0], of_block);
  atomicMax(&integers[1], i % 71);
  atomicMin(&integers[2], -i);
  atomicInc(word, 9);
  atomicAdd(large, 1ull << 33);
  atomicAdd(sum, 0.5f);
}

// A lock that threads of one warp spin for, and a counter behind it that is not atomic.
__global__ void lock_kernel(int* lock, int* count, int* spins) {
  bool done = false;
  while (!done) {
    if (atomicCAS(lock, 0, 1) != 0) {
      atomicAdd(spins, 1);
      continue;
    }
    __threadfence();
    *count += 1;
    __threadfence();
    atomicExch(lock, 0);
    done = true;
  }
}

// The block that comes last adds up what all have left behind.
__global__ void last_block_kernel(float* parts, unsigned* arrived, float* total) {
  SSLK_SHARED(bool, last);
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = blockIdx.x + 1.f;
    __threadfence();
    last = atomicAdd(arrived, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  if (threadIdx.x == 0)
    for (unsigned i = 0; i < gridDim.x; i++) *total += parts[i];
}

// Where each thread of a three-dimensional launch is; out is its number of visits.
__global__ void index_kernel(int* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] += 1;
}

// One product of registers as they are: a (32, 8), b (32, 4) and c (32, 4) hold what each lane holds.
template <class T>
__global__ void mma_registers_kernel(const T* a, const T* b, float* c) {
  const int lane = threadIdx.x;
  uint32_t left[4], right[2];
  float sum[4] = {0, 0, 0, 0};
  for (int r = 0; r < 4; r++) left[r] = reinterpret_cast<const uint32_t*>(a)[lane * 4 + r];
  for (int r = 0; r < 2; r++) right[r] = reinterpret_cast<const uint32_t*>(b)[lane * 2 + r];
  mma_m16n8k16<T>(sum, left, right);
  for (int r = 0; r < 4; r++) c[lane * 4 + r] = sum[r];
}

// The threads in the order in which they come out of a barrier.
__global__ void order_kernel(int* order, int* next) {
  __syncthreads();
  order[atomicAdd(next, 1)] = blockIdx.x * blockDim.x + threadIdx.x;
}

__global__ void bf16_kernel(const float* x, __nv_bfloat16* narrow, float* back, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  narrow[i] = __float2bfloat16(x[i]);
  back[i] = __bfloat162float(narrow[i]);
}
__global__ void half_kernel(const float* x, __half* narrow, float* back, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  narrow[i] = __float2half(x[i]);
  back[i] = __half2float(narrow[i]);
}

// What the harness refuses, a kind at a time; memory is aligned to 16 bytes.
__global__ void misuse_kernel(int* memory, int kind) {
  const int lane = threadIdx.x % 32;
  SSLK_SHARED(int4, shared);
  if (kind == 0) __syncwarp(0xfffffffeu);
  if (kind == 1) __syncwarp(lane < 16 ? 0xffffffffu : 0xffff0000u);
  if (kind == 2) __shfl_sync(0xffffffffu, lane, 0, 3);
  if (kind == 3) {
    if (lane < 16) {
      __shfl_sync(0xffffffffu, lane, 0);
    } else {
      __shfl_sync(0xffffffffu, lane, 0);
    }
  }
  if (kind == 4) cp_async16(&shared, memory + 1);
  if (kind == 5) cp_async16(memory, memory);
  if (kind == 6) atomicAdd(reinterpret_cast<int*>(reinterpret_cast<char*>(memory) + 1), 1);
  if (kind == 7) {
    while (atomicCAS(memory, 1, 2) != 1) {
    }
  }
}

// Needs more shared memory than a kernel gets without asking.
__global__ void large_kernel(float* out, int n) {
  SSLK_DYNAMIC_SHARED(float, large);
  if (threadIdx.x == 0) large[n - 1] = 7;
  __syncthreads();
  out[threadIdx.x] = large[n - 1];
}

}  // namespace sslkernels::primitives

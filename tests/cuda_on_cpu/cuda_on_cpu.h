// What csrc/cuda/platform.h includes under a C++ compiler that is not nvcc: CUDA, as far as our kernels use it, on one
// thread of the CPU. CONTRIBUTING.md, "Writing a CUDA kernel", says what is emulated and what is not.
#pragma once
#include <cstdint>

#include "atomics.h"
#include "intrinsics.h"
#include "launch.h"
#include "tensor_core.h"
#include "types.h"
#include "warp.h"

#define __global__ inline
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ _Pragma("GCC error \"declare shared memory by SSLK_SHARED or SSLK_DYNAMIC_SHARED\"")

#define threadIdx (::cuda_on_cpu::current_thread->index)
#define blockIdx (::cuda_on_cpu::current_block->index)
#define blockDim (::cuda_on_cpu::current_block->shape.block)
#define gridDim (::cuda_on_cpu::current_block->shape.grid)
constexpr int warpSize = 32;

namespace cuda_on_cpu {

inline void* shared_variable(const void* tag, size_t bytes, size_t alignment) {
  Unwatched unwatched;
  return current_block->memory.variable(tag, bytes, alignment);
}

}  // namespace cuda_on_cpu

#define SSLK_ASSUME_GLOBAL(pointer) static_cast<void>(pointer)
#define SSLK_SHARED(type, name, ...)                  \
  typedef type name##_shared __VA_ARGS__;             \
  static const char name##_tag = 0;                   \
  name##_shared& name = *static_cast<name##_shared*>( \
      ::cuda_on_cpu::shared_variable(&name##_tag, sizeof(name##_shared), alignof(name##_shared)))
#define SSLK_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(::cuda_on_cpu::current_block->memory.dynamic())
#define SSLK_LAUNCH(kernel, grid, block, dynamic_bytes, stream, ...) \
  ::cuda_on_cpu::launch(kernel, grid, block, dynamic_bytes, stream, __VA_ARGS__)

// The one header that a kernel (.cuh) includes. nvcc gets CUDA and a few macros; any other compiler gets the same names
// from cuda_on_cpu.h, which runs the kernel on the CPU and which only the tests have on their include path.
//
//   SSLK_SHARED(float, tile, [16][33]);             __shared__ float tile[16][33];
//   SSLK_DYNAMIC_SHARED(float, rows);               float* rows, the dynamic shared memory, aligned to 16 bytes
//   SSLK_LAUNCH(kernel, grid, block, dynamic_bytes, stream, arguments...);
//   SSLK_LAUNCH((kernel<float, 4>), ...);           in parentheses where there is a comma
#pragma once
#include <cstdint>

#if !defined(__CUDACC__)
#include "cuda_on_cpu.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define SSLK_SHARED(type, name, ...) __shared__ type name __VA_ARGS__
#define SSLK_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char sslk_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(sslk_dynamic_shared)
#define SSLK_LAUNCH(kernel, grid, block, dynamic_bytes, stream, ...) \
  (kernel)<<<grid, block, dynamic_bytes, stream>>>(__VA_ARGS__)

// A pointer that was itself read from memory may be to any kind of it: this says that it is to global memory.
#define SSLK_ASSUME_GLOBAL(pointer) __builtin_assume(__isGlobal(pointer))

namespace sslkernels {

// 16 bytes of global memory at an address aligned to as much, in one access: left to itself nvcc may take them apart.
__device__ __forceinline__ uint4 load16(const void* global) {
  uint4 x;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(__cvta_generic_to_global(global)));
  return x;
}
__device__ __forceinline__ void store16(void* global, uint4 x) {
  asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(__cvta_generic_to_global(global)), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
}

// Starts a copy of 16 bytes, both addresses aligned to as much; cp_async_commit closes a group of them, and
// cp_async_wait<N> waits until at most N of this thread's groups are on the way. Other threads need a barrier besides.
__device__ __forceinline__ void cp_async16(void* shared, const void* global) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// c += a b on one warp, (16, 16) by (16, 8), T being __nv_bfloat16 or __half. With g = lane / 4 and t = lane % 4, a
// lane holds, two to a register, the lower index in the lower half:
//   a[r]  row g + 8 (r % 2), columns 2t + 8 (r / 2) and the next
//   b[r]  rows 2t + 8 r and the next, column g
//   c[r]  row g + 8 (r / 2), column 2t + r % 2
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define SSLK_MMA(T, name)                                                                                          \
  template <>                                                                                                      \
  __device__ __forceinline__ void mma_m16n8k16<T>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                            \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                      \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                              \
  }
SSLK_MMA(__nv_bfloat16, "bf16")
SSLK_MMA(__half, "f16")
#undef SSLK_MMA

}  // namespace sslkernels
#endif

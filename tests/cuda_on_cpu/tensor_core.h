// Asynchronous copies and tensor-core products: what csrc/cuda/platform.h writes in PTX for the GPU.
#pragma once
#include <cstdint>
#include <cstring>

#include "block.h"

namespace sslkernels {

inline uint4 load16(const void* global, cuda_on_cpu::Where where = cuda_on_cpu::Where::here()) {
  if (reinterpret_cast<uintptr_t>(global) % 16) cuda_on_cpu::current_block->fail("misaligned load of 16 bytes", where);
  return *static_cast<const uint4*>(global);
}
inline void store16(void* global, uint4 x, cuda_on_cpu::Where where = cuda_on_cpu::Where::here()) {
  if (reinterpret_cast<uintptr_t>(global) % 16) cuda_on_cpu::current_block->fail("misaligned store of 16 bytes", where);
  *static_cast<uint4*>(global) = x;
}

// The destination holds poison from the issue to the wait, as on the GPU it may hold the old or the new: whoever reads
// it without waiting, or had not finished with the old, gets NaN.
inline void cp_async16(void* shared, const void* global, cuda_on_cpu::Where where = cuda_on_cpu::Where::here()) {
  cuda_on_cpu::AsyncCopy copy;
  cuda_on_cpu::Block& block = *cuda_on_cpu::current_block;
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16)
    block.fail("cp.async of 16 bytes is misaligned", where);
  if (!block.memory.holds(shared, 16)) block.fail("cp.async writes outside shared memory", where);
  copy.to = shared;
  for (int i = 0; i < 16; i++) copy.bytes[i] = static_cast<const unsigned char*>(global)[i];
  cuda_on_cpu::poison(shared, 16);
  cuda_on_cpu::Unwatched unwatched;
  cuda_on_cpu::current_thread->copies.back().push_back(copy);
}

inline void cp_async_commit() {
  cuda_on_cpu::Unwatched unwatched;
  cuda_on_cpu::current_thread->copies.emplace_back();
}

// Until at most N of this thread's committed groups are on the way.
template <int N>
void cp_async_wait() {
  auto& groups = cuda_on_cpu::current_thread->copies;
  while (groups.size() > N + 1) {
    for (const cuda_on_cpu::AsyncCopy& copy : groups.front())
      for (int i = 0; i < 16; i++) static_cast<unsigned char*>(copy.to)[i] = copy.bytes[i];
    cuda_on_cpu::Unwatched unwatched;
    groups.erase(groups.begin());
  }
}

// c += a b on one warp, (16, 16) by (16, 8), T being __nv_bfloat16 or __half. With g = lane / 4 and t = lane % 4, a
// lane holds, two to a register, the lower index in the lower half:
//   a[r]  row g + 8 (r % 2), columns 2t + 8 (r / 2) and the next
//   b[r]  rows 2t + 8 r and the next, column g
//   c[r]  row g + 8 (r / 2), column 2t + r % 2
template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  cuda_on_cpu::Where where = cuda_on_cpu::Where::here()) {
  struct Fragments {
    float* c;
    const uint32_t *a, *b;
  } mine{c, a, b};
  const auto combine = [](void* const* operands, unsigned) {
    const auto lane = [&](int i) -> const Fragments& { return *static_cast<Fragments*>(operands[i]); };
    const auto element = [](const uint32_t* registers, int r, int half) {
      return static_cast<float>(cuda_on_cpu::bits_as<T>(static_cast<uint16_t>(registers[r] >> (16 * half))));
    };
    float left[16][16], right[16][8];
    for (int i = 0; i < 32; i++)
      for (int half = 0; half < 2; half++) {
        const int g = i / 4, t = i % 4;
        for (int r = 0; r < 4; r++) left[g + 8 * (r % 2)][2 * t + 8 * (r / 2) + half] = element(lane(i).a, r, half);
        for (int r = 0; r < 2; r++) right[2 * t + 8 * r + half][g] = element(lane(i).b, r, half);
      }
    for (int i = 0; i < 32; i++)
      for (int r = 0; r < 4; r++) {
        float sum = lane(i).c[r];
        for (int k = 0; k < 16; k++) sum += left[i / 4 + 8 * (r / 2)][k] * right[k][2 * (i % 4) + r % 2];
        lane(i).c[r] = sum;
      }
  };
  cuda_on_cpu::current_block->meet(~0u, &mine, combine, where);
}

}  // namespace sslkernels

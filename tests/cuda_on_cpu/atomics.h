// CUDA's atomics: relaxed, as on the GPU, so that they order nothing else in ThreadSanitizer's eyes.
#pragma once
#include <cstdint>
#include <type_traits>

#include "block.h"

namespace cuda_on_cpu {

// *p = change(*p) at once; the old value.
template <class T, class Change>
T atomic_update(T* p, const Where& where, const Change& change) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) current_block->fail("misaligned atomic", where);
  current_block->maybe_yield(where);
  T old, desired;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do desired = change(old);
  while (!__atomic_compare_exchange(p, &old, &desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

template <class T>
struct NotDeduced {
  using type = T;
};
template <class T>
using Same = typename NotDeduced<T>::type;

template <class T>
constexpr bool is_32_or_64_bits = std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);
template <class T>
constexpr bool is_addable =
    std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long> ||
    std::is_same_v<T, float> || std::is_same_v<T, double>;

// Integers wrap around.
template <class T>
T wrapping_sum(T x, T y) {
  if constexpr (std::is_integral_v<T>) {
    using Unsigned = std::make_unsigned_t<T>;
    return static_cast<T>(static_cast<Unsigned>(x) + static_cast<Unsigned>(y));
  } else {
    return x + y;
  }
}

}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_ATOMIC(name, condition, result)                                                   \
  template <class T>                                                                                  \
  T name(T* p, cuda_on_cpu::Same<T> x, cuda_on_cpu::Where where = cuda_on_cpu::Where::here()) {       \
    static_assert(condition, "CUDA has no " #name " of this type");                                   \
    return cuda_on_cpu::atomic_update(p, where, [&]([[maybe_unused]] T old) -> T { return result; }); \
  }
CUDA_ON_CPU_ATOMIC(atomicAdd, cuda_on_cpu::is_addable<T>, cuda_on_cpu::wrapping_sum<T>(old, x))
CUDA_ON_CPU_ATOMIC(atomicSub, std::is_integral_v<T> && sizeof(T) == 4,
                   static_cast<T>(static_cast<unsigned>(old) - static_cast<unsigned>(x)))
CUDA_ON_CPU_ATOMIC(atomicMax, cuda_on_cpu::is_32_or_64_bits<T>, old < x ? x : old)
CUDA_ON_CPU_ATOMIC(atomicMin, cuda_on_cpu::is_32_or_64_bits<T>, x < old ? x : old)
CUDA_ON_CPU_ATOMIC(atomicExch, cuda_on_cpu::is_addable<T> && !(std::is_same_v<T, double>), x)
CUDA_ON_CPU_ATOMIC(atomicAnd, cuda_on_cpu::is_32_or_64_bits<T>, old& x)
CUDA_ON_CPU_ATOMIC(atomicOr, cuda_on_cpu::is_32_or_64_bits<T>, old | x)
CUDA_ON_CPU_ATOMIC(atomicXor, cuda_on_cpu::is_32_or_64_bits<T>, old ^ x)
CUDA_ON_CPU_ATOMIC(atomicInc, (std::is_same_v<T, unsigned>), old >= x ? 0 : old + 1)
#undef CUDA_ON_CPU_ATOMIC

template <class T>
T atomicCAS(T* p, cuda_on_cpu::Same<T> expected, cuda_on_cpu::Same<T> desired,
            cuda_on_cpu::Where where = cuda_on_cpu::Where::here()) {
  static_assert(std::is_integral_v<T> && sizeof(T) >= 2, "CUDA has no atomicCAS of this type");
  const T old = cuda_on_cpu::atomic_update(p, where, [&](T value) -> T { return value == expected ? desired : value; });
  if (old != expected) cuda_on_cpu::current_block->yield(where);  // perhaps it spins until another thread stores
  return old;
}

// A fence publishes what this thread wrote and observes what others published: with atomics, a hand-over.
inline void __threadfence(cuda_on_cpu::Where where = cuda_on_cpu::Where::here()) {
  cuda_on_cpu::publish(&cuda_on_cpu::fence_clock);
  cuda_on_cpu::current_block->maybe_yield(where);
  cuda_on_cpu::observe(&cuda_on_cpu::fence_clock);
}
inline void __threadfence_block(cuda_on_cpu::Where where = cuda_on_cpu::Where::here()) { __threadfence(where); }
inline void __nanosleep(unsigned, cuda_on_cpu::Where where = cuda_on_cpu::Where::here()) {
  cuda_on_cpu::current_block->yield(where);
}

// In which order blocks, warps and lanes run. A GPU promises none, so a right kernel gives the same under all of them.
#pragma once
#include <cstdint>
#include <utility>

namespace cuda_on_cpu {

struct Random {
  uint64_t state;
  uint32_t below(uint32_t n) {  // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return static_cast<uint32_t>((z ^ z >> 31) >> 32) % n;
  }
  template <class T>
  void shuffle(T* items, uint32_t n) {
    for (uint32_t i = n; i > 1; i--) std::swap(items[i - 1], items[below(i)]);
  }
};

//   0, 1   ascending, descending
//   2, 3   shuffled blocks, warps and lanes
//   4, 5   shuffled, and every wait goes on with a random warp instead of staying with the one that runs
//   6, 7   the same, and atomics and fences hand over now and then too
// Under 0 to 3 a warp runs until it needs another, so that it meets what the others have not written yet. From 8 on:
// like 6 and 7 with other draws.
constexpr int kSchedules = 8;

struct Schedule {
  int number = 0;
  bool descending() const { return number & 1; }
  bool shuffled() const { return number >= 2; }
  bool roaming() const { return number >= 4; }
  bool preempting() const { return number >= 6; }
  Random random(uint64_t stream) const { return {static_cast<uint64_t>(number) << 32 ^ stream * 0x2545f4914f6cdd1d}; }

  // Fills order[0 .. n) with the numbers below n.
  void arrange(uint32_t* order, uint32_t n, Random& random) const {
    for (uint32_t i = 0; i < n; i++) order[i] = descending() ? n - 1 - i : i;
    if (shuffled()) random.shuffle(order, n);
  }
};

}  // namespace cuda_on_cpu

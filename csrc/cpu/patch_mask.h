// Patch masking on the CPU: what its loops are, and how work is shared out. No torch, no instruction set.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>

#include "../dtype.h"

namespace sslkernels {

// The loops of one instruction set.
struct PatchMaskKernel {
  // The random keys of a sample's tokens. `keys` has room for kKeyBlock more.
  void (*keys)(uint64_t seed, uint64_t sample, int64_t tokens, uint32_t* keys);
  void (*copy)(void* to, const void* from, int64_t bytes);
  void (*zero)(void* to, int64_t bytes);
  void (*add)(Dtype dtype, void* to, const void* a, const void* b, int64_t columns);
  // Sums of rows: `part` is in fp32 (fp64 for fp64), and flush moves it into `total` before it grows.
  void (*accumulate)(Dtype dtype, void* part, const void* row, int64_t columns);
  void (*flush)(Dtype dtype, double* total, void* part, int64_t columns);
  void (*round)(Dtype dtype, void* to, const double* total, int64_t columns);
};

constexpr int64_t kKeyBlock = 128;

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }

inline int64_t blocks_of(int64_t items, int64_t block) { return (items + block - 1) / block; }

// Shares out [0, items) in chunks, which workers take as they come. make() returns what a worker calls with (begin,
// end); parallel(n, body) runs body on up to n workers.
template <class Parallel, class Make>
void share(int64_t items, int64_t chunk, int64_t threads, const Parallel& parallel, const Make& make) {
  const int64_t chunks = blocks_of(items, chunk);
  if (chunks == 0) return;
  std::atomic<int64_t> next{0};
  parallel(std::min(threads, chunks), [&](int64_t, int64_t) {
    auto work = make();
    for (int64_t c; (c = next.fetch_add(1, std::memory_order_relaxed)) < chunks;)
      work(c * chunk, std::min(items, (c + 1) * chunk));
  });
}

// What a worker is given at a time: enough to outweigh its taking.
constexpr int64_t kChunkBytes = 256 << 10;
inline int64_t rows_per_chunk(int64_t row_bytes) { return std::max<int64_t>(1, kChunkBytes / (row_bytes + 16)); }

// The threads of a call and how they are started.
template <class Parallel>
struct Workers {
  const PatchMaskKernel& kernel;
  int64_t threads;
  const Parallel& parallel;

  template <class Make>
  void share(int64_t items, int64_t chunk, const Make& make) const {
    sslkernels::share(items, chunk, threads, parallel, make);
  }
};

// The first row in which any worker found something wrong.
class FirstRow {
 public:
  void report(int64_t row) {
    int64_t first = row_.load(std::memory_order_relaxed);
    while (row < first && !row_.compare_exchange_weak(first, row, std::memory_order_relaxed)) {
    }
  }
  // The row, or -1.
  int64_t row() const {
    const int64_t first = row_.load(std::memory_order_relaxed);
    return first == kNone ? -1 : first;
  }

 private:
  static constexpr int64_t kNone = INT64_MAX;
  std::atomic<int64_t> row_{kNone};
};

}  // namespace sslkernels

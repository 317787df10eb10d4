// How the rows of patch masking are shared out among threads. No torch, no instruction set.
#pragma once
#include <algorithm>
#include <atomic>
#include <vector>

#include "patch_mask.h"
#include "result_memory.h"

namespace sslkernels {

// What this thread wrote past the caches is there for the others from here on.
inline void finish_streams() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

inline int64_t blocks_of(int64_t items, int64_t block) { return (items + block - 1) / block; }

// Shares out [0, items) in chunks. Each worker has a range of its own, so that no two meet in one page of fresh memory,
// and helps the others when it is through. make() returns what a worker calls with (begin, end); parallel(n, body) runs
// body(begin, end) over a partition of [0, n).
template <class Parallel, class Make>
void share(int64_t items, int64_t chunk, int64_t threads, const Parallel& parallel, const Make& make) {
  const int64_t chunks = blocks_of(items, chunk), workers = std::min(threads, chunks);
  if (chunks == 0) return;
  std::vector<std::atomic<int64_t>> taken(workers);  // chunks of each range
  parallel(workers, [&](int64_t own, int64_t) {
    auto work = make();
    for (int64_t i = 0; i < workers; i++) {
      const int64_t range = (own + i) % workers;
      const int64_t first = chunks * range / workers, last = chunks * (range + 1) / workers;
      for (int64_t c; (c = first + taken[range].fetch_add(1, std::memory_order_relaxed)) < last;)
        work(c * chunk, std::min(items, (c + 1) * chunk));
    }
    finish_streams();
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

  // For a result of so many bytes. One that no cache holds for its reader is written past them, which saves the reading
  // of what it overwrites.
  const RowMoves& moves(int64_t bytes) const { return bytes > kStreamedResult ? kernel.streamed : kernel.cached; }
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

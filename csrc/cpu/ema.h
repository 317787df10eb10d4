// The moving average on the CPU: what there is to do, and how it is shared out. No torch, no instruction set: the loops
// are those of ema_kernel.h, reached through EmaKernel.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "../ema_list.h"

namespace sslkernels {

struct EmaJob {
  double weight;  // of the student; 0 leaves the teachers alone
  bool stochastic;
  uint64_t seed;
  uint32_t step;
};

struct EmaKernel {
  // Updates the elements [begin, end) of a tensor, in the order in which they are walked.
  void (*update)(const EmaTensor&, const EmaJob&, int64_t begin, int64_t end);
};

constexpr int64_t kEmaChunk = 65536;  // elements that a worker takes at a time; waking one up costs as much

// Runs a job on `threads` workers, over one flat range of elements: a thousand small tensors cost one parallel region.
// parallel(n, body) runs body(begin, end) over a partition of [0, n).
template <class Parallel>
void run_ema(const std::vector<EmaTensor>& tensors, const EmaJob& job, const EmaKernel& kernel, int64_t threads,
             const Parallel& parallel) {
  std::vector<int64_t> ends(tensors.size());
  int64_t total = 0;
  for (size_t t = 0; t < tensors.size(); t++) ends[t] = total += tensors[t].count;
  const int64_t chunks = (total + kEmaChunk - 1) / kEmaChunk;
  std::atomic<int64_t> next{0};
  parallel(std::min(threads, chunks), [&](int64_t, int64_t) {
    for (int64_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) {
      int64_t at = chunk * kEmaChunk;
      const int64_t end = std::min(at + kEmaChunk, total);
      for (size_t t = std::upper_bound(ends.begin(), ends.end(), at) - ends.begin(); at < end; t++) {
        const int64_t start = ends[t] - tensors[t].count, stop = std::min(end, ends[t]);
        if (stop > at) kernel.update(tensors[t], job, at - start, stop - start);
        at = stop;
      }
    }
  });
}

}  // namespace sslkernels

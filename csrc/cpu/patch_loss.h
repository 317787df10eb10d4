// The masked patch loss on the CPU: how it is shared out. No torch, no instruction set: the loops are those of
// patch_loss_kernel.h, reached through PatchLossKernel.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "../patch_loss_job.h"
#include "workspace.h"

namespace sslkernels {

struct PatchLossKernel {
  // Sums the squared errors of the masked patches [begin, end), numbered through all samples, and writes their
  // gradient, `scale` times the error, and zeros for the others. `scratch` holds patch_scratch_bytes().
  double (*forward)(const PatchLossJob&, double scale, int64_t begin, int64_t end, void* scratch);
  void (*backward)(const PatchGradJob&, double grad_loss, int64_t begin, int64_t end);
};

// The pixels of a patch, padded to whole vectors.
inline int64_t patch_scratch_bytes(const PatchLossJob& job) { return (job.width() + 256) * sizeof(double); }

// Runs work(chunk, worker) for chunks [0, count), each taken by the worker that is free.
template <class Parallel, class Work>
void share_chunks(int64_t count, int64_t threads, const Parallel& parallel, const Work& work) {
  std::atomic<int64_t> next{0};
  parallel(std::min(threads, count), [&](int64_t worker, int64_t) {
    for (int64_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(chunk, worker);
  });
}

constexpr int64_t kPatchChunk = 16384;  // elements that a worker takes at a time

// Patches of a chunk: it depends on nothing but their size, so that the sums do not depend on the threads.
inline int64_t patches_in_chunk(int64_t width) { return std::max<int64_t>(1, kPatchChunk / width); }

// The loss; with job.grad the gradient too. parallel(n, body) runs body(begin, end) over a partition of [0, n).
template <class Parallel>
double run_patch_loss(const PatchLossJob& job, const PatchLossKernel& kernel, int64_t threads,
                      const Parallel& parallel) {
  const int64_t patches = job.samples * job.tokens(), width = job.width(), each = patches_in_chunk(width);
  const int64_t chunks = (patches + each - 1) / each, masked = std::count(job.mask, job.mask + patches, true);
  const double scale = 2.0 / (static_cast<double>(std::max<int64_t>(1, masked)) * static_cast<double>(width));
  std::vector<double> sums(chunks);
  Workspace workspace;
  char* scratch;
  const int64_t bytes = patch_scratch_bytes(job);
  workspace.allocate([&](Workspace& w) { w.take(scratch, bytes * threads); });
  share_chunks(chunks, threads, parallel, [&](int64_t chunk, int64_t worker) {
    const int64_t begin = chunk * each;
    sums[chunk] = kernel.forward(job, scale, begin, std::min(begin + each, patches), scratch + worker * bytes);
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return total * scale / 2;
}

template <class Parallel>
void run_patch_grad(const PatchGradJob& job, double grad_loss, const PatchLossKernel& kernel, int64_t threads,
                    const Parallel& parallel) {
  const int64_t each = patches_in_chunk(job.width);
  share_chunks((job.rows + each - 1) / each, threads, parallel, [&](int64_t chunk, int64_t) {
    kernel.backward(job, grad_loss, chunk * each, std::min((chunk + 1) * each, job.rows));
  });
}

}  // namespace sslkernels

// NT-Xent on the CPU: the problem, its workspace and the order of the steps. No torch, no instruction set: the loops
// are those of infonce_kernel.h, reached through NtXentKernel.
//
// Rows are the two views interleaved, row 2i = z0[i] and row 2i + 1 = z1[i], so that a row's positive is its neighbour
// and only tiles on the diagonal need a mask. Results are stored in the order of the public op: all of z0, then z1.
#pragma once
#include <cmath>

#include "logits.h"
#include "tournament.h"

namespace sslkernels {

struct NtXentJob {
  // ---- inputs
  Rows in;  // two views
  double temperature;
  bool bounded;  // |logit| <= 1/|temperature|, close enough to subtract that bound instead of the row's maximum
  bool top1;     // compare the positive's logit with the largest negative's; not with bounded
  const float* positive_weight;  // DCL: (2 pairs,), and the positive stays out of the denominator; null: NT-Xent

  // ---- forward: results, (2 pairs,)
  float *loss, *positive;
  double* logsumexp;
  bool* hit;

  // ---- backward: the gradient of the rows' losses, what the forward gave, and the results
  const float *grad_loss, *saved_loss;
  const double* saved_logsumexp;
  void* grad_view[2];  // (pairs, dim), contiguous, in the dtype of the inputs
  double grad_temperature;

  // ---- workspace
  Logits logits;
  Side z;
  double* cosine;                  // forward, per row: z . z of its positive
  double grad_scale;               // the largest |grad_loss|, taken out of the weights
  double* grad_temperature_parts;  // one per panel

  int64_t output_row(int64_t row) const { return row % 2 * (in.count / 2) + row / 2; }
};

// The loops of one instruction set for one kind of tile. `scratch` is private to a worker.
struct NtXentKernel : Packing {
  int64_t scratch_bytes;
  void (*pack)(const NtXentJob&, int64_t panel, bool backward, void* scratch);
  void (*forward_tile)(const NtXentJob&, int64_t i0, int64_t j0, void* scratch);
  void (*forward_rows)(const NtXentJob&, int64_t panel, void* scratch);
  void (*backward_tile)(const NtXentJob&, int64_t i0, int64_t j0, void* scratch);
  void (*backward_rows)(const NtXentJob&, int64_t panel, void* scratch);
};

// parallel(n, body): runs body(begin, end) over a partition of [0, n).
template <class Parallel>
class NtXentRunner {
 public:
  NtXentRunner(NtXentJob& job, const NtXentKernel& kernel, int64_t threads, const Parallel& parallel)
      : job_(job), kernel_(kernel), threads_(threads), parallel_(parallel) {}

  void forward() {
    allocate(false);
    each_panel([&](int64_t panel, void* scratch) { kernel_.pack(job_, panel, false, scratch); });
    each_tile(kernel_.forward_tile);
    each_panel([&](int64_t panel, void* scratch) { kernel_.forward_rows(job_, panel, scratch); });
  }

  void backward() {
    job_.grad_scale = 0;
    for (int64_t i = 0; i < job_.in.count; i++) {
      const double w = std::fabs(job_.grad_loss[i]);
      if (!(w <= job_.grad_scale)) job_.grad_scale = w;  // a NaN is kept too
    }
    if (job_.grad_scale == 0) job_.grad_scale = 1;
    allocate(true);
    each_panel([&](int64_t panel, void* scratch) { kernel_.pack(job_, panel, true, scratch); });
    each_tile(kernel_.backward_tile);
    each_panel([&](int64_t panel, void* scratch) { kernel_.backward_rows(job_, panel, scratch); });
    job_.grad_temperature = 0;
    for (int64_t p = 0; p < job_.z.padded_rows / kernel_.panel; p++)
      job_.grad_temperature += job_.grad_temperature_parts[p];
  }

 private:
  void allocate(bool backward) {
    Side& z = job_.z;
    z = {};
    z.rows = job_.in.count;
    z.padded_rows = round_up(z.rows, kernel_.panel);
    const int64_t dim = job_.in.dim;
    job_.logits = make_logits(dim, kernel_.words(dim), tile_side(z.rows), 1 / job_.temperature, job_.bounded);
    job_.logits.columns = true;
    job_.logits.triangle = Triangle::kPairs;
    const SideLayout layout{kernel_, dim, backward, false};
    workspace_.allocate([&](Workspace& w) {
      layout.take(w, z, Role::kBoth);
      if (backward) {
        w.take(job_.grad_temperature_parts, z.padded_rows / kernel_.panel);
      } else {
        w.take(job_.cosine, z.padded_rows);
        w.take(job_.logits.own_logit, z.padded_rows);
      }
      w.take(scratch_, round_up(kernel_.scratch_bytes, 128) * threads_);
    });
    if (!job_.top1) job_.logits.own_logit = nullptr;
  }
  void* scratch(int64_t worker) const { return scratch_ + worker * round_up(kernel_.scratch_bytes, 128); }

  // f(panel, scratch) for every panel of rows; a worker's panels are neighbours.
  template <class F>
  void each_panel(const F& f) {
    const int64_t panels = job_.z.padded_rows / kernel_.panel;
    const int64_t workers = threads_ < panels ? threads_ : panels;
    parallel_(workers, [&](int64_t begin, int64_t end) {
      for (int64_t p = panels * begin / workers; p < panels * end / workers; p++) f(p, scratch(begin));
    });
  }

  void each_tile(void (*visit)(const NtXentJob&, int64_t, int64_t, void*)) {
    const int64_t tiles = (job_.z.padded_rows + job_.logits.tile - 1) / job_.logits.tile;
    const int64_t side = tiles_in_group(tiles), groups = (tiles + side - 1) / side;
    const int64_t games = groups * (groups + 1) / 2, workers = threads_ < games ? threads_ : games;
    Tournament tournament(groups);
    parallel_(workers, [&](int64_t begin, int64_t) {
      tournament.work([&](int64_t a, int64_t b) {
        for (int64_t i = a * side; i < (a + 1) * side && i < tiles; i++)
          for (int64_t j = a == b ? i : b * side; j < (b + 1) * side && j < tiles; j++)
            visit(job_, i * job_.logits.tile, j * job_.logits.tile, scratch(begin));
      });
    });
  }
  NtXentJob& job_;
  const NtXentKernel& kernel_;
  int64_t threads_;
  const Parallel& parallel_;
  Workspace workspace_;
  char* scratch_ = nullptr;
};

}  // namespace sslkernels

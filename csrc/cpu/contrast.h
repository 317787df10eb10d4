// The contrastive core on the CPU: softmaxes of similarities along rows and columns, the sigmoid loss, and their
// gradients. No torch, no instruction set: the loops are those of contrast_kernel.h, reached through ContrastKernel.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "logits.h"
#include "tournament.h"

namespace sslkernels {

enum class Pass { kForward, kBackward, kSigmoidForward, kSigmoidBackward };

// One side of the logits: what is given, and the workspace.
struct ContrastSide {
  Rows in;
  const int64_t* ids;       // or null
  const double* gradient;   // backward, per row; null on the columns where those have none
  const double* logsumexp;  // backward; not for the sigmoid loss
  Side side;
};

struct ContrastJob {
  // ---- inputs
  ContrastSide query, key;  // key is unused where symmetric
  bool symmetric;           // the keys are the queries, and no row meets itself
  double scale, bias;
  bool bounded;         // see Logits
  bool columns;         // forward: log-sum-exp along the columns too; backward: they have a gradient
  bool attract;         // forward: also the mean of the keys under each row's softmax; without columns only
  const int64_t* skip;  // (rows, skips)
  int64_t skips;

  // ---- forward: results. The sigmoid loss has only lse_rows, which receives the rows' losses.
  double *lse_rows, *lse_columns;
  float *peak_rows, *peak_columns, *skipped;  // null where not asked for
  float* attraction;

  // ---- backward: results, contiguous
  float *grad_query, *grad_key;
  double grad_scale, grad_bias;

  // ---- workspace
  Logits logits;
  double largest_gradient;  // taken out of the weights
};

// The loops of one instruction set for one kind of tile. `scratch` is private to a worker.
struct ContrastKernel : Packing {
  int64_t scratch_bytes;
  void (*pack)(const ContrastJob&, const ContrastSide&, int64_t panel, void* scratch);
  void (*tile)(const ContrastJob&, Pass, const Side& a, const Side& b, int64_t i0, int64_t j0, void* scratch);
  void (*gather_grad)(const Side&, int64_t dim, int64_t panel);
};

// parallel(n, body): runs body(begin, end) over a partition of [0, n).
template <class Parallel>
class ContrastRunner {
 public:
  ContrastRunner(ContrastJob& job, const ContrastKernel& kernel, int64_t threads, const Parallel& parallel)
      : job_(job), kernel_(kernel), threads_(threads), parallel_(parallel) {}

  void forward() {
    if (job_.columns || job_.symmetric) {
      prepare(Pass::kForward);
      pack_sides();
      each_tile(Pass::kForward);
      close_sums(job_.query.side, job_.lse_rows, job_.peak_rows);
      if (job_.columns && !job_.symmetric) close_sums(job_.key.side, job_.lse_columns, job_.peak_columns);
      return close_skipped();
    }
    forward_by_lanes(Pass::kForward);
    for_rows([&](int64_t row) { merge_lanes(row); });
    close_skipped();
  }

  void sigmoid_forward() {
    forward_by_lanes(Pass::kSigmoidForward);
    for (int64_t row = 0; row < job_.query.in.count; row++) {
      job_.lse_rows[row] = 0;
      for (const Side& lane : lanes_) job_.lse_rows[row] += lane.sums[row];
    }
  }

  void backward(bool sigmoid) {
    const Pass pass = sigmoid ? Pass::kSigmoidBackward : Pass::kBackward;
    job_.largest_gradient = largest_gradient();
    prepare(pass);
    pack_sides();
    each_tile(pass);
    gather_grad(job_.query.side);
    if (!job_.symmetric) gather_grad(job_.key.side);
    close_gradients(pass);
  }

 private:
  static constexpr int64_t kLaneBytes = int64_t{4} << 20;  // what the lanes' sums may take
  static constexpr int64_t kBlockTiles = 4;                // row tiles that pass over a tile of keys while it is packed

  Side& other() { return job_.symmetric ? job_.query.side : job_.key.side; }

  // ---- workspace

  static Side side_of(const ContrastSide& from, int64_t panel) {
    Side side{};
    side.rows = from.in.count;
    side.padded_rows = round_up(side.rows, panel);
    return side;
  }

  SideLayout set_logits(bool backward) {
    const int64_t dim = job_.query.in.dim;
    const int64_t rows = std::max(job_.query.in.count, job_.symmetric ? 0 : job_.key.in.count);
    const int64_t tile = tile_side(rows);
    job_.logits = make_logits(dim, kernel_.words(dim), tile, job_.scale, job_.bounded);
    job_.logits.columns = job_.columns || job_.symmetric;
    job_.logits.triangle = job_.symmetric ? Triangle::kSelf : Triangle::kNone;
    job_.logits.skip = job_.skip;
    job_.logits.skips = job_.skips;
    job_.logits.ids = job_.query.ids != nullptr;
    job_.logits.bias2 = static_cast<float>(job_.bias * kLog2E);
    return {kernel_, dim, backward, job_.logits.ids};
  }

  // Both sides packed whole.
  void prepare(Pass pass) {
    const SideLayout layout = set_logits(pass != Pass::kForward);
    job_.query.side = side_of(job_.query, kernel_.panel);
    job_.key.side = side_of(job_.key, kernel_.panel);
    workspace_.allocate([&](Workspace& w) {
      layout.take(w, job_.query.side, job_.symmetric ? Role::kBoth : Role::kRows);
      if (pass == Pass::kSigmoidBackward || (pass == Pass::kBackward && kernel_.bf16))
        layout.take_sums(w, job_.query.side);
      if (!job_.symmetric) layout.take(w, job_.key.side, Role::kColumns);
      if (job_.skipped) w.take(job_.logits.own_logit, job_.query.side.padded_rows);
      w.take(scratch_, scratch_bytes() * threads_);
    });
    clear_own_logits();
  }

  int64_t scratch_bytes() const { return round_up(kernel_.scratch_bytes, 128); }
  void* scratch(int64_t worker) const { return scratch_ + worker * scratch_bytes(); }

  void clear_own_logits() {
    for (int64_t row = 0; job_.skipped && row < job_.query.in.count; row++)
      job_.logits.own_logit[row] = -std::numeric_limits<float>::infinity();
  }

  // ---- packing and tiles

  void pack_sides() {
    pack(job_.query);
    if (!job_.symmetric) pack(job_.key);
  }

  void pack(const ContrastSide& of) {
    each_panel(of.side, [&](int64_t panel, int64_t worker) { kernel_.pack(job_, of, panel, scratch(worker)); });
  }
  void gather_grad(const Side& side) {
    each_panel(side, [&](int64_t panel, int64_t) { kernel_.gather_grad(side, job_.logits.dim, panel); });
  }
  template <class F>
  void each_panel(const Side& side, const F& f) {
    const int64_t panels = side.padded_rows / kernel_.panel, workers = std::min(threads_, panels);
    parallel_(workers, [&](int64_t begin, int64_t end) {
      for (int64_t p = panels * begin / workers; p < panels * end / workers; p++) f(p, begin);
    });
  }

  void each_tile(Pass pass) {
    const Side &a = job_.query.side, &b = other();
    const int64_t tile = job_.logits.tile, row_tiles = (a.padded_rows + tile - 1) / tile,
                  column_tiles = (b.padded_rows + tile - 1) / tile;
    const int64_t side = tiles_in_group(std::max(row_tiles, column_tiles));
    const auto visit = [&](int64_t worker, int64_t x, int64_t y) {
      for (int64_t i = x * side; i < std::min((x + 1) * side, row_tiles); i++)
        for (int64_t j = job_.symmetric && x == y ? i : y * side; j < std::min((y + 1) * side, column_tiles); j++)
          kernel_.tile(job_, pass, a, b, i * tile, j * tile, scratch(worker));
    };
    const int64_t rows = (row_tiles + side - 1) / side, columns = (column_tiles + side - 1) / side;
    if (job_.symmetric) {
      Tournament games(rows);
      play(games, rows * (rows + 1) / 2, visit);
    } else {
      LatinSquare games(rows, columns);
      play(games, rows * columns, visit);
    }
  }

  template <class Games, class Visit>
  void play(Games& games, int64_t count, const Visit& visit) {
    parallel_(std::min(threads_, count),
              [&](int64_t worker, int64_t) { games.work([&](int64_t x, int64_t y) { visit(worker, x, y); }); });
  }

  // ---- forward along the rows alone: keys are packed tile by tile and forgotten, so that a long queue costs nothing.
  // A lane is a range of keys with sums of its own; their number depends on the shape alone, and so do the results.

  void forward_by_lanes(Pass pass) {
    SideLayout layout = set_logits(false);
    const int64_t tile = job_.logits.tile;
    job_.query.side = side_of(job_.query, kernel_.panel);
    const Side& query = job_.query.side;
    const int64_t key_tiles = (job_.key.in.count + tile - 1) / tile, block = kBlockTiles * tile;
    const int64_t blocks = (query.padded_rows + block - 1) / block;
    const int64_t bytes = query.padded_rows * 4 * (job_.attract ? layout.padded_dim() : 2);
    const int64_t wanted = std::min<int64_t>({(32 + blocks - 1) / std::max<int64_t>(blocks, 1),
                                              kLaneBytes / std::max<int64_t>(bytes, 1), (key_tiles + 3) / 4});
    lanes_.assign(std::max<int64_t>(wanted, 1), Side{});
    std::vector<ContrastSide> chunks(threads_, job_.key);
    workspace_.allocate([&](Workspace& w) {
      layout.take(w, job_.query.side, Role::kRows);
      if (job_.skipped) w.take(job_.logits.own_logit, query.padded_rows);
      for (Side& lane : lanes_) {
        lane = query;
        layout.take_sums(w, lane);
        if (job_.attract) layout.take_grad(w, lane);
      }
      for (ContrastSide& chunk : chunks) {
        chunk.side = Side{};
        chunk.side.padded_rows = tile;
        layout.take(w, chunk.side, Role::kColumns);
        if (job_.attract) layout.take_columns(w, chunk.side);
      }
      w.take(scratch_, scratch_bytes() * threads_);
    });
    clear_own_logits();
    pack(job_.query);
    const int64_t lanes = lanes_.size(), tasks = blocks * lanes;
    std::atomic<int64_t> next{0};
    parallel_(std::min(threads_, tasks), [&](int64_t worker, int64_t) {
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        const int64_t lane = task / blocks, first = task % blocks * block;
        clear_lane(lanes_[lane], first, std::min(first + block, query.padded_rows));
        for (int64_t t = key_tiles * lane / lanes; t < key_tiles * (lane + 1) / lanes; t++) {
          pack_chunk(chunks[worker], t * tile, tile, scratch(worker));
          for (int64_t i = first; i < std::min(first + block, query.padded_rows); i += tile)
            kernel_.tile(job_, pass, lanes_[lane], chunks[worker].side, i, 0, scratch(worker));
        }
      }
    });
  }

  void clear_lane(const Side& lane, int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; row++) lane.sums[row] = 0, lane.maxima[row] = -job_.logits.none2;
    for (int64_t column = 0; job_.attract && column < job_.logits.dim; column += kernel_.panel) {
      float* grad = lane.grad + column * lane.padded_rows;
      std::fill(grad + begin * kernel_.panel, grad + end * kernel_.panel, 0.f);
    }
  }

  // Packs the keys from `first` on, one tile of them, as a side of its own.
  void pack_chunk(ContrastSide& chunk, int64_t first, int64_t tile, void* scratch) const {
    const Rows& in = job_.key.in;
    chunk.in.count = std::min(tile, in.count - first);
    const int64_t itemsize = in.dtype == Dtype::kFloat32 ? 4 : 2;
    chunk.in.view[0] = static_cast<const char*>(in.view[0]) + first * in.row_stride[0] * itemsize;
    chunk.ids = job_.key.ids ? job_.key.ids + first : nullptr;
    chunk.side.first = first;
    chunk.side.rows = chunk.in.count;
    chunk.side.padded_rows = round_up(chunk.in.count, kernel_.panel);
    for (int64_t p = 0; p < chunk.side.padded_rows / kernel_.panel; p++) kernel_.pack(job_, chunk, p, scratch);
  }

  void merge_lanes(int64_t row) {
    float peak = -job_.logits.none2;
    for (const Side& lane : lanes_) peak = std::max(peak, lane.maxima[row]);
    double total = 0;
    std::vector<double> factors(lanes_.size());
    for (size_t l = 0; l < lanes_.size(); l++) {
      factors[l] = job_.bounded ? 1 : std::exp2(static_cast<double>(lanes_[l].maxima[row]) - peak);
      total += factors[l] * lanes_[l].sums[row];
    }
    job_.lse_rows[row] = logsumexp(total, peak);
    if (job_.peak_rows) job_.peak_rows[row] = natural(peak);
    if (!job_.attract) return;
    std::vector<double> sums(job_.logits.dim);
    for (size_t l = 0; l < lanes_.size(); l++)
      each_grad(lanes_[l], row, [&](int64_t d, float grad) { sums[d] += factors[l] * grad; });
    float* out = job_.attraction + row * job_.logits.dim;
    for (int64_t d = 0; d < job_.logits.dim; d++) out[d] = total == 0 ? 0 : static_cast<float>(sums[d] / total);
  }

  // ---- closing

  double logsumexp(double total, float peak) const {
    const double offset = (job_.bounded ? job_.logits.bound2 : peak) / kLog2E;
    return total == 0 ? -std::numeric_limits<double>::infinity() : std::log(total) + offset;  // a NaN stays one
  }
  float natural(float base2) const {
    return base2 <= -job_.logits.none2 ? -std::numeric_limits<float>::infinity() : static_cast<float>(base2 / kLog2E);
  }
  template <class F>
  void each_grad(const Side& side, int64_t row, const F& f) const {
    const int64_t dim = job_.logits.dim, panel = kernel_.panel;
    for (int64_t first = 0; first < dim; first += panel) {
      const float* grad = side.grad + first * side.padded_rows + row * panel;
      for (int64_t d = first; d < std::min(first + panel, dim); d++) f(d, grad[d - first]);
    }
  }

  void close_sums(const Side& side, double* out, float* peaks) const {
    for (int64_t row = 0; row < side.rows; row++) {
      out[row] = logsumexp(side.sums[row], side.maxima[row]);
      if (peaks) peaks[row] = natural(side.maxima[row]);
    }
  }
  void close_skipped() const {
    for (int64_t row = 0; job_.skipped && row < job_.query.in.count; row++)
      job_.skipped[row] = natural(job_.logits.own_logit[row]);
  }

  double largest_gradient() const {
    double largest = 0;
    for (const ContrastSide* of : {&job_.query, &job_.key})
      for (int64_t i = 0; of->gradient && i < of->in.count; i++) {
        const double size = std::fabs(of->gradient[i]);
        if (!(size <= largest)) largest = size;  // a NaN is kept too
      }
    return largest == 0 ? 1 : largest;
  }

  // The logits are bilinear: scale * d/d scale is the inner product of a side with its gradient, twice that where both
  // sides are one.
  void close_gradients(Pass pass) {
    const int64_t rows = job_.query.in.count;
    std::vector<double> along(rows);
    for_rows([&](int64_t row) { along[row] = close_gradient(job_.query, row, job_.grad_query); });
    const float* sums = job_.query.side.sums;
    double from_rows = 0, from_tiles = 0;
    for (int64_t row = 0; row < rows; row++) {
      from_rows += along[row];
      if (sums) from_tiles += sums[row] * job_.largest_gradient;
    }
    if (job_.symmetric) from_rows /= 2;
    job_.grad_scale = sums && pass == Pass::kBackward ? from_tiles : from_rows;
    job_.grad_bias = pass == Pass::kSigmoidBackward ? from_tiles : 0;
    if (job_.symmetric) return;
    const int64_t keys = job_.key.in.count, workers = std::min(threads_, keys);
    parallel_(workers, [&](int64_t begin, int64_t end) {
      for (int64_t row = keys * begin / workers; row < keys * end / workers; row++)
        close_gradient(job_.key, row, job_.grad_key);
    });
  }

  double close_gradient(const ContrastSide& of, int64_t row, float* out) const {
    const int64_t dim = job_.logits.dim;
    const float* x = static_cast<const float*>(of.in.view[0]) + row * of.in.row_stride[0];
    const double factor = job_.largest_gradient * job_.scale;
    double along[2] = {0, 0};  // two chains
    each_grad(of.side, row, [&](int64_t d, float grad) {
      along[d % 2] += static_cast<double>(grad) * x[d * of.in.column_stride[0]];
      out[row * dim + d] = static_cast<float>(grad * factor);
    });
    return (along[0] + along[1]) * job_.largest_gradient;
  }

  template <class F>
  void for_rows(const F& f) {
    const int64_t rows = job_.query.in.count, workers = std::min(threads_, rows);
    parallel_(workers, [&](int64_t begin, int64_t end) {
      for (int64_t row = rows * begin / workers; row < rows * end / workers; row++) f(row);
    });
  }

  ContrastJob& job_;
  const ContrastKernel& kernel_;
  int64_t threads_;
  const Parallel& parallel_;
  Workspace workspace_;
  std::vector<Side> lanes_;
  char* scratch_ = nullptr;
};

}  // namespace sslkernels

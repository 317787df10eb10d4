// What the contrastive losses share on the CPU: rows of embeddings, the two sides of a matrix of logits, and which of
// its elements take part. No torch, no instruction set: the loops are those of logit_rows.h and logit_tiles.h.
#pragma once
#include <cstdint>

#include "../dtype.h"
#include "workspace.h"

namespace sslkernels {

constexpr double kNormalizeEps = 1e-12;  // of torch.nn.functional.normalize
constexpr double kLog2E = 1.4426950408889634;
constexpr int64_t kMaxTile = 128;
constexpr double kMaxBoundedSpan = 80;  // see MAX_BOUNDED_SPAN in ops/infonce/arguments.py

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// Of a square tile; smaller ones share out better among threads.
inline int64_t tile_side(int64_t rows) { return rows >= 1024 ? kMaxTile : kMaxTile / 2; }

// Embeddings as the caller has them: the rows of one tensor, or of two in turn.
struct Rows {
  const void* view[2];
  int64_t row_stride[2], column_stride[2];  // in elements
  int64_t views, count, dim;
  Dtype dtype;
  bool normalize;
};

// The rows or the columns of the logits: what the tiles read, and what they add up.
struct Side {
  int64_t rows, padded_rows;
  int64_t first;             // index of the first row among the columns that Logits::skip names
  uint32_t* panels;          // [padded_rows / panel][words][panel]: operands of S = A B^T
  uint32_t* columns;         // [dim / panel][padded_rows (bf16: / 2)][panel]: right operand of dA += G B
  uint32_t *lefts, *turned;  // with AMX, see tile_amx.h: left operands of S, and of dB^T += A^T G
  double* scale;             // what turns a row of the input into a row of A
  float* residual;           // what the packed row still has to be multiplied by (bf16 tiles; otherwise 1)
  int32_t *id_low, *id_high;
  float *sums, *maxima;  // forward: sum of exp over what takes part, its offset (base 2); backward: see LogitTile
  float* grad;           // [dim / panel][padded_rows][panel]
  float* turned_grad;  // with AMX: what the side is given as the columns, [dim / panel][padded_rows / panel][dim][row]
  float *weight, *logsumexp2, *logsumexp2_low;  // backward: factor of exp, and offset (base 2) in two parts
};

// Which pairs the upper triangle of a matrix of logits leaves out, if it is one.
enum class Triangle {
  kNone,   // rows and columns are different sides
  kSelf,   // no row meets itself
  kPairs,  // nor its neighbour, where rows 2i and 2i + 1 are the two views
};

struct Logits {
  int64_t dim, words, tile;
  double scale;
  float to_base2, to_base2_low;  // log2(e) * scale in two parts, so that large logits are as exact as small ones
  float bound2;                  // log2(e) * |scale|
  float none2;                   // minus the maximum (base 2) of no logits; a pair that is left out lies below it
  bool bounded;                  // |logit| <= |scale|, close enough to subtract that bound instead of the row's maximum
  bool columns;                  // sums along the columns too
  Triangle triangle;
  const int64_t* skip;  // (rows, skips): columns that a row leaves out
  int64_t skips;
  bool ids;          // pairs of equal ids are left out
  float* own_logit;  // if not null, per row: the logit of its first skip, or of its neighbour (base 2)
  float bias2;       // sigmoid: added to the logit, in base 2; what is left out belongs together instead
};

constexpr double kFarSimilarity = 0x1p100;  // of pairs that are left out, in size; and half of it is out of reach

inline Logits make_logits(int64_t dim, int64_t words, int64_t tile, double scale, bool bounded) {
  const double tiny = scale < 0 ? -1e-20 : 1e-20;  // so that pairs that are left out stay out at a scale of 0
  const double factor = kLog2E * (scale < -1e-20 || scale > 1e-20 ? scale : tiny);
  Logits logits{};
  logits.dim = dim;
  logits.words = words;
  logits.tile = tile;
  logits.scale = scale;
  logits.bounded = bounded;
  logits.to_base2 = static_cast<float>(factor);
  logits.to_base2_low = static_cast<float>(factor - logits.to_base2);
  logits.bound2 = static_cast<float>(factor < 0 ? -factor : factor);
  logits.none2 = static_cast<float>(kFarSimilarity / 2) * logits.bound2;
  return logits;
}

// How the tiles of a kernel want their operands.
struct Packing {
  int64_t panel;
  bool bf16, amx;

  int64_t words(int64_t dim) const { return amx ? round_up(dim, 32) / 2 : bf16 ? (dim + 1) / 2 : dim; }
  int64_t parts() const { return amx && !bf16 ? 3 : 1; }
};

// What a side is in the tiles.
enum class Role { kRows, kColumns, kBoth };

// Takes what a side needs from a workspace.
struct SideLayout {
  Packing packing;
  int64_t dim;
  bool backward, ids;

  int64_t padded_dim() const { return round_up(dim, packing.panel); }

  void take(Workspace& w, Side& s, Role role) const {
    const int64_t words = s.padded_rows * packing.words(dim) * packing.parts();
    if (!packing.amx || role != Role::kRows) w.take(s.panels, words);
    if (packing.amx && role != Role::kColumns) w.take(s.lefts, words);
    w.take(s.scale, s.padded_rows);
    w.take(s.residual, s.padded_rows);
    if (ids) {
      w.take(s.id_low, s.padded_rows);
      w.take(s.id_high, s.padded_rows);
    }
    if (!backward) {
      take_sums(w, s);
      return;
    }
    if (!packing.amx || role != Role::kRows) take_columns(w, s);
    if (packing.amx && role != Role::kColumns) w.take(s.turned, words);
    take_grads(w, s, role);
    w.take(s.weight, s.padded_rows);
    w.take(s.logsumexp2, s.padded_rows);
    w.take(s.logsumexp2_low, s.padded_rows);
  }
  void take_sums(Workspace& w, Side& s) const {
    w.take(s.sums, s.padded_rows);
    w.take(s.maxima, s.padded_rows);
  }
  void take_columns(Workspace& w, Side& s) const {
    w.take(s.columns, s.padded_rows * padded_dim() * packing.parts() / (packing.bf16 || packing.amx ? 2 : 1));
  }
  void take_grad(Workspace& w, Side& s) const { w.take(s.grad, s.padded_rows * padded_dim()); }
  void take_grads(Workspace& w, Side& s, Role role) const {
    take_grad(w, s);
    if (!packing.amx || role == Role::kRows) return;
    s.turned_grad = s.grad;  // turned where it lies, where there is no other
    if (role == Role::kBoth) w.take(s.turned_grad, s.padded_rows * padded_dim());
  }
};

}  // namespace sslkernels

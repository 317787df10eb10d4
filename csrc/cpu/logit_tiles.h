// Tiles of logits and what is done to them: S = A B^T block by block, the exp and the sums in the epilogue, and the
// products dA += G B and dB += G^T A of the backward. Every contrastive loss is a way through them. Compiled once per
// instruction set.
#pragma once
#include "logit_rows.h"

namespace sslkernels::SSLK_ISA {

template <bool kBf16>
struct LogitTile : TileProducts<kBf16> {
  typedef TileProducts<kBf16> Products;
  typedef typename Products::FullBlock FullBlock;
  using Products::a;
  using Products::accumulate_both;
  using Products::accumulate_rows;
  using Products::b;
  using Products::diagonal;
  using Products::height;
  using Products::i0;
  using Products::j0;
  using Products::logits;
  using Products::scratch;
  using Products::store_g;
  using Products::width;

  const bool masked = any_masked();
  const float to_base2 = logits.to_base2, to_base2_low = logits.to_base2_low, bound2 = logits.bound2;

  // ---- S, block by block; epilogue(row, column, block) gets each finished block.

  template <class Epilogue>
  SSLK_INLINE void similarities(const Epilogue& epilogue) {
    const int64_t piece = Products::steps_at_once();
    for (int64_t k = 0; k < logits.words; k += piece) {
      const int64_t steps = min(piece, logits.words - k);
      for (int64_t column = 0; column < width; column += kPanel)
        for (int64_t block = 0; block < height; block += Products::kBlockRows) {
          if (diagonal && column + kPanel <= block) break;  // below the diagonal
          Products::multiply_block(block, column, k, steps,
                                   [&](int64_t row, FullBlock& c) __attribute__((always_inline)) {
                                     finish_block(row, column, k, k + steps == logits.words, c, epilogue);
                                   });
        }
    }
  }

  // Takes a block's sums over some steps, from step k on.
  template <class Epilogue>
  SSLK_INLINE void finish_block(int64_t row, int64_t column, int64_t k, bool last, FullBlock& c,
                                const Epilogue& epilogue) {
    float* partial = scratch.s + row * kTileStride + column;
    if (k > 0)  // added to the sums so far, not continued from them: short sums round less
      SSLK_UNROLL for (int r = 0; r < kRows; r++) SSLK_UNROLL for (int v = 0; v < kVecs; v++) c[r][v] +=
          load(partial + r * kTileStride + v * kLanes);
    if (last) {
      epilogue(row, column, c);
    } else {
      SSLK_UNROLL for (int r = 0; r < kRows; r++) SSLK_UNROLL for (int v = 0; v < kVecs; v++)
          store(partial + r * kTileStride + v * kLanes, c[r][v]);
    }
  }

  // The logit of a similarity in base 2, minus an offset. The difference is taken first, where the large parts cancel.
  SSLK_INLINE Vec logit(Vec s, Vec offset) const {
    return fused(s, broadcast(to_base2_low), fused(s, broadcast(to_base2), -offset));
  }

  // c := similarities: what the packed rows still have to be multiplied by goes in.
  SSLK_INLINE void to_similarities(int64_t row, int64_t column, FullBlock& c) const {
    if constexpr (kBf16)
      SSLK_UNROLL for (int r = 0; r < kRows; r++) SSLK_UNROLL for (int v = 0; v < kVecs; v++) c[r][v] =
          c[r][v] * (load(b.residual + j0 + column + v * kLanes) * a.residual[i0 + row + r]);
  }
  // c := logits in base 2, minus an offset.
  SSLK_INLINE void to_logits(int64_t row, int64_t column, FullBlock& c, float offset) const {
    to_similarities(row, column, c);
    SSLK_UNROLL for (int r = 0; r < kRows; r++) SSLK_UNROLL for (int v = 0; v < kVecs; v++) c[r][v] =
        logit(c[r][v], broadcast(offset));
  }

  // ---- what takes no part

  bool any_masked() const {
    if (logits.triangle != Triangle::kNone) return diagonal || j0 + width > b.rows;
    if (logits.ids || i0 + height > a.rows || j0 + width > b.rows) return true;
    for (int64_t at = i0 * logits.skips; at < (i0 + height) * logits.skips; at++) {
      const int64_t column = logits.skip[at] - b.first - j0;
      if (column >= 0 && column < width) return true;
    }
    return false;
  }

  // Lanes of a vector whose pair is inside the matrix.
  SSLK_INLINE VecInt inside(int64_t row, int64_t column) const {
    const int64_t columns = row < a.rows - i0 ? b.rows - j0 - column : 0;
    return lane_index() < static_cast<int32_t>(min(columns, kLanes));
  }

  // Lanes of a vector whose pair is inside the matrix, but left out.
  SSLK_INLINE VecInt left_out(int64_t row, int64_t column) const {
    VecInt out{};
    if (logits.triangle != Triangle::kNone) {
      const int64_t last = logits.triangle == Triangle::kPairs ? row | 1 : row;  // the diagonal, or the pair beside it
      return diagonal ? lane_index() <= static_cast<int32_t>(last - column) : out;
    }
    if (row >= a.rows - i0) return out;
    for (int64_t s = 0; s < logits.skips; s++) {
      const int64_t lane = logits.skip[(i0 + row) * logits.skips + s] - b.first - j0 - column;
      if (lane >= 0 && lane < kLanes) out |= lane_index() == static_cast<int32_t>(lane);
    }
    if (logits.ids) {
      const VecInt low = (VecInt)load(b.id_low + j0 + column), high = (VecInt)load(b.id_high + j0 + column);
      out |= (low == a.id_low[i0 + row]) & (high == a.id_high[i0 + row]);
    }
    return out;
  }

  // Replaces what takes no part in the sums.
  SSLK_INLINE void mask(int64_t row, int64_t column, FullBlock& c, float by) const {
    if (!masked) return;
    for (int r = 0; r < kRows; r++)
      for (int v = 0; v < kVecs; v++) {
        const int64_t first = column + v * kLanes;
        const VecInt keep = inside(row + r, first) & ~left_out(row + r, first);
        c[r][v] = keep ? c[r][v] : broadcast(by);
      }
  }

  // ---- forward

  // exp(l - |scale|) where no logit is larger than that; see OnlineTile for the others. attract: adds the keys,
  // weighted by it, to the gradient.
  void forward_bounded(bool attract) {
    clear_tile_sums();
    similarities([&](int64_t row, int64_t column, FullBlock& c) __attribute__((always_inline)) {
      to_logits(row, column, c, bound2);
      SSLK_UNROLL for (int r = 0; r < kRows; r++) SSLK_UNROLL for (int v = 0; v < kVecs; v++) c[r][v] = exp2(c[r][v]);
      mask(row, column, c, 0);
      add_to_row_sums(row, c);
      if (logits.columns) add_to_column_sums(column, c);
      if (attract) store_g(row, column, c, true);
    });
    add_tile_sums();
    if (attract) accumulate_rows();
  }

  SSLK_INLINE void clear_tile_sums() {
    for (int64_t at = 0; at < height * kLanes; at += kLanes) store(scratch.row_sums + at, Vec{});
    for (int64_t at = 0; at < width; at += kLanes) store(scratch.column_sums + at, Vec{});
  }
  SSLK_INLINE void add_to_row_sums(int64_t row, const FullBlock& c) {
    SSLK_UNROLL for (int r = 0; r < kRows; r++) {
      float* sums = scratch.row_sums + (row + r) * kLanes;
      store(sums, load(sums) + (c[r][0] + c[r][1]));
    }
  }
  SSLK_INLINE void add_to_column_sums(int64_t column, const FullBlock& c) {
    SSLK_UNROLL for (int v = 0; v < kVecs; v++) {
      float* sums = scratch.column_sums + column + v * kLanes;
      Vec total = c[0][v] + c[1][v];
      SSLK_UNROLL for (int r = 2; r < kRows; r += 2) total += c[r][v] + c[r + 1][v];
      store(sums, load(sums) + total);
    }
  }
  SSLK_INLINE void add_tile_sums() {
    for (int64_t r = 0; r < height; r++) a.sums[i0 + r] += sum(load(scratch.row_sums + r * kLanes));
    if (!logits.columns) return;
    for (int64_t at = 0; at < width; at += kLanes)
      store(b.sums + j0 + at, load(b.sums + j0 + at) + load(scratch.column_sums + at));
  }

  // ---- backward

  // With sums of a: also adds up G * S along its rows, what the scale's gradient is made of, before G is rounded.
  void backward() {
    const bool adds_up = kBf16 && a.sums;
    if (adds_up) clear_tile_sums();
    similarities([&](int64_t row, int64_t column, FullBlock& c) __attribute__((always_inline)) {
      if (adds_up) keep(row, column, c);
      if (logits.bounded)
        weigh_bounded(row, column, c);
      else
        weigh_online(row, column, c);
      mask(row, column, c, 0);
      if (adds_up) add_products(row, column, c);
      store_g(row, column, c, false);
    });
    for (int64_t r = 0; adds_up && r < height; r++)
      a.sums[i0 + r] += sum(load(scratch.row_sums + r * kLanes)) * a.residual[i0 + r];
    accumulate_both();
  }

  SSLK_INLINE void keep(int64_t row, int64_t column, const FullBlock& c) const {
    SSLK_UNROLL for (int r = 0; r < kRows; r++) SSLK_UNROLL for (int v = 0; v < kVecs; v++)
        store(scratch.s + (row + r) * kTileStride + column + v * kLanes, c[r][v]);
  }
  // Into the sums of rows: G times what was kept, which the row's residual still has to be multiplied by.
  SSLK_INLINE void add_products(int64_t row, int64_t column, const FullBlock& c) const {
    SSLK_UNROLL for (int r = 0; r < kRows; r++) {
      float* sums = scratch.row_sums + (row + r) * kLanes;
      Vec total = load(sums);
      SSLK_UNROLL for (int v = 0; v < kVecs; v++) {
        const int64_t at = column + v * kLanes;
        total += c[r][v] * load(b.residual + j0 + at) * load(scratch.s + (row + r) * kTileStride + at);
      }
      store(sums, total);
    }
  }

  SSLK_INLINE void weigh_bounded(int64_t row, int64_t column, FullBlock& c) const {
    to_logits(row, column, c, bound2);
    SSLK_UNROLL for (int v = 0; v < kVecs; v++) {
      const Vec weight = load(b.weight + j0 + column + v * kLanes);
      SSLK_UNROLL for (int r = 0; r < kRows; r++) c[r][v] = exp2(c[r][v]) * (weight + a.weight[i0 + row + r]);
    }
  }

  // The offsets come in two parts: at small temperatures the logits are large, and p is nearly 1 where the two cancel.
  SSLK_INLINE void weigh_online(int64_t row, int64_t column, FullBlock& c) const {
    to_similarities(row, column, c);
    SSLK_UNROLL for (int v = 0; v < kVecs; v++) {
      const int64_t j = j0 + column + v * kLanes;
      SSLK_UNROLL for (int r = 0; r < kRows; r++) {
        const int64_t i = i0 + row + r;
        Vec g = exp2(logit(c[r][v], broadcast(a.logsumexp2[i])) - a.logsumexp2_low[i]) * a.weight[i];
        if (logits.columns)
          g += exp2(logit(c[r][v], load(b.logsumexp2 + j)) - load(b.logsumexp2_low + j)) * load(b.weight + j);
        c[r][v] = g;
      }
    }
  }
};

}  // namespace sslkernels::SSLK_ISA

// Tiles of logits and what is done to them: S = A B^T block by block, the exp and the sums in the epilogue, and the
// products dA += G B and dB += G^T A of the backward. Every contrastive loss is a way through them. Compiled once per
// instruction set.
#pragma once
#include "logit_rows.h"

namespace sslkernels::SSLK_ISA {

constexpr int64_t kStepsAtOnce = 128;           // reduction steps of S between two visits of a block
constexpr int64_t kTileStride = kMaxTile + 16;  // row of a tile in words, padded against cache-set conflicts
constexpr float kLn2 = 0.69314718f;

// log(1 + t) for t in [0, 1].
SSLK_INLINE Vec log1p(Vec t) {
  const Vec s = t / (t + 2.f), q = s * s;
  Vec p = q * (1.f / 15) + 1.f / 13;
  p = p * q + 1.f / 11;
  p = p * q + 1.f / 9;
  p = p * q + 1.f / 7;
  p = p * q + 1.f / 5;
  p = p * q + 1.f / 3;
  return 2.f * s * (p * q + 1.f);
}

template <bool kBf16>
struct TileScratch {
  static constexpr int64_t kPerWord = kBf16 ? 2 : 1;
  static constexpr int64_t kRowG = kMaxTile / kPerWord + 16;  // row of G in words

  alignas(64) float s[kMaxTile * kTileStride];
  alignas(64) uint32_t g[kMaxTile * kRowG];                                    // by rows; bf16: words hold two columns
  alignas(64) uint32_t g_by_columns[kBf16 ? kMaxTile / 2 * kTileStride : 16];  // bf16: words hold two rows
  alignas(64) float row_sums[kMaxTile * kLanes];
  alignas(64) float column_sums[kMaxTile];
};

template <bool kBf16>
struct LogitTile {
  typedef TileScratch<kBf16> Scratch;
  typedef Block<kVecs> FullBlock;
  static constexpr int64_t kPerWord = Scratch::kPerWord, kRowG = Scratch::kRowG;

  const Logits& logits;
  const Side &a, &b;
  Scratch& scratch;
  const int64_t i0, j0;  // first row and column of the tile
  const int64_t height = min(logits.tile, a.padded_rows - i0), width = min(logits.tile, b.padded_rows - j0);
  const bool diagonal = logits.triangle != Triangle::kNone && i0 == j0;
  const bool masked = any_masked();
  const float to_base2 = logits.to_base2, to_base2_low = logits.to_base2_low, bound2 = logits.bound2;

  // ---- S, block by block; epilogue(row, column, block) gets each finished block.

  template <class Epilogue>
  SSLK_INLINE void similarities(const Epilogue& epilogue) {
    // without a bound logits may be large, and so are the effects of their rounding: shorter sums, which round less
    const int64_t piece = logits.bounded ? kStepsAtOnce : min(kStepsAtOnce, logits.words < 64 ? 16 : logits.words / 4);
    for (int64_t k = 0; k < logits.words; k += piece) {
      const int64_t steps = min(piece, logits.words - k);
      for (int64_t column = 0; column < width; column += kPanel)
        for (int64_t row = 0; row < height; row += kRows) {
          if (diagonal && column + kPanel <= row) break;  // below the diagonal
          prefetch_panel(column + kPanel, k, steps, row);
          similarity_block(row, column, k, steps, epilogue);
        }
    }
  }

  template <class Epilogue>
  SSLK_INLINE void similarity_block(int64_t row, int64_t column, int64_t k, int64_t steps, const Epilogue& epilogue) {
    FullBlock c;
    float* partial = scratch.s + row * kTileStride + column;
    clear<kVecs>(c);
    multiply<kBf16, kVecs, 1, kPanel>(steps, panel_word(a, i0 + row, k), panel_word(b, j0 + column, k), c);
    if (k > 0)  // added to the sums so far, not continued from them: short sums round less
      SSLK_UNROLL for (int r = 0; r < kRows; r++) SSLK_UNROLL for (int v = 0; v < kVecs; v++) c[r][v] +=
          load(partial + r * kTileStride + v * kLanes);
    if (k + steps == logits.words) {
      epilogue(row, column, c);
    } else {
      SSLK_UNROLL for (int r = 0; r < kRows; r++) SSLK_UNROLL for (int v = 0; v < kVecs; v++)
          store(partial + r * kTileStride + v * kLanes, c[r][v]);
    }
  }

  const uint32_t* panel_word(const Side& side, int64_t row, int64_t k) const {
    return side.panels + (row / kPanel * logits.words + k) * kPanel + row % kPanel;
  }

  // A block row's share of the panel that comes next.
  SSLK_INLINE void prefetch_panel(int64_t column, int64_t k, int64_t steps, int64_t row) const {
    if (column >= width) return;
    const char* next = reinterpret_cast<const char*>(panel_word(b, j0 + column, k));
    const int64_t share = steps * kPanel * 4 * kRows / height;
    for (int64_t at = row / kRows * share; at < (row / kRows + 1) * share; at += 64)
      __builtin_prefetch(next + at, 0, 2);
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

  void forward(bool attract) {
    if (logits.bounded)
      forward_bounded(attract);
    else
      forward_online(attract);
    if (attract) accumulate<kRowG, 1>(scratch.g, a, i0, b, j0, height, width, false);
  }

  SSLK_INLINE void forward_bounded(bool attract) {
    clear_tile_sums();
    similarities([&](int64_t row, int64_t column, FullBlock& c) __attribute__((always_inline)) {
      to_logits(row, column, c, bound2);
      SSLK_UNROLL for (int r = 0; r < kRows; r++) SSLK_UNROLL for (int v = 0; v < kVecs; v++) c[r][v] = exp2(c[r][v]);
      mask(row, column, c, 0);
      add_to_row_sums(row, c);
      if (logits.columns) add_to_column_sums(column, c);
      if (attract) store_g(row, column, c);
    });
    add_tile_sums();
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

  // Without a bound: the tile is kept, and a running maximum taken along its rows, then along its columns. It holds
  // similarities, so that what goes into exp is the difference of a logit and the maximum, rounded once.
  SSLK_INLINE void forward_online(bool attract) {
    const float far = static_cast<float>(to_base2 < 0 ? kFarSimilarity : -kFarSimilarity);
    similarities([&](int64_t row, int64_t column, FullBlock& c) __attribute__((always_inline)) {
      to_similarities(row, column, c);
      if (masked && logits.own_logit) {
        keep(row, column, c);
        keep_own_logits(row, column);
      }
      mask(row, column, c, far);
      keep(row, column, c);
    });
    if (attract) {
      attract_online();
      return;
    }
    for (int64_t r = 0; r < height; r++) add_row(r);
    for (int64_t at = 0; logits.columns && at < width; at += kLanes) add_columns(at);
  }

  SSLK_INLINE void keep(int64_t row, int64_t column, const FullBlock& c) const {
    SSLK_UNROLL for (int r = 0; r < kRows; r++) SSLK_UNROLL for (int v = 0; v < kVecs; v++)
        store(scratch.s + (row + r) * kTileStride + column + v * kLanes, c[r][v]);
  }
  // The logit of an element that was kept.
  SSLK_INLINE float kept_logit(int64_t r, int64_t at) const {
    return logit(broadcast(scratch.s[r * kTileStride + at]), Vec{})[0];
  }

  // The positives' logits as the tiles have them: only so is a tie with a negative seen as a tie.
  SSLK_INLINE void keep_own_logits(int64_t row, int64_t column) const {
    if (logits.triangle == Triangle::kPairs) {
      for (int64_t r = row; r < row + kRows && diagonal; r += 2)
        if (column <= r && r < column + kPanel)
          logits.own_logit[i0 + r] = logits.own_logit[i0 + r + 1] = kept_logit(r, r + 1);
      return;
    }
    for (int64_t r = row; logits.skips > 0 && r < min(row + kRows, a.rows - i0); r++) {
      const int64_t at = logits.skip[(i0 + r) * logits.skips] - b.first - j0;
      if (column <= at && at < min(column + kPanel, b.rows - j0)) logits.own_logit[i0 + r] = kept_logit(r, at);
    }
  }

  // Takes a row of the tile into its maximum; returns what sums so far have to be multiplied by.
  SSLK_INLINE float raise_maximum(int64_t r, int64_t first) const {
    const float* row = scratch.s + r * kTileStride;
    const float before = a.maxima[i0 + r];
    Vec largest = broadcast(before);
    for (int64_t at = first; at < width; at += kLanes) largest = max(largest, logit(load(row + at), Vec{}));
    a.maxima[i0 + r] = maximum(largest);
    return exp2(broadcast(before - a.maxima[i0 + r]))[0];
  }

  SSLK_INLINE void add_row(int64_t r) const {
    const int64_t first = diagonal ? r / kPanel * kPanel : 0;
    const float rescale = raise_maximum(r, first);
    const float* row = scratch.s + r * kTileStride;
    const Vec top = broadcast(a.maxima[i0 + r]);
    Vec total{};
    for (int64_t at = first; at < width; at += kLanes) total += exp2(logit(load(row + at), top));
    a.sums[i0 + r] = a.sums[i0 + r] * rescale + sum(total);
  }

  SSLK_INLINE void add_columns(int64_t at) const {
    const int64_t end = diagonal ? min(height, (at / kPanel + 1) * kPanel) : height;
    const float* column = scratch.s + at;
    const Vec before = load(b.maxima + j0 + at);
    Vec top = before, total{};
    for (int64_t r = 0; r < end; r++) top = max(top, logit(load(column + r * kTileStride), Vec{}));
    for (int64_t r = 0; r < end; r++) total += exp2(logit(load(column + r * kTileStride), top));
    store(b.sums + j0 + at, load(b.sums + j0 + at) * exp2(before - top) + total);
    store(b.maxima + j0 + at, top);
  }

  // G = exp(l - maximum), once the sums so far and the gradient's rows are brought to the new maximum.
  SSLK_INLINE void attract_online() {
    clear_tile_sums();
    for (int64_t r = 0; r < height; r++) {
      const float rescale = raise_maximum(r, 0);
      if (rescale == 1) continue;
      a.sums[i0 + r] *= rescale;
      for (int64_t column = 0; column < logits.dim; column += kPanel) {
        float* grad = a.grad + column * a.padded_rows + (i0 + r) * kPanel;
        SSLK_UNROLL for (int v = 0; v < kVecs; v++) store(grad + v * kLanes, load(grad + v * kLanes) * rescale);
      }
    }
    for (int64_t column = 0; column < width; column += kPanel)
      for (int64_t row = 0; row < height; row += kRows) {
        FullBlock c;
        SSLK_UNROLL for (int r = 0; r < kRows; r++) SSLK_UNROLL for (int v = 0; v < kVecs; v++) {
          const Vec s = load(scratch.s + (row + r) * kTileStride + column + v * kLanes);
          c[r][v] = exp2(logit(s, broadcast(a.maxima[i0 + row + r])));
        }
        add_to_row_sums(row, c);
        store_g(row, column, c);
      }
    for (int64_t r = 0; r < height; r++) a.sums[i0 + r] += sum(load(scratch.row_sums + r * kLanes));
  }

  // ---- backward

  void backward() {
    similarities([&](int64_t row, int64_t column, FullBlock& c) __attribute__((always_inline)) {
      if (logits.bounded)
        weigh_bounded(row, column, c);
      else
        weigh_online(row, column, c);
      mask(row, column, c, 0);
      store_g(row, column, c);
    });
    accumulate_both();
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

  SSLK_INLINE void accumulate_both() {
    accumulate<kRowG, 1>(scratch.g, a, i0, b, j0, height, width, false);
    if constexpr (kBf16)
      accumulate<1, kTileStride>(scratch.g_by_columns, b, j0, a, i0, width, height, true);
    else
      accumulate<1, kRowG>(scratch.g, b, j0, a, i0, width, height, true);
  }

  // ---- the sigmoid loss: softplus(-l) of pairs that belong together, softplus(l) of the others

  void sigmoid_forward() {
    clear_tile_sums();
    similarities([&](int64_t row, int64_t column, FullBlock& c) __attribute__((always_inline)) {
      to_logits(row, column, c, -logits.bias2);
      if (masked) flip_positives(row, column, c);
      SSLK_UNROLL for (int r = 0; r < kRows; r++) SSLK_UNROLL for (int v = 0; v < kVecs; v++) {
        const Vec l = c[r][v], size = max(l, -l);
        c[r][v] = max(l, Vec{}) * kLn2 + log1p(exp2(-size));
      }
      mask_outside(row, column, c);
      add_to_row_sums(row, c);
    });
    for (int64_t r = 0; r < height; r++) a.sums[i0 + r] += sum(load(scratch.row_sums + r * kLanes));
  }

  // G = w_i sigmoid(l), or w_i (sigmoid(l) - 1) = -w_i sigmoid(-l) of a pair that belongs together; and its row sums.
  void sigmoid_backward() {
    clear_tile_sums();
    similarities([&](int64_t row, int64_t column, FullBlock& c) __attribute__((always_inline)) {
      to_logits(row, column, c, -logits.bias2);
      FullBlock sign;
      SSLK_UNROLL for (int r = 0; r < kRows; r++) SSLK_UNROLL for (int v = 0; v < kVecs; v++) sign[r][v] =
          broadcast(a.weight[i0 + row + r]);
      if (masked) flip_positives(row, column, c), flip_positives(row, column, sign);
      SSLK_UNROLL for (int r = 0; r < kRows; r++) SSLK_UNROLL for (int v = 0; v < kVecs; v++) {
        const Vec l = c[r][v], e = exp2(-max(l, -l));
        c[r][v] = (l < Vec{} ? e : broadcast(1.f)) / (e + 1.f) * sign[r][v];
      }
      mask_outside(row, column, c);
      add_to_row_sums(row, c);
      store_g(row, column, c);
    });
    for (int64_t r = 0; r < height; r++) a.sums[i0 + r] += sum(load(scratch.row_sums + r * kLanes));
    accumulate_both();
  }

  SSLK_INLINE void flip_positives(int64_t row, int64_t column, FullBlock& c) const {
    for (int r = 0; r < kRows; r++)
      for (int v = 0; v < kVecs; v++) c[r][v] = left_out(row + r, column + v * kLanes) ? -c[r][v] : c[r][v];
  }
  SSLK_INLINE void mask_outside(int64_t row, int64_t column, FullBlock& c) const {
    if (!masked) return;
    for (int r = 0; r < kRows; r++)
      for (int v = 0; v < kVecs; v++) c[r][v] = inside(row + r, column + v * kLanes) ? c[r][v] : Vec{};
  }

  // Stores G as the left operand of both products. In bf16 it meets the packed rows, so the factor that is missing from
  // them goes in first: that of the column's row for dz_i, of the row for dz_j.
  SSLK_INLINE void store_g(int64_t row, int64_t column, FullBlock& c) {
    if constexpr (!kBf16) {
      SSLK_UNROLL for (int r = 0; r < kRows; r++) SSLK_UNROLL for (int v = 0; v < kVecs; v++)
          store(scratch.g + (row + r) * kRowG + column + v * kLanes, c[r][v]);
    }
#if defined(__AVX512BF16__)
    if constexpr (kBf16) {
      const Vec residual0 = load(b.residual + j0 + column), residual1 = load(b.residual + j0 + column + kLanes);
      SSLK_UNROLL for (int r = 0; r < kRows; r++) {
        const __m512bh pair = _mm512_cvtne2ps_pbh(c[r][1] * residual1, c[r][0] * residual0);
        store(scratch.g + (row + r) * kRowG + column / 2, (Vec)pair);
      }
      alignas(64) static const uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                           21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                           11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
      const __m512i interleave = _mm512_load_si512(kInterleave);
      SSLK_UNROLL for (int r = 0; r < kRows; r += 2) {
        const float even = a.residual[i0 + row + r], odd = a.residual[i0 + row + r + 1];
        SSLK_UNROLL for (int v = 0; v < kVecs; v++) {
          const __m512bh rows = _mm512_cvtne2ps_pbh(c[r + 1][v] * odd, c[r][v] * even);
          store(scratch.g_by_columns + (row + r) / 2 * kTileStride + column + v * kLanes,
                (Vec)_mm512_permutexvar_epi16(interleave, (__m512i)rows));
        }
      }
    }
#endif
  }

  // target.grad[to .. to + rows) += L source[from .. from + depth), L being G or its transpose. On the diagonal L is
  // triangular.
  template <int kRowStride, int kStepStride>
  SSLK_INLINE void accumulate(const uint32_t* l, const Side& target, int64_t to, const Side& source, int64_t from,
                              int64_t rows, int64_t depth, bool transposed) {
    for (int64_t column = 0; column < logits.dim; column += kPanel) {
      const uint32_t* right = source.columns + (column * source.padded_rows + from * kPanel) / kPerWord;
      float* out = target.grad + column * target.padded_rows + to * kPanel;
      const bool narrow = logits.dim - column <= kLanes;  // the last panel may be half empty
      for (int64_t row = 0; row < rows; row += kRows) {
        const int64_t begin = diagonal && !transposed ? row : 0, end = diagonal && transposed ? row + kRows : depth;
        if (column + kPanel < logits.dim) {
          const char* next = reinterpret_cast<const char*>(right + source.padded_rows * kPanel / kPerWord);
          const int64_t share = depth * kPanel * 4 / kPerWord * kRows / rows;
          for (int64_t at = row / kRows * share; at < (row / kRows + 1) * share; at += 64)
            __builtin_prefetch(next + at, 0, 2);
        }
        const uint32_t* left = l + row * kRowStride + begin / kPerWord * kStepStride;
        if (narrow)
          accumulate_block<1, kRowStride, kStepStride>((end - begin) / kPerWord, left,
                                                       right + begin / kPerWord * kPanel, out + row * kPanel);
        else
          accumulate_block<kVecs, kRowStride, kStepStride>((end - begin) / kPerWord, left,
                                                           right + begin / kPerWord * kPanel, out + row * kPanel);
      }
    }
  }

  template <int V, int kRowStride, int kStepStride>
  static SSLK_INLINE void accumulate_block(int64_t steps, const uint32_t* left, const uint32_t* right, float* out) {
    Block<V> c;
    clear<V>(c);
    SSLK_UNROLL for (int r = 0; r < kRows; r++) __builtin_prefetch(out + r * kPanel, 1, 3);
    multiply<kBf16, V, kRowStride, kStepStride>(steps, left, right, c);
    SSLK_UNROLL for (int r = 0; r < kRows; r++) SSLK_UNROLL for (int v = 0; v < V; v++) {
      float* at = out + r * kPanel + v * kLanes;
      store(at, load(at) + c[r][v]);
    }
  }
};

}  // namespace sslkernels::SSLK_ISA

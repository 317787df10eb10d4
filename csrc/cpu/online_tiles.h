// The forward through tiles of logits without a bound: a running maximum for every row and column. Compiled once per
// instruction set.
#pragma once
#include "logit_tiles.h"

namespace sslkernels::SSLK_ISA {

constexpr float kSharedSpan = 48;  // binary orders of magnitude, see share_exps

// The tile is kept, and with it the largest logit of each row and column. It holds similarities, so that what goes into
// exp is the difference of a logit and the maximum, rounded once.
template <bool kBf16>
struct OnlineTile : LogitTile<kBf16> {
  typedef LogitTile<kBf16> Tile;
  typedef typename Tile::FullBlock FullBlock;
  using Tile::a;
  using Tile::add_to_column_sums;
  using Tile::add_to_row_sums;
  using Tile::b;
  using Tile::clear_tile_sums;
  using Tile::diagonal;
  using Tile::height;
  using Tile::i0;
  using Tile::j0;
  using Tile::keep;
  using Tile::logit;
  using Tile::logits;
  using Tile::mask;
  using Tile::masked;
  using Tile::scratch;
  using Tile::store_g;
  using Tile::to_similarities;
  using Tile::width;

  const float direction = logits.to_base2 < 0 ? -1.f : 1.f;  // in which a logit grows with its similarity

  void forward(bool attract) {
    const float far = static_cast<float>(kFarSimilarity) * -direction;
    clear_peaks();
    Tile::similarities([&](int64_t row, int64_t column, FullBlock& c) __attribute__((always_inline)) {
      to_similarities(row, column, c);
      if (masked && logits.own_logit) {
        keep(row, column, c);
        keep_own_logits(row, column);
      }
      mask(row, column, c, far);
      keep(row, column, c);
      take_peaks(row, column, c);
    });
    const float top = raise_maxima(attract);
    clear_tile_sums();
    const bool shared = logits.columns && share_exps(top);
    add_kept(attract, shared);
    for (int64_t r = 0; r < height; r++) a.sums[i0 + r] += sum(load(scratch.row_sums + r * kLanes));
    for (int64_t at = 0; logits.columns && at < width; at += kLanes) add_columns(at, shared, top);
    if (attract) Tile::accumulate_rows();
  }

  SSLK_INLINE void clear_peaks() const {
    const Vec none = broadcast(static_cast<float>(-kFarSimilarity));
    for (int64_t at = 0; at < height * kLanes; at += kLanes) store(scratch.row_peaks + at, none);
    for (int64_t at = 0; at < width; at += kLanes) store(scratch.column_peaks + at, none);
  }
  SSLK_INLINE void take_peaks(int64_t row, int64_t column, const FullBlock& c) const {
    Vec peaks[kVecs];
    SSLK_UNROLL for (int v = 0; v < kVecs; v++) peaks[v] = load(scratch.column_peaks + column + v * kLanes);
    SSLK_UNROLL for (int r = 0; r < kRows; r++) {
      float* of_row = scratch.row_peaks + (row + r) * kLanes;
      Vec peak = load(of_row);
      SSLK_UNROLL for (int v = 0; v < kVecs; v++) {
        const Vec upward = c[r][v] * direction;
        peak = max(peak, upward);
        peaks[v] = max(peaks[v], upward);
      }
      store(of_row, peak);
    }
    SSLK_UNROLL for (int v = 0; v < kVecs; v++) store(scratch.column_peaks + column + v * kLanes, peaks[v]);
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

  // Raises the rows' maxima to those of the tile and brings what was summed so far to them; returns the largest. Leaves
  // what the columns have to multiply a row's exps by.
  SSLK_INLINE float raise_maxima(bool attract) const {
    float top = -logits.none2;
    for (int64_t r = 0; r < height; r++) {
      const float before = a.maxima[i0 + r];
      const float peak = logit(broadcast(direction * maximum(load(scratch.row_peaks + r * kLanes))), Vec{})[0];
      if (!(before >= peak)) {
        a.maxima[i0 + r] = peak;
        rescale(r, exp2(broadcast(before - peak))[0], attract);
      }
      if (!(top >= a.maxima[i0 + r])) top = a.maxima[i0 + r];
    }
    for (int64_t at = 0; at < height; at += kLanes)
      store(scratch.row_weights + at, exp2(load(a.maxima + i0 + at) - top));
    return top;
  }
  SSLK_INLINE void rescale(int64_t r, float by, bool attract) const {
    a.sums[i0 + r] *= by;
    for (int64_t column = 0; attract && column < logits.dim; column += kPanel) {
      float* grad = a.grad + column * a.padded_rows + (i0 + r) * kPanel;
      SSLK_UNROLL for (int v = 0; v < kVecs; v++) store(grad + v * kLanes, load(grad + v * kLanes) * by);
    }
  }

  SSLK_INLINE Vec column_peak(int64_t at) const { return logit(load(scratch.column_peaks + at) * direction, Vec{}); }
  // Whether exp(l - the row's maximum) serves the columns too: no column's largest logit is so far below the largest of
  // all that it would be rounded away, or lose more digits than a logit has lost by being large.
  SSLK_INLINE bool share_exps(float top) const {
    Vec lowest = broadcast(top);
    for (int64_t at = 0; at < width; at += kLanes) {
      const Vec peak = column_peak(at);
      lowest = (peak > -logits.none2) & ~(peak > lowest) ? peak : lowest;
    }
    return -maximum(-lowest) >= top - kSharedSpan;
  }

  // Sums e = exp(l - the row's maximum) along the rows, and, where the columns share it, e * exp(that maximum - the
  // largest) along them; with attract, keeps e as G.
  SSLK_INLINE void add_kept(bool attract, bool shared) {
    for (int64_t column = 0; column < width; column += kPanel)
      for (int64_t row = 0; row < height; row += kRows) {
        if (diagonal && column + kPanel <= row) break;  // below the diagonal
        FullBlock c;
        SSLK_UNROLL for (int r = 0; r < kRows; r++) SSLK_UNROLL for (int v = 0; v < kVecs; v++) {
          const Vec s = load(scratch.s + (row + r) * kTileStride + column + v * kLanes);
          c[r][v] = exp2(logit(s, broadcast(a.maxima[i0 + row + r])));
        }
        add_to_row_sums(row, c);
        if (attract) store_g(row, column, c, true);
        if (!shared) continue;
        SSLK_UNROLL for (int r = 0; r < kRows; r++) SSLK_UNROLL for (int v = 0; v < kVecs; v++) c[r][v] =
            c[r][v] * scratch.row_weights[row + r];
        add_to_column_sums(column, c);
      }
  }

  // Into the sums of the columns: what the rows' exps gave them, offset by the largest maximum, or exps of their own.
  SSLK_INLINE void add_columns(int64_t at, bool shared, float offset) const {
    const Vec before = load(b.maxima + j0 + at), top = max(before, column_peak(at));
    Vec total{};
    if (shared) {
      const Vec above = offset - top;  // within the span, but of a column with nothing in it: 0 times infinity
      total = load(scratch.column_sums + at) * exp2(above > kSharedSpan ? broadcast(kSharedSpan) : above);
    } else {
      const int64_t end = diagonal ? min(height, (at / kPanel + 1) * kPanel) : height;
      for (int64_t r = 0; r < end; r++) total += exp2(logit(load(scratch.s + r * kTileStride + at), top));
    }
    store(b.sums + j0 + at, load(b.sums + j0 + at) * exp2(before - top) + total);
    store(b.maxima + j0 + at, top);
  }
};

// The forward of a tile, bounded or not. attract: also adds the keys, weighted by their exps, to the gradient.
template <bool kBf16>
SSLK_INLINE void forward_logits(const Logits& logits, const Side& a, const Side& b, int64_t i0, int64_t j0,
                                bool attract, void* scratch) {
  LogitTile<kBf16> tile{logits, a, b, *static_cast<TileScratch<kBf16>*>(scratch), i0, j0};
  if (logits.bounded)
    tile.forward_bounded(attract);
  else
    OnlineTile<kBf16>{tile}.forward(attract);
}

}  // namespace sslkernels::SSLK_ISA

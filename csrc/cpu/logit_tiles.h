// Tiles of logits and what is done to them: S = A B^T block by block, the exp and the sums in the epilogue, and the
// products dA += G B and dB += G^T A of the backward. Every contrastive loss is a way through them. Compiled once per
// instruction set.
#pragma once
#include "logit_rows.h"
#include "tile_scratch.h"

namespace sslkernels::SSLK_ISA {

constexpr int64_t kStepsAtOnce = 128;  // reduction steps of S between two visits of a block

template <bool kBf16>
struct LogitTile {
  typedef TileScratch<kBf16> Scratch;
  typedef Block<kVecs> FullBlock;
  static constexpr int64_t kPerWord = Scratch::kPerWord, kRowG = Scratch::kRowG;
  static constexpr int64_t kBlockRows = kAmx<kBf16> ? kAmxSide : kRows;  // of S and of the products

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
    const int64_t quarter = logits.words < 64 ? 16
                            : kAmx<kBf16>     ? round_up(logits.words / 4, kAmxSteps)
                                              : logits.words / 4;
    const int64_t piece = logits.bounded ? kStepsAtOnce : min(kStepsAtOnce, quarter);
    for (int64_t k = 0; k < logits.words; k += piece) {
      const int64_t steps = min(piece, logits.words - k);
      for (int64_t column = 0; column < width; column += kPanel)
        for (int64_t row = 0; row < height; row += kBlockRows) {
          if (diagonal && column + kPanel <= row) break;  // below the diagonal
          if constexpr (kAmx<kBf16>) {
            similarity_tiles(row, column, k, steps, epilogue);
          } else {
            prefetch_panel(column + kPanel, k, steps, row);
            similarity_block(row, column, k, steps, epilogue);
          }
        }
    }
  }

  template <class Epilogue>
  SSLK_INLINE void similarity_block(int64_t row, int64_t column, int64_t k, int64_t steps, const Epilogue& epilogue) {
    FullBlock c;
    clear<kVecs>(c);
    multiply<kBf16, kVecs, 1, kPanel>(steps, panel_word(a, i0 + row, k), panel_word(b, j0 + column, k), c);
    finish_block(row, column, k, k + steps == logits.words, c, epilogue);
  }

  // kAmxSide rows by AMX, kRows at a time for the epilogue.
  template <class Epilogue>
  SSLK_INLINE void similarity_tiles(int64_t row, int64_t column, int64_t k, int64_t steps, const Epilogue& epilogue) {
#if defined(__AMX_BF16__)
    load_sums(nullptr, 0);
    multiply_tiles(0, steps, a.lefts + (i0 + row) * logits.words + k, logits.words, panel_word(b, j0 + column, k));
    store_sums(scratch.block, kAmxSide);
    for (int64_t part = 0; part < kAmxSide; part += kRows) {
      FullBlock c;
      SSLK_UNROLL for (int r = 0; r < kRows; r++) SSLK_UNROLL for (int v = 0; v < kVecs; v++) c[r][v] =
          load(scratch.block + (part + r) * kAmxSide + v * kLanes);
      finish_block(row + part, column, k, k + steps == logits.words, c, epilogue);
    }
#endif
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
      if (attract) store_g(row, column, c);
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
      store_g(row, column, c);
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

  void accumulate_rows() { accumulate<kRowG, 1>(scratch.g(), a, i0, b, j0, height, width, false); }
  SSLK_INLINE void accumulate_both() {
    accumulate_rows();
    if constexpr (kAmx<kBf16>)
      accumulate<kRowG, 1>(scratch.g_by_columns, b, j0, a, i0, width, height, true);
    else if constexpr (kBf16)
      accumulate<1, kTileStride>(scratch.g_by_columns, b, j0, a, i0, width, height, true);
    else
      accumulate<1, kRowG>(scratch.g(), b, j0, a, i0, width, height, true);
  }

  // Stores G as the left operand of both products. In bf16 it meets the packed rows, so the factor that is missing from
  // them goes in first: that of the column's row for dz_i, of the row for dz_j.
  SSLK_INLINE void store_g(int64_t row, int64_t column, FullBlock& c) {
    if constexpr (!kBf16) {
      SSLK_UNROLL for (int r = 0; r < kRows; r++) SSLK_UNROLL for (int v = 0; v < kVecs; v++)
          store(scratch.g() + (row + r) * kRowG + column + v * kLanes, c[r][v]);
    }
#if defined(__AVX512BF16__)
    if constexpr (kBf16) {
      const Vec residual0 = load(b.residual + j0 + column), residual1 = load(b.residual + j0 + column + kLanes);
      SSLK_UNROLL for (int r = 0; r < kRows; r++) {
        const __m512bh pair = _mm512_cvtne2ps_pbh(c[r][1] * residual1, c[r][0] * residual0);
        store(scratch.g() + (row + r) * kRowG + column / 2, (Vec)pair);
      }
      alignas(64) static const uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                           21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                           11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
      const __m512i interleave = _mm512_load_si512(kInterleave);
      SSLK_UNROLL for (int v = 0; v < kVecs; v++) {
        __m512i pairs[kRows / 2];
        SSLK_UNROLL for (int r = 0; r < kRows; r += 2) {
          const float even = a.residual[i0 + row + r], odd = a.residual[i0 + row + r + 1];
          const __m512bh rows = _mm512_cvtne2ps_pbh(c[r + 1][v] * odd, c[r][v] * even);
          pairs[r / 2] = _mm512_permutexvar_epi16(interleave, (__m512i)rows);
        }
        store_pairs(row, column + v * kLanes, pairs);
      }
    }
#endif
  }

#if defined(__AVX512BF16__)
  // Stores kLanes columns of G, the words of kRows / 2 pairs of rows, in the order of the second product.
  SSLK_INLINE void store_pairs(int64_t row, int64_t column, const __m512i (&pairs)[kRows / 2]) {
    if constexpr (!kAmx<kBf16>) {
      SSLK_UNROLL for (int p = 0; p < kRows / 2; p++)
          store(scratch.g_by_columns + (row / 2 + p) * kTileStride + column, (Vec)pairs[p]);
      return;
    }
    static_assert(kRows == 8);
    const __m512i low[2] = {_mm512_maskz_unpacklo_epi32(kAllLanes, pairs[0], pairs[1]),
                            _mm512_maskz_unpacklo_epi32(kAllLanes, pairs[2], pairs[3])},
                  high[2] = {_mm512_maskz_unpackhi_epi32(kAllLanes, pairs[0], pairs[1]),
                             _mm512_maskz_unpackhi_epi32(kAllLanes, pairs[2], pairs[3])};
    uint32_t* to = scratch.g_by_columns + column * kRowG + row / 2;
    store_columns(to, _mm512_maskz_unpacklo_epi64(0xff, low[0], low[1]));
    store_columns(to + kRowG, _mm512_maskz_unpackhi_epi64(0xff, low[0], low[1]));
    store_columns(to + 2 * kRowG, _mm512_maskz_unpacklo_epi64(0xff, high[0], high[1]));
    store_columns(to + 3 * kRowG, _mm512_maskz_unpackhi_epi64(0xff, high[0], high[1]));
  }
  // The four words of every fourth column.
  static SSLK_INLINE void store_columns(uint32_t* to, __m512i words) {
    auto* at = reinterpret_cast<__m128i*>(to);
    at[0] = _mm512_maskz_extracti32x4_epi32(0xf, words, 0);
    at[kRowG] = _mm512_maskz_extracti32x4_epi32(0xf, words, 1);
    at[2 * kRowG] = _mm512_maskz_extracti32x4_epi32(0xf, words, 2);
    at[3 * kRowG] = _mm512_maskz_extracti32x4_epi32(0xf, words, 3);
  }
#endif

  // target.grad[to .. to + rows) += L source[from .. from + depth), L being G or its transpose. On the diagonal L is
  // triangular.
  template <int kRowStride, int kStepStride>
  SSLK_INLINE void accumulate(const uint32_t* l, const Side& target, int64_t to, const Side& source, int64_t from,
                              int64_t rows, int64_t depth, bool transposed) {
    for (int64_t column = 0; column < logits.dim; column += kPanel) {
      const uint32_t* right = source.columns + (column * source.padded_rows + from * kPanel) / kPerWord;
      float* out = target.grad + column * target.padded_rows + to * kPanel;
      const bool narrow = logits.dim - column <= kLanes;  // the last panel may be half empty
      for (int64_t row = 0; row < rows; row += kBlockRows) {
        const int64_t begin = diagonal && !transposed ? row : 0,
                      end = diagonal && transposed ? row + kBlockRows : depth;
#if defined(__AMX_BF16__)
        if constexpr (kAmx<kBf16>) {
          load_sums(out + row * kPanel, kPanel);
          multiply_tiles(begin / kPerWord, end / kPerWord, l + row * kRowStride, kRowStride, right);
          store_sums(out + row * kPanel, kPanel);
          continue;
        }
#endif
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

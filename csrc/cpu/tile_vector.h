// The products of a tile by the micro-kernel: how it wants rows packed, and how it multiplies them.
#pragma once
#include "tile_scratch.h"

namespace sslkernels::SSLK_ISA {

// Sets up what the products need; nothing here.
struct TileConfig {
  TileConfig() {}  // so that it is not an unused variable
};

template <bool kBf16>
constexpr Packing packing_of() {
  return {kPanel, kBf16, false};
}

// ---- packing

template <bool kBf16>
struct PackScratch {
  alignas(64) float rows[kPanel * kChunkStride];
  alignas(64) uint16_t halves[kBf16 ? kPanel * kChunkStride : 1];
};

// to[k * kPanel + r] = from[r * from_stride + k] for k < steps and the kPanel rows r; `from` may be read to the next
// multiple of 4.
SSLK_INLINE void transpose_panel(const uint32_t* from, int64_t from_stride, int64_t steps, uint32_t* to) {
  for (int64_t k = 0; k < steps; k += 4)
    for (int r = 0; r < kPanel; r += 4) {
      Quad row[4];
      for (int q = 0; q < 4; q++) row[q] = *reinterpret_cast<const Quad*>(from + (r + q) * from_stride + k);
      transpose(row);
      for (int q = 0; q < 4 && k + q < steps; q++) *reinterpret_cast<Quad*>(to + (k + q) * kPanel + r) = row[q];
    }
}

// Packs columns [column, column + kChunk) of the rows of a panel, which lie in `s.rows`, padded with zeros to a
// multiple of kPanel, into `panels` and, where the side has them, into `columns`.
template <bool kBf16>
void pack_chunk(const Side& side, int64_t dim, int64_t words, int64_t panel, int64_t column, PackScratch<kBf16>& s) {
  const int64_t count = min(kChunk, dim - column), padded = (count + kPanel - 1) / kPanel * kPanel;
  uint32_t* to = side.panels + panel * words * kPanel + column / (kBf16 ? 2 : 1) * kPanel;
  if constexpr (kBf16) {
    for (int64_t r = 0; r < kPanel; r++)
      for (int64_t c = 0; c < padded; c++) s.halves[r * kChunkStride + c] = to_bf16(s.rows[r * kChunkStride + c]);
    transpose_panel(reinterpret_cast<const uint32_t*>(s.halves), kChunkStride / 2, min(padded / 2, words - column / 2),
                    to);
  } else {
    transpose_panel(reinterpret_cast<const uint32_t*>(s.rows), kChunkStride, count, to);
  }
  if (!side.columns) return;
  constexpr int64_t kPerWord = kBf16 ? 2 : 1;
  for (int64_t c = 0; c < padded; c += kPanel) {
    uint32_t* out = side.columns + ((column + c) * side.padded_rows + panel * kPanel * kPanel) / kPerWord;
    for (int64_t r = 0; r < kPanel; r += kPerWord, out += kPanel)
      for (int64_t k = 0; k < kPanel; k++) {
        if constexpr (kBf16)
          out[k] = s.halves[r * kChunkStride + c + k] | uint32_t{s.halves[(r + 1) * kChunkStride + c + k]} << 16;
        else
          out[k] = to_bits(s.rows[r * kChunkStride + c + k]);
      }
  }
}

// Brings what the tiles added to a panel's gradient into one array; here they have but one.
SSLK_INLINE void gather_grad(const Side&, int64_t /*dim*/, int64_t /*panel*/) {}

// ---- products

template <bool kBf16>
struct TileProducts : TilePlace<kBf16> {
  typedef TilePlace<kBf16> Place;
  typedef Block<kVecs> FullBlock;
  static constexpr int64_t kPerWord = kBf16 ? 2 : 1, kRowG = Place::Scratch::kRowG;
  static constexpr int64_t kBlockRows = kRows, kStepsAtOnce = 128;  // of S between two visits of a block
  using Place::a;
  using Place::b;
  using Place::diagonal;
  using Place::height;
  using Place::i0;
  using Place::j0;
  using Place::logits;
  using Place::scratch;
  using Place::width;

  // Without a bound logits may be large, and so are the effects of their rounding: shorter sums, which round less.
  int64_t steps_at_once() const {
    const int64_t quarter = logits.words < 64 ? 16 : logits.words / 4;
    return logits.bounded ? kStepsAtOnce : min(kStepsAtOnce, quarter);
  }

  // take(row, block) gets A B^T over the words [k, k + steps) of kBlockRows rows and kPanel columns.
  template <class Take>
  SSLK_INLINE void multiply_block(int64_t row, int64_t column, int64_t k, int64_t steps, const Take& take) const {
    prefetch_panel(column + kPanel, k, steps, row);
    FullBlock c;
    clear<kVecs>(c);
    multiply<kBf16, kVecs, 1, kPanel>(steps, panel_word(a, i0 + row, k), panel_word(b, j0 + column, k), c);
    take(row, c);
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

  // Stores G as the left operand of both products. In fp32 it takes the place of S. In bf16 it meets the packed rows,
  // so the factor that is missing from them goes in first: that of the column's row for dz_i, of the row for dz_j.
  SSLK_INLINE void store_g(int64_t row, int64_t column, const FullBlock& c, bool /*rows_alone*/) {
    if constexpr (!kBf16) {
      SSLK_UNROLL for (int r = 0; r < kRows; r++) SSLK_UNROLL for (int v = 0; v < kVecs; v++)
          store(scratch.s + (row + r) * kTileStride + column + v * kLanes, c[r][v]);
    }
#if defined(__AVX512BF16__)
    if constexpr (kBf16) {
      const Vec residual0 = load(b.residual + j0 + column), residual1 = load(b.residual + j0 + column + kLanes);
      SSLK_UNROLL for (int r = 0; r < kRows; r++) {
        const __m512bh pair = _mm512_cvtne2ps_pbh(c[r][1] * residual1, c[r][0] * residual0);
        store(scratch.g_by_rows + (row + r) * kRowG + column / 2, (Vec)pair);
      }
      alignas(64) static const uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                           21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                           11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
      const __m512i interleave = _mm512_load_si512(kInterleave);
      SSLK_UNROLL for (int v = 0; v < kVecs; v++) SSLK_UNROLL for (int r = 0; r < kRows; r += 2) {
        const float even = a.residual[i0 + row + r], odd = a.residual[i0 + row + r + 1];
        const __m512bh rows = _mm512_cvtne2ps_pbh(c[r + 1][v] * odd, c[r][v] * even);
        store(scratch.g_by_columns + (row + r) / 2 * kTileStride + column + v * kLanes,
              (Vec)_mm512_permutexvar_epi16(interleave, (__m512i)rows));
      }
    }
#endif
  }

  // a.grad += G B, and b.grad += G^T A
  void accumulate_rows() {
    if constexpr (kBf16)
      accumulate<kRowG, 1>(scratch.g_by_rows, a, i0, b, j0, height, width, false);
    else
      accumulate<kTileStride, 1>(words_of_s(), a, i0, b, j0, height, width, false);
  }
  SSLK_INLINE void accumulate_both() {
    accumulate_rows();
    if constexpr (kBf16)
      accumulate<1, kTileStride>(scratch.g_by_columns, b, j0, a, i0, width, height, true);
    else
      accumulate<1, kTileStride>(words_of_s(), b, j0, a, i0, width, height, true);
  }
  const uint32_t* words_of_s() const { return reinterpret_cast<const uint32_t*>(scratch.s); }

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

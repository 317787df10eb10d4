// The tiles of NT-Xent: S = Z Z^T on the upper triangle only, with the exp and the sums in the epilogue, and the two
// products dZ += G Z of the backward. Compiled once per instruction set.
#pragma once
#include "infonce_rows.h"

namespace sslkernels::SSLK_ISA {

constexpr int64_t kStepsAtOnce = 128;           // reduction steps of S between two visits of a block
constexpr int64_t kTileStride = kMaxTile + 16;  // row of a tile in words, padded against cache-set conflicts

template <bool kBf16>
struct NtXentTiles {
  static constexpr int64_t kPerWord = kBf16 ? 2 : 1;
  static constexpr int64_t kRowG = kMaxTile / kPerWord + 16;  // row of G in words
  typedef Block<kVecs> FullBlock;

  struct Scratch {
    alignas(64) float s[kMaxTile * kTileStride];
    alignas(64) uint32_t g[kMaxTile * kRowG];  // by rows; bf16: words hold two columns
    alignas(64) uint32_t g_by_columns[kBf16 ? kMaxTile / 2 * kTileStride : 16];  // bf16: words hold two rows
    alignas(64) float row_sums[kMaxTile * kLanes];
    alignas(64) float column_sums[kMaxTile];
  };

  const NtXentJob& job;
  Scratch& scratch;
  const int64_t i0, j0;  // first row and column of the tile
  const int64_t height = min(job.tile, job.padded_rows - i0), width = min(job.tile, job.padded_rows - j0);
  const bool diagonal = i0 == j0;
  const bool masked = diagonal || j0 + width > job.rows;
  const float to_base2 = static_cast<float>(kLog2E / job.temperature);
  const float bound2 = to_base2 < 0 ? -to_base2 : to_base2;

  // ---- S, block by block; epilogue(row, column, block) gets each finished block.

  template <class Epilogue>
  SSLK_INLINE void similarities(const Epilogue& epilogue) {
    for (int64_t k = 0; k < job.words; k += kStepsAtOnce) {
      const int64_t steps = min(kStepsAtOnce, job.words - k);
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
    if (k == 0)
      clear<kVecs>(c);
    else
      SSLK_UNROLL for (int r = 0; r < kRows; r++) SSLK_UNROLL for (int v = 0; v < kVecs; v++) c[r][v] =
          load(partial + r * kTileStride + v * kLanes);
    multiply<kBf16, kVecs, 1, kPanel>(steps, panel_word(i0 + row, k), panel_word(j0 + column, k), c);
    if (k + steps == job.words) {
      epilogue(row, column, c);
    } else {
      SSLK_UNROLL for (int r = 0; r < kRows; r++) SSLK_UNROLL for (int v = 0; v < kVecs; v++)
          store(partial + r * kTileStride + v * kLanes, c[r][v]);
    }
  }

  const uint32_t* panel_word(int64_t row, int64_t k) const {
    return job.panels + (row / kPanel * job.words + k) * kPanel + row % kPanel;
  }

  // A block row's share of the panel that comes next.
  SSLK_INLINE void prefetch_panel(int64_t column, int64_t k, int64_t steps, int64_t row) const {
    if (column >= width) return;
    const char* next = reinterpret_cast<const char*>(panel_word(j0 + column, k));
    const int64_t share = steps * kPanel * 4 * kRows / height;
    for (int64_t at = row / kRows * share; at < (row / kRows + 1) * share; at += 64)
      __builtin_prefetch(next + at, 0, 2);
  }

  // c := logits in base 2, minus the bound if there is one.
  SSLK_INLINE void to_logits(int64_t row, int64_t column, FullBlock& c, float offset) const {
    SSLK_UNROLL for (int r = 0; r < kRows; r++) {
      const float factor = kBf16 ? to_base2 * job.residual[i0 + row + r] : to_base2;
      SSLK_UNROLL for (int v = 0; v < kVecs; v++) {
        Vec s = c[r][v];
        if constexpr (kBf16) s = s * load(job.residual + j0 + column + v * kLanes);
        c[r][v] = s * factor - offset;
      }
    }
  }

  // Replaces what takes no part in the sums: the diagonal and below, the positives beside it, and the padding.
  SSLK_INLINE void mask(int64_t row, int64_t column, FullBlock& c, float by) const {
    if (!masked) return;
    for (int r = 0; r < kRows; r++)
      for (int v = 0; v < kVecs; v++) {
        const VecInt index = lane_index() + static_cast<int32_t>(j0 - i0 + column + v * kLanes);  // from row i0 on
        const int32_t partner = static_cast<int32_t>((row + r) | 1),
                      end = static_cast<int32_t>(min(job.rows - i0, 1 << 30));
        c[r][v] = (index > partner) & (index < end) ? c[r][v] : broadcast(by);
      }
  }

  // ---- forward

  void forward() {
    if (job.bounded)
      forward_bounded();
    else
      forward_online();
  }

  SSLK_INLINE void forward_bounded() {
    for (int64_t at = 0; at < height * kLanes; at += kLanes) store(scratch.row_sums + at, Vec{});
    for (int64_t at = 0; at < width; at += kLanes) store(scratch.column_sums + at, Vec{});
    similarities([&](int64_t row, int64_t column, FullBlock& c) __attribute__((always_inline)) {
      to_logits(row, column, c, bound2);
      SSLK_UNROLL for (int r = 0; r < kRows; r++) SSLK_UNROLL for (int v = 0; v < kVecs; v++) c[r][v] = exp2(c[r][v]);
      mask(row, column, c, 0);
      SSLK_UNROLL for (int r = 0; r < kRows; r++) {
        float* sums = scratch.row_sums + (row + r) * kLanes;
        store(sums, load(sums) + (c[r][0] + c[r][1]));
      }
      SSLK_UNROLL for (int v = 0; v < kVecs; v++) {
        float* sums = scratch.column_sums + column + v * kLanes;
        Vec total = c[0][v] + c[1][v];
        SSLK_UNROLL for (int r = 2; r < kRows; r += 2) total += c[r][v] + c[r + 1][v];
        store(sums, load(sums) + total);
      }
    });
    for (int64_t r = 0; r < height; r++) job.negatives[i0 + r] += sum(load(scratch.row_sums + r * kLanes));
    for (int64_t at = 0; at < width; at += kLanes)
      store(job.negatives + j0 + at, load(job.negatives + j0 + at) + load(scratch.column_sums + at));
  }

  // Without a bound: the tile is kept, and a running maximum taken along its rows, then along its columns.
  SSLK_INLINE void forward_online() {
    similarities([&](int64_t row, int64_t column, FullBlock& c) __attribute__((always_inline)) {
      to_logits(row, column, c, 0);
      if (diagonal) {
        store_logits(row, column, c);
        keep_positives(row, column);
      }
      mask(row, column, c, kMasked);
      store_logits(row, column, c);
    });
    for (int64_t r = 0; r < height; r++) add_row(r);
    for (int64_t at = 0; at < width; at += kLanes) add_columns(at);
  }

  SSLK_INLINE void store_logits(int64_t row, int64_t column, const FullBlock& c) const {
    SSLK_UNROLL for (int r = 0; r < kRows; r++) SSLK_UNROLL for (int v = 0; v < kVecs; v++)
        store(scratch.s + (row + r) * kTileStride + column + v * kLanes, c[r][v]);
  }

  // The positives' logits as the tiles have them: only so is a tie with a negative seen as a tie.
  SSLK_INLINE void keep_positives(int64_t row, int64_t column) const {
    for (int64_t r = row; r < row + kRows; r += 2)
      if (column <= r && r < column + kPanel)
        job.packed_positive[i0 + r] = job.packed_positive[i0 + r + 1] = scratch.s[r * kTileStride + r + 1];
  }

  SSLK_INLINE void add_row(int64_t r) const {
    const int64_t first = diagonal ? r / kPanel * kPanel : 0;
    const float* logits = scratch.s + r * kTileStride;
    Vec largest = broadcast(job.maxima[i0 + r]);
    for (int64_t at = first; at < width; at += kLanes) largest = max(largest, load(logits + at));
    const Vec top = broadcast(maximum(largest));
    Vec total{};
    for (int64_t at = first; at < width; at += kLanes) total += exp2(load(logits + at) - top);
    const float rescale = exp2(broadcast(job.maxima[i0 + r]) - top)[0];
    job.negatives[i0 + r] = job.negatives[i0 + r] * rescale + sum(total);
    job.maxima[i0 + r] = top[0];
  }

  SSLK_INLINE void add_columns(int64_t at) const {
    const int64_t end = diagonal ? min(height, (at / kPanel + 1) * kPanel) : height;
    const float* logits = scratch.s + at;
    const Vec before = load(job.maxima + j0 + at);
    Vec top = before, total{};
    for (int64_t r = 0; r < end; r++) top = max(top, load(logits + r * kTileStride));
    for (int64_t r = 0; r < end; r++) total += exp2(load(logits + r * kTileStride) - top);
    store(job.negatives + j0 + at, load(job.negatives + j0 + at) * exp2(before - top) + total);
    store(job.maxima + j0 + at, top);
  }

  // ---- backward

  void backward() {
    similarities([&](int64_t row, int64_t column, FullBlock& c) __attribute__((always_inline)) {
      if (job.bounded)
        weigh_bounded(row, column, c);
      else
        weigh_online(row, column, c);
      mask(row, column, c, 0);
      store_g(row, column, c);
    });
    accumulate<kRowG, 1>(scratch.g, i0, j0, height, width, false);
    if constexpr (kBf16)
      accumulate<1, kTileStride>(scratch.g_by_columns, j0, i0, width, height, true);
    else
      accumulate<1, kRowG>(scratch.g, j0, i0, width, height, true);
  }

  SSLK_INLINE void weigh_bounded(int64_t row, int64_t column, FullBlock& c) const {
    to_logits(row, column, c, bound2);
    SSLK_UNROLL for (int v = 0; v < kVecs; v++) {
      const Vec weight = load(job.weight + j0 + column + v * kLanes);
      SSLK_UNROLL for (int r = 0; r < kRows; r++) c[r][v] = exp2(c[r][v]) * (weight + job.weight[i0 + row + r]);
    }
  }

  // The offsets come in two parts: at small temperatures the logits are large, and p is nearly 1 where the two cancel.
  SSLK_INLINE void weigh_online(int64_t row, int64_t column, FullBlock& c) const {
    to_logits(row, column, c, 0);
    SSLK_UNROLL for (int v = 0; v < kVecs; v++) {
      const int64_t j = j0 + column + v * kLanes;
      SSLK_UNROLL for (int r = 0; r < kRows; r++) {
        const int64_t i = i0 + row + r;
        const Vec of_row = exp2(c[r][v] - job.logsumexp2[i] - job.logsumexp2_low[i]) * job.weight[i];
        const Vec of_column =
            exp2(c[r][v] - load(job.logsumexp2 + j) - load(job.logsumexp2_low + j)) * load(job.weight + j);
        c[r][v] = of_row + of_column;
      }
    }
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
      const Vec residual0 = load(job.residual + j0 + column), residual1 = load(job.residual + j0 + column + kLanes);
      SSLK_UNROLL for (int r = 0; r < kRows; r++) {
        const __m512bh pair = _mm512_cvtne2ps_pbh(c[r][1] * residual1, c[r][0] * residual0);
        store(scratch.g + (row + r) * kRowG + column / 2, (Vec)pair);
      }
      alignas(64) static const uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                           21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                           11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
      const __m512i interleave = _mm512_load_si512(kInterleave);
      SSLK_UNROLL for (int r = 0; r < kRows; r += 2) {
        const float even = job.residual[i0 + row + r], odd = job.residual[i0 + row + r + 1];
        SSLK_UNROLL for (int v = 0; v < kVecs; v++) {
          const __m512bh rows = _mm512_cvtne2ps_pbh(c[r + 1][v] * odd, c[r][v] * even);
          store(scratch.g_by_columns + (row + r) / 2 * kTileStride + column + v * kLanes,
                (Vec)_mm512_permutexvar_epi16(interleave, (__m512i)rows));
        }
      }
    }
#endif
  }

  // grad_z[to .. to + height) += A Z[from .. from + width), A being G or its transpose. On the diagonal A is
  // triangular.
  template <int kRowStride, int kStepStride>
  SSLK_INLINE void accumulate(const uint32_t* a, int64_t to, int64_t from, int64_t rows, int64_t depth,
                              bool transposed) {
    for (int64_t column = 0; column < job.dim; column += kPanel) {
      const uint32_t* right = job.columns + (column * job.padded_rows + from * kPanel) / kPerWord;
      float* out = job.grad_z + column * job.padded_rows + to * kPanel;
      const bool narrow = job.dim - column <= kLanes;  // the last panel may be half empty
      for (int64_t row = 0; row < rows; row += kRows) {
        const int64_t begin = diagonal && !transposed ? row : 0, end = diagonal && transposed ? row + kRows : depth;
        if (column + kPanel < job.dim) {
          const char* next = reinterpret_cast<const char*>(right + job.padded_rows * kPanel / kPerWord);
          const int64_t share = depth * kPanel * 4 / kPerWord * kRows / rows;
          for (int64_t at = row / kRows * share; at < (row / kRows + 1) * share; at += 64)
            __builtin_prefetch(next + at, 0, 2);
        }
        const uint32_t* left = a + row * kRowStride + begin / kPerWord * kStepStride;
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

template <bool kBf16>
void forward_tile(const NtXentJob& job, int64_t i0, int64_t j0, void* scratch) {
  NtXentTiles<kBf16>{job, *static_cast<typename NtXentTiles<kBf16>::Scratch*>(scratch), i0, j0}.forward();
}
template <bool kBf16>
void backward_tile(const NtXentJob& job, int64_t i0, int64_t j0, void* scratch) {
  NtXentTiles<kBf16>{job, *static_cast<typename NtXentTiles<kBf16>::Scratch*>(scratch), i0, j0}.backward();
}

template <bool kBf16>
NtXentKernel kernel_of() {
  constexpr int64_t tiles = sizeof(typename NtXentTiles<kBf16>::Scratch), packing = sizeof(PackScratch<kBf16>);
  return {kPanel,
          kBf16,
          tiles > packing ? tiles : packing,
          pack<kBf16>,
          forward_tile<kBf16>,
          forward_rows,
          backward_tile<kBf16>,
          backward_rows};
}

NtXentKernel nt_xent_kernel(bool bf16) { return bf16 && kHasBf16 ? kernel_of<kHasBf16>() : kernel_of<false>(); }

}  // namespace sslkernels::SSLK_ISA

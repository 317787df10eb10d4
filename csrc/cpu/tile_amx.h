// The products of a tile by AMX: how it wants rows packed, and how it multiplies them.
//
// AMX multiplies bf16 alone, sixteen times as fast as the vector units multiply floats. So a float is split into parts,
// x = x0 + x1 + x2, each rounded to bf16: 3 x 8 digits are all that it has. Of the nine products of two floats' parts
// the six largest are taken; the others are at most 2^-23 of the product together, and of either sign. They are added
// up in fp32, two steps at once, so sums round less than those of a chain of multiply-adds. Parts below 2^-126 count as
// zero, and what is infinite becomes NaN.
//
// Everything lies in blocks of 32 x 32 values, each in kParts parts of kPart words, and a part in two halves of 16 x 16
// words, as the tile registers take them. A word holds two values that are neighbours along the reduction: steps k and
// k + 16 of a block, but 2k and 2k + 1 in `turned` and `g_by_columns`.
//
//   lefts    [panel][dim / 32]: rows x words along dim; left operand of S
//   panels   [panel][dim / 32]: words along dim x rows; right operand of S
//   columns  [dim / 32][panel]: words along the rows x dim; right operand of dA += G B
//   turned   [dim / 32][panel]: dim x words along the rows; left operand of dB^T += A^T G
//   grad     [dim / 32][panel]: rows x dim; and turned_grad, dim x rows
#pragma once
#include "amx.h"

namespace sslkernels::SSLK_ISA {

template <bool kBf16>
constexpr Packing packing_of() {
  return {kPanel, kBf16, true};
}

// ---- parts

SSLK_INLINE VecWord pair_up(VecWord low, VecWord high) { return low >> 16 | (high & 0xffff0000u); }

// Takes a part of each of some vectors, its bits in the upper halves of words, and leaves the rest to the next; the
// last of three is exact. Ties go away from zero, and a NaN whose bits are all ones is not taken for one.
template <bool kBf16, int kIndex, int kCount>
SSLK_INLINE void take_part(Vec (&c)[kCount], VecWord (&part)[kCount]) {
  SSLK_UNROLL for (int i = 0; i < kCount; i++) {
    part[i] = (VecWord)c[i] + (kBf16 || kIndex < 2 ? 0x8000 : 0);
    if (kIndex < kParts<kBf16> - 1) c[i] -= (Vec)(part[i] & 0xffff0000u);
  }
}

template <int kIndex>
struct Index {
  static constexpr int value = kIndex;
};
// f(index) for every part, the index being a constant.
template <bool kBf16, class F>
SSLK_INLINE void each_part(const F& f) {
  f(Index<0>{});
  if constexpr (!kBf16) f(Index<1>{}), f(Index<2>{});
}

// ---- packing

template <bool kBf16>
struct PackScratch {
  alignas(64) float rows[kPanel * kChunkStride];
  alignas(64) uint32_t lefts[kBlock<kBf16>], turned[kBlock<kBf16>];  // of a block; `turned` not yet so
};

// Rows of 16 words, transposed: the words are gathered from two rows, then pairs of them, then four, then eight.
SSLK_INLINE void transpose(VecWord (&row)[16]) {
  constexpr VecWord kLow1 = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30},
                    kLow2 = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29},
                    kLow4 = {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27},
                    kLow8 = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
  const auto exchange = [&](int distance, VecWord low) __attribute__((always_inline)) {
    SSLK_UNROLL for (int r = 0; r < 16; r++) {
      if (r & distance) continue;
      const VecWord upper = row[r], lower = row[r + distance];
      row[r] = __builtin_shuffle(upper, lower, low);
      row[r + distance] = __builtin_shuffle(upper, lower, low + static_cast<uint32_t>(distance));
    }
  };
  exchange(1, kLow1);
  exchange(2, kLow2);
  exchange(4, kLow4);
  exchange(8, kLow8);
}
// A half, transposed.
SSLK_INLINE void transpose_half(const uint32_t* from, uint32_t* to) {
  VecWord row[16];
  SSLK_UNROLL for (int r = 0; r < 16; r++) row[r] = (VecWord)load(from + r * 16);
  transpose(row);
  SSLK_UNROLL for (int r = 0; r < 16; r++) store(to + r * 16, (Vec)row[r]);
}

// Packs 32 columns of the rows of a panel into a block of all that the side has.
template <bool kBf16>
SSLK_INLINE void pack_block(const float* rows, uint32_t* lefts, uint32_t* panels, uint32_t* columns, uint32_t* turned,
                            PackScratch<kBf16>& s) {
  uint32_t* const by_rows = lefts ? lefts : s.lefts;
  for (int64_t k = 0; k < 8; k++) {
    const int64_t row[] = {2 * k, 2 * k + 1, 16 + 2 * k, 17 + 2 * k};
    Vec rest[8];
    SSLK_UNROLL for (int i = 0; i < 8; i++) {
      rest[i] = load(rows + row[i / 2] * kChunkStride + i % 2 * kLanes);
      if (kBf16) rest[i] = rest[i] == rest[i] ? rest[i] : broadcast(__builtin_nanf(""));  // which take_part knows
    }
    each_part<kBf16>([&](auto index) __attribute__((always_inline)) {
      constexpr int64_t kAt = decltype(index)::value * kPart;
      VecWord part[8];
      take_part<kBf16, decltype(index)::value>(rest, part);
      SSLK_UNROLL for (int r = 0; r < 4; r++)
          store(by_rows + kAt + row[r] * kLanes, (Vec)pair_up(part[2 * r], part[2 * r + 1]));
      SSLK_UNROLL for (int half = 0; half < 2; half++) {
        if (columns) {
          uint32_t* const to = columns + kAt + half * kHalf + 2 * k * kLanes;
          store(to, (Vec)pair_up(part[half], part[4 + half]));
          store(to + kLanes, (Vec)pair_up(part[2 + half], part[6 + half]));
        }
        if (turned) {
          uint32_t* const to = s.turned + kAt + half * kHalf + k * kLanes;
          store(to, (Vec)pair_up(part[half], part[2 + half]));
          store(to + kHalf / 2, (Vec)pair_up(part[4 + half], part[6 + half]));
        }
      }
    });
  }
  for (int64_t half = 0; half < kBlock<kBf16>; half += kHalf) {
    if (panels) transpose_half(by_rows + half, panels + half);
    if (turned) transpose_half(s.turned + half, turned + half);
  }
}

// Packs columns [column, column + kChunk) of the rows of a panel, which lie in `s.rows`, padded with zeros to a
// multiple of kPanel, into whatever the side has.
template <bool kBf16>
void pack_chunk(const Side& side, int64_t dim, int64_t words, int64_t panel, int64_t column, PackScratch<kBf16>& s) {
  const auto part_of = [](uint32_t* of, int64_t block) { return of ? of + block * kBlock<kBf16> : nullptr; };
  for (int64_t c = 0; c < min(kChunk, dim - column); c += kPanel) {
    const int64_t block = (column + c) / kPanel, along_dim = panel * (words / kAmxSteps) + block,
                  along_rows = block * (side.padded_rows / kPanel) + panel;
    pack_block<kBf16>(s.rows + c, part_of(side.lefts, along_dim), part_of(side.panels, along_dim),
                      part_of(side.columns, along_rows), part_of(side.turned, along_rows), s);
  }
}

// Adds what a panel was given by the columns' side of tiles to what it was given by the rows', or only turns it.
SSLK_INLINE void gather_grad(const Side& side, int64_t dim, int64_t panel) {
  if (!side.turned_grad) return;
  const bool alone = side.grad == side.turned_grad;
  for (int64_t column = 0; column < dim; column += kPanel) {
    const int64_t at = column * side.padded_rows + panel * kPanel * kPanel;
    VecWord quarter[4][16];
    for (int q = 0; q < 4; q++) {
      const float* from = side.turned_grad + at + q / 2 * 16 * kPanel + q % 2 * 16;
      SSLK_UNROLL for (int r = 0; r < 16; r++) quarter[q][r] = (VecWord)load(from + r * kPanel);
      transpose(quarter[q]);
    }
    for (int q = 0; q < 4; q++) {
      float* to = side.grad + at + q % 2 * 16 * kPanel + q / 2 * 16;
      for (int r = 0; r < 16; r++, to += kPanel) store(to, (Vec)quarter[q][r] + (alone ? Vec{} : load(to)));
    }
  }
}

// ---- products

// Adds blocks of sums to a gradient: each while the next is multiplied, since the tile unit is slow to hand them over.
class BlockAdder {
 public:
  explicit SSLK_INLINE BlockAdder(float (&blocks)[2][kPanel * kPanel]) : blocks_(blocks) {}

  // Takes the sums in the registers; those before are added.
  SSLK_INLINE void take(float* out) {
    add_all();
    filled_ = !filled_;
    store_sums(blocks_[filled_]);
    out_ = out;
    added_ = 0;
  }
  // A share of them, as many as a tile has blocks along a side.
  SSLK_INLINE void add_some() {
    if (!out_ || added_ == kPanel * kPanel) return;
    const float* from = blocks_[filled_] + added_;
    float* to = out_ + added_;
    SSLK_UNROLL for (int64_t at = 0; at < kShare; at += kLanes) store(to + at, load(to + at) + load(from + at));
    added_ += kShare;
  }
  SSLK_INLINE void add_all() {
    while (out_ && added_ < kPanel * kPanel) add_some();
  }

 private:
  static constexpr int64_t kShare = kPanel * kPanel / (kMaxTile / kPanel);
  float (&blocks_)[2][kPanel * kPanel];
  float* out_ = nullptr;
  int64_t added_ = 0;
  int filled_ = 0;
};

template <bool kBf16>
struct TileProducts : TilePlace<kBf16> {
  typedef TilePlace<kBf16> Place;
  typedef Block<kVecs> FullBlock;
  static constexpr int64_t kBlockRows = kPanel;  // of S between two visits of a block
  static constexpr int64_t kTileBlocks = kMaxTile / kPanel;
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
    return logits.bounded || !kBf16 ? 256 : min(256, round_up(logits.words / 4, kAmxSteps));
  }

  // take(row, block) gets A B^T over the words [k, k + steps) of kRows rows and kPanel columns, for kBlockRows rows.
  template <class Take>
  SSLK_INLINE void multiply_block(int64_t row, int64_t column, int64_t k, int64_t steps, const Take& take) const {
    const int64_t blocks = logits.words / kAmxSteps, first = k / kAmxSteps;
    multiply_blocks<kBf16>(steps / kAmxSteps, a.lefts + ((i0 + row) / kPanel * blocks + first) * kBlock<kBf16>,
                           b.panels + ((j0 + column) / kPanel * blocks + first) * kBlock<kBf16>, [] {});
    store_sums(scratch.blocks[0]);
    for (int64_t part = 0; part < kPanel; part += kRows) {
      FullBlock c;
      SSLK_UNROLL for (int r = 0; r < kRows; r++) SSLK_UNROLL for (int v = 0; v < kVecs; v++) c[r][v] =
          load(scratch.blocks[0] + (part + r) * kPanel + v * kLanes);
      take(row + part, c);
    }
  }

  uint32_t* g_by_rows(int64_t row, int64_t column) const {
    return scratch.g_by_rows + (row / kPanel * kTileBlocks + column / kPanel) * kBlock<kBf16>;
  }
  uint32_t* g_by_columns(int64_t row, int64_t column) const {
    return scratch.g_by_columns + (column / kPanel * kTileBlocks + row / kPanel) * kBlock<kBf16>;
  }

  // Stores G as the left operand of the rows' product and the right operand of the columns'. In bf16 it meets the
  // packed rows, so the factor that is missing from them goes in first: that of the column's row for dz_i, of the row
  // for dz_j.
  SSLK_INLINE void store_g(int64_t row, int64_t column, const FullBlock& c, bool rows_alone) const {
    uint32_t* const by_rows = g_by_rows(row, column) + row % kPanel * kLanes;
    uint32_t* const by_columns = g_by_columns(row, column) + row % kPanel / 2 * kLanes;
    SSLK_UNROLL for (int r = 0; r < kRows; r += 2) {
      Vec rest[4] = {c[r][0], c[r][1], c[r + 1][0], c[r + 1][1]}, turned[4];
      if constexpr (kBf16) {
        SSLK_UNROLL for (int i = 0; i < 4; i++) {
          turned[i] = rest[i] * a.residual[i0 + row + r + i / 2];
          rest[i] *= load(b.residual + j0 + column + i % 2 * kLanes);
        }
      }
      each_part<kBf16>([&](auto index) __attribute__((always_inline)) {
        constexpr int64_t kAt = decltype(index)::value * kPart;
        VecWord part[4];
        take_part<kBf16, decltype(index)::value>(rest, part);
        store(by_rows + kAt + r * kLanes, (Vec)pair_up(part[0], part[1]));
        store(by_rows + kAt + (r + 1) * kLanes, (Vec)pair_up(part[2], part[3]));
        if (rows_alone) return;
        if constexpr (kBf16) take_part<kBf16, 0>(turned, part);
        store(by_columns + kAt + r / 2 * kLanes, (Vec)pair_up(part[0], part[2]));
        store(by_columns + kAt + kHalf + r / 2 * kLanes, (Vec)pair_up(part[1], part[3]));
      });
    }
  }

  // a.grad += G B
  void accumulate_rows() const {
    BlockAdder adder{scratch.blocks};
    for (int64_t column = 0; column < logits.dim; column += kPanel) {
      const uint32_t* right = b.columns + (column * b.padded_rows + j0 * kPanel) / (kPanel * kPanel) * kBlock<kBf16>;
      float* out = a.grad + column * a.padded_rows + i0 * kPanel;
      for (int64_t row = 0; row < height; row += kPanel) {
        const int64_t begin = diagonal ? row / kPanel : 0;
        multiply_blocks<kBf16>(width / kPanel - begin, g_by_rows(row, begin * kPanel), right + begin * kBlock<kBf16>,
                               [&]() __attribute__((always_inline)) { adder.add_some(); });
        adder.take(out + row * kPanel);
      }
    }
    adder.add_all();
  }
  // b.turned_grad += A^T G
  void accumulate_columns() const {
    BlockAdder adder{scratch.blocks};
    for (int64_t column = 0; column < logits.dim; column += kPanel) {
      const uint32_t* left = a.turned + (column * a.padded_rows + i0 * kPanel) / (kPanel * kPanel) * kBlock<kBf16>;
      float* out = b.turned_grad + column * b.padded_rows + j0 * kPanel;
      for (int64_t j = 0; j < width; j += kPanel) {
        multiply_blocks<kBf16>(diagonal ? j / kPanel + 1 : height / kPanel, left, g_by_columns(0, j),
                               [&]() __attribute__((always_inline)) { adder.add_some(); });
        adder.take(out + j * kPanel);
      }
    }
    adder.add_all();
  }
  void accumulate_both() const {
    accumulate_rows();
    accumulate_columns();
  }
};

}  // namespace sslkernels::SSLK_ISA

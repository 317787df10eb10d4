// The sigmoid loss through tiles of logits. Compiled once per instruction set.
#pragma once
#include "logit_tiles.h"

namespace sslkernels::SSLK_ISA {

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

// softplus(-l) of pairs that belong together, softplus(l) of the others.
template <bool kBf16>
struct SigmoidTile : LogitTile<kBf16> {
  typedef LogitTile<kBf16> Tile;
  typedef typename Tile::FullBlock FullBlock;
  using Tile::a;
  using Tile::accumulate_both;
  using Tile::add_to_row_sums;
  using Tile::clear_tile_sums;
  using Tile::height;
  using Tile::i0;
  using Tile::inside;
  using Tile::left_out;
  using Tile::logits;
  using Tile::masked;
  using Tile::scratch;
  using Tile::store_g;
  using Tile::to_logits;

  void forward() {
    clear_tile_sums();
    Tile::similarities([&](int64_t row, int64_t column, FullBlock& c) __attribute__((always_inline)) {
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
  void backward() {
    clear_tile_sums();
    Tile::similarities([&](int64_t row, int64_t column, FullBlock& c) __attribute__((always_inline)) {
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
      store_g(row, column, c, false);
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
};

}  // namespace sslkernels::SSLK_ISA

// A tile of logits and what a worker keeps while it goes through it. Compiled once per instruction set.
#pragma once
#include "logits.h"
#include "storage.h"
#include "tile_gemm.h"

namespace sslkernels::SSLK_ISA {

constexpr int64_t kTileStride = kMaxTile + 16;  // row of a tile in words, padded against cache-set conflicts
constexpr int64_t kChunk = 512;                 // columns of a row handled at a time
constexpr int64_t kChunkStride = kChunk + 32;   // between rows of a chunk: a power of two would share few cache sets

#if defined(__AMX_BF16__)
constexpr bool kHasAmx = true;
#else
constexpr bool kHasAmx = false;
#endif
// Parts that a value is multiplied in: by AMX a float is the sum of three bf16.
template <bool kBf16>
constexpr int64_t kParts = kHasAmx && !kBf16 ? 3 : 1;

template <bool kBf16>
struct TileScratch {
  static constexpr int64_t kRowG = kMaxTile / (kBf16 ? 2 : 1) + 16;  // row of G in words; not with AMX
  static constexpr int64_t kG = kHasAmx ? kMaxTile * kMaxTile / 2 * kParts<kBf16> : kBf16 ? kMaxTile * kRowG : 16;

  alignas(64) float s[kMaxTile * kTileStride];
  alignas(64) uint32_t g_by_rows[kG];                           // bf16: words hold two columns
  alignas(64) uint32_t g_by_columns[kG];                        // bf16: words hold two rows
  alignas(64) float blocks[2][kHasAmx ? kPanel * kPanel : 16];  // as AMX stores them
  alignas(64) float row_sums[kMaxTile * kLanes];
  alignas(64) float column_sums[kMaxTile];
  alignas(64) float row_peaks[kMaxTile * kLanes];  // similarities, with the sign of the scale
  alignas(64) float column_peaks[kMaxTile];
  alignas(64) float row_weights[kMaxTile];
};

// The logits of some rows of side a and some columns, rows of side b.
template <bool kBf16>
struct TilePlace {
  typedef TileScratch<kBf16> Scratch;

  const Logits& logits;
  const Side &a, &b;
  Scratch& scratch;
  const int64_t i0, j0;  // first row and column of the tile
  const int64_t height = min(logits.tile, a.padded_rows - i0), width = min(logits.tile, b.padded_rows - j0);
  const bool diagonal = logits.triangle != Triangle::kNone && i0 == j0;
};

}  // namespace sslkernels::SSLK_ISA

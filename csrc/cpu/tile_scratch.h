// What a worker keeps while it goes through a tile of logits. Compiled once per instruction set.
#pragma once
#include "logits.h"
#include "tile_amx.h"

namespace sslkernels::SSLK_ISA {

constexpr int64_t kTileStride = kMaxTile + 16;  // row of a tile in words, padded against cache-set conflicts

template <bool kBf16>
struct TileScratch {
  static constexpr int64_t kPerWord = kBf16 ? 2 : 1;
  static constexpr int64_t kRowG = kMaxTile / kPerWord + 16;  // row of G in words

  alignas(64) float s[kMaxTile * kTileStride];
  alignas(64) uint32_t g_by_rows[kBf16 ? kMaxTile * kRowG : 16];  // bf16: words hold two columns
  // bf16: words hold two rows; of AMX's left operand they lie by columns
  alignas(64) uint32_t g_by_columns[kAmx<kBf16> ? kMaxTile * kRowG : kBf16 ? kMaxTile / 2 * kTileStride : 16];
  alignas(64) float block[kAmx<kBf16> ? kAmxSide * kAmxSide : 16];
  alignas(64) float row_sums[kMaxTile * kLanes];
  alignas(64) float column_sums[kMaxTile];
  alignas(64) float row_peaks[kMaxTile * kLanes];  // similarities, with the sign of the scale
  alignas(64) float column_peaks[kMaxTile];
  alignas(64) float row_weights[kMaxTile];

  uint32_t* g() { return kBf16 ? g_by_rows : reinterpret_cast<uint32_t*>(s); }  // in fp32 G takes the place of S
};

}  // namespace sslkernels::SSLK_ISA

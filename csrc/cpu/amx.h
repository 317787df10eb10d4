// The tile registers of AMX: products of blocks of 32 x 32 values, which lie as tile_amx.h describes.
#pragma once
#include "tile_scratch.h"

namespace sslkernels::SSLK_ISA {

static_assert(kPanel == 32 && kLanes == 16 && kRows == 8);
constexpr int64_t kAmxSteps = 16;                  // words along the reduction of a block
constexpr int64_t kHalf = 256, kPart = 2 * kHalf;  // words
template <bool kBf16>
constexpr int64_t kBlock = kPart * kParts<kBf16>;

// Sets the tile registers up for a while, where they are used; whoever else uses them sets them up again, as their ABI
// has it.
struct TileConfig {
  TileConfig() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  TileConfig(const TileConfig&) = delete;
  TileConfig& operator=(const TileConfig&) = delete;
  ~TileConfig() { asm volatile("tilerelease"); }
};

// ---- tile registers: 0 to 3 hold the sums of a block, 4 and 5 the halves of a left operand, 6 and 7 of a right one

// The macros of amxtileintrin.h do not tell the compiler that a load reads memory.
#define SSLK_TILE_LOAD(tile, from) \
  asm volatile("tileloadd (%0, %1), %%tmm" #tile : : "r"(from), "r"(int64_t{64}) : "memory")
// The hint leaves the first cache to the other operand.
#define SSLK_TILE_STREAM(tile, from) \
  asm volatile("tileloaddt1 (%0, %1), %%tmm" #tile : : "r"(from), "r"(int64_t{64}) : "memory")
#define SSLK_TILE_STORE(tile, to, stride) \
  asm volatile("tilestored %%tmm" #tile ", (%0, %1)" : : "r"(to), "r"(int64_t{stride}) : "memory")
#define SSLK_TILE_ZERO(tile) asm volatile("tilezero %tmm" #tile)
#define SSLK_TILE_MULTIPLY(sum, left, right) asm volatile("tdpbf16ps %tmm" #right ", %tmm" #left ", %tmm" #sum)

SSLK_INLINE void clear_sums() {
  SSLK_TILE_ZERO(0);
  SSLK_TILE_ZERO(1);
  SSLK_TILE_ZERO(2);
  SSLK_TILE_ZERO(3);
}
SSLK_INLINE void store_sums(float* to) {
  SSLK_TILE_STORE(0, to, 4 * kPanel);
  SSLK_TILE_STORE(1, to + 16, 4 * kPanel);
  SSLK_TILE_STORE(2, to + 16 * kPanel, 4 * kPanel);
  SSLK_TILE_STORE(3, to + 16 * kPanel + 16, 4 * kPanel);
}
SSLK_INLINE void load_left(const uint32_t* part) {
  SSLK_TILE_STREAM(4, part);
  SSLK_TILE_STREAM(5, part + kHalf);
}
SSLK_INLINE void load_right(const uint32_t* part) {
  SSLK_TILE_LOAD(6, part);
  SSLK_TILE_LOAD(7, part + kHalf);
}
SSLK_INLINE void multiply_loaded() {
  SSLK_TILE_MULTIPLY(0, 4, 6);
  SSLK_TILE_MULTIPLY(2, 5, 6);
  SSLK_TILE_MULTIPLY(1, 4, 7);
  SSLK_TILE_MULTIPLY(3, 5, 7);
}

// sums := A B over some blocks that follow each other along the reduction; meanwhile() is called after each of them.
template <bool kBf16, class Meanwhile>
SSLK_INLINE void multiply_blocks(int64_t blocks, const uint32_t* a, const uint32_t* b, const Meanwhile& meanwhile) {
  clear_sums();
  for (int64_t k = 0; k < blocks; k++, a += kBlock<kBf16>, b += kBlock<kBf16>) {
    if constexpr (!kBf16) {  // a path that changes one operand at a time, and ends with the largest product
      load_left(a);
      load_right(b + 2 * kPart);
      multiply_loaded();
      load_right(b + kPart);
      multiply_loaded();
      load_left(a + kPart);
      multiply_loaded();
      load_right(b);
      multiply_loaded();
      load_left(a + 2 * kPart);
      multiply_loaded();
    }
    load_left(a);
    if (kBf16) load_right(b);
    multiply_loaded();
    meanwhile();
  }
}

// Sums that stay in their registers, of operands that do too; returns the flops.
inline double multiply_tiles_loop(int64_t iterations) {
  constexpr int kSteps = 16;
  const TileConfig config;
  alignas(64) uint32_t zeros[kPart] = {};
  clear_sums();
  load_left(zeros);
  load_right(zeros);
  for (int64_t step = 0; step < iterations * kSteps; step++) multiply_loaded();
  return 2.0 * iterations * kSteps * 32 * 32 * 32;
}

#undef SSLK_TILE_LOAD
#undef SSLK_TILE_STREAM
#undef SSLK_TILE_STORE
#undef SSLK_TILE_ZERO
#undef SSLK_TILE_MULTIPLY

}  // namespace sslkernels::SSLK_ISA

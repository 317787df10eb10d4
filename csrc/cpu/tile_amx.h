// Products of bf16 by AMX: 32 x 32 sums in four tile registers, fed by two tiles of the left operand (16 rows of 16
// words, so row-major) and two of the right (16 steps of 16 columns, as the micro-kernel has them). Without AMX there
// is nothing here but constants and a TileConfig that does nothing.
#pragma once
#include "tile_gemm.h"

namespace sslkernels::SSLK_ISA {

#if defined(__AMX_BF16__)
constexpr bool kHasAmx = true;
#else
constexpr bool kHasAmx = false;
#endif
template <bool kBf16>
constexpr bool kAmx = kBf16 && kHasAmx;  // whether tiles of this kind are multiplied by AMX
constexpr int64_t kAmxSide = 32;         // rows and columns of a block
constexpr int64_t kAmxSteps = 16;        // words along the reduction of a tile

// Sets the tile registers up for a while, where they are used; whoever else uses them sets them up again, as their ABI
// has it.
template <bool kUsed>
struct TileConfig {
  TileConfig() {}  // so that it is not an unused variable
};

#if defined(__AMX_BF16__)

template <>
struct TileConfig<true> {
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

// The macros of amxtileintrin.h do not tell the compiler that a load reads memory.
#define SSLK_TILE_LOAD(tile, from, stride) \
  asm volatile("tileloadd (%0, %1), %%tmm" #tile : : "r"(from), "r"(static_cast<int64_t>(stride)) : "memory")
#define SSLK_TILE_STORE(tile, to, stride) \
  asm volatile("tilestored %%tmm" #tile ", (%0, %1)" : : "r"(to), "r"(static_cast<int64_t>(stride)) : "memory")
#define SSLK_TILE_ZERO(tile) asm volatile("tilezero %tmm" #tile)
#define SSLK_TILE_MULTIPLY(sum, left, right) asm volatile("tdpbf16ps %tmm" #right ", %tmm" #left ", %tmm" #sum)

// The sums, kAmxSide rows of kAmxSide: those of `from`, or zeros for null, and where they go. `stride` in floats.
SSLK_INLINE void load_sums(const float* from, int64_t stride) {
  if (!from) {
    SSLK_TILE_ZERO(0);
    SSLK_TILE_ZERO(1);
    SSLK_TILE_ZERO(2);
    SSLK_TILE_ZERO(3);
    return;
  }
  SSLK_TILE_LOAD(0, from, 4 * stride);
  SSLK_TILE_LOAD(1, from + 16, 4 * stride);
  SSLK_TILE_LOAD(2, from + 16 * stride, 4 * stride);
  SSLK_TILE_LOAD(3, from + 16 * stride + 16, 4 * stride);
}
SSLK_INLINE void store_sums(float* to, int64_t stride) {
  SSLK_TILE_STORE(0, to, 4 * stride);
  SSLK_TILE_STORE(1, to + 16, 4 * stride);
  SSLK_TILE_STORE(2, to + 16 * stride, 4 * stride);
  SSLK_TILE_STORE(3, to + 16 * stride + 16, 4 * stride);
}

// sums += A B over the words [begin, end), multiples of kAmxSteps: rows of A lie `a_stride` words apart, step k of B is
// the kPanel words from b + k * kPanel on.
SSLK_INLINE void multiply_tiles(int64_t begin, int64_t end, const uint32_t* a, int64_t a_stride, const uint32_t* b) {
  static_assert(kPanel == kAmxSide);
  for (int64_t k = begin; k < end; k += kAmxSteps) {
    SSLK_TILE_LOAD(4, a + k, 4 * a_stride);
    SSLK_TILE_LOAD(6, b + k * kPanel, 4 * kPanel);
    SSLK_TILE_LOAD(5, a + 16 * a_stride + k, 4 * a_stride);
    SSLK_TILE_LOAD(7, b + k * kPanel + 16, 4 * kPanel);
    SSLK_TILE_MULTIPLY(0, 4, 6);
    SSLK_TILE_MULTIPLY(2, 5, 6);
    SSLK_TILE_MULTIPLY(1, 4, 7);
    SSLK_TILE_MULTIPLY(3, 5, 7);
  }
}

// Sums that stay in their registers, of operands that do too; returns the flops.
inline double multiply_tiles_loop(int64_t iterations) {
  constexpr int kSteps = 16;
  const TileConfig<true> config;
  alignas(64) float zeros[256] = {};
  SSLK_TILE_ZERO(0);
  SSLK_TILE_ZERO(1);
  SSLK_TILE_ZERO(2);
  SSLK_TILE_ZERO(3);
  SSLK_TILE_LOAD(4, zeros, 64);
  SSLK_TILE_LOAD(6, zeros, 64);
  for (int64_t step = 0; step < iterations * kSteps; step++) {
    SSLK_TILE_MULTIPLY(0, 4, 6);
    SSLK_TILE_MULTIPLY(1, 4, 6);
    SSLK_TILE_MULTIPLY(2, 4, 6);
    SSLK_TILE_MULTIPLY(3, 4, 6);
  }
  return 2.0 * iterations * kSteps * 4 * 16 * 16 * 32;
}

#undef SSLK_TILE_LOAD
#undef SSLK_TILE_STORE
#undef SSLK_TILE_ZERO
#undef SSLK_TILE_MULTIPLY

#endif

}  // namespace sslkernels::SSLK_ISA

// The loops of patch masking, as patch_mask_*.h call them. No torch, no instruction set.
#pragma once
#include <cstdint>

#include "../dtype.h"

namespace sslkernels {

// How a row of a result is written: into the caches, or past them.
struct RowMoves {
  void (*copy)(void* to, const void* from, int64_t bytes);
  void (*zero)(void* to, int64_t bytes);
  void (*add)(Dtype dtype, void* to, const void* a, const void* b, int64_t columns);
};

// The loops of one instruction set.
struct PatchMaskKernel {
  // The random keys of a sample's tokens. `keys` has room for kKeyBlock more.
  void (*keys)(uint64_t seed, uint64_t sample, int64_t tokens, uint32_t* keys);
  RowMoves cached, streamed;
  // Sums of rows: `part` is in fp32 (fp64 for fp64), and flush moves it into `total` before it grows.
  void (*accumulate)(Dtype dtype, void* part, const void* row, int64_t columns);
  void (*flush)(Dtype dtype, double* total, void* part, int64_t columns);
  void (*round)(Dtype dtype, void* to, const double* total, int64_t columns);
};

constexpr int64_t kKeyBlock = 128;

}  // namespace sslkernels

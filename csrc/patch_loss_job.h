// What the masked patch loss is asked to do, for CPU and GPU alike, without torch.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace sslkernels {

// Patches are numbered in row-major order of the grid (frames, rows, columns), through all samples; the pixels of a
// patch in row-major order with the channels last. Images have one frame.
struct PatchLossJob {
  const void* pred;  // (N, L, D), the last dimension dense
  const void* images;
  const bool* mask;  // (N, L): what counts
  void* grad;        // (N, L, D) in grad_dtype(), or null
  Dtype pred_dtype, images_dtype;
  bool norm_pix;
  double eps;
  int64_t samples, grid[3], channels, patch[3];
  int64_t pred_strides[2];                   // of sample and patch
  int64_t sample_stride, grid_strides[3];    // of the images: to the next sample, and the next patch in the grid
  int64_t channel_stride, patch_strides[3];  // within a patch

  constexpr int64_t tokens() const { return grid[0] * grid[1] * grid[2]; }
  constexpr int64_t width() const { return channels * patch[0] * patch[1] * patch[2]; }
  constexpr bool is_double() const { return pred_dtype == Dtype::kFloat64 || images_dtype == Dtype::kFloat64; }
  // The gradient of an fp16 prediction is as small as 2 / (D * masked): fp16 would lose it.
  constexpr Dtype grad_dtype() const { return pred_dtype == Dtype::kFloat16 ? Dtype::kFloat32 : pred_dtype; }

  // Where the channels of a pixel lie side by side, a row of a patch is one of more pixels with one channel.
  constexpr void merge_channels() {
    if (channel_stride != 1 || patch_strides[2] != channels) return;
    patch[2] *= channels;
    patch_strides[2] = channels = 1;
  }
};

// The backward: grad = grad_pred times a number where masked, zero elsewhere.
struct PatchGradJob {
  const void* grad_pred;  // (rows, width)
  const bool* mask;
  void* grad;
  Dtype from, to;  // equal, but for fp32 that becomes fp16
  int64_t rows, width;
};

}  // namespace sslkernels

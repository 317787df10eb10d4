// The moving average on a GPU, as the host asks for it: no CUDA in sight.
#pragma once
#include <cstdint>
#include <vector>

#include "ema_list.h"

namespace sslkernels {
namespace ema {

// What all tensors have in common. The pointers are to device memory: nothing of it is read on the host.
struct Options {
  const double* momentum;
  const float* found_inf;  // or null
  const int64_t* step;     // null: round to nearest
  uint64_t seed;
};

// Launches the update on torch's current stream of a device.
void update_on_gpu(const std::vector<EmaTensor>& tensors, const Options& options, int32_t device);

}  // namespace ema
}  // namespace sslkernels

// torch as the host of an op's steps: its caching allocator and its current stream, so that the steps may be captured
// in a CUDA graph.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "checks.h"
#include "cuda/current_stream.h"
#include "cuda/platform.h"

namespace sslkernels {

// A device, made current for as long as this lives, and its stream; errors are in the name of `op`.
class OnDevice {
 public:
  OnDevice(const char* op, int32_t device) : op_(op), guard_(device) {
    const CurrentStreamLookup lookup = current_stream_lookup();
    STD_TORCH_CHECK(lookup, op, ": this torch was built without CUDA");
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(lookup(device, &current));
    stream = static_cast<cudaStream_t>(current);
  }

  void check() const { check(cudaGetLastError(), "launch"); }
  void check(cudaError_t status, const char* what) const {
    STD_TORCH_CHECK(status == cudaSuccess, op_, ": ", what, ": ", cudaGetErrorString(status));
  }

  cudaStream_t stream;

 private:
  const char* const op_;
  const torch::stable::accelerator::DeviceGuard guard_;
};

class TorchHost : public OnDevice {
 public:
  // Memory and launches are on the device of `like`.
  TorchHost(const char* op, const Tensor& like) : OnDevice(op, like.get_device_index()), like_(like) {}

  void* allocate(int64_t bytes) {
    memory_.push_back(torch::stable::new_empty(like_, {bytes}, ScalarType::Byte));
    return memory_.back().mutable_data_ptr();
  }

 private:
  const Tensor like_;
  std::vector<Tensor> memory_;
};

}  // namespace sslkernels

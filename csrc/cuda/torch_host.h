// torch as the host of an op's steps: its caching allocator and its current stream, so that the steps may be captured
// in a CUDA graph.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "checks.h"
#include "cuda/platform.h"

// weak: the same library loads where torch has no CUDA
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace sslkernels {

class TorchHost {
 public:
  // Memory and launches are on the device of `like`, in the name of `op`.
  TorchHost(const char* op, const Tensor& like) : op_(op), guard_(like.get_device_index()), like_(like) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }

  void* allocate(int64_t bytes) {
    memory_.push_back(torch::stable::new_empty(like_, {bytes}, ScalarType::Byte));
    return memory_.back().mutable_data_ptr();
  }

  void check() const {
    const cudaError_t status = cudaGetLastError();
    STD_TORCH_CHECK(status == cudaSuccess, op_, ": launch: ", cudaGetErrorString(status));
  }

  cudaStream_t stream;

 private:
  const char* const op_;
  const torch::stable::accelerator::DeviceGuard guard_;
  const Tensor like_;
  std::vector<Tensor> memory_;
};

}  // namespace sslkernels

// torch's threads, as the kernels take them.
#pragma once
#include <torch/csrc/stable/ops.h>

namespace sslkernels {

// Runs body(begin, end) over a partition of [0, n).
struct TorchThreads {
  template <class Body>
  void operator()(int64_t n, const Body& body) const {
    torch::stable::parallel_for(0, n, 1, body);
  }
};

}  // namespace sslkernels

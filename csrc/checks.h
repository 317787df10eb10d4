// Last-resort checks of what Python has checked already, for those who call the operators directly.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace sslkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_views(const char* op, const Tensor& z0, const Tensor& z1) {
  STD_TORCH_CHECK(z0.dim() == 2 && z1.dim() == 2, op, ": z0 and z1 must be (N, D)");
  STD_TORCH_CHECK(z0.size(0) == z1.size(0) && z0.size(1) == z1.size(1), op, ": z0 and z1 must have one shape");
  STD_TORCH_CHECK(z0.scalar_type() == z1.scalar_type(), op, ": z0 and z1 must have one dtype");
  STD_TORCH_CHECK(z0.size(1) > 0, op, ": z0 and z1 must have at least one column");
}

inline void check_matrix(const char* op, const char* argument, const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 2 && x.size(1) > 0, op, ": ", argument,
                  " must be a matrix on the CPU with at least one column");
}

// A contiguous CPU tensor of this dtype and number of elements.
inline void check_rows(const char* op, const char* argument, const Tensor& x, ScalarType dtype, int64_t count) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.scalar_type() == dtype && x.numel() == count, op, ": ", argument,
                  " must be a contiguous CPU tensor of ", count, " elements in the right dtype");
}

}  // namespace sslkernels

// Reading stable-ABI tensors, on any device.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include "checks.h"
#include "dtype.h"

namespace sslkernels {

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}
template <class T>
const T* const_data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

inline Dtype dtype_of(const char* op, const char* argument, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::Double:
      return Dtype::kFloat64;
    default:
      STD_TORCH_CHECK(false, op, ": ", argument, " must be float32, bfloat16, float16 or float64");
  }
}

}  // namespace sslkernels

// The dtypes of the tensors that kernels read, without torch.
#pragma once

namespace sslkernels {

enum class Dtype { kFloat32, kBFloat16, kFloat16, kFloat64 };

constexpr int itemsize(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }

}  // namespace sslkernels

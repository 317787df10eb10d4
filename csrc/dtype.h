// The dtypes of the tensors that kernels read, without torch.
#pragma once

namespace sslkernels {

enum class Dtype { kFloat32, kBFloat16, kFloat16, kFloat64 };

}  // namespace sslkernels

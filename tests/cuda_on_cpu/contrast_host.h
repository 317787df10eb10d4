// What the steps of the contrastive core need besides kernels, on the CPU: memory, and plain loops that multiply as
// exactly as a matrix multiplication can.
#pragma once
#include <vector>

#include "cuda/contrast.cuh"
#include "host.h"

class CpuHost : public HostMemory {
 public:
  void multiply(const sslkernels::contrast::Matrix& a, const sslkernels::contrast::Matrix& b,
                const sslkernels::contrast::Matrix& out) {
    const std::vector<float> left = dense(a), right = dense(b.transposed());
    for (int64_t i = 0; i < out.rows; i++)
      for (int64_t j = 0; j < out.columns; j++) {
        double sum = 0;
        for (int64_t k = 0; k < a.columns; k++)
          sum += static_cast<double>(left[i * a.columns + k]) * right[j * a.columns + k];
        static_cast<float*>(out.data)[i * out.row_stride + j * out.column_stride] = static_cast<float>(sum);
      }
  }

 private:
  static std::vector<float> dense(const sslkernels::contrast::Matrix& m) {
    std::vector<float> values(m.rows * m.columns);
    for (int64_t i = 0; i < m.rows; i++)
      for (int64_t j = 0; j < m.columns; j++) {
        const int64_t at = i * m.row_stride + j * m.column_stride;
        float& value = values[i * m.columns + j];
        if (m.dtype == sslkernels::Dtype::kFloat32) value = static_cast<const float*>(m.data)[at];
        if (m.dtype == sslkernels::Dtype::kBFloat16) value = static_cast<const __nv_bfloat16*>(m.data)[at];
        if (m.dtype == sslkernels::Dtype::kFloat16) value = static_cast<const __half*>(m.data)[at];
      }
    return values;
  }
};

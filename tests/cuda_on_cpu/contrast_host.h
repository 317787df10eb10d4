// What the steps of the contrastive core need besides kernels, on the CPU: memory full of poison, and plain loops that
// multiply as exactly as a matrix multiplication can.
#pragma once
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "cuda/contrast.cuh"

class CpuHost {
 public:
  cudaStream_t stream = nullptr;

  void* allocate(int64_t bytes) {
    memory_.emplace_back(static_cast<unsigned char*>(::operator new(static_cast<size_t>(bytes), kAligned)));
    cuda_on_cpu::poison(memory_.back().get(), static_cast<size_t>(bytes));
    return memory_.back().get();
  }

  void check() const {}  // a launch that a GPU refuses is an exception here

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
  static constexpr std::align_val_t kAligned{16};
  struct Free {
    void operator()(unsigned char* memory) const { ::operator delete(memory, kAligned); }
  };

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

  std::vector<std::unique_ptr<unsigned char, Free>> memory_;
};

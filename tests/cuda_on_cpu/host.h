// What the steps of an op need besides kernels, on the CPU: memory full of poison that lives as long as the host.
#pragma once
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "cuda/platform.h"

class HostMemory {
 public:
  cudaStream_t stream = nullptr;

  void* allocate(int64_t bytes) {
    memory_.emplace_back(static_cast<unsigned char*>(::operator new(static_cast<size_t>(bytes), kAligned)));
    cuda_on_cpu::poison(memory_.back().get(), static_cast<size_t>(bytes));
    return memory_.back().get();
  }

  void check() const {}  // a launch that a GPU refuses is an exception here

 private:
  static constexpr std::align_val_t kAligned{16};
  struct Free {
    void operator()(unsigned char* memory) const { ::operator delete(memory, kAligned); }
  };

  std::vector<std::unique_ptr<unsigned char, Free>> memory_;
};

// The shared memory of one block: fresh for every block and filled with poison, each variable an allocation of its own,
// so that AddressSanitizer sees its ends.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

#include "fiber.h"

namespace cuda_on_cpu {

constexpr size_t kMaxStaticBytes = 48 << 10, kMaxSharedBytes = 227 << 10;  // the latter of sm_90 and sm_100

// A NaN as float, double, half and bfloat16, and a large number as an integer.
inline void poison(void* memory, size_t bytes) {
  static const unsigned char pattern[2] = {0xff, 0x7f};
  for (size_t i = 0; i < bytes; i++) static_cast<unsigned char*>(memory)[i] = pattern[i % 2];
}

class SharedMemory {
 public:
  explicit SharedMemory(size_t dynamic_bytes) : dynamic_(allocate(nullptr, dynamic_bytes, 16)) {}

  void* dynamic() { return dynamic_.begin; }

  // The variable declared where `tag` lies.
  void* variable(const void* tag, size_t bytes, size_t alignment) {
    for (const Variable& variable : variables_)
      if (variable.tag == tag) return variable.begin;
    static_bytes_ += bytes;
    if (static_bytes_ > kMaxStaticBytes)
      throw std::runtime_error("more than 48 KiB of SSLK_SHARED variables: use dynamic shared memory");
    if (static_bytes_ + dynamic_.bytes > kMaxSharedBytes)
      throw std::runtime_error("more than 227 KiB of shared memory");
    variables_.push_back(allocate(tag, bytes, alignment));
    return variables_.back().begin;
  }

  bool holds(const void* p, size_t bytes) const {
    if (dynamic_.holds(p, bytes)) return true;
    for (const Variable& variable : variables_)
      if (variable.holds(p, bytes)) return true;
    return false;
  }

 private:
  struct Free {
    std::align_val_t alignment;
    void operator()(unsigned char* memory) const { ::operator delete(memory, alignment); }
  };
  struct Variable {
    const void* tag;
    std::unique_ptr<unsigned char, Free> memory;
    unsigned char* begin;
    size_t bytes;
    bool holds(const void* p, size_t n) const {
      const unsigned char* at = static_cast<const unsigned char*>(p);
      return at >= begin && at + n <= begin + bytes;
    }
  };

  // Aligned as asked for and no better: on the GPU a variable that follows another is not aligned by luck either.
  static Variable allocate(const void* tag, size_t bytes, size_t alignment) {
    const std::align_val_t twice{2 * alignment};
    unsigned char* memory = static_cast<unsigned char*>(::operator new(alignment + bytes, twice));
#if defined(CUDA_ON_CPU_ASAN)
    __asan_poison_memory_region(memory, alignment);
#endif
    poison(memory + alignment, bytes);
    return {tag, {memory, Free{twice}}, memory + alignment, bytes};
  }

  Variable dynamic_;
  std::vector<Variable> variables_;
  size_t static_bytes_ = 0;
};

}  // namespace cuda_on_cpu

// Large pages for a result that is written once.
#pragma once
#include <sys/mman.h>

#include <cstdint>

namespace sslkernels {

// What malloc maps afresh for every call, whatever was freed before, and returns to the system after it.
constexpr int64_t kAlwaysMapped = int64_t{32} << 20;

// A fresh page costs a fault and is cleared by the system: at 4 KiB that takes longer than the writing. A hint, which
// the system may decline; the memory does not grow, since no page reaches beyond its ends.
inline void prefer_huge_pages(void* data, int64_t bytes) {
  constexpr uintptr_t kPage = 4096;
  if (bytes <= kAlwaysMapped) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

}  // namespace sslkernels

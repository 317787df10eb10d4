// The memory of large results, kept for the next ones. No torch, no instruction set.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>

namespace sslkernels {

// A larger result than this is one that malloc may get from the system for every call, and return after it.
constexpr int64_t kKeptResult = int64_t{4} << 20;
// A larger one than this is written past the caches, which would not hold it for its reader.
constexpr int64_t kStreamedResult = int64_t{32} << 20;

struct ResultBlock {
  void* data = nullptr;
  int64_t bytes = 0;
};

// Large pages for memory of another allocator: a hint, which the system may decline.
inline void prefer_huge_pages(void* data, int64_t bytes) {
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

// Blocks on huge pages. The system clears a fresh page when it is first touched, which takes longer than writing the
// result; so blocks that were given back wait for results of about their size. They are the system's meanwhile: it
// takes their pages when it is short of memory (MADV_FREE).
class ResultMemory {
 public:
  static constexpr int64_t kMaxKept = int64_t{512} << 20;
  static constexpr size_t kMaxBlocks = 16;

  // A block of `bytes` or a little more; without data where the system has no memory.
  ResultBlock take(int64_t bytes) {
    const int64_t rounded = (bytes + kUnit - 1) / kUnit * kUnit;
    ResultBlock found;
    if (lock()) {
      for (size_t i = count_; i-- > 0 && !found.data;)  // what was given back last is likeliest to have its pages
        if (kept_[i].bytes >= rounded && kept_[i].bytes <= rounded + rounded / 16) found = remove(i);
      unlock();
    }
    if (!found.data) found = map(rounded);
    if (!found.data) {  // what is kept may be what is missing
      empty();
      found = map(rounded);
    }
    return found;
  }

  void give(ResultBlock block) noexcept {
    const bool keeps = block.bytes <= kMaxKept && madvise(block.data, block.bytes, MADV_FREE) == 0;
    if (!keeps || !lock()) return release(block);
    while (count_ == kMaxBlocks || kept_bytes_ + block.bytes > kMaxKept) release(remove(0));
    kept_[count_++] = block;
    kept_bytes_ += block.bytes;
    unlock();
  }

  // Gives all that is kept to the system.
  void empty() {
    if (!lock()) return;
    while (count_ > 0) release(remove(0));
    unlock();
  }
  int64_t kept_bytes() const { return kept_bytes_; }

 private:
  static constexpr int64_t kUnit = int64_t{64} << 10;
  static constexpr int64_t kPage = int64_t{2} << 20;  // a huge one

  // Whoever finds it taken does without: nobody waits, not even in a process that was forked while it was.
  bool lock() { return !busy_.test_and_set(std::memory_order_acquire); }
  void unlock() { busy_.clear(std::memory_order_release); }

  ResultBlock remove(size_t i) {
    const ResultBlock block = kept_[i];
    std::copy(kept_.begin() + i + 1, kept_.begin() + count_, kept_.begin() + i);
    count_--;
    kept_bytes_ -= block.bytes;
    return block;
  }
  static void release(ResultBlock block) { munmap(block.data, block.bytes); }
  static ResultBlock map(int64_t bytes) {
    void* const memory = mmap(nullptr, bytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return {};
    // from the beginning of a huge page
    const int64_t before = -static_cast<int64_t>(reinterpret_cast<uintptr_t>(memory)) & (kPage - 1);
    char* const data = static_cast<char*>(memory) + before;
    if (before > 0) munmap(memory, before);
    if (before < kPage) munmap(data + bytes, kPage - before);
    prefer_huge_pages(data, bytes);
    return {data, bytes};
  }

  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
  std::array<ResultBlock, kMaxBlocks> kept_;  // the oldest first
  size_t count_ = 0;
  int64_t kept_bytes_ = 0;
};

}  // namespace sslkernels

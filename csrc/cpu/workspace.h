// Memory for one call of an op, aligned and on huge pages, and kept for the next call.
#pragma once
#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <new>

namespace sslkernels {

// One block of uninitialised memory, handed out in aligned pieces. Fresh memory costs a page fault every 4 KiB, more
// than the arithmetic of a small problem, so the last block is kept for reuse unless it is very large. The system may
// take back what of it was used beyond kMaxHeld.
class Workspace {
 public:
  static constexpr int64_t kMaxKept = int64_t{256} << 20, kMaxHeld = int64_t{64} << 20;

  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() {
    if (block_ && used_ > kMaxHeld)  // no matter if it is refused
      madvise(reinterpret_cast<char*>(block_) + kMaxHeld, used_ - kMaxHeld, MADV_FREE);
    if (block_ && block_->bytes <= kMaxKept) block_ = kept().exchange(block_);
    release(block_);
  }

  static void empty_cache() { release(kept().exchange(nullptr)); }

  // Runs layout(*this) twice: to count what it takes, then to hand it out.
  template <class Layout>
  void allocate(const Layout& layout) {
    used_ = kAlignment;  // the head of the block describes it
    layout(*this);
    block_ = kept().exchange(nullptr);
    if (!block_ || block_->bytes < used_) {
      release(block_);
      block_ = map(used_);
    }
    used_ = kAlignment;
    layout(*this);
  }

  template <class T>
  void take(T*& pointer, int64_t count) {
    pointer = block_ ? reinterpret_cast<T*>(reinterpret_cast<char*>(block_) + used_) : nullptr;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
  }

 private:
  struct Block {
    int64_t bytes;
  };
  static constexpr int64_t kAlignment = 128;

  static Block* map(int64_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    madvise(memory, bytes, MADV_HUGEPAGE);  // a hint: where it is refused, small pages serve
    return new (memory) Block{bytes};
  }
  static void release(Block* block) {
    if (block) munmap(block, block->bytes);
  }
  static std::atomic<Block*>& kept() {
    static std::atomic<Block*> block{nullptr};
    return block;
  }

  Block* block_ = nullptr;
  int64_t used_ = 0;
};

}  // namespace sslkernels

// The memory of large results: what is kept for whom, and that no two hold the same. Exit status 1 and a line per
// failure.
#include "cpu/result_memory.h"

#include <cstdio>
#include <cstring>
#include <vector>

#include "std_threads.h"

using namespace sslkernels;

namespace {

constexpr int64_t kMiB = int64_t{1} << 20;

int failures = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  failures++;
  std::printf("FAILED %s\n", what);
}

void check_reuse() {
  ResultMemory memory;
  const ResultBlock first = memory.take(33 * kMiB + 1);
  expect(first.data && first.bytes == 33 * kMiB + (64 << 10), "a little more");
  expect(reinterpret_cast<uintptr_t>(first.data) % (2 * kMiB) == 0, "aligned to huge pages");
  std::memset(first.data, 1, first.bytes);
  const ResultBlock second = memory.take(33 * kMiB);
  expect(second.data != first.data, "what is held is nobody else's");
  memory.give(first);
  const ResultBlock larger = memory.take(35 * kMiB), smaller = memory.take(20 * kMiB);
  expect(larger.data != first.data, "too small for it");
  expect(smaller.data != first.data, "far larger than it");
  const ResultBlock again = memory.take(32 * kMiB);
  expect(again.data == first.data && again.bytes == first.bytes, "given to a result of about its size");
  for (const ResultBlock block : {second, larger, smaller, again}) memory.give(block);
  expect(memory.take(32 * kMiB).data == again.data, "the last to be given is the first to be taken");
  memory.give(again);
  memory.empty();
  expect(memory.kept_bytes() == 0, "emptied");
}

// What is kept has a limit, beyond which the oldest goes. No page of these blocks is touched.
void check_limits() {
  ResultMemory memory;
  std::vector<ResultBlock> blocks;
  for (int64_t i = 0; i < 4; i++) blocks.push_back(memory.take((200 + 2 * i) * kMiB));
  for (const ResultBlock block : blocks) memory.give(block);
  expect(memory.take(206 * kMiB).data == blocks[3].data && memory.take(204 * kMiB).data == blocks[2].data,
         "the newest");
  expect(memory.kept_bytes() == 0, "no more than kMaxKept were kept");
  const ResultBlock huge = memory.take(ResultMemory::kMaxKept + kMiB);
  memory.give(huge);
  expect(memory.kept_bytes() == 0, "a block of more than kMaxKept goes back to the system");
  std::vector<ResultBlock> many;
  for (size_t i = 0; i < ResultMemory::kMaxBlocks + 3; i++) many.push_back(memory.take(5 * kMiB));
  for (const ResultBlock block : many) memory.give(block);
  expect(memory.kept_bytes() == static_cast<int64_t>(ResultMemory::kMaxBlocks) * 5 * kMiB, "no more than kMaxBlocks");
  expect(!memory.take(int64_t{1} << 60).data && memory.kept_bytes() == 0, "what was kept went before the memory");
}

// Every thread takes a block, writes its own number and finds nothing else in it.
void check_threads() {
  ResultMemory memory;
  std::vector<int> wrong(4);
  StdThreads{}(4, [&](int64_t thread, int64_t) {
    for (int64_t i = 0; i < 200; i++) {
      const ResultBlock block = memory.take(2 * kMiB);
      auto* const numbers = static_cast<volatile int64_t*>(block.data);
      for (int64_t at = 0; at < 64; at++) numbers[at] = 4 * i + thread;
      for (int64_t at = 0; at < 64; at++) wrong[thread] += numbers[at] != 4 * i + thread;
      memory.give(block);
    }
  });
  for (const int count : wrong) expect(count == 0, "threads share a block");
}

}  // namespace

int main() {
  check_reuse();
  check_limits();
  check_threads();
  std::printf("%d failed\n", failures);
  return failures != 0;
}

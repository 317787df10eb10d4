// The mask makers' C++: exact counts, and the same masks for any number of threads. Without torch, so that it runs
// under the sanitizers. Exit status 1 and a line per failure.
#include "cpu/mask_makers.h"

#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "std_threads.h"

using namespace sslkernels;

namespace {

constexpr int64_t kSamples = 24;

int failures = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  failures++;
  std::printf("FAILED %s\n", what.c_str());
}

// Every sample on a thread of its own, or all on one.
struct OneThread {
  template <class Body>
  void operator()(int64_t n, const Body& body) const {
    body(0, n);
  }
};

struct Mask {
  int64_t columns;
  std::unique_ptr<bool[]> data;

  explicit Mask(int64_t columns) : columns(columns), data(new bool[kSamples * columns]()) {}
  int64_t count(int64_t row) const {
    return std::count(data.get() + row * columns, data.get() + (row + 1) * columns, true);
  }
  bool operator==(const Mask& other) const {
    return std::equal(data.get(), data.get() + kSamples * columns, other.data.get());
  }
};

masks::Samples samples(int64_t tokens, uint32_t stream) { return {kSamples, tokens, 77, nullptr, stream}; }

void check_blocks(uint32_t height, uint32_t width, uint32_t least, uint32_t most) {
  const std::string name = "blocks on " + std::to_string(height) + " x " + std::to_string(width);
  const int64_t patches = int64_t{height} * width;
  masks::BlockMaskJob job{
      height, width, least, most, 100, 3, {65536 / 2, 65536 * 2, 65536, 65536, 65536 * 3, 65536 / 3}};
  std::vector<int64_t> wanted(kSamples);
  for (int64_t i = 0; i < kSamples; i++) wanted[i] = i * patches / (kSamples - 1);
  Mask one(patches), many(patches);
  masks::make_block_masks(samples(patches, kPhiloxBlockMask), job, wanted.data(), one.data.get(), OneThread{});
  masks::make_block_masks(samples(patches, kPhiloxBlockMask), job, wanted.data(), many.data.get(), StdThreads{});
  for (int64_t i = 0; i < kSamples; i++) expect(one.count(i) == wanted[i], name + ": the number of masked patches");
  expect(one == many, name + " depend on the number of threads");
}

void check_multi_blocks(const masks::MultiBlockJob& job) {
  const std::string name = "targets on " + std::to_string(job.height) + " x " + std::to_string(job.width);
  const int64_t patches = int64_t{job.height} * job.width;
  const int64_t area = int64_t{job.context_height} * job.context_width;
  const int64_t target_area = int64_t{job.target_height} * job.target_width;
  std::vector<int64_t> ids(kSamples * area, -1), counts(kSamples, -1),
      targets(kSamples * job.targets * target_area, -1);
  Mask context(patches), target(job.targets * patches);
  masks::make_multi_block_masks(samples(patches, kPhiloxMultiBlockMask), job,
                                {ids.data(), counts.data(), targets.data(), context.data.get(), target.data.get()},
                                StdThreads{});
  for (int64_t i = 0; i < kSamples; i++) {
    expect(context.count(i) == counts[i], name + ": the number of context patches");
    expect(target.count(i) == job.targets * target_area, name + ": the number of target patches");
    for (int64_t k = 0; k < area; k++)
      expect(counts[i] == 0 ? ids[i * area + k] == 0 : context.data[i * patches + ids[i * area + k]],
             name + ": a context id");
    for (int64_t k = 0; k < job.targets * target_area; k++)
      expect(target.data[(i * job.targets + k / target_area) * patches + targets[i * job.targets * target_area + k]],
             name + ": a target id");
  }
}

void check_spans(const masks::SpanMaskJob& job) {
  const std::string name = "spans of " + std::to_string(job.span_length) + (job.overlap ? "" : " apart");
  std::vector<int64_t> lengths(kSamples), asked(kSamples);
  for (int64_t i = 0; i < kSamples; i++) lengths[i] = i * job.tokens / (kSamples - 1), asked[i] = i;
  Mask drawn(job.tokens), mask(job.tokens);
  const masks::Samples some = samples(job.tokens, kPhiloxSpanMask);
  masks::make_span_masks(some, job, lengths.data(), nullptr, drawn.data.get(), StdThreads{});
  masks::make_span_masks(some, job, lengths.data(), asked.data(), mask.data.get(), StdThreads{});
  for (int64_t i = 0; i < kSamples; i++) {
    const bool* row = mask.data.get() + i * job.tokens;
    expect(!std::count(row + lengths[i], row + job.tokens, true), name + " reach beyond a sample");
    const int64_t room = masks::span_room(job, static_cast<uint32_t>(lengths[i]));
    if (!job.overlap)
      expect(mask.count(i) == job.span_length * std::min(asked[i], room), name + ": the number of masked tokens");
    expect(drawn.count(i) >= (room ? job.min_spans : 0), name + ": the fewest");
  }
}

}  // namespace

int main() {
  check_blocks(1, 1, 4, 1), check_blocks(7, 9, 4, 63), check_blocks(5, 40, 1, 1), check_blocks(16, 16, 4, 128);
  check_blocks(3, 100, 300, 300);
  check_multi_blocks({9, 40, 4, 13, 8, 39, 4, 10, false});
  check_multi_blocks({6, 6, 5, 5, 3, 3, 2, 9, false});
  check_multi_blocks({6, 6, 6, 6, 3, 3, 1, 9, false});
  check_multi_blocks({6, 6, 2, 2, 6, 6, 2, 9, true});
  for (bool overlap : {false, true}) {
    check_spans({100, 1, 1, uint64_t{1} << 31, overlap});
    check_spans({333, 10, 2, uint64_t{1} << 32, overlap});
    check_spans({20, 40, 2, uint64_t{1} << 32, overlap});
  }
  std::printf("%d failed\n", failures);
  return failures != 0;
}

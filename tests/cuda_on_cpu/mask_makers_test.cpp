// The mask makers' kernels under every schedule, against the same makers on the host. For the sanitizers: exit status 1
// and a line per failure.
#include "cuda/mask_makers.cuh"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <vector>

using namespace sslkernels;

namespace {

constexpr int64_t kSamples = 3, kIds[kSamples] = {5, -1, int64_t{1} << 40}, kSeed = -12345;

int failures = 0;

void expect(bool holds, const char* what, int schedule) {
  if (holds) return;
  failures++;
  std::printf("FAILED %s under schedule %d\n", what, schedule);
}

struct Call {
  std::vector<uint64_t> memory;
  masks::Samples samples;

  Call(int64_t tokens, uint32_t stream)
      : memory(kSamples * masks::Scratch::size(tokens), ~uint64_t{0}),
        samples{kSamples, tokens, &kSeed, kIds, stream, memory.data()} {}
};

struct Mask {
  int64_t size;
  std::unique_ptr<bool[]> data;

  explicit Mask(int64_t size) : size(size), data(new bool[size]()) {}
  int64_t count() const { return std::count(data.get(), data.get() + size, true); }
  bool operator==(const Mask& other) const { return std::equal(data.get(), data.get() + size, other.data.get()); }
};

masks::BlockMaskJob blocks(uint32_t height, uint32_t width, uint32_t least, uint32_t most) {
  masks::BlockMaskJob job{height, width, least, most, 120, masks::kMaxAspects, {}};
  for (int i = 0; i < masks::kMaxAspects; i++) {
    const double aspect = 0.3 * std::pow(1 / 0.09, (i + 0.5) / masks::kMaxAspects);
    job.factors[2 * i] = static_cast<uint32_t>(std::lround(65536 * aspect));
    job.factors[2 * i + 1] = static_cast<uint32_t>(std::lround(65536 / aspect));
  }
  return job;
}

// Few patches and most of them; rows that fill words and rows that do not.
Mask check_blocks(int schedule, uint32_t height, uint32_t width, uint32_t least) {
  const int64_t patches = int64_t{height} * width;
  const int64_t wanted[kSamples] = {patches / 3, patches, patches - 2};
  Call call(patches, kPhiloxBlockMask);
  Mask mask(kSamples * patches);
  masks::launch_block_mask(call.samples, blocks(height, width, least, static_cast<uint32_t>(patches)), wanted,
                           mask.data.get(), nullptr);
  expect(mask.count() == wanted[0] + wanted[1] + wanted[2], "the number of masked patches", schedule);
  return mask;
}

Mask check_multi_blocks(int schedule, uint32_t height, uint32_t width, bool allow_overlap) {
  const masks::MultiBlockJob job{height, width, height / 2, width / 3, height - 1, width, 3, 4, allow_overlap};
  const int64_t patches = int64_t{height} * width;
  const int64_t area = int64_t{job.context_height} * job.context_width;
  const int64_t target_area = int64_t{job.target_height} * job.target_width;
  std::vector<int64_t> context(kSamples * area, -1), counts(kSamples, -1), targets(kSamples * 3 * target_area, -1);
  Mask context_mask(kSamples * patches), target_mask(kSamples * 3 * patches);
  Call call(patches, kPhiloxMultiBlockMask);
  masks::launch_multi_block_mask(
      call.samples, job,
      {context.data(), counts.data(), targets.data(), context_mask.data.get(), target_mask.data.get()}, nullptr);
  expect(context_mask.count() == counts[0] + counts[1] + counts[2], "the number of context patches", schedule);
  expect(target_mask.count() == kSamples * 3 * target_area, "the number of target patches", schedule);
  for (int64_t i = 0; i < kSamples * area; i++)
    expect(context_mask.data[i / area * patches + context[i]], "a context id", schedule);
  return context_mask;
}

Mask check_spans(int schedule, uint32_t tokens, uint32_t span_length, bool overlap) {
  const masks::SpanMaskJob job{tokens, span_length, 0, uint64_t{1} << 31, overlap};
  const int64_t lengths[kSamples] = {tokens, tokens / 2, span_length}, asked[kSamples] = {2, 1, 9};
  Call call(tokens, kPhiloxSpanMask);
  Mask mask(kSamples * tokens), drawn(kSamples * tokens);
  masks::launch_span_mask(call.samples, job, lengths, asked, mask.data.get(), nullptr);
  masks::launch_span_mask(call.samples, job, lengths, nullptr, drawn.data.get(), nullptr);
  if (!overlap) expect(mask.count() == 4 * span_length, "the number of masked tokens", schedule);
  return drawn;
}

// All masks under a schedule, one after the other.
std::vector<Mask> masks_under(int schedule) {
  cuda_on_cpu::set_schedule(schedule);
  std::vector<Mask> all;
  all.push_back(check_blocks(schedule, 7, 9, 4));
  all.push_back(check_blocks(schedule, 5, 40, 1));
  all.push_back(check_blocks(schedule, 4, 8, 30));
  for (bool flag : {false, true}) {
    all.push_back(check_multi_blocks(schedule, 6, 11, flag));
    all.push_back(check_spans(schedule, 75, 5, flag));
  }
  return all;
}

}  // namespace

int main() {
  const std::vector<Mask> first = masks_under(0);
  for (int schedule = 1; schedule < cuda_on_cpu::kSchedules; schedule++)
    expect(masks_under(schedule) == first, "the masks differ from those of schedule 0", schedule);
  std::printf("%d failed\n", failures);
  return failures != 0;
}

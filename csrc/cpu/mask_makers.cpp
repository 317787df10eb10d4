// sslkernels::block_mask_fwd, multi_block_mask_fwd and span_mask_fwd for CPU tensors.
#include "mask_makers.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "../mask_maker_args.h"
#include "../tensors.h"

namespace sslkernels {
namespace masks {
namespace {

// Runs body(begin, end) over a partition of [0, n), in parts of so many tokens that waking a thread is worth while.
struct SampleThreads {
  int64_t tokens, part;

  template <class Body>
  void operator()(int64_t n, const Body& body) const {
    torch::stable::parallel_for(0, n, std::max<int64_t>(1, part / std::max<int64_t>(1, tokens)), body);
  }
};

constexpr int64_t kNoLimit = INT64_MAX;

void check_values(const char* op, const char* argument, const Integers& x, int64_t count, int64_t most) {
  for (int64_t i = 0; i < count; i++) {
    if (0 <= x.data[i] && x.data[i] <= most) continue;
    const std::string range = most == kNoLimit ? "at least 0" : "in [0, " + std::to_string(most) + "]";
    STD_TORCH_CHECK(false, op, ": ", argument, " must be ", range, ", got ", x.data[i], " in row ", i);
  }
}

uint64_t value_of(const Tensor& seed) {
  STD_TORCH_CHECK(seed.is_cpu() && seed.scalar_type() == ScalarType::Long && seed.numel() == 1,
                  "the seed must be one integer in int64 on the CPU");
  return static_cast<uint64_t>(*const_data<int64_t>(seed));
}

Tensor block_mask_fwd_cpu(const Tensor& seed, const MaybeTensor& sample_ids, const Tensor& num_masked, int64_t height,
                          int64_t width, int64_t min_patches, int64_t max_patches, std::vector<int64_t> aspects,
                          int64_t attempts) {
  constexpr const char* kOp = "block_mask";
  const BlockMaskJob job = block_mask_job(height, width, min_patches, max_patches, aspects, attempts);
  const int64_t count = num_masked.numel(), patches = height * width;
  const Integers ids(kOp, "sample_ids", sample_ids, count, seed), wanted(kOp, "num_masked", num_masked, count, seed);
  const Samples samples{count, patches, value_of(seed), ids.data, kPhiloxBlockMask};
  check_values(kOp, "num_masked", wanted, count, patches);
  Tensor mask = torch::stable::new_empty(seed, {count, height, width}, ScalarType::Bool);
  make_block_masks(samples, job, wanted.data, data<bool>(mask), SampleThreads{patches, 32768});
  return mask;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> multi_block_mask_fwd_cpu(
    const Tensor& seed, const MaybeTensor& sample_ids, int64_t count, int64_t height, int64_t width,
    int64_t target_height, int64_t target_width, int64_t context_height, int64_t context_width, int64_t num_targets,
    int64_t min_context, bool allow_overlap) {
  const MultiBlockJob job = multi_block_job(height, width, target_height, target_width, context_height, context_width,
                                            num_targets, min_context, allow_overlap);
  const Integers ids("multi_block_mask", "sample_ids", sample_ids, count, seed);
  const Samples samples{count, height * width, value_of(seed), ids.data, kPhiloxMultiBlockMask};
  const MultiBlockTensors out(seed, count, job);
  make_multi_block_masks(samples, job, out.first(), SampleThreads{samples.tokens, 4096});
  return {out.context_ids, out.context_counts, out.target_ids, out.context_mask, out.target_mask};
}

Tensor span_mask_fwd_cpu(const Tensor& seed, const MaybeTensor& sample_ids, const Tensor& lengths,
                         const MaybeTensor& num_spans, int64_t tokens, int64_t span_length, int64_t share,
                         int64_t min_spans, bool overlap) {
  constexpr const char* kOp = "span_mask";
  const SpanMaskJob job = span_mask_job(tokens, span_length, share, min_spans, overlap);
  const int64_t count = lengths.numel();
  const Integers ids(kOp, "sample_ids", sample_ids, count, seed), valid(kOp, "lengths", lengths, count, seed),
      asked(kOp, "num_spans", num_spans, count, seed);
  const Samples samples{count, tokens, value_of(seed), ids.data, kPhiloxSpanMask};
  check_values(kOp, "lengths", valid, count, tokens);
  if (asked.data) check_values(kOp, "num_spans", asked, count, kNoLimit);
  Tensor mask = torch::stable::new_empty(seed, {count, tokens}, ScalarType::Bool);
  make_span_masks(samples, job, valid.data, asked.data, data<bool>(mask), SampleThreads{tokens, 16384});
  return mask;
}

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CPU, m) {
  m.impl("block_mask_fwd", TORCH_BOX(&block_mask_fwd_cpu));
  m.impl("multi_block_mask_fwd", TORCH_BOX(&multi_block_mask_fwd_cpu));
  m.impl("span_mask_fwd", TORCH_BOX(&span_mask_fwd_cpu));
}

}  // namespace
}  // namespace masks
}  // namespace sslkernels

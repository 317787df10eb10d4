// The arguments of the mask makers' operators as jobs, with last-resort checks of what Python has checked already.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "block_mask.h"
#include "checks.h"
#include "multi_block_mask.h"
#include "span_mask.h"

namespace sslkernels {
namespace masks {

using MaybeTensor = std::optional<Tensor>;

// A contiguous int64 tensor of `count` elements on the device of the seed, kept alive by its owner.
class Integers {
 public:
  Integers(const char* op, const char* argument, const MaybeTensor& x, int64_t count, const Tensor& seed) {
    if (!x) return;
    STD_TORCH_CHECK(x->scalar_type() == ScalarType::Long && x->numel() == count && x->device() == seed.device(), op,
                    ": ", argument, " must have ", count, " elements in int64 on the device of the seed");
    tensor_ = torch::stable::contiguous(*x);
    data = static_cast<const int64_t*>(tensor_->const_data_ptr());
  }
  const int64_t* data = nullptr;

 private:
  MaybeTensor tensor_;
};

inline void check_range(const char* op, const char* argument, int64_t x, int64_t low, int64_t high) {
  STD_TORCH_CHECK(low <= x && x <= high, op, ": ", argument, " must be in [", low, ", ", high, "], got ", x);
}

inline void check_grid(const char* op, int64_t height, int64_t width) {
  check_range(op, "height", height, 0, kMaxTokens);
  check_range(op, "width", width, 0, kMaxTokens);
  check_range(op, "height * width", height * width, 0, kMaxTokens);
}

inline BlockMaskJob block_mask_job(int64_t height, int64_t width, int64_t min_patches, int64_t max_patches,
                                   const std::vector<int64_t>& aspects, int64_t attempts) {
  constexpr const char* kOp = "block_mask";
  check_grid(kOp, height, width);
  check_range(kOp, "min_patches", min_patches, 1, kMaxTokens);
  check_range(kOp, "max_patches", max_patches, 1, kMaxTokens);
  check_range(kOp, "attempts", attempts, 0, INT32_MAX);
  check_range(kOp, "the number of aspects", static_cast<int64_t>(aspects.size() / 2), 1, kMaxAspects);
  BlockMaskJob job{static_cast<uint32_t>(height),
                   static_cast<uint32_t>(width),
                   static_cast<uint32_t>(min_patches),
                   static_cast<uint32_t>(max_patches),
                   static_cast<uint32_t>(attempts),
                   static_cast<uint32_t>(aspects.size() / 2),
                   {}};
  for (size_t i = 0; i < 2 * job.aspects; i++) {
    check_range(kOp, "an aspect", aspects[i], 1, 1 << 24);  // larger ones overflow the area of a rectangle
    job.factors[i] = static_cast<uint32_t>(aspects[i]);
  }
  return job;
}

inline MultiBlockJob multi_block_job(int64_t height, int64_t width, int64_t target_height, int64_t target_width,
                                     int64_t context_height, int64_t context_width, int64_t targets,
                                     int64_t min_context, bool allow_overlap) {
  constexpr const char* kOp = "multi_block_mask";
  check_grid(kOp, height, width);
  check_range(kOp, "target_height", target_height, 1, height);
  check_range(kOp, "target_width", target_width, 1, width);
  check_range(kOp, "context_height", context_height, 1, height);
  check_range(kOp, "context_width", context_width, 1, width);
  check_range(kOp, "num_targets", targets, 0, kMaxTokens);
  check_range(kOp, "min_context", min_context, 0, kMaxTokens);
  return {
      static_cast<uint32_t>(height),       static_cast<uint32_t>(width),          static_cast<uint32_t>(target_height),
      static_cast<uint32_t>(target_width), static_cast<uint32_t>(context_height), static_cast<uint32_t>(context_width),
      static_cast<uint32_t>(targets),      static_cast<uint32_t>(min_context),    allow_overlap};
}

inline SpanMaskJob span_mask_job(int64_t tokens, int64_t span_length, int64_t share, int64_t min_spans, bool overlap) {
  constexpr const char* kOp = "span_mask";
  check_range(kOp, "tokens", tokens, 0, kMaxTokens);
  check_range(kOp, "span_length", span_length, 1, kMaxTokens);
  check_range(kOp, "share", share, 0, int64_t{1} << 32);
  check_range(kOp, "min_spans", min_spans, 0, kMaxTokens);
  return {static_cast<uint32_t>(tokens), static_cast<uint32_t>(span_length), static_cast<uint32_t>(min_spans),
          static_cast<uint64_t>(share), overlap};
}

// What multi_block_mask_fwd returns.
struct MultiBlockTensors {
  Tensor context_ids, context_counts, target_ids, context_mask, target_mask;

  MultiBlockTensors(const Tensor& seed, int64_t samples, const MultiBlockJob& job)
      : context_ids(torch::stable::new_empty(seed, {samples, int64_t{job.context_height} * job.context_width})),
        context_counts(torch::stable::new_empty(seed, {samples})),
        target_ids(
            torch::stable::new_empty(seed, {samples, job.targets, int64_t{job.target_height} * job.target_width})),
        context_mask(torch::stable::new_empty(seed, {samples, job.height, job.width}, ScalarType::Bool)),
        target_mask(torch::stable::new_empty(seed, {samples, job.targets, job.height, job.width}, ScalarType::Bool)) {}

  MultiBlockRow first() const {
    return {static_cast<int64_t*>(context_ids.mutable_data_ptr()),
            static_cast<int64_t*>(context_counts.mutable_data_ptr()),
            static_cast<int64_t*>(target_ids.mutable_data_ptr()), static_cast<bool*>(context_mask.mutable_data_ptr()),
            static_cast<bool*>(target_mask.mutable_data_ptr())};
  }
};

}  // namespace masks
}  // namespace sslkernels

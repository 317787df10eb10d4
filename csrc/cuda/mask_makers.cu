// sslkernels::block_mask_fwd, multi_block_mask_fwd and span_mask_fwd for CUDA tensors.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cuda/mask_makers.cuh"
#include "cuda/torch_host.h"
#include "mask_maker_args.h"

namespace sslkernels {
namespace masks {
namespace {

// One call: the device, its stream, and the memory of the warps, from torch's caching allocator.
class Call {
 public:
  Call(const char* op, const Tensor& seed, const MaybeTensor& sample_ids, int64_t count, int64_t tokens,
       uint32_t philox_stream)
      : device_(op, seed.get_device_index()),
        ids_(op, "sample_ids", sample_ids, count, seed),
        scratch_(torch::stable::new_empty(seed, {count, Scratch::size(tokens)})) {
    STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, op,
                    ": seed must be one integer in int64");
    check_range(op, "the number of samples", count, 0, INT32_MAX);  // each is a block
    samples = {count,     tokens,        static_cast<const int64_t*>(seed.const_data_ptr()),
               ids_.data, philox_stream, static_cast<uint64_t*>(scratch_.mutable_data_ptr())};
  }

  // `launch`, unless there is nothing to do.
  template <class Launch>
  void run(const Launch& launch) const {
    if (!samples.count) return;
    launch();
    device_.check();
  }
  cudaStream_t stream() const { return device_.stream; }

  Samples samples;

 private:
  const OnDevice device_;
  Integers ids_;
  Tensor scratch_;
};

Tensor block_mask_fwd_cuda(const Tensor& seed, const MaybeTensor& sample_ids, const Tensor& num_masked, int64_t height,
                           int64_t width, int64_t min_patches, int64_t max_patches, std::vector<int64_t> aspects,
                           int64_t attempts) {
  constexpr const char* kOp = "block_mask";
  const BlockMaskJob job = block_mask_job(height, width, min_patches, max_patches, aspects, attempts);
  const int64_t count = num_masked.numel();
  const Call call(kOp, seed, sample_ids, count, height * width, kPhiloxBlockMask);
  const Integers wanted(kOp, "num_masked", num_masked, count, seed);
  Tensor mask = torch::stable::new_empty(seed, {count, height, width}, ScalarType::Bool);
  bool* const out = static_cast<bool*>(mask.mutable_data_ptr());
  call.run([&] { launch_block_mask(call.samples, job, wanted.data, out, call.stream()); });
  return mask;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> multi_block_mask_fwd_cuda(
    const Tensor& seed, const MaybeTensor& sample_ids, int64_t count, int64_t height, int64_t width,
    int64_t target_height, int64_t target_width, int64_t context_height, int64_t context_width, int64_t num_targets,
    int64_t min_context, bool allow_overlap) {
  const MultiBlockJob job = multi_block_job(height, width, target_height, target_width, context_height, context_width,
                                            num_targets, min_context, allow_overlap);
  const Call call("multi_block_mask", seed, sample_ids, count, height * width, kPhiloxMultiBlockMask);
  const MultiBlockTensors out(seed, count, job);
  call.run([&] { launch_multi_block_mask(call.samples, job, out.first(), call.stream()); });
  return {out.context_ids, out.context_counts, out.target_ids, out.context_mask, out.target_mask};
}

Tensor span_mask_fwd_cuda(const Tensor& seed, const MaybeTensor& sample_ids, const Tensor& lengths,
                          const MaybeTensor& num_spans, int64_t tokens, int64_t span_length, int64_t share,
                          int64_t min_spans, bool overlap) {
  constexpr const char* kOp = "span_mask";
  const SpanMaskJob job = span_mask_job(tokens, span_length, share, min_spans, overlap);
  const int64_t count = lengths.numel();
  const Call call(kOp, seed, sample_ids, count, tokens, kPhiloxSpanMask);
  const Integers valid(kOp, "lengths", lengths, count, seed), asked(kOp, "num_spans", num_spans, count, seed);
  Tensor mask = torch::stable::new_empty(seed, {count, tokens}, ScalarType::Bool);
  bool* const out = static_cast<bool*>(mask.mutable_data_ptr());
  call.run([&] { launch_span_mask(call.samples, job, valid.data, asked.data, out, call.stream()); });
  return mask;
}

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CUDA, m) {
  m.impl("block_mask_fwd", TORCH_BOX(&block_mask_fwd_cuda));
  m.impl("multi_block_mask_fwd", TORCH_BOX(&multi_block_mask_fwd_cuda));
  m.impl("span_mask_fwd", TORCH_BOX(&span_mask_fwd_cuda));
}

}  // namespace
}  // namespace masks
}  // namespace sslkernels

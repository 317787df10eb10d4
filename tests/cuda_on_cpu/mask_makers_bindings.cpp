// The mask makers' kernels on CPU tensors, with the arguments of their operators and the results to write into.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

#include "cuda/mask_makers.cuh"
#include "tensor.h"

namespace py = pybind11;
using namespace sslkernels;

namespace {

// The samples, and the memory of their warps, which holds anything at first.
struct Call {
  std::vector<uint64_t> memory;
  masks::Samples samples;

  Call(const In<int64_t>& seed, const In<int64_t>& ids, int64_t count, int64_t tokens, uint32_t stream)
      : memory(count * masks::Scratch::size(tokens), 0xdeadbeefdeadbeef),
        samples{count, tokens, seed, ids, stream, memory.data()} {}
};

void block_mask(In<int64_t> seed, In<int64_t> ids, In<int64_t> num_masked, uint32_t height, uint32_t width,
                uint32_t min_patches, uint32_t max_patches, const std::vector<uint32_t>& aspects, uint32_t attempts,
                Out<bool> mask) {
  masks::BlockMaskJob job{height, width, min_patches, max_patches, attempts, static_cast<uint32_t>(aspects.size() / 2),
                          {}};
  std::copy(aspects.begin(), aspects.end(), job.factors);
  const Call call(seed, ids, num_masked.size, int64_t{height} * width, kPhiloxBlockMask);
  masks::launch_block_mask(call.samples, job, num_masked, mask, nullptr);
}

void multi_block_mask(In<int64_t> seed, In<int64_t> ids, int64_t samples, const std::vector<uint32_t>& sizes,
                      uint32_t targets, uint32_t min_context, bool allow_overlap, Out<int64_t> context_ids,
                      Out<int64_t> context_counts, Out<int64_t> target_ids, Out<bool> context_mask,
                      Out<bool> target_mask) {
  const masks::MultiBlockJob job{sizes.at(0), sizes.at(1), sizes.at(2), sizes.at(3),  sizes.at(4),
                                 sizes.at(5), targets,     min_context, allow_overlap};
  const Call call(seed, ids, samples, int64_t{job.height} * job.width, kPhiloxMultiBlockMask);
  masks::launch_multi_block_mask(call.samples, job,
                                 {context_ids, context_counts, target_ids, context_mask, target_mask}, nullptr);
}

void span_mask(In<int64_t> seed, In<int64_t> ids, In<int64_t> lengths, In<int64_t> num_spans, uint32_t tokens,
               uint32_t span_length, uint64_t share, uint32_t min_spans, bool overlap, Out<bool> mask) {
  const masks::SpanMaskJob job{tokens, span_length, min_spans, share, overlap};
  const Call call(seed, ids, lengths.size, tokens, kPhiloxSpanMask);
  masks::launch_span_mask(call.samples, job, lengths, num_spans, mask, nullptr);
}

}  // namespace

void define_mask_makers(py::module_& m) {
  m.def("block_mask", &block_mask);
  m.def("multi_block_mask", &multi_block_mask);
  m.def("span_mask", &span_mask);
}

// The operators of patch masking for CUDA tensors; their schemas are in sslkernels/ops/patch_mask/op.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cuda/patch_mask.cuh"
#include "cuda/torch_host.h"
#include "tensors.h"

namespace sslkernels {
namespace {

using patch_mask::Images;
using patch_mask::kMaxTokens;
using patch_mask::Rows;
using patch_mask::Selection;

// The arguments of one call, checked, and copies of those that cannot be read in place, which live as long as it does.
class Call {
 public:
  Call(const char* op, const Tensor& beside) : op_(op), beside_(beside) {
    STD_TORCH_CHECK(beside.is_cuda(), op, ": the tensors must be on a GPU");
  }

  template <class... Text>
  void require(bool holds, const Text&... text) const {
    STD_TORCH_CHECK(holds, op_, ": ", text...);
  }

  // Memory of a dense tensor with this dtype and number of elements.
  template <class T>
  const T* data(const char* argument, const Tensor& x, ScalarType dtype, int64_t count) {
    require(x.is_cuda() && x.get_device_index() == beside_.get_device_index() && x.scalar_type() == dtype &&
                x.numel() == count,
            argument, " must have ", count, " elements in the right dtype on the device of the others");
    held_.push_back(torch::stable::contiguous(x));
    return static_cast<const T*>(held_.back().const_data_ptr());
  }
  template <class T>
  const T* data(const char* argument, const std::optional<Tensor>& x, ScalarType dtype, int64_t count) {
    return x ? data<T>(argument, *x, dtype, count) : nullptr;
  }

  const int64_t* ids(const char* argument, const Tensor& x, int64_t samples) {
    require(x.dim() == 2 && x.size(0) == samples, argument, " must be (", samples, ", tokens)");
    require(x.size(1) <= kMaxTokens, argument, " must have less than 2^31 columns");
    return data<int64_t>(argument, x, ScalarType::Long, x.numel());
  }

  // (samples, rows, dim), at least `prefix` rows; read in place where a row is dense.
  Rows rows(const char* argument, const Tensor& x, int64_t prefix) {
    require(x.is_cuda() && x.dim() == 3 && prefix >= 0 && x.size(1) >= prefix, argument,
            " must be (samples, tokens, dim) with at least ", prefix, " tokens");
    require(x.size(0) <= kMaxTokens && x.size(1) <= kMaxTokens && x.size(2) <= kMaxTokens, argument,
            " must have less than 2^31 samples, tokens and dimensions");
    held_.push_back(x.size(2) > 1 && x.stride(2) != 1 ? torch::stable::contiguous(x) : x);
    const Tensor& held = held_.back();
    const int64_t bytes = itemsize(dtype(held));
    const auto stride = [&](int64_t d) { return held.size(d) > 1 ? held.stride(d) * bytes : 0; };
    return {static_cast<char*>(held.mutable_data_ptr()), stride(0), stride(1)};
  }

  Dtype dtype(const Tensor& x) const { return dtype_of(op_, "every tensor", x); }

  // (N, C, H, W) as the video of one frame that it is.
  Images images(const Tensor& x, const std::vector<int64_t>& patch) const {
    require(x.dim() == 4 || x.dim() == 5, "images must be (N, C, H, W) or (N, C, T, H, W)");
    const int64_t dims = x.dim() - 2, missing = 3 - dims;
    require(static_cast<int64_t>(patch.size()) == dims, "patch_size must have ", dims, " numbers");
    int64_t sizes[5] = {1, 1, 1, 1, 1}, strides[5] = {}, edges[3] = {1, 1, 1}, elements = x.size(1);
    for (int64_t d = 0; d < x.dim(); d++) {
      const int64_t to = d < 2 ? d : d + missing;
      sizes[to] = x.size(d);
      strides[to] = x.size(d) > 1 || d == x.dim() - 1 ? x.stride(d) : 0;
    }
    for (int64_t d = 0; d < dims; d++) {
      edges[d + missing] = patch[d];
      require(patch[d] > 0 && x.size(d + 2) % patch[d] == 0, "the sizes of images must be multiples of patch_size");
      elements *= patch[d];
    }
    require(x.size(0) <= kMaxTokens && elements <= kMaxTokens, "patches must have less than 2^31 elements");
    const Images images = patch_mask::images_of(x.mutable_data_ptr(), dtype(x), sizes, strides, edges);
    require(images.patches() <= kMaxTokens, "images must have less than 2^31 patches");
    return images;
  }

  Tensor empty(std::vector<int64_t> sizes, std::optional<ScalarType> dtype = std::nullopt) const {
    return torch::stable::new_empty(beside_, sizes, dtype);
  }
  Tensor zeros(std::vector<int64_t> sizes) const { return torch::stable::new_zeros(beside_, sizes); }

 private:
  const char* const op_;
  const Tensor beside_;
  std::vector<Tensor> held_;
};

// ---- which tokens stay

struct Selected {
  Tensor ids_keep, ids_restore, mask;

  Selected(Call& call, const Tensor& seed, const std::optional<Tensor>& sample_ids, const std::optional<Tensor>& scores,
           int64_t samples, int64_t tokens, int64_t num_keep, bool ordered, TorchHost& host)
      : ids_keep(call.empty({samples, num_keep}, ScalarType::Long)),
        ids_restore(call.empty({samples, tokens}, ScalarType::Long)),
        mask(call.empty({samples, tokens}, ScalarType::Bool)) {
    call.require(samples >= 0 && samples <= kMaxTokens && tokens >= 0 && tokens <= kMaxTokens,
                 "there must be less than 2^31 samples, and less than 2^31 tokens in each");
    call.require(num_keep >= 0 && num_keep <= tokens, "num_keep must be in [0, ", tokens, "], got ", num_keep);
    Selection s{};
    s.seed = call.data<int64_t>("seed", seed, ScalarType::Long, 1);
    s.sample_ids = call.data<int64_t>("sample_ids", sample_ids, ScalarType::Long, samples);
    s.scores = call.data<float>("scores", scores, ScalarType::Float, samples * tokens);
    s.tokens = tokens;
    s.num_keep = num_keep;
    s.ordered = ordered;
    s.ids_keep = data<int64_t>(ids_keep);
    s.ids_restore = data<int64_t>(ids_restore);
    s.mask = data<bool>(mask);
    patch_mask::select(host, s, samples);
  }
};

std::tuple<Tensor, Tensor, Tensor> patch_mask_fwd_cuda(const Tensor& seed, std::optional<Tensor> sample_ids,
                                                       std::optional<Tensor> scores, int64_t samples, int64_t tokens,
                                                       int64_t num_keep, bool ordered) {
  Call call("patch_mask", seed);
  TorchHost host("patch_mask", seed);
  const Selected selected(call, seed, sample_ids, scores, samples, tokens, num_keep, ordered, host);
  return {selected.ids_keep, selected.ids_restore, selected.mask};
}

std::tuple<Tensor, Tensor> invert_ids_cuda(const Tensor& ids_keep, int64_t tokens) {
  Call call("invert_ids", ids_keep);
  call.require(ids_keep.dim() == 2, "ids_keep must be (samples, tokens)");
  call.require(tokens >= 0 && tokens <= kMaxTokens, "there must be less than 2^31 tokens");
  const int64_t samples = ids_keep.size(0);
  const Tensor ids_restore = call.empty({samples, tokens}), mask = call.empty({samples, tokens}, ScalarType::Bool);
  Selection s{};
  s.ids_keep = const_cast<int64_t*>(call.ids("ids_keep", ids_keep, samples));  // read only
  s.tokens = tokens;
  s.num_keep = ids_keep.size(1);
  s.ids_restore = data<int64_t>(ids_restore);
  s.mask = data<bool>(mask);
  TorchHost host("invert_ids", ids_keep);
  patch_mask::invert(host, s, samples);
  return {ids_restore, mask};
}

// ---- rows of tokens

std::tuple<Tensor, Tensor, Tensor, Tensor> random_masking_fwd_cuda(const Tensor& x, const Tensor& seed,
                                                                   std::optional<Tensor> sample_ids,
                                                                   std::optional<Tensor> scores, int64_t num_keep,
                                                                   int64_t num_prefix, bool ordered) {
  Call call("random_masking", x);
  const Rows rows = call.rows("x", x, num_prefix);
  const int64_t samples = x.size(0), tokens = x.size(1) - num_prefix, dim = x.size(2);
  TorchHost host("random_masking", x);
  const Selected selected(call, seed, sample_ids, scores, samples, tokens, num_keep, ordered, host);
  const Tensor kept = call.empty({samples, num_prefix + num_keep, dim});
  patch_mask::gather_tokens(host, call.dtype(x), rows, data<int64_t>(selected.ids_keep), samples, num_keep, tokens,
                            num_prefix, dim, kept.mutable_data_ptr());
  return {kept, selected.ids_keep, selected.ids_restore, selected.mask};
}

Tensor gather_tokens_fwd_cuda(const Tensor& x, const Tensor& ids, int64_t num_prefix) {
  Call call("gather_tokens", x);
  const Rows rows = call.rows("x", x, num_prefix);
  const int64_t samples = x.size(0), dim = x.size(2);
  const int64_t* const at = call.ids("ids", ids, samples);
  const Tensor out = call.empty({samples, num_prefix + ids.size(1), dim});
  TorchHost host("gather_tokens", x);
  patch_mask::gather_tokens(host, call.dtype(x), rows, at, samples, ids.size(1), x.size(1) - num_prefix, num_prefix,
                            dim, out.mutable_data_ptr());
  return out;
}

Tensor gather_tokens_bwd_cuda(const Tensor& grad, const Tensor& ids, int64_t tokens, int64_t num_prefix) {
  Call call("gather_tokens", grad);
  const Rows rows = call.rows("grad", grad, num_prefix);
  const int64_t samples = grad.size(0), dim = grad.size(2);
  const int64_t* const at = call.ids("ids", ids, samples);
  call.require(ids.size(1) == grad.size(1) - num_prefix, "grad and ids must have equally many tokens");
  call.require(tokens >= 0 && tokens <= kMaxTokens, "there must be less than 2^31 tokens");
  const Tensor out = call.empty({samples, num_prefix + tokens, dim});
  TorchHost host("gather_tokens", grad);
  patch_mask::gather_tokens_backward(host, call.dtype(grad), rows, at, samples, ids.size(1), tokens, num_prefix, dim,
                                     out.mutable_data_ptr());
  return out;
}

Tensor restore_tokens_fwd_cuda(const Tensor& x, const Tensor& ids_restore, std::optional<Tensor> mask_token,
                               std::optional<Tensor> pos_embed, int64_t num_prefix) {
  Call call("restore_tokens", x);
  const Rows rows = call.rows("x", x, num_prefix);
  const int64_t samples = x.size(0), tokens = ids_restore.size(1), dim = x.size(2);
  const int64_t* const places = call.ids("ids_restore", ids_restore, samples);
  patch_mask::Positions positions{};
  if (pos_embed) {
    positions.count = pos_embed->size(0);
    call.require(positions.count == tokens || positions.count == num_prefix + tokens,
                 "pos_embed must have a row for each token");
    positions.data = call.data<void>("pos_embed", *pos_embed, x.scalar_type(), positions.count * dim);
  }
  const char* const fill = call.data<char>("mask_token", mask_token, x.scalar_type(), dim);
  const Tensor out = call.empty({samples, num_prefix + tokens, dim});
  TorchHost host("restore_tokens", x);
  const Dtype dtype = call.dtype(x);
  patch_mask::restore_tokens(
      host, dtype, {rows, places, tokens, num_prefix, x.size(1) - num_prefix, fill, patch_mask::nan_of(dtype)},
      positions, samples, dim, out.mutable_data_ptr());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> restore_tokens_bwd_cuda(const Tensor& grad, const Tensor& ids_restore,
                                                           int64_t num_keep, int64_t num_prefix, int64_t pos_tokens,
                                                           bool need_x, bool need_mask_token) {
  Call call("restore_tokens", grad);
  const Rows rows = call.rows("grad", grad, num_prefix);
  const int64_t samples = grad.size(0), tokens = ids_restore.size(1), dim = grad.size(2);
  const int64_t* const places = call.ids("ids_restore", ids_restore, samples);
  call.require(grad.size(1) == num_prefix + tokens, "grad and ids_restore must have equally many tokens");
  call.require(pos_tokens == 0 || pos_tokens == tokens || pos_tokens == num_prefix + tokens,
               "pos_tokens must be the number of tokens, or 0");
  call.require(num_keep >= 0 && num_keep <= kMaxTokens, "num_keep must be below 2^31");
  // sums of nothing are not written
  const auto sums = [&](std::vector<int64_t> sizes) { return grad.numel() ? call.empty(sizes) : call.zeros(sizes); };
  const Tensor grad_x = need_x ? call.empty({samples, num_prefix + num_keep, dim}) : call.empty({0});
  const Tensor grad_mask_token = need_mask_token ? sums({dim}) : call.empty({0});
  const Tensor grad_pos = pos_tokens ? sums({pos_tokens, dim}) : call.empty({0});
  const auto wanted = [](bool is_wanted, const Tensor& x) { return is_wanted ? x.mutable_data_ptr() : nullptr; };
  TorchHost host("restore_tokens", grad);
  patch_mask::restore_tokens_backward(
      host, call.dtype(grad), rows, places, samples, tokens, num_keep, num_prefix, dim,
      {wanted(need_x, grad_x), wanted(need_mask_token, grad_mask_token), wanted(pos_tokens, grad_pos), pos_tokens});
  return {grad_x, grad_mask_token, grad_pos};
}

// ---- rows of patches

Tensor gather_patches_fwd_cuda(const Tensor& images, const Tensor& ids, std::vector<int64_t> patch_size) {
  Call call("gather_patches", images);
  const Images from = call.images(images, patch_size);
  const int64_t samples = images.size(0), channels = images.size(1);
  const int64_t* const at = call.ids("ids", ids, samples);
  const Tensor out = call.empty({samples, ids.size(1), channels * from.elements()});
  TorchHost host("gather_patches", images);
  patch_mask::gather_patches(host, call.dtype(images), from, at, samples, ids.size(1), channels,
                             out.mutable_data_ptr());
  return out;
}

Tensor gather_patches_bwd_cuda(const Tensor& grad, const Tensor& ids, std::vector<int64_t> image_shape,
                               std::vector<int64_t> patch_size) {
  Call call("gather_patches", grad);
  const Rows rows = call.rows("grad", grad, 0);
  const int64_t samples = grad.size(0);
  const int64_t* const at = call.ids("ids", ids, samples);
  const Tensor out = call.empty(image_shape);
  const Images to = call.images(out, patch_size);
  call.require(out.size(0) == samples && grad.size(1) == ids.size(1) && grad.size(2) == out.size(1) * to.elements(),
               "grad must be (samples, ids, elements of a patch)");
  TorchHost host("gather_patches", grad);
  patch_mask::gather_patches_backward(host, call.dtype(grad), rows, at, samples, ids.size(1), out.size(1), to);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CUDA, m) {
  m.impl("patch_mask_fwd", TORCH_BOX(&patch_mask_fwd_cuda));
  m.impl("invert_ids", TORCH_BOX(&invert_ids_cuda));
  m.impl("random_masking_fwd", TORCH_BOX(&random_masking_fwd_cuda));
  m.impl("gather_tokens_fwd", TORCH_BOX(&gather_tokens_fwd_cuda));
  m.impl("gather_tokens_bwd", TORCH_BOX(&gather_tokens_bwd_cuda));
  m.impl("restore_tokens_fwd", TORCH_BOX(&restore_tokens_fwd_cuda));
  m.impl("restore_tokens_bwd", TORCH_BOX(&restore_tokens_bwd_cuda));
  m.impl("gather_patches_fwd", TORCH_BOX(&gather_patches_fwd_cuda));
  m.impl("gather_patches_bwd", TORCH_BOX(&gather_patches_bwd_cuda));
}

}  // namespace
}  // namespace sslkernels

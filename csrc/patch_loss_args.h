// The arguments of the masked patch loss's operators, checked for those who call them directly, on any device.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "patch_loss_job.h"
#include "tensors.h"

namespace sslkernels {
namespace {

// (N, L) bool, dense.
inline Tensor patch_mask(const Tensor& mask, int64_t samples, int64_t tokens) {
  STD_TORCH_CHECK(
      mask.scalar_type() == ScalarType::Bool && mask.dim() == 2 && mask.size(0) == samples && mask.size(1) == tokens,
      "patch_loss: mask must be (", samples, ", ", tokens, ") bool");
  return torch::stable::contiguous(mask);
}

// What allocates the gradients: (like, sizes, dtype).
using NewTensor = Tensor (*)(const Tensor&, const std::vector<int64_t>&, std::optional<ScalarType>);

inline Tensor new_empty(const Tensor& like, const std::vector<int64_t>& sizes, std::optional<ScalarType> dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// The forward: its job, the tensors that it points into, and its results.
struct PatchLossArguments {
  PatchLossJob job{};
  Tensor loss, grad_pred;

  PatchLossArguments(const Tensor& given_pred, const Tensor& images, const Tensor& given_mask,
                     const std::vector<int64_t>& patch_size, bool norm_pix, double eps, bool need_grad,
                     NewTensor new_tensor = new_empty)
      : pred_(given_pred) {
    const int64_t dims = images.dim() - 2;
    STD_TORCH_CHECK((dims == 2 || dims == 3) && static_cast<int64_t>(patch_size.size()) == dims,
                    "patch_loss_fwd: images must be (N, C, H, W) or (N, C, T, H, W), with as many patch sizes");
    set_images(images, patch_size);
    STD_TORCH_CHECK(pred_.dim() == 3 && pred_.size(0) == job.samples && pred_.size(1) == job.tokens() &&
                        pred_.size(2) == job.width() && job.channels > 0,
                    "patch_loss_fwd: pred must be (N, L, D), L and D being the patches and their pixels");
    if (pred_.stride(2) != 1 && pred_.size(2) > 1) pred_ = torch::stable::contiguous(pred_);
    mask_ = patch_mask(given_mask, job.samples, job.tokens());
    job.pred = pred_.const_data_ptr();
    job.mask = static_cast<const bool*>(mask_.const_data_ptr());
    job.pred_dtype = dtype_of("patch_loss", "pred", pred_);
    job.pred_strides[0] = pred_.stride(0);
    job.pred_strides[1] = pred_.stride(1);
    job.norm_pix = norm_pix;
    job.eps = eps;
    loss = torch::stable::new_empty(pred_, {}, job.is_double() ? ScalarType::Double : ScalarType::Float);
    std::vector<int64_t> shape{0};
    if (need_grad) shape = {job.samples, job.tokens(), job.width()};
    const bool is_half = job.pred_dtype == Dtype::kFloat16;
    grad_pred = new_tensor(pred_, shape, is_half ? ScalarType::Float : pred_.scalar_type());
    if (need_grad) job.grad = grad_pred.mutable_data_ptr();
  }

 private:
  void set_images(const Tensor& images, const std::vector<int64_t>& patch_size) {
    job.images = images.const_data_ptr();
    job.images_dtype = dtype_of("patch_loss", "images", images);
    job.samples = images.size(0);
    job.sample_stride = images.stride(0);
    job.channels = images.size(1);
    job.channel_stride = images.stride(1);
    const int64_t missing = 5 - images.dim();  // the frames
    for (int64_t d = 0; d < 3; d++) {
      const bool is_there = d >= missing;
      const int64_t size = is_there ? images.size(d - missing + 2) : 1, patch = is_there ? patch_size[d - missing] : 1;
      STD_TORCH_CHECK(patch > 0 && size % patch == 0, "patch_loss_fwd: images must be a multiple of patch_size");
      job.patch_strides[d] = is_there ? images.stride(d - missing + 2) : 0;
      job.grid_strides[d] = patch * job.patch_strides[d];
      job.grid[d] = size / patch;
      job.patch[d] = patch;
    }
    job.merge_channels();
  }

  Tensor pred_, mask_;
};

// The backward; grad_loss is read where it lies.
struct PatchGradArguments {
  PatchGradJob job{};
  Tensor grad;
  bool is_double;  // grad_loss is float64, or else float32

  PatchGradArguments(const Tensor& grad_loss, const Tensor& grad_pred, const Tensor& mask, ScalarType dtype,
                     NewTensor new_tensor = new_empty)
      : is_double(grad_loss.scalar_type() == ScalarType::Double) {
    STD_TORCH_CHECK(grad_loss.numel() == 1 && (is_double || grad_loss.scalar_type() == ScalarType::Float),
                    "patch_loss_bwd: grad_loss must be one float32 or float64");
    STD_TORCH_CHECK(grad_pred.dim() == 3, "patch_loss_bwd: grad_pred must be (N, L, D)");
    const bool to_half = grad_pred.scalar_type() == ScalarType::Float && dtype == ScalarType::Half;
    STD_TORCH_CHECK(to_half || (grad_pred.scalar_type() == dtype && dtype != ScalarType::Half),
                    "patch_loss_bwd: grad_pred must have the dtype of the result, or float32 for float16");
    from_ = torch::stable::contiguous(grad_pred);
    mask_ = patch_mask(mask, grad_pred.size(0), grad_pred.size(1));
    grad = new_tensor(grad_pred, {grad_pred.size(0), grad_pred.size(1), grad_pred.size(2)}, dtype);
    job.grad_pred = from_.const_data_ptr();
    job.mask = static_cast<const bool*>(mask_.const_data_ptr());
    job.grad = grad.mutable_data_ptr();
    job.from = dtype_of("patch_loss", "grad_pred", from_);
    job.to = to_half ? Dtype::kFloat16 : job.from;
    job.rows = grad_pred.size(0) * grad_pred.size(1);
    job.width = grad_pred.size(2);
  }

 private:
  Tensor from_, mask_;
};

}  // namespace
}  // namespace sslkernels

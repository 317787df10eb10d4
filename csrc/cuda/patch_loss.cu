// sslkernels::patch_loss_fwd and patch_loss_bwd for CUDA tensors.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "cuda/patch_loss.cuh"
#include "cuda/torch_host.h"
#include "patch_loss_args.h"

namespace sslkernels {
namespace {

void check_together(const Tensor& a, const Tensor& b, const Tensor& c) {
  const bool cuda = a.is_cuda() && b.is_cuda() && c.is_cuda();
  STD_TORCH_CHECK(cuda && a.get_device_index() == b.get_device_index() && a.get_device_index() == c.get_device_index(),
                  "patch_loss: all tensors must be on one CUDA device");
}

std::tuple<Tensor, Tensor> patch_loss_fwd_cuda(const Tensor& pred, const Tensor& images, const Tensor& mask,
                                               std::vector<int64_t> patch_size, bool norm_pix, double eps,
                                               bool need_grad) {
  check_together(pred, images, mask);
  const OnDevice device("patch_loss", pred.get_device_index());
  const PatchLossArguments arguments(pred, images, mask, patch_size, norm_pix, eps, need_grad);
  const PatchLossJob& job = arguments.job;
  STD_TORCH_CHECK(job.samples * job.tokens() <= patch_loss::kMaxPatches, "patch_loss_fwd: at most 2^31 - 1 patches");
  const Tensor workspace = torch::stable::new_empty(pred, {patch_loss::workspace_bytes(job)}, ScalarType::Byte);
  patch_loss::forward(job, workspace.mutable_data_ptr(), arguments.loss.mutable_data_ptr(), device.stream);
  device.check();
  return {arguments.loss, arguments.grad_pred};
}

Tensor patch_loss_bwd_cuda(const Tensor& grad_loss, const Tensor& grad_pred, const Tensor& mask, ScalarType dtype) {
  check_together(grad_loss, grad_pred, mask);
  const OnDevice device("patch_loss", grad_pred.get_device_index());
  const PatchGradArguments arguments(grad_loss, grad_pred, mask, dtype);
  STD_TORCH_CHECK(arguments.job.rows <= patch_loss::kMaxPatches, "patch_loss_bwd: at most 2^31 - 1 patches");
  patch_loss::backward(arguments.job, grad_loss.const_data_ptr(), arguments.is_double, device.stream);
  device.check();
  return arguments.grad;
}

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CUDA, m) {
  m.impl("patch_loss_fwd", TORCH_BOX(&patch_loss_fwd_cuda));
  m.impl("patch_loss_bwd", TORCH_BOX(&patch_loss_bwd_cuda));
}

}  // namespace
}  // namespace sslkernels

// sslkernels::patch_loss_fwd and patch_loss_bwd for CPU tensors.
#include "patch_loss.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../patch_loss_args.h"
#include "../tensors.h"
#include "isa.h"
#include "results.h"
#include "threads.h"

namespace sslkernels {
namespace {

std::tuple<Tensor, Tensor> patch_loss_fwd_cpu(const Tensor& pred, const Tensor& images, const Tensor& mask,
                                              std::vector<int64_t> patch_size, bool norm_pix, double eps,
                                              bool need_grad) {
  STD_TORCH_CHECK(pred.is_cpu() && images.is_cpu() && mask.is_cpu(), "patch_loss_fwd: all tensors must be on the CPU");
  const PatchLossArguments arguments(pred, images, mask, patch_size, norm_pix, eps, need_grad, new_result);
  const double loss =
      run_patch_loss(arguments.job, isa().patch_loss(), torch::stable::get_num_threads(), TorchThreads{});
  if (arguments.job.is_double()) {
    *data<double>(arguments.loss) = loss;
  } else {
    *data<float>(arguments.loss) = static_cast<float>(loss);
  }
  return {arguments.loss, arguments.grad_pred};
}

Tensor patch_loss_bwd_cpu(const Tensor& grad_loss, const Tensor& grad_pred, const Tensor& mask, ScalarType dtype) {
  STD_TORCH_CHECK(grad_loss.is_cpu() && grad_pred.is_cpu() && mask.is_cpu(),
                  "patch_loss_bwd: all tensors must be on the CPU");
  const PatchGradArguments arguments(grad_loss, grad_pred, mask, dtype, new_result);
  const double factor = arguments.is_double ? *const_data<double>(grad_loss) : *const_data<float>(grad_loss);
  run_patch_grad(arguments.job, factor, isa().patch_loss(), torch::stable::get_num_threads(), TorchThreads{});
  return arguments.grad;
}

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CPU, m) {
  m.impl("patch_loss_fwd", TORCH_BOX(&patch_loss_fwd_cpu));
  m.impl("patch_loss_bwd", TORCH_BOX(&patch_loss_bwd_cpu));
}

}  // namespace
}  // namespace sslkernels

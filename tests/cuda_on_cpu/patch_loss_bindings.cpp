// The masked patch loss's operators by the CUDA kernels, on CPU tensors of any strides, which In and Out do not take.
// The caller allocates the results.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cuda/patch_loss.cuh"
#include "tensor.h"

namespace py = pybind11;
using namespace sslkernels;

namespace {

Dtype dtype_of(const py::handle& tensor) {
  const std::string name = py::str(tensor.attr("dtype"));
  if (name == "torch.float32") return Dtype::kFloat32;
  if (name == "torch.bfloat16") return Dtype::kBFloat16;
  if (name == "torch.float16") return Dtype::kFloat16;
  if (name == "torch.float64") return Dtype::kFloat64;
  throw py::type_error("patch_loss: no kernel for " + name);
}

void* data_of(const py::handle& tensor) { return reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>()); }

// images (N, C, T, H, W) of any strides; pred with a dense last dimension; grad_pred None where none is needed.
void forward(const py::handle& pred, const py::handle& images, In<bool> mask, const std::vector<int64_t>& patch_size,
             bool norm_pix, double eps, const py::handle& loss, const py::handle& grad_pred) {
  const auto sizes = images.attr("shape").cast<std::vector<int64_t>>();
  const auto strides = images.attr("stride")().cast<std::vector<int64_t>>();
  const auto pred_strides = pred.attr("stride")().cast<std::vector<int64_t>>();
  PatchLossJob job{};
  job.pred = data_of(pred);
  job.images = data_of(images);
  job.mask = mask;
  job.grad = grad_pred.is_none() ? nullptr : data_of(grad_pred);
  job.pred_dtype = dtype_of(pred);
  job.images_dtype = dtype_of(images);
  job.norm_pix = norm_pix;
  job.eps = eps;
  job.samples = sizes[0];
  job.channels = sizes[1];
  job.sample_stride = strides[0];
  job.channel_stride = strides[1];
  for (int d = 0; d < 3; d++) {
    job.patch[d] = patch_size[d];
    job.patch_strides[d] = strides[d + 2];
    job.grid[d] = sizes[d + 2] / patch_size[d];
    job.grid_strides[d] = strides[d + 2] * patch_size[d];
  }
  job.pred_strides[0] = pred_strides[0];
  job.pred_strides[1] = pred_strides[1];
  job.merge_channels();
  std::vector<double> workspace(patch_loss::workspace_bytes(job) / 8);
  patch_loss::forward(job, workspace.data(), data_of(loss), nullptr);
}

void backward(const py::handle& grad_loss, const py::handle& grad_pred, In<bool> mask, const py::handle& grad) {
  const auto shape = grad_pred.attr("shape").cast<std::vector<int64_t>>();
  const PatchGradJob job{data_of(grad_pred),  mask,    data_of(grad), dtype_of(grad_pred), dtype_of(grad),
                         shape[0] * shape[1], shape[2]};
  patch_loss::backward(job, data_of(grad_loss), dtype_of(grad_loss) == Dtype::kFloat64, nullptr);
}

}  // namespace

void define_patch_loss(py::module_& m) {
  m.def("patch_loss_fwd", &forward);
  m.def("patch_loss_bwd", &backward);
}

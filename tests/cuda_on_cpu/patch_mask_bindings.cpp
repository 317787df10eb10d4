// The operators of patch masking by the CUDA kernels, on CPU tensors of any strides: arguments are those of the schemas
// in op.py, then the results, which the caller allocates.
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "cuda/patch_mask.cuh"
#include "host.h"
#include "tensor.h"

namespace py = pybind11;
using namespace sslkernels;
using patch_mask::Rows;

namespace {

Dtype dtype_of(const py::handle& tensor) {
  const std::string name = py::str(tensor.attr("dtype"));
  if (name == "torch.float32") return Dtype::kFloat32;
  if (name == "torch.bfloat16") return Dtype::kBFloat16;
  if (name == "torch.float16") return Dtype::kFloat16;
  if (name == "torch.float64") return Dtype::kFloat64;
  throw py::type_error("patch_mask: no kernel for " + name);
}

void* data_of(const py::handle& tensor) {
  return tensor.is_none() ? nullptr : reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
}

std::vector<int64_t> sizes_of(const py::handle& tensor) { return tensor.attr("shape").cast<std::vector<int64_t>>(); }

// (samples, rows, dim), of which rows are dense.
Rows rows_of(const py::handle& tensor) {
  const auto strides = tensor.attr("stride")().cast<std::vector<int64_t>>();
  const int64_t bytes = itemsize(dtype_of(tensor));
  return {static_cast<char*>(data_of(tensor)), strides[0] * bytes, strides[1] * bytes};
}

patch_mask::Images image_rows(const py::handle& images, const std::vector<int64_t>& patch) {
  auto sizes = sizes_of(images), strides = images.attr("stride")().cast<std::vector<int64_t>>(), edges = patch;
  if (sizes.size() == 4) {
    sizes.insert(sizes.begin() + 2, 1);
    strides.insert(strides.begin() + 2, 0);
    edges.insert(edges.begin(), 1);
  }
  int64_t size[5], stride[5], edge[3];
  std::copy(sizes.begin(), sizes.end(), size);
  std::copy(strides.begin(), strides.end(), stride);
  std::copy(edges.begin(), edges.end(), edge);
  return patch_mask::images_of(data_of(images), dtype_of(images), size, stride, edge);
}

void patch_mask_fwd(In<int64_t> seed, In<int64_t> sample_ids, In<float> scores, int64_t samples, int64_t tokens,
                    int64_t num_keep, bool ordered, Out<int64_t> ids_keep, Out<int64_t> ids_restore, Out<bool> mask) {
  HostMemory host;
  patch_mask::select(host, {seed, sample_ids, scores, tokens, num_keep, ordered, ids_keep, ids_restore, mask}, samples);
}

void invert_ids(Out<int64_t> ids_keep, int64_t samples, int64_t num_keep, int64_t tokens, Out<int64_t> ids_restore,
                Out<bool> mask) {
  HostMemory host;
  patch_mask::invert(host, {nullptr, nullptr, nullptr, tokens, num_keep, false, ids_keep, ids_restore, mask}, samples);
}

void gather_tokens_fwd(const py::object& x, In<int64_t> ids, int64_t prefix, const py::object& out) {
  const auto from = sizes_of(x), to = sizes_of(out);
  HostMemory host;
  patch_mask::gather_tokens(host, dtype_of(x), rows_of(x), ids, to[0], to[1] - prefix, from[1] - prefix, prefix, to[2],
                            data_of(out));
}

void gather_tokens_bwd(const py::object& grad, In<int64_t> ids, int64_t prefix, const py::object& out) {
  const auto from = sizes_of(grad), to = sizes_of(out);
  HostMemory host;
  patch_mask::gather_tokens_backward(host, dtype_of(grad), rows_of(grad), ids, to[0], from[1] - prefix, to[1] - prefix,
                                     prefix, to[2], data_of(out));
}

void restore_tokens_fwd(const py::object& x, In<int64_t> ids_restore, const py::object& mask_token,
                        const py::object& pos_embed, int64_t prefix, const py::object& out) {
  const auto from = sizes_of(x), to = sizes_of(out);
  const int64_t positions = pos_embed.is_none() ? 0 : sizes_of(pos_embed)[0];
  HostMemory host;
  patch_mask::restore_tokens(host, dtype_of(x),
                             {rows_of(x), ids_restore, to[1] - prefix, prefix, from[1] - prefix,
                              static_cast<char*>(data_of(mask_token)), patch_mask::nan_of(dtype_of(x))},
                             {data_of(pos_embed), positions}, to[0], to[2], data_of(out));
}

void restore_tokens_bwd(const py::object& grad, In<int64_t> ids_restore, int64_t num_keep, int64_t prefix,
                        int64_t pos_tokens, const py::object& grad_x, const py::object& grad_mask_token,
                        const py::object& grad_pos) {
  const auto from = sizes_of(grad);
  HostMemory host;
  patch_mask::restore_tokens_backward(host, dtype_of(grad), rows_of(grad), ids_restore, from[0], from[1] - prefix,
                                      num_keep, prefix, from[2],
                                      {data_of(grad_x), data_of(grad_mask_token), data_of(grad_pos), pos_tokens});
}

void gather_patches_fwd(const py::object& images, In<int64_t> ids, const std::vector<int64_t>& patch_size,
                        const py::object& out) {
  const auto to = sizes_of(out);
  HostMemory host;
  patch_mask::gather_patches(host, dtype_of(images), image_rows(images, patch_size), ids, to[0], to[1],
                             sizes_of(images)[1], data_of(out));
}

void gather_patches_bwd(const py::object& grad, In<int64_t> ids, const std::vector<int64_t>& patch_size,
                        const py::object& out) {
  const auto from = sizes_of(grad);
  HostMemory host;
  patch_mask::gather_patches_backward(host, dtype_of(grad), rows_of(grad), ids, from[0], from[1], sizes_of(out)[1],
                                      image_rows(out, patch_size));
}

}  // namespace

void define_patch_mask(py::module_& m) {
  m.def("patch_mask_fwd", &patch_mask_fwd);
  m.def("invert_ids", &invert_ids);
  m.def("gather_tokens_fwd", &gather_tokens_fwd);
  m.def("gather_tokens_bwd", &gather_tokens_bwd);
  m.def("restore_tokens_fwd", &restore_tokens_fwd);
  m.def("restore_tokens_bwd", &restore_tokens_bwd);
  m.def("gather_patches_fwd", &gather_patches_fwd);
  m.def("gather_patches_bwd", &gather_patches_bwd);
}

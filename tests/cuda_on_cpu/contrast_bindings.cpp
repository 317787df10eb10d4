// The contrastive core's operators by the CUDA kernels, on CPU tensors: arguments and results are those of the schemas
// in contrast_op.py, but for results, which the caller allocates, and the bytes of a chunk.
#include <pybind11/pybind11.h>

#include <string>

#include "contrast_host.h"
#include "tensor.h"

namespace py = pybind11;
using namespace sslkernels;
using contrast::Inputs;

namespace {

Dtype matmul_dtype(int64_t matmul) {
  return matmul == 0 ? Dtype::kFloat32 : matmul == 1 ? Dtype::kBFloat16 : Dtype::kFloat16;
}

Dtype dtype_of(const py::handle& tensor) {
  const std::string name = py::str(tensor.attr("dtype"));
  if (name == "torch.float32") return Dtype::kFloat32;
  if (name == "torch.bfloat16") return Dtype::kBFloat16;
  if (name == "torch.float16") return Dtype::kFloat16;
  throw py::type_error("contrast: no kernel for " + name);
}

Inputs inputs_of(const py::object& query, const py::object& key, In<float> scale, In<int64_t> skip,
                 In<int64_t> query_ids, In<int64_t> key_ids, int64_t matmul, int64_t chunk_bytes) {
  Inputs in{};
  in.rows = query.attr("shape").attr("__getitem__")(0).cast<int64_t>();
  in.dim = query.attr("shape").attr("__getitem__")(1).cast<int64_t>();
  in.query = query.cast<In<float>>();
  in.pairs.columns = in.rows;
  in.pairs.diagonal = key.is_none();
  if (!key.is_none()) {
    if (!key.attr("is_contiguous")().cast<bool>()) throw py::type_error("contrast: key must be contiguous");
    in.pairs.columns = key.attr("shape").attr("__getitem__")(0).cast<int64_t>();
    in.key = reinterpret_cast<const void*>(key.attr("data_ptr")().cast<uintptr_t>());
    in.key_dtype = dtype_of(key);
  }
  in.scale = scale;
  in.pairs.skip = skip;
  in.pairs.skips = in.rows ? skip.size / in.rows : 0;
  in.pairs.query_ids = query_ids;
  in.pairs.key_ids = key_ids;
  in.matmul = matmul_dtype(matmul);
  in.chunk_bytes = chunk_bytes;
  return in;
}

void contrast_fwd(const py::object& query, const py::object& key, In<float> scale, In<int64_t> skip,
                  In<int64_t> query_ids, In<int64_t> key_ids, bool normalize_key, int64_t matmul, int64_t chunk_bytes,
                  Out<double> lse_rows, Out<double> lse_columns, Out<float> peak_rows, Out<float> peak_columns,
                  Out<float> skipped, Out<float> attraction) {
  Inputs in = inputs_of(query, key, scale, skip, query_ids, key_ids, matmul, chunk_bytes);
  in.normalize_key = normalize_key;
  CpuHost host;
  contrast::forward(host, in, {{lse_rows, peak_rows, skipped}, {lse_columns, peak_columns}, attraction});
}

void contrast_bwd(In<double> grad_rows, In<double> grad_columns, In<double> lse_rows, In<double> lse_columns,
                  const py::object& query, const py::object& key, In<float> scale, In<int64_t> skip,
                  In<int64_t> query_ids, In<int64_t> key_ids, int64_t matmul, int64_t chunk_bytes,
                  Out<float> grad_query, Out<float> grad_key, Out<float> grad_scale) {
  const Inputs in = inputs_of(query, key, scale, skip, query_ids, key_ids, matmul, chunk_bytes);
  CpuHost host;
  contrast::softmax_backward(host, in, grad_rows, grad_columns, lse_rows, lse_columns,
                             {grad_query, grad_key, grad_scale, nullptr});
}

void sigmoid_contrast_fwd(const py::object& query, const py::object& key, In<float> scale, In<float> bias,
                          In<int64_t> positive, In<int64_t> query_ids, In<int64_t> key_ids, int64_t matmul,
                          int64_t chunk_bytes, Out<double> loss) {
  const Inputs in = inputs_of(query, key, scale, positive, query_ids, key_ids, matmul, chunk_bytes);
  CpuHost host;
  contrast::sigmoid_forward(host, in, bias, loss);
}

void sigmoid_contrast_bwd(In<double> grad_rows, const py::object& query, const py::object& key, In<float> scale,
                          In<float> bias, In<int64_t> positive, In<int64_t> query_ids, In<int64_t> key_ids,
                          int64_t matmul, int64_t chunk_bytes, Out<float> grad_query, Out<float> grad_key,
                          Out<float> grad_scale, Out<float> grad_bias) {
  const Inputs in = inputs_of(query, key, scale, positive, query_ids, key_ids, matmul, chunk_bytes);
  CpuHost host;
  contrast::sigmoid_backward(host, in, bias, grad_rows, {grad_query, grad_key, grad_scale, grad_bias});
}

}  // namespace

void define_contrast(py::module_& m) {
  m.def("contrast_fwd", &contrast_fwd);
  m.def("contrast_bwd", &contrast_bwd);
  m.def("sigmoid_contrast_fwd", &sigmoid_contrast_fwd);
  m.def("sigmoid_contrast_bwd", &sigmoid_contrast_bwd);
}

// sslkernels::contrast_cuda_fwd, contrast_cuda_bwd, sigmoid_contrast_cuda_fwd and sigmoid_contrast_cuda_bwd.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cuda/contrast.cuh"
#include "cuda/torch_host.h"
#include "tensors.h"

namespace sslkernels {
namespace {

using contrast::Gradients;
using contrast::Inputs;
using contrast::Matrix;
using torch::stable::Device;

constexpr const char* kOp = "contrast_cuda";

ScalarType scalar_type(Dtype dtype) {
  return dtype == Dtype::kFloat32    ? ScalarType::Float
         : dtype == Dtype::kBFloat16 ? ScalarType::BFloat16
                                     : ScalarType::Half;
}

// torch multiplies: its cuBLAS handle. Its fp32 products are TF32 where torch was told so.
class MultiplyingHost : public TorchHost {
 public:
  explicit MultiplyingHost(const Tensor& query) : TorchHost(kOp, query), device_(query.device()) {}

  void multiply(const Matrix& a, const Matrix& b, const Matrix& out) {
    using torch::stable::detail::from;
    const bool wider = a.dtype != out.dtype;
    std::vector<StableIValue> stack{from(tensor(a)), from(tensor(b))};
    if (wider) stack.push_back(from(ScalarType::Float));
    stack.push_back(from(tensor(out)));
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::mm", wider ? "dtype_out" : "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // `out` once more, to be released
  }

 private:
  Tensor tensor(const Matrix& m) const {
    return torch::stable::from_blob(m.data, {m.rows, m.columns}, {m.row_stride, m.column_stride}, device_,
                                    scalar_type(m.dtype));
  }

  const Device device_;
};

// ---- arguments

// A tensor made contiguous, which lives as long as the pointers to it.
class Held {
 public:
  explicit Held(const Tensor& query) : device_(query.get_device_index()) {}

  template <class T>
  const T* data(const char* argument, const Tensor& x, ScalarType dtype, int64_t count) {
    STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == device_ && x.scalar_type() == dtype && x.numel() == count,
                    kOp, ": ", argument, " must have ", count, " elements in the right dtype on the device of query");
    tensors_.push_back(torch::stable::contiguous(x));
    return static_cast<const T*>(tensors_.back().const_data_ptr());
  }
  template <class T>
  const T* data(const char* argument, const std::optional<Tensor>& x, ScalarType dtype, int64_t count) {
    return x ? data<T>(argument, *x, dtype, count) : nullptr;
  }

 private:
  const int32_t device_;
  std::vector<Tensor> tensors_;
};

Dtype matmul_dtype(int64_t matmul) {
  STD_TORCH_CHECK(matmul >= 0 && matmul <= 2, kOp, ": matmul must be 0, 1 or 2, got ", matmul);
  return matmul == 0 ? Dtype::kFloat32 : matmul == 1 ? Dtype::kBFloat16 : Dtype::kFloat16;
}

Dtype key_dtype(const Tensor& key) {
  const Dtype dtype = dtype_of(kOp, "key", key);
  STD_TORCH_CHECK(dtype != Dtype::kFloat64, kOp, ": key must be float32, bfloat16 or float16");
  return dtype;
}

Inputs inputs_of(Held& held, const Tensor& query, const std::optional<Tensor>& key, const Tensor& scale,
                 const std::optional<Tensor>& skip, const std::optional<Tensor>& query_ids,
                 const std::optional<Tensor>& key_ids, int64_t matmul) {
  STD_TORCH_CHECK(query.dim() == 2 && query.size(1) > 0, kOp, ": query must be (N, D) with at least one column");
  STD_TORCH_CHECK(!key || (key->dim() == 2 && key->size(1) == query.size(1)), kOp, ": key must be (M, D) like query");
  STD_TORCH_CHECK(!skip || (skip->dim() == 2 && skip->size(0) == query.size(0)), kOp, ": skip must be (N, S)");
  STD_TORCH_CHECK(query_ids.has_value() == key_ids.has_value(), kOp, ": query_ids and key_ids come together");
  Inputs in{};
  in.rows = query.size(0);
  in.dim = query.size(1);
  in.query = held.data<float>("query", query, ScalarType::Float, query.numel());
  in.pairs.columns = key ? key->size(0) : in.rows;
  in.pairs.diagonal = !key;
  if (key) {
    in.key_dtype = key_dtype(*key);
    in.key = held.data<void>("key", *key, key->scalar_type(), key->numel());
  }
  in.scale = held.data<float>("scale", scale, ScalarType::Float, 1);
  if (skip) {
    in.pairs.skips = skip->size(1);
    in.pairs.skip = held.data<int64_t>("skip", *skip, ScalarType::Long, skip->numel());
  }
  in.pairs.query_ids = held.data<int64_t>("query_ids", query_ids, ScalarType::Long, in.rows);
  in.pairs.key_ids = held.data<int64_t>("key_ids", key_ids, ScalarType::Long, in.pairs.columns);
  in.matmul = matmul_dtype(matmul);
  return in;
}

// ---- operators

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Forward contrast_fwd_cuda(const Tensor& query, const std::optional<Tensor>& key, const Tensor& scale,
                          const std::optional<Tensor>& skip, const std::optional<Tensor>& query_ids,
                          const std::optional<Tensor>& key_ids, bool normalize_key, bool /*unit*/, bool /*bounded*/,
                          bool columns, bool attract, bool peaks, int64_t matmul) {
  Held held(query);
  Inputs in = inputs_of(held, query, key, scale, skip, query_ids, key_ids, matmul);
  STD_TORCH_CHECK(!normalize_key || key, kOp, ": normalize_key must be False without key");
  in.normalize_key = normalize_key;
  const int64_t width = columns ? in.pairs.columns : 0, seen = peaks ? in.rows : 0;
  const Tensor lse_rows = torch::stable::new_empty(query, {in.rows}, ScalarType::Double);
  const Tensor lse_columns = torch::stable::new_empty(query, {width}, ScalarType::Double);
  const Tensor peak_rows = torch::stable::new_empty(query, {seen}), skipped = torch::stable::empty_like(peak_rows);
  const Tensor peak_columns = torch::stable::new_empty(query, {peaks ? width : 0});
  const Tensor attraction = torch::stable::new_zeros(query, {attract ? in.rows : 0, attract ? in.dim : 0});
  contrast::ForwardResults results{};
  results.rows.logsumexp = data<double>(lse_rows);
  if (columns) results.columns.logsumexp = data<double>(lse_columns);
  if (peaks) {
    results.rows.peak = data<float>(peak_rows);
    results.rows.skipped = data<float>(skipped);
    if (columns) results.columns.peak = data<float>(peak_columns);
  }
  if (attract) results.attraction = data<float>(attraction);
  MultiplyingHost host(query);
  contrast::forward(host, in, results);
  return {lse_rows, lse_columns, peak_rows, peak_columns, skipped, attraction};
}

using Backward = std::tuple<Tensor, Tensor, Tensor>;

Backward contrast_bwd_cuda(const Tensor& grad_rows, const std::optional<Tensor>& grad_columns, const Tensor& lse_rows,
                           const std::optional<Tensor>& lse_columns, const Tensor& query,
                           const std::optional<Tensor>& key, const Tensor& scale, const std::optional<Tensor>& skip,
                           const std::optional<Tensor>& query_ids, const std::optional<Tensor>& key_ids, bool /*unit*/,
                           bool /*bounded*/, int64_t matmul) {
  Held held(query);
  const Inputs in = inputs_of(held, query, key, scale, skip, query_ids, key_ids, matmul);
  STD_TORCH_CHECK(!grad_columns || lse_columns, kOp, ": grad_columns and lse_columns come together");
  STD_TORCH_CHECK(!key || in.key_dtype == Dtype::kFloat32, kOp, ": a key with a gradient must be float32");
  const Tensor grad_query = torch::stable::new_zeros(query, {in.rows, in.dim});
  const Tensor grad_key = torch::stable::new_zeros(query, {key ? in.pairs.columns : 0, key ? in.dim : 0});
  const Tensor grad_scale = torch::stable::new_zeros(scale, {});
  const int64_t columns = in.pairs.columns;
  MultiplyingHost host(query);
  contrast::softmax_backward(
      host, in, held.data<double>("grad_rows", grad_rows, ScalarType::Double, in.rows),
      held.data<double>("grad_columns", grad_columns, ScalarType::Double, columns),
      held.data<double>("lse_rows", lse_rows, ScalarType::Double, in.rows),
      grad_columns ? held.data<double>("lse_columns", lse_columns, ScalarType::Double, columns) : nullptr,
      Gradients{data<float>(grad_query), data<float>(grad_key), data<float>(grad_scale), nullptr});
  return {grad_query, grad_key, grad_scale};
}

Tensor sigmoid_contrast_fwd_cuda(const Tensor& query, const Tensor& key, const Tensor& scale, const Tensor& bias,
                                 const std::optional<Tensor>& positive, const std::optional<Tensor>& query_ids,
                                 const std::optional<Tensor>& key_ids, int64_t matmul) {
  Held held(query);
  const Inputs in = inputs_of(held, query, key, scale, positive, query_ids, key_ids, matmul);
  const Tensor loss = torch::stable::new_empty(query, {in.rows}, ScalarType::Double);
  MultiplyingHost host(query);
  contrast::sigmoid_forward(host, in, held.data<float>("bias", bias, ScalarType::Float, 1), data<double>(loss));
  return loss;
}

using SigmoidBackward = std::tuple<Tensor, Tensor, Tensor, Tensor>;

SigmoidBackward sigmoid_contrast_bwd_cuda(const Tensor& grad_rows, const Tensor& query, const Tensor& key,
                                          const Tensor& scale, const Tensor& bias,
                                          const std::optional<Tensor>& positive, const std::optional<Tensor>& query_ids,
                                          const std::optional<Tensor>& key_ids, int64_t matmul) {
  Held held(query);
  const Inputs in = inputs_of(held, query, key, scale, positive, query_ids, key_ids, matmul);
  STD_TORCH_CHECK(in.key_dtype == Dtype::kFloat32, kOp, ": a key with a gradient must be float32");
  const Tensor grad_query = torch::stable::new_zeros(query, {in.rows, in.dim});
  const Tensor grad_key = torch::stable::new_zeros(query, {in.pairs.columns, in.dim});
  const Tensor grad_scale = torch::stable::new_zeros(scale, {}), grad_bias = torch::stable::new_zeros(bias, {});
  MultiplyingHost host(query);
  contrast::sigmoid_backward(
      host, in, held.data<float>("bias", bias, ScalarType::Float, 1),
      held.data<double>("grad_rows", grad_rows, ScalarType::Double, in.rows),
      Gradients{data<float>(grad_query), data<float>(grad_key), data<float>(grad_scale), data<float>(grad_bias)});
  return {grad_query, grad_key, grad_scale, grad_bias};
}

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CUDA, m) {
  m.impl("contrast_cuda_fwd", TORCH_BOX(&contrast_fwd_cuda));
  m.impl("contrast_cuda_bwd", TORCH_BOX(&contrast_bwd_cuda));
  m.impl("sigmoid_contrast_cuda_fwd", TORCH_BOX(&sigmoid_contrast_fwd_cuda));
  m.impl("sigmoid_contrast_cuda_bwd", TORCH_BOX(&sigmoid_contrast_bwd_cuda));
}

}  // namespace
}  // namespace sslkernels

// sslkernels::contrast_fwd, contrast_bwd, sigmoid_contrast_fwd and sigmoid_contrast_bwd for CPU tensors.
#include "contrast.h"

#include <torch/csrc/stable/library.h>

#include <list>
#include <optional>

#include "../checks.h"
#include "../tensors.h"
#include "isa.h"
#include "threads.h"

namespace sslkernels {
namespace {

using Maybe = std::optional<Tensor>;
constexpr const char* kOp = "contrast";

// Tensors that the job points into, made contiguous where it asks for that.
class Kept {
 public:
  const Tensor& contiguous(const Tensor& x) { return tensors_.emplace_back(torch::stable::contiguous(x)); }

  const int64_t* integers(const char* argument, const Maybe& x, int64_t count) {
    if (!x) return nullptr;
    const Tensor& kept = contiguous(*x);
    check_rows(kOp, argument, kept, ScalarType::Long, count);
    return const_data<int64_t>(kept);
  }
  const double* doubles(const char* argument, const Maybe& x, int64_t count) {
    if (!x) return nullptr;
    const Tensor& kept = contiguous(*x);
    check_rows(kOp, argument, kept, ScalarType::Double, count);
    return const_data<double>(kept);
  }

 private:
  std::list<Tensor> tensors_;
};

double number(const char* argument, const Tensor& x) {
  check_rows(kOp, argument, x, ScalarType::Float, 1);
  return *const_data<float>(x);
}

Rows rows_of(const Tensor& x, bool normalize) {
  return {{x.const_data_ptr(), nullptr},     {x.stride(0), 0}, {x.stride(1), 0}, 1, x.size(0), x.size(1),
          dtype_of(kOp, "query and key", x), normalize};
}

ContrastJob make_job(const Tensor& query, const Maybe& key, const Tensor& scale, const Maybe& skip,
                     const Maybe& query_ids, const Maybe& key_ids, bool normalize_key, Kept& kept) {
  check_matrix(kOp, "query", query);
  STD_TORCH_CHECK(query.scalar_type() == ScalarType::Float,
                  "contrast: query must be float32; float64 runs on the definition, backend='reference'");
  ContrastJob job{};
  job.query.in = rows_of(query, false);
  job.symmetric = !key;
  if (key) {
    check_matrix(kOp, "key", *key);
    STD_TORCH_CHECK(key->size(1) == query.size(1), "contrast: query and key must have as many columns");
    STD_TORCH_CHECK(key->scalar_type() != ScalarType::Double, "contrast: key must not be float64 with a float32 query");
    job.key.in = rows_of(*key, normalize_key);
  }
  job.scale = number("scale", scale);
  job.skips = skip ? skip->size(1) : 0;
  job.skip = kept.integers("skip", skip, query.size(0) * job.skips);
  STD_TORCH_CHECK(query_ids.has_value() == key_ids.has_value() && !(query_ids && !key),
                  "contrast: query_ids and key_ids come together, and with a key");
  job.query.ids = kept.integers("query_ids", query_ids, query.size(0));
  job.key.ids = kept.integers("key_ids", key_ids, job.key.in.count);
  return job;
}

bool is_bounded(const ContrastJob& job, bool unit) { return unit && 2 * std::fabs(job.scale) <= kMaxBoundedSpan; }

ContrastKernel kernel_for(const ContrastJob& job, int64_t matmul) {
  if (matmul == 1) return isa().contrast(true);
  return isa_for(std::max(job.query.in.count, job.key.in.count), job.query.in.dim).contrast(false);
}

template <class Run>
void run(ContrastJob& job, int64_t matmul, const Run& steps) {
  const TorchThreads threads;
  const ContrastKernel kernel = kernel_for(job, matmul);
  ContrastRunner runner(job, kernel, torch::stable::get_num_threads(), threads);
  steps(runner);
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Forward contrast_fwd_cpu(const Tensor& query, const Maybe& key, const Tensor& scale, const Maybe& skip,
                         const Maybe& query_ids, const Maybe& key_ids, bool normalize_key, bool unit, bool /*bounded*/,
                         bool columns, bool attract, bool peaks, int64_t matmul) {
  Kept kept;
  ContrastJob job = make_job(query, key, scale, skip, query_ids, key_ids, normalize_key, kept);
  STD_TORCH_CHECK(!attract || (key && !columns), "contrast: attract needs a key, and no columns");
  const int64_t rows = query.size(0), width = !columns ? 0 : key ? key->size(0) : rows;
  job.bounded = is_bounded(job, unit) && !peaks;
  job.columns = columns;
  job.attract = attract;
  Tensor lse_rows = torch::stable::new_empty(query, {rows}, ScalarType::Double);
  Tensor lse_columns = torch::stable::new_empty(query, {width}, ScalarType::Double);
  Tensor peak_rows = torch::stable::new_empty(query, {peaks ? rows : 0});
  Tensor peak_columns = torch::stable::new_empty(query, {peaks ? width : 0});
  Tensor skipped = torch::stable::new_empty(query, {peaks ? rows : 0});
  Tensor attraction = torch::stable::new_empty(query, {attract ? rows : 0, attract ? query.size(1) : 0});
  job.lse_rows = data<double>(lse_rows);
  job.lse_columns = data<double>(lse_columns);
  if (peaks) {
    job.peak_rows = data<float>(peak_rows);
    job.peak_columns = data<float>(peak_columns);
    job.skipped = data<float>(skipped);
  }
  job.attraction = data<float>(attraction);
  run(job, matmul, [](auto& runner) { runner.forward(); });
  if (columns && !key) {
    for (int64_t i = 0; i < rows; i++) job.lse_columns[i] = job.lse_rows[i];
    for (int64_t i = 0; peaks && i < rows; i++) job.peak_columns[i] = job.peak_rows[i];
  }
  return {lse_rows, lse_columns, peak_rows, peak_columns, skipped, attraction};
}

std::tuple<Tensor, Tensor, Tensor> contrast_bwd_cpu(const Tensor& grad_rows, const Maybe& grad_columns,
                                                    const Tensor& lse_rows, const Maybe& lse_columns,
                                                    const Tensor& query, const Maybe& key, const Tensor& scale,
                                                    const Maybe& skip, const Maybe& query_ids, const Maybe& key_ids,
                                                    bool unit, bool /*bounded*/, int64_t matmul) {
  Kept kept;
  ContrastJob job = make_job(query, key, scale, skip, query_ids, key_ids, false, kept);
  STD_TORCH_CHECK(!key || key->scalar_type() == ScalarType::Float, "contrast: key must be float32 to have a gradient");
  STD_TORCH_CHECK(grad_columns.has_value() == lse_columns.has_value(),
                  "contrast: grad_columns and lse_columns come together");
  const int64_t rows = query.size(0), width = key ? key->size(0) : rows;
  job.bounded = is_bounded(job, unit);
  job.columns = grad_columns.has_value();
  job.query.gradient = kept.doubles("grad_rows", grad_rows, rows);
  job.query.logsumexp = kept.doubles("lse_rows", lse_rows, rows);
  job.key.gradient = kept.doubles("grad_columns", grad_columns, width);
  job.key.logsumexp = kept.doubles("lse_columns", lse_columns, width);
  Tensor summed;
  if (!key && grad_columns) {  // a symmetric matrix: the columns' gradient adds to the rows'
    summed = torch::stable::new_empty(grad_rows, {rows});
    double* total = data<double>(summed);
    for (int64_t i = 0; i < rows; i++) total[i] = job.query.gradient[i] + job.key.gradient[i];
    job.query.gradient = total;
    job.key.gradient = nullptr;
  }
  Tensor grad_query = torch::stable::new_empty(query, {rows, query.size(1)});
  Tensor grad_key =
      key ? torch::stable::new_empty(query, {width, query.size(1)}) : torch::stable::new_empty(query, {0, 0});
  Tensor grad_scale = torch::stable::new_empty(scale, {});
  job.grad_query = data<float>(grad_query);
  job.grad_key = data<float>(grad_key);
  run(job, matmul, [](auto& runner) { runner.backward(false); });
  *data<float>(grad_scale) = static_cast<float>(job.grad_scale);
  return {grad_query, grad_key, grad_scale};
}

Tensor sigmoid_contrast_fwd_cpu(const Tensor& query, const Tensor& key, const Tensor& scale, const Tensor& bias,
                                const Maybe& positive, const Maybe& query_ids, const Maybe& key_ids, int64_t matmul) {
  Kept kept;
  ContrastJob job = make_job(query, key, scale, positive, query_ids, key_ids, false, kept);
  job.bias = number("bias", bias);
  Tensor loss = torch::stable::new_empty(query, {query.size(0)}, ScalarType::Double);
  job.lse_rows = data<double>(loss);
  run(job, matmul, [](auto& runner) { runner.sigmoid_forward(); });
  return loss;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sigmoid_contrast_bwd_cpu(const Tensor& grad_rows, const Tensor& query,
                                                                    const Tensor& key, const Tensor& scale,
                                                                    const Tensor& bias, const Maybe& positive,
                                                                    const Maybe& query_ids, const Maybe& key_ids,
                                                                    int64_t matmul) {
  Kept kept;
  ContrastJob job = make_job(query, key, scale, positive, query_ids, key_ids, false, kept);
  STD_TORCH_CHECK(key.scalar_type() == ScalarType::Float, "contrast: key must be float32 to have a gradient");
  job.bias = number("bias", bias);
  job.query.gradient = kept.doubles("grad_rows", grad_rows, query.size(0));
  Tensor grad_query = torch::stable::new_empty(query, {query.size(0), query.size(1)});
  Tensor grad_key = torch::stable::new_empty(query, {key.size(0), key.size(1)});
  Tensor grad_scale = torch::stable::new_empty(scale, {}), grad_bias = torch::stable::new_empty(bias, {});
  job.grad_query = data<float>(grad_query);
  job.grad_key = data<float>(grad_key);
  run(job, matmul, [](auto& runner) { runner.backward(true); });
  *data<float>(grad_scale) = static_cast<float>(job.grad_scale);
  *data<float>(grad_bias) = static_cast<float>(job.grad_bias);
  return {grad_query, grad_key, grad_scale, grad_bias};
}

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CPU, m) {
  m.impl("contrast_fwd", TORCH_BOX(&contrast_fwd_cpu));
  m.impl("contrast_bwd", TORCH_BOX(&contrast_bwd_cpu));
  m.impl("sigmoid_contrast_fwd", TORCH_BOX(&sigmoid_contrast_fwd_cpu));
  m.impl("sigmoid_contrast_bwd", TORCH_BOX(&sigmoid_contrast_bwd_cpu));
}

}  // namespace
}  // namespace sslkernels

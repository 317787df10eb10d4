// sslkernels::unit_rows_fwd and unit_rows_bwd for CPU tensors.
#include "unit_rows.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "../checks.h"
#include "../tensors.h"
#include "isa.h"
#include "threads.h"

namespace sslkernels {
namespace {

using Maybe = std::optional<Tensor>;
constexpr const char* kOp = "unit_rows";

RowsToScale rows_to_scale(const char* argument, const Tensor& x) {
  check_matrix(kOp, argument, x);
  return {x.const_data_ptr(), x.stride(0), x.stride(1), dtype_of(kOp, argument, x)};
}

UnitRowsJob make_job(const Tensor& x, const Maybe& y) {
  UnitRowsJob job{};
  job.x = rows_to_scale("x", x);
  job.rows = x.size(0), job.dim = x.size(1);
  job.is_double = job.x.dtype == Dtype::kFloat64;
  if (!y) return job;
  job.y = rows_to_scale("y", *y);
  STD_TORCH_CHECK(y->size(0) == job.rows && y->size(1) == job.dim, "unit_rows: y must have the shape of x");
  STD_TORCH_CHECK((job.y.dtype == Dtype::kFloat64) == job.is_double, "unit_rows: float64 does not mix with the rest");
  return job;
}

ScalarType result_type(const UnitRowsJob& job) { return job.is_double ? ScalarType::Double : ScalarType::Float; }

void run(const UnitRowsJob& job, bool backward) {
  run_unit_rows(job, isa().unit_rows(), backward, torch::stable::get_num_threads(), TorchThreads{});
}

std::tuple<Tensor, Tensor, Tensor> unit_rows_fwd_cpu(const Tensor& x, const Maybe& y) {
  UnitRowsJob job = make_job(x, y);
  const auto result = [&](std::initializer_list<int64_t> sizes) {
    return torch::stable::new_empty(x, sizes, result_type(job));
  };
  Tensor x_rows = result({job.rows, job.dim}), y_rows = y ? result({job.rows, job.dim}) : result({0, 0}),
         similarity = result({y ? job.rows : 0});
  job.x_rows = x_rows.mutable_data_ptr();
  job.y_rows = y_rows.mutable_data_ptr();
  job.similarity = similarity.mutable_data_ptr();
  run(job, false);
  return {x_rows, y_rows, similarity};
}

std::tuple<Tensor, Tensor> unit_rows_bwd_cpu(const Maybe& grad_x_rows, const Maybe& grad_y_rows,
                                             const Maybe& grad_similarity, const Tensor& x, const Maybe& y) {
  UnitRowsJob job = make_job(x, y);
  Maybe kept[3];
  const auto given = [&](int at, const char* argument, const Maybe& grad, int64_t count) -> const void* {
    if (!grad || (!y && at > 0)) return nullptr;
    kept[at] = torch::stable::contiguous(*grad);
    check_rows(kOp, argument, *kept[at], result_type(job), count);
    return kept[at]->const_data_ptr();
  };
  job.grad_x_rows = given(0, "grad_x_rows", grad_x_rows, job.rows * job.dim);
  job.grad_y_rows = given(1, "grad_y_rows", grad_y_rows, job.rows * job.dim);
  job.grad_similarity = given(2, "grad_similarity", grad_similarity, job.rows);
  Tensor grad_x = torch::stable::new_empty(x, {job.rows, job.dim});
  Tensor grad_y = y ? torch::stable::new_empty(*y, {job.rows, job.dim}) : torch::stable::new_empty(x, {0, 0});
  job.grad_x = grad_x.mutable_data_ptr();
  job.grad_y = grad_y.mutable_data_ptr();
  run(job, true);
  return {grad_x, grad_y};
}

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CPU, m) {
  m.impl("unit_rows_fwd", TORCH_BOX(&unit_rows_fwd_cpu));
  m.impl("unit_rows_bwd", TORCH_BOX(&unit_rows_bwd_cpu));
}

}  // namespace
}  // namespace sslkernels

// sslkernels::nt_xent_fwd and nt_xent_bwd for CPU tensors.
#include "infonce.h"

#include <torch/csrc/stable/library.h>

#include "../checks.h"
#include "../tensors.h"
#include "infonce_double.h"
#include "isa.h"
#include "threads.h"

namespace sslkernels {
namespace {

NtXentJob make_job(const Tensor& z0, const Tensor& z1, const Tensor& temperature, bool normalize) {
  check_views("nt_xent", z0, z1);
  NtXentJob job{};
  job.in.dtype = dtype_of("nt_xent", "z0", z0);
  const bool is_double = job.in.dtype == Dtype::kFloat64;
  check_rows("nt_xent", "temperature", temperature, is_double ? ScalarType::Double : ScalarType::Float, 1);
  job.temperature = is_double ? *const_data<double>(temperature) : *const_data<float>(temperature);
  STD_TORCH_CHECK(job.temperature != 0, "nt_xent: temperature must not be zero");
  const Tensor* views[] = {&z0, &z1};
  for (int v = 0; v < 2; v++) {
    job.in.view[v] = views[v]->const_data_ptr();
    job.in.row_stride[v] = views[v]->stride(0);
    job.in.column_stride[v] = views[v]->stride(1);
  }
  job.in.views = 2;
  job.in.count = 2 * z0.size(0);
  job.in.dim = z0.size(1);
  job.in.normalize = normalize;
  job.bounded = normalize && 2 / std::fabs(job.temperature) <= kMaxBoundedSpan;  // here the value is known
  return job;
}

NtXentKernel kernel_for(const NtXentJob& job, bool bf16_matmul) {
  const bool bf16 = job.in.dtype == Dtype::kBFloat16 || (bf16_matmul && job.in.dtype == Dtype::kFloat32);
  return bf16 ? isa().nt_xent(true) : isa_for(job.in.count, job.in.dim).nt_xent(false);
}

// The weights of the positives, contiguous.
std::optional<Tensor> checked_weight(const std::optional<Tensor>& weight, const Tensor& temperature, int64_t rows) {
  if (!weight) return std::nullopt;
  const Tensor contiguous = torch::stable::contiguous(*weight);
  check_rows("nt_xent", "positive_weight", contiguous, temperature.scalar_type(), rows);
  return contiguous;
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Backward = std::tuple<Tensor, Tensor, Tensor>;

Forward nt_xent_fwd_cpu(const Tensor& z0, const Tensor& z1, const Tensor& temperature,
                        const std::optional<Tensor>& positive_weight, bool normalize, bool /*bounded*/, bool top1,
                        bool bf16_matmul) {
  NtXentJob job = make_job(z0, z1, temperature, normalize);
  const std::optional<Tensor> weight = checked_weight(positive_weight, temperature, job.in.count);
  const int64_t rows = job.in.count;
  Tensor loss = torch::stable::new_empty(temperature, {rows}), positive = torch::stable::empty_like(loss);
  Tensor logsumexp = torch::stable::new_empty(temperature, {rows}, ScalarType::Double);
  Tensor hit = torch::stable::new_empty(z0, {top1 ? rows : 0}, ScalarType::Bool);
  if (top1) {
    job.top1 = true;
    job.bounded = false;
    job.hit = data<bool>(hit);
  }
  if (job.in.dtype == Dtype::kFloat64) {
    NtXentDouble run{job, {}, {}, data<double>(loss), data<double>(positive), data<double>(logsumexp), {}, {}, {}};
    if (weight) run.positive_weight = const_data<double>(*weight);
    run.load();
    TorchThreads()(rows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) run.forward_row(i);
    });
  } else if (rows > 0) {
    if (weight) job.positive_weight = const_data<float>(*weight);
    job.loss = data<float>(loss);
    job.logsumexp = data<double>(logsumexp);
    job.positive = data<float>(positive);
    const TorchThreads threads;
    NtXentRunner(job, kernel_for(job, bf16_matmul), torch::stable::get_num_threads(), threads).forward();
  }
  return {loss, logsumexp, positive, hit};
}

double backward_double(NtXentDouble& run) {
  run.load();
  const int64_t rows = run.job.in.count;
  std::vector<double> parts(rows);
  TorchThreads()(rows, [&](int64_t begin, int64_t end) {
    std::vector<double> g(run.job.in.dim);
    for (int64_t i = begin; i < end; i++) parts[i] = run.backward_row(i, g.data());
  });
  double total = 0;
  for (double part : parts) total += part;
  return total;
}

Backward nt_xent_bwd_cpu(const Tensor& grad_loss, const Tensor& z0, const Tensor& z1, const Tensor& temperature,
                         const std::optional<Tensor>& positive_weight, const Tensor& loss, const Tensor& logsumexp,
                         bool normalize, bool /*bounded*/, bool bf16_matmul) {
  NtXentJob job = make_job(z0, z1, temperature, normalize);
  const std::optional<Tensor> weight = checked_weight(positive_weight, temperature, job.in.count);
  const int64_t rows = job.in.count;
  const ScalarType rows_dtype = temperature.scalar_type();
  const Tensor grad = torch::stable::contiguous(grad_loss);
  check_rows("nt_xent", "grad_loss", grad, rows_dtype, rows);
  check_rows("nt_xent", "loss", loss, rows_dtype, rows);
  check_rows("nt_xent", "logsumexp", logsumexp, ScalarType::Double, rows);
  Tensor grad_z0 = torch::stable::new_empty(z0, {job.in.count / 2, job.in.dim}),
         grad_z1 = torch::stable::empty_like(grad_z0);
  Tensor grad_temperature = torch::stable::new_empty(temperature, {});
  job.grad_view[0] = grad_z0.mutable_data_ptr();
  job.grad_view[1] = grad_z1.mutable_data_ptr();
  if (job.in.dtype == Dtype::kFloat64) {
    NtXentDouble run{
        job, {}, {}, {}, {}, {}, const_data<double>(grad), const_data<double>(loss), const_data<double>(logsumexp)};
    if (weight) run.positive_weight = const_data<double>(*weight);
    *data<double>(grad_temperature) = backward_double(run);
    return {grad_z0, grad_z1, grad_temperature};
  }
  if (rows > 0) {
    if (weight) job.positive_weight = const_data<float>(*weight);
    job.grad_loss = const_data<float>(grad);
    job.saved_loss = const_data<float>(loss);
    job.saved_logsumexp = const_data<double>(logsumexp);
    const TorchThreads threads;
    NtXentRunner(job, kernel_for(job, bf16_matmul), torch::stable::get_num_threads(), threads).backward();
  }
  *data<float>(grad_temperature) = static_cast<float>(job.grad_temperature);
  return {grad_z0, grad_z1, grad_temperature};
}

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CPU, m) {
  m.impl("nt_xent_fwd", TORCH_BOX(&nt_xent_fwd_cpu));
  m.impl("nt_xent_bwd", TORCH_BOX(&nt_xent_bwd_cpu));
}

}  // namespace
}  // namespace sslkernels

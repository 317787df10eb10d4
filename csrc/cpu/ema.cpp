// sslkernels::ema_update_ for CPU tensors.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "../checks.h"
#include "ema_list.h"
#include "isa.h"
#include "threads.h"

namespace sslkernels {
namespace {

using Tensors = std::vector<Tensor>;

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::Double:
      return Dtype::kFloat64;
    default:
      STD_TORCH_CHECK(false, "ema_update_: tensors must be float32, bfloat16, float16 or float64 here");
  }
}

TensorView view_of(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu(), "ema_update_: all tensors must be on one device");
  return {x.mutable_data_ptr(), dtype_of(x), x.dim(), x.sizes().data(), x.strides().data()};
}

void add(EmaList& list, const Tensor& teacher, const Tensor& student, const Tensor* copy, uint32_t index,
         int64_t first) {
  const TensorView target = view_of(teacher), source = view_of(student);
  STD_TORCH_CHECK(target.same_shape(source), "ema_update_: teacher and student must have one shape");
  TensorView written{};
  if (copy) {
    written = view_of(*copy);
    STD_TORCH_CHECK(written.dtype == Dtype::kBFloat16 && target.dtype == Dtype::kFloat32 && written.same_shape(target),
                    "ema_update_: bf16_copy must be bfloat16 in the shape of a float32 teacher");
  }
  STD_TORCH_CHECK(list.add(target, source, copy ? &written : nullptr, index, first),
                  "ema_update_: what is written must not hold one element twice");
}

void ema_update_cpu(Tensors teacher, Tensors student, const Tensor& momentum, std::optional<Tensor> found_inf,
                    Tensors bf16_copy, std::optional<int64_t> seed, std::optional<Tensor> step,
                    std::vector<int64_t> keys) {
  const size_t count = teacher.size();
  STD_TORCH_CHECK(student.size() == count, "ema_update_: as many students as teachers are needed");
  STD_TORCH_CHECK(bf16_copy.empty() || bf16_copy.size() == count, "ema_update_: one bf16_copy for each teacher");
  STD_TORCH_CHECK(!seed || keys.size() == 2 * count, "ema_update_: two keys for each teacher");
  check_rows("ema_update_", "momentum", momentum, ScalarType::Double, 1);
  EmaJob job{1 - *static_cast<const double*>(momentum.const_data_ptr()), seed.has_value(), 0, 0};
  if (seed) {
    STD_TORCH_CHECK(step.has_value(), "ema_update_: a seed needs a step");
    check_rows("ema_update_", "step", *step, ScalarType::Long, 1);
    job.seed = static_cast<uint64_t>(*seed);
    job.step = static_cast<uint32_t>(*static_cast<const int64_t*>(step->const_data_ptr()));
  }
  if (found_inf) {
    check_rows("ema_update_", "found_inf", *found_inf, ScalarType::Float, 1);
    if (*static_cast<const float*>(found_inf->const_data_ptr()) != 0) job.weight = 0;
  }
  EmaList list(count);
  for (size_t t = 0; t < count; t++)
    add(list, teacher[t], student[t], bf16_copy.empty() ? nullptr : &bf16_copy[t],
        seed ? static_cast<uint32_t>(keys[2 * t]) : 0, seed ? keys[2 * t + 1] : 0);
  if (job.weight == 0 && bf16_copy.empty()) return;
  run_ema(list.tensors, job, isa().ema(), torch::stable::get_num_threads(), TorchThreads{});
}

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CPU, m) { m.impl("ema_update_", TORCH_BOX(&ema_update_cpu)); }

}  // namespace
}  // namespace sslkernels

// sslkernels::ema_update_ for CPU tensors.
#include "ema.h"

#include <torch/csrc/stable/library.h>

#include "../ema_args.h"
#include "isa.h"
#include "threads.h"

namespace sslkernels {
namespace {

void ema_update_cpu(std::vector<Tensor> teacher, std::vector<Tensor> student, const Tensor& momentum,
                    std::optional<Tensor> found_inf, std::vector<Tensor> bf16_copy, std::optional<int64_t> seed,
                    std::optional<Tensor> step, std::vector<int64_t> keys) {
  if (teacher.empty()) return;
  STD_TORCH_CHECK(teacher[0].is_cpu(), "ema_update_: all tensors must be on one device");
  const EmaArguments arguments(teacher, student, momentum, found_inf, bf16_copy, seed, step, keys);
  EmaJob job{1 - *static_cast<const double*>(momentum.const_data_ptr()), seed.has_value(),
             static_cast<uint64_t>(seed.value_or(0)), 0};
  if (seed) job.step = static_cast<uint32_t>(*static_cast<const int64_t*>(step->const_data_ptr()));
  if (found_inf && *static_cast<const float*>(found_inf->const_data_ptr()) != 0) job.weight = 0;
  if (job.weight == 0 && bf16_copy.empty()) return;
  run_ema(arguments.list.tensors, job, isa().ema(), torch::stable::get_num_threads(), TorchThreads{});
}

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CPU, m) { m.impl("ema_update_", TORCH_BOX(&ema_update_cpu)); }

}  // namespace
}  // namespace sslkernels

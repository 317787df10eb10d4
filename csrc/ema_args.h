// The arguments of sslkernels::ema_update_, checked for those who call the operator directly, on any device.
#pragma once
#include <optional>
#include <unordered_set>
#include <vector>

#include "checks.h"
#include "ema_list.h"

namespace sslkernels {
namespace {

inline Dtype dtype_of(const Tensor& x) {
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

inline TensorView view_of(const Tensor& x, const Tensor& beside) {
  STD_TORCH_CHECK(x.device() == beside.device(), "ema_update_: all tensors must be on one device");
  return {x.mutable_data_ptr(), dtype_of(x), x.dim(), x.sizes().data(), x.strides().data()};
}

inline void add(EmaList& list, const Tensor& teacher, const Tensor& student, const Tensor* copy, uint32_t index,
                int64_t first) {
  const TensorView target = view_of(teacher, teacher), source = view_of(student, teacher);
  STD_TORCH_CHECK(target.same_shape(source), "ema_update_: teacher and student must have one shape");
  TensorView written{};
  if (copy) {
    written = view_of(*copy, teacher);
    STD_TORCH_CHECK(written.dtype == Dtype::kBFloat16 && target.dtype == Dtype::kFloat32 && written.same_shape(target),
                    "ema_update_: bf16_copy must be bfloat16 in the shape of a float32 teacher");
  }
  STD_TORCH_CHECK(list.add(target, source, copy ? &written : nullptr, index, first),
                  "ema_update_: what is written must not hold one element twice");
}

struct EmaArguments {
  EmaList list;

  EmaArguments(const std::vector<Tensor>& teacher, const std::vector<Tensor>& student, const Tensor& momentum,
               const std::optional<Tensor>& found_inf, const std::vector<Tensor>& bf16_copy,
               std::optional<int64_t> seed, const std::optional<Tensor>& step, const std::vector<int64_t>& keys)
      : list(teacher.size()) {
    const size_t count = teacher.size();
    STD_TORCH_CHECK(student.size() == count, "ema_update_: as many students as teachers are needed");
    STD_TORCH_CHECK(bf16_copy.empty() || bf16_copy.size() == count, "ema_update_: one bf16_copy for each teacher");
    STD_TORCH_CHECK(!seed || keys.size() == 2 * count, "ema_update_: two keys for each teacher");
    STD_TORCH_CHECK(!seed || step.has_value(), "ema_update_: a seed needs a step");
    if (count == 0) return;
    const Tensor& beside = teacher[0];
    check_number("momentum", momentum, ScalarType::Double, beside);
    if (seed) check_number("step", *step, ScalarType::Long, beside);
    if (found_inf) check_number("found_inf", *found_inf, ScalarType::Float, beside);
    std::unordered_set<const void*> seen;  // a tensor that is listed twice is updated once
    for (size_t t = 0; t < count; t++) {
      if (teacher[t].numel() > 0 && !seen.insert(teacher[t].const_data_ptr()).second) continue;
      add(list, teacher[t], student[t], bf16_copy.empty() ? nullptr : &bf16_copy[t],
          seed ? static_cast<uint32_t>(keys[2 * t]) : 0, seed ? keys[2 * t + 1] : 0);
    }
  }

 private:
  static void check_number(const char* argument, const Tensor& x, ScalarType dtype, const Tensor& beside) {
    STD_TORCH_CHECK(x.numel() == 1 && x.scalar_type() == dtype && x.device() == beside.device(),
                    "ema_update_: ", argument, " must be one number in the right dtype, on the device of the tensors");
  }
};

}  // namespace
}  // namespace sslkernels

// The arguments of sslkernels::ema_update_, checked for those who call the operator directly, on any device.
#pragma once
#include <deque>
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
    case ScalarType::ComplexFloat:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
    case ScalarType::ComplexHalf:
      return Dtype::kFloat16;
    case ScalarType::Double:
    case ScalarType::ComplexDouble:
      return Dtype::kFloat64;
    default:
      STD_TORCH_CHECK(false,
                      "ema_update_: tensors must be floating-point or complex, of a dtype that there is a kernel for");
  }
}

inline bool is_complex(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  return type == ScalarType::ComplexFloat || type == ScalarType::ComplexHalf || type == ScalarType::ComplexDouble;
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
      add(teacher[t], student[t], bf16_copy.empty() ? nullptr : &bf16_copy[t],
          seed ? static_cast<uint32_t>(keys[2 * t]) : 0, seed ? keys[2 * t + 1] : 0);
    }
  }

 private:
  void add(const Tensor& teacher, const Tensor& student, const Tensor* copy, uint32_t index, int64_t first) {
    const TensorView target = view_of(teacher, teacher), source = view_of(student, teacher);
    STD_TORCH_CHECK(is_complex(teacher) == is_complex(student) && target.same_shape(source),
                    "ema_update_: teacher and student must have one shape, and both or neither be complex");
    TensorView written{};
    if (copy) {
      written = view_of(*copy, teacher);
      STD_TORCH_CHECK(
          written.dtype == Dtype::kBFloat16 && target.dtype == Dtype::kFloat32 && written.same_shape(target),
          "ema_update_: bf16_copy must be bfloat16 in the shape of a float32 teacher");
    }
    STD_TORCH_CHECK(list.add(target, source, copy ? &written : nullptr, index, is_complex(teacher) ? 2 * first : first),
                    "ema_update_: no two elements of what is written may share memory, and all must have memory");
  }

  // A complex tensor as the real one whose last dimension holds the parts.
  TensorView view_of(const Tensor& x, const Tensor& beside) {
    STD_TORCH_CHECK(x.device() == beside.device(), "ema_update_: all tensors must be on one device");
    if (!is_complex(x)) return {x.mutable_data_ptr(), dtype_of(x), x.dim(), x.sizes().data(), x.strides().data()};
    std::vector<int64_t>& sizes = parts_.emplace_back(x.sizes().begin(), x.sizes().end());
    sizes.push_back(2);
    std::vector<int64_t>& strides = parts_.emplace_back();
    for (int64_t stride : x.strides()) strides.push_back(2 * stride);
    strides.push_back(1);
    return {x.mutable_data_ptr(), dtype_of(x), x.dim() + 1, sizes.data(), strides.data()};
  }

  static void check_number(const char* argument, const Tensor& x, ScalarType dtype, const Tensor& beside) {
    STD_TORCH_CHECK(x.numel() == 1 && x.scalar_type() == dtype && x.device() == beside.device(),
                    "ema_update_: ", argument, " must be one number in the right dtype, on the device of the tensors");
  }

  std::deque<std::vector<int64_t>> parts_;
};

}  // namespace
}  // namespace sslkernels

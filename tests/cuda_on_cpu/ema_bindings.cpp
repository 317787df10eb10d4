// The moving average's kernel on lists of CPU tensors of any layout, which In and Out do not take.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "cuda/ema.cuh"

namespace py = pybind11;
using namespace sslkernels;

namespace {

Dtype dtype_of(const py::handle& tensor) {
  const std::string name = py::str(tensor.attr("dtype"));
  if (name == "torch.float32") return Dtype::kFloat32;
  if (name == "torch.bfloat16") return Dtype::kBFloat16;
  if (name == "torch.float16") return Dtype::kFloat16;
  if (name == "torch.float64") return Dtype::kFloat64;
  throw py::type_error("ema_update: no kernel for " + name);
}

struct View {
  std::vector<int64_t> sizes, strides;
  TensorView view;

  explicit View(const py::handle& tensor)
      : sizes(tensor.attr("shape").cast<std::vector<int64_t>>()),
        strides(tensor.attr("stride")().cast<std::vector<int64_t>>()) {
    view = {reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>()), dtype_of(tensor),
            static_cast<int64_t>(sizes.size()), sizes.data(), strides.data()};
  }
};

void ema_update(const py::list& teacher, const py::list& student, double momentum,
                const std::optional<py::list>& copies, std::optional<float> found_inf, std::optional<uint64_t> seed,
                int64_t step, const std::vector<int64_t>& keys) {
  EmaList list(teacher.size());
  for (size_t t = 0; t < teacher.size(); t++) {
    const View target(teacher[t]), source(student[t]);
    std::optional<View> copy;
    if (copies) copy.emplace((*copies)[t]);
    if (!list.add(target.view, source.view, copy ? &copy->view : nullptr, static_cast<uint32_t>(keys[2 * t]),
                  keys[2 * t + 1]))
      throw py::value_error("ema_update: a teacher holds one element twice");
  }
  const ema::Options options{&momentum, found_inf ? &*found_inf : nullptr, seed ? &step : nullptr, seed.value_or(0)};
  for (const ema::Table& table : ema::tables_of(list.tensors))
    ema::launch(table, table.entries.data(), options, nullptr);
}

}  // namespace

void define_ema(py::module_& m) {
  m.def("ema_update", &ema_update, py::arg("teacher"), py::arg("student"), py::arg("momentum"), py::arg("bf16_copy"),
        py::arg("found_inf"), py::arg("seed"), py::arg("step"), py::arg("keys"));
}

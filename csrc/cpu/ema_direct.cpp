#include "ema_direct.h"

#include <pybind11/stl.h>

#include <optional>

#include "../dlpack.h"
#include "ema.h"
#include "isa.h"
#include "threads.h"

namespace py = pybind11;

namespace sslkernels {
namespace {

// What Python knows of torch.
struct Torch {
  PyTypeObject *tensor, *parameter;
  int (*read)(void*, dlpack::Tensor*) = nullptr;

  Torch(const py::handle& tensor_type, const py::handle& parameter_type)
      : tensor(reinterpret_cast<PyTypeObject*>(tensor_type.ptr())),
        parameter(reinterpret_cast<PyTypeObject*>(parameter_type.ptr())) {
    const py::object capsule = py::getattr(tensor_type, "__dlpack_c_exchange_api__", py::none());
    if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return;
    const auto* exchange = capsule.cast<py::capsule>().get_pointer<dlpack::Exchange>();
    if (exchange->major_version == dlpack::kMajorVersion) read = exchange->from_python;
  }

  // False for whatever is not a plain CPU tensor of a dtype that the kernels know.
  bool view(PyObject* object, TensorView& out) const {
    if (Py_TYPE(object) != tensor && Py_TYPE(object) != parameter) return false;
    dlpack::Tensor x;
    if (read(object, &x)) {
      PyErr_Clear();
      return false;
    }
    if (x.device_type != dlpack::kCpu || x.byte_offset || x.dtype.lanes != 1 || (x.dims && !x.strides)) return false;
    if (x.dtype.code == dlpack::kBfloat)
      out.dtype = Dtype::kBFloat16;
    else if (x.dtype.code == dlpack::kFloat && x.dtype.bits >= 16)
      out.dtype = x.dtype.bits == 16 ? Dtype::kFloat16 : x.dtype.bits == 32 ? Dtype::kFloat32 : Dtype::kFloat64;
    else
      return false;
    out.data = x.data;
    out.dims = x.dims;
    out.sizes = x.shape;
    out.strides = x.strides;
    return !negated(object, out);
  }

  // DLPack does not tell of the sign that a view such as z.conj().imag has yet to take. Only views have it.
  static bool negated(PyObject* object, const TensorView& view) {
    if (view.is_contiguous() && view.count() != 1) return false;
    return py::reinterpret_borrow<py::object>(object).attr("is_neg")().cast<bool>();
  }
};

bool add_all(const Torch& torch, const py::tuple& teacher, const py::tuple& student,
             const std::optional<py::tuple>& bf16_copy, EmaList& list) {
  if (student.size() != teacher.size() || (bf16_copy && bf16_copy->size() != teacher.size())) return false;
  for (size_t t = 0; t < teacher.size(); t++) {
    TensorView target, source, copy;
    PyObject* const objects[] = {PyTuple_GET_ITEM(teacher.ptr(), t), PyTuple_GET_ITEM(student.ptr(), t)};
    if (!torch.view(objects[0], target) || !torch.view(objects[1], source) || !target.same_shape(source)) return false;
    if (bf16_copy) {
      if (!torch.view(PyTuple_GET_ITEM(bf16_copy->ptr(), t), copy) || !copy.same_shape(target)) return false;
      if (copy.dtype != Dtype::kBFloat16 || target.dtype != Dtype::kFloat32) return false;
    }
    if (!list.add(target, source, bf16_copy ? &copy : nullptr, static_cast<uint32_t>(t), 0)) return false;
  }
  return true;
}

}  // namespace

void bind_ema(py::module_& m) {
  py::class_<Torch>(m, "EmaDirect",
                    "The moving average of lists of plain CPU tensors. Everything else is for the operator.")
      .def(py::init<py::handle, py::handle>(), py::arg("tensor_type"), py::arg("parameter_type"))
      .def_property_readonly("available", [](const Torch& torch) { return torch.read != nullptr; })
      .def(
          "update",
          [](const Torch& torch, const py::list& teachers, const py::list& students, double momentum,
             const std::optional<py::list>& copies, std::optional<uint64_t> seed, uint32_t step) {
            // tuples of our own keep the tensors alive, whatever becomes of the lists once others may run
            const py::tuple teacher(teachers), student(students);
            const auto bf16_copy = copies ? std::optional<py::tuple>(*copies) : std::nullopt;
            EmaList list(teacher.size());
            if (!add_all(torch, teacher, student, bf16_copy, list)) return false;
            const EmaJob job{1 - momentum, seed.has_value(), seed.value_or(0), step};
            if (job.weight == 0 && !bf16_copy) return true;
            py::gil_scoped_release release;
            run_ema(list.tensors, job, isa().ema(), torch::stable::get_num_threads(), TorchThreads{});
            return true;
          },
          py::arg("teacher"), py::arg("student"), py::arg("momentum"), py::arg("bf16_copy"), py::arg("seed"),
          py::arg("step"), "Returns False, having written nothing, where it declines.");
}

}  // namespace sslkernels

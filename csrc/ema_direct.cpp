#include "ema_direct.h"

#include <pybind11/stl.h>

#include <optional>

#include "cpu/ema.h"
#include "cpu/isa.h"
#include "cpu/threads.h"
#ifdef SSLKERNELS_HAVE_CUDA
#include "cuda/current_stream.h"
#include "cuda/ema.h"
#endif
#include "dlpack.h"

namespace py = pybind11;

namespace sslkernels {
namespace {

struct Device {
  int32_t type, id;
};

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

  // False for whatever is not a plain tensor.
  bool read_plain(PyObject* object, dlpack::Tensor& x) const {
    if (Py_TYPE(object) != tensor && Py_TYPE(object) != parameter) return false;
    if (!read(object, &x)) return true;
    PyErr_Clear();
    return false;
  }

  // False for whatever is not a plain tensor on the device, of a dtype that the kernels know.
  bool view(PyObject* object, const Device& device, TensorView& out) const {
    dlpack::Tensor x;
    if (!read_plain(object, x) || x.device_type != device.type || x.device_id != device.id) return false;
    if (x.byte_offset || x.dtype.lanes != 1 || (x.dims && !x.strides)) return false;
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

// Tuples of our own keep the tensors alive, whatever becomes of the lists once others may run.
struct Tensors {
  const py::tuple teacher, student;
  const std::optional<py::tuple> bf16_copy;

  Tensors(const py::list& teachers, const py::list& students, const std::optional<py::list>& copies)
      : teacher(teachers), student(students), bf16_copy(copies ? std::optional<py::tuple>(*copies) : std::nullopt) {}

  // False where one of them is not for the kernels.
  bool list(const Torch& torch, const Device& device, EmaList& list) const {
    if (student.size() != teacher.size() || (bf16_copy && bf16_copy->size() != teacher.size())) return false;
    for (size_t t = 0; t < teacher.size(); t++) {
      TensorView target, source, copy;
      if (!torch.view(PyTuple_GET_ITEM(teacher.ptr(), t), device, target) ||
          !torch.view(PyTuple_GET_ITEM(student.ptr(), t), device, source) || !target.same_shape(source))
        return false;
      if (bf16_copy) {
        if (!torch.view(PyTuple_GET_ITEM(bf16_copy->ptr(), t), device, copy) || !copy.same_shape(target)) return false;
        if (copy.dtype != Dtype::kBFloat16 || target.dtype != Dtype::kFloat32) return false;
      }
      if (!list.add(target, source, bf16_copy ? &copy : nullptr, static_cast<uint32_t>(t), 0)) return false;
    }
    return true;
  }
};

bool update_on_cpu(const Torch& torch, const py::list& teacher, const py::list& student, double momentum,
                   const std::optional<py::list>& bf16_copy, std::optional<uint64_t> seed, uint32_t step) {
  const Tensors tensors(teacher, student, bf16_copy);
  EmaList list(teacher.size());
  if (!tensors.list(torch, {dlpack::kCpu, 0}, list)) return false;
  const EmaJob job{1 - momentum, seed.has_value(), seed.value_or(0), step};
  if (job.weight == 0 && !bf16_copy) return true;
  py::gil_scoped_release release;
  run_ema(list.tensors, job, isa().ema(), torch::stable::get_num_threads(), TorchThreads{});
  return true;
}

#ifdef SSLKERNELS_HAVE_CUDA
// The memory of one number on the device, or null for None.
template <class T>
const T* number(const Torch& torch, const py::object& object) {
  dlpack::Tensor x{};
  if (!object.is_none() && !torch.read_plain(object.ptr(), x)) throw py::type_error("a number must be a plain tensor");
  return static_cast<const T*>(x.data);
}

// The numbers are tensors of one element on the device `id`, in fp64, fp32 and int64.
bool update_on_gpu(const Torch& torch, int32_t id, const py::list& teacher, const py::list& student,
                   const py::object& momentum, const py::object& found_inf, const std::optional<py::list>& bf16_copy,
                   std::optional<uint64_t> seed, const py::object& step) {
  if (!current_stream_lookup()) return false;
  const Tensors tensors(teacher, student, bf16_copy);
  EmaList list(teacher.size());
  if (!tensors.list(torch, {dlpack::kCuda, id}, list)) return false;
  const ema::Options options{number<double>(torch, momentum), number<float>(torch, found_inf),
                             seed ? number<int64_t>(torch, step) : nullptr, seed.value_or(0)};
  py::gil_scoped_release release;
  ema::update_on_gpu(list.tensors, options, id);
  return true;
}
#endif

}  // namespace

void bind_ema(py::module_& m) {
  py::class_<Torch>(m, "EmaDirect",
                    "The moving average of lists of plain tensors on one device. Everything else is for the operator. "
                    "Both return False, having written nothing, where they decline.")
      .def(py::init<py::handle, py::handle>(), py::arg("tensor_type"), py::arg("parameter_type"))
      .def_property_readonly("available", [](const Torch& torch) { return torch.read != nullptr; })
#ifdef SSLKERNELS_HAVE_CUDA
      .def("update_on_gpu", &update_on_gpu, py::arg("device"), py::arg("teacher"), py::arg("student"),
           py::arg("momentum"), py::arg("found_inf"), py::arg("bf16_copy"), py::arg("seed"), py::arg("step"))
#endif
      .def("update_on_cpu", &update_on_cpu, py::arg("teacher"), py::arg("student"), py::arg("momentum"),
           py::arg("bf16_copy"), py::arg("seed"), py::arg("step"));
}

}  // namespace sslkernels

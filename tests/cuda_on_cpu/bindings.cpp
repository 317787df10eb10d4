// The Python module that runs the kernels of csrc/cuda on CPU tensors. Adding one is including its header and adding a
// line to the module below, which calls the function that launches it:
//
//   m.def("add", [](In<float> x, Out<float> sum) { add(x, sum, sum.size, nullptr); });
//
// In<T> and Out<T> take a contiguous CPU tensor of that type, or None; numbers come as they are.
#include <pybind11/pybind11.h>

#include "cuda/platform.h"
#include "tensor.h"

namespace py = pybind11;
using namespace sslkernels;

// in files of their own, so that they are not compiled with every kernel
void define_examples(py::module_& m);
void define_ema(py::module_& m);
void define_contrast(py::module_& m);
void define_patch_mask(py::module_& m);
void define_mask_makers(py::module_& m);
void define_patch_loss(py::module_& m);

PYBIND11_MODULE(cuda_on_cpu_kernels, m) {
  m.attr("SCHEDULES") = cuda_on_cpu::kSchedules;
  m.def("set_schedule", &cuda_on_cpu::set_schedule);
  define_examples(m);
  define_ema(m);
  define_contrast(m);
  define_patch_mask(m);
  define_mask_makers(m);
  define_patch_loss(m);
}

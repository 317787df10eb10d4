// The extension module. Loading it runs every registration in csrc; what it exposes itself is about the host.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/ops.h>

#include <chrono>
#include <map>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/results.h"
#include "cpu/workspace.h"
#ifdef SSLKERNELS_HAVE_CUDA
#include "cuda/current_stream.h"
#endif
#include "ema_direct.h"

namespace py = pybind11;
using namespace sslkernels;

namespace {

std::map<std::string, std::string> build_info() {
  return {{"compiler", __VERSION__},
          {"torch_target_version",
           std::to_string(TORCH_TARGET_VERSION >> 56) + "." + std::to_string(TORCH_TARGET_VERSION >> 48 & 0xff)},
#ifdef SSLKERNELS_HAVE_CUDA
          {"cuda", "built"}};
#else
          {"cuda", "not built"}};
#endif
}

std::vector<std::string> names(bool supported_only) {
  std::vector<std::string> found;
  for (const Isa& isa : built_isas())
    if (!supported_only || isa.supported()) found.push_back(isa.name);
  return found;
}

void empty_cache() {
  result_memory().empty();
  Workspace::empty_cache();
}

// Units of work per second of all threads together; work(iterations) runs on each and returns what it did.
template <class Work>
double rate(int64_t iterations, const Work& work) {
  const int64_t threads = torch::stable::get_num_threads();
  std::vector<double> done(threads);
  const auto start = std::chrono::steady_clock::now();
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) done[i] = work(iterations);
  });
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  double total = 0;
  for (double part : done) total += part;
  return total / seconds.count();
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of sslkernels";
  m.def("build_info", &build_info);
  m.def("isa", [] { return std::string(isa().name); }, "The instruction set in use.");
  m.def("built_isas", [] { return names(false); });
  m.def("supported_isas", [] { return names(true); }, "Those built that this processor has.");
#ifdef SSLKERNELS_HAVE_CUDA
  m.def("finds_cuda_stream", [] { return current_stream_lookup() != nullptr; }, "Whether torch can launch on a GPU.");
#endif
  m.def("has_bf16", [] { return isa().nt_xent(true).bf16; }, "Whether it multiplies bfloat16 numbers itself.");
  m.def("threads", [] { return torch::stable::get_num_threads(); });
  m.def("empty_cache", &empty_cache, "Gives the memory kept between calls to the system.");
  m.def(
      "fma_peak",
      [](bool bf16, int64_t iterations) {
        return rate(iterations, [=](int64_t n) { return isa().peak().multiply_add(bf16, n); }) / 1e9;
      },
      py::arg("bf16"), py::arg("iterations") = 20000, py::call_guard<py::gil_scoped_release>(),
      "GFLOP/s of all threads in a multiply-add loop on registers and first-level cache.");
  m.def(
      "exp_rate", [](int64_t iterations) { return rate(iterations, [](int64_t n) { return isa().peak().exp(n); }); },
      py::arg("iterations") = 2000, py::call_guard<py::gil_scoped_release>(), "exp2 a second, all threads.");
  bind_ema(m);
}

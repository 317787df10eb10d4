// The kernels by which the harness itself is tested.
#include <pybind11/pybind11.h>

#include <array>

#include "example.cuh"
#include "primitives.cuh"
#include "tensor.h"

namespace py = pybind11;
using namespace sslkernels;
using example::Bug;

namespace {

void define_kernels(py::module_& m) {
  py::enum_<Bug>(m, "Bug")
      .value("NONE", Bug::kNone)
      .value("DIVERGENT_BARRIER", Bug::kDivergentBarrier)
      .value("TWO_BARRIERS", Bug::kTwoBarriers)
      .value("LEAVES_EARLY", Bug::kLeavesEarly)
      .value("MISSING_BARRIER", Bug::kMissingBarrier)
      .value("SHUFFLE_FOR_BARRIER", Bug::kShuffleForBarrier)
      .value("UNINITIALISED_SHARED", Bug::kUninitialisedShared)
      .value("BLOCK_BEFORE", Bug::kBlockBefore)
      .value("READS_OUT_OF_BOUNDS", Bug::kReadsOutOfBounds)
      .value("WRITES_OUT_OF_BOUNDS", Bug::kWritesOutOfBounds)
      .value("MISALIGNED", Bug::kMisaligned)
      .value("RACE_BETWEEN_BLOCKS", Bug::kRaceBetweenBlocks)
      .value("MISSING_WAIT", Bug::kMissingWait)
      .value("COPIES_TOO_EARLY", Bug::kCopiesTooEarly)
      .value("THROWS", Bug::kThrows);
  m.def("row_logsumexp",
        [](In<float> x, Out<float> logsumexp, Out<float> total, Out<int> positives, int threads, Bug bug) {
          const int rows = static_cast<int>(logsumexp.size), columns = static_cast<int>(x.size / logsumexp.size);
          example::row_logsumexp(x, logsumexp, total, positives, rows, columns, threads, nullptr, bug);
        });
  m.def("sum4",
        [](In<float> x, Out<float> out, Bug bug) { example::sum4(x, out, static_cast<int>(out.size), nullptr, bug); });
}

template <class T>
void define_16_bits(py::module_& m, void (*convert)(const float*, T*, float*, int)) {
  m.def("product", [](In<T> a, In<T> b, Out<float> c, int m, int n, int depth, Bug bug) {
    example::product<T>(a, b, c, m, n, depth, nullptr, bug);
  });
  m.def("mma_registers", [](In<T> a, In<T> b, Out<float> c) {
    SSLK_LAUNCH(primitives::mma_registers_kernel<T>, 1, 32, 0, nullptr, a, b, c);
  });
  m.def("convert", [convert](In<float> x, Out<T> narrow, Out<float> back) {
    const int n = static_cast<int>(x.size);
    SSLK_LAUNCH(convert, (n + 255) / 256, 256, 0, nullptr, x, narrow, back, n);
  });
}

void define_primitives(py::module_& m) {
  m.attr("SHUFFLES") = primitives::kShuffles;
  m.def("shuffle", [](Out<int> out) { SSLK_LAUNCH(primitives::shuffle_kernel, 1, 32, 0, nullptr, out); });
  m.def("order", [](Out<int> order, Out<int> next) {
    SSLK_LAUNCH(primitives::order_kernel, 3, static_cast<unsigned>(order.size / 3), 0, nullptr, order, next);
  });
  m.def("lock", [](Out<int> lock, Out<int> count, Out<int> spins) {
    SSLK_LAUNCH(primitives::lock_kernel, 2, 64, 0, nullptr, lock, count, spins);
  });
  m.def("index", [](Out<int> out, std::array<unsigned, 3> grid, std::array<unsigned, 3> block) {
    SSLK_LAUNCH(primitives::index_kernel, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), 0,
                nullptr, out);
  });
  m.def("misuse", [](Out<int> memory, int kind, int threads) {
    SSLK_LAUNCH(primitives::misuse_kernel, 1, threads, 0, nullptr, memory, kind);
  });
  m.def("large", [](Out<float> out, int elements, bool ask) {
    const int bytes = elements * static_cast<int>(sizeof(float));
    cudaFuncSetAttribute(primitives::large_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, ask ? bytes : 0);
    SSLK_LAUNCH(primitives::large_kernel, 1, 32, bytes, nullptr, out, elements);
  });
}

}  // namespace

void define_examples(py::module_& m) {
  define_kernels(m);
  define_16_bits<__nv_bfloat16>(m, primitives::bf16_kernel);
  define_16_bits<__half>(m, primitives::half_kernel);
  define_primitives(m);
}

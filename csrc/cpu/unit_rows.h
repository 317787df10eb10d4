// Rows divided by their lengths, the products of pairs of them, and the gradient of both. No torch, no instruction set:
// the loops are those of unit_rows_kernel.h, reached through UnitRowsKernel.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "../dtype.h"

namespace sslkernels {

// One matrix of the caller's, or none.
struct RowsToScale {
  const void* data;
  int64_t row_stride, column_stride;  // in elements
  Dtype dtype;
};

// Results are contiguous. Rows at unit length, similarities and their gradients are fp64 where is_double, else fp32.
struct UnitRowsJob {
  int64_t rows, dim;
  RowsToScale x, y;
  bool is_double;

  void *x_rows, *y_rows, *similarity;  // forward

  const void *grad_x_rows, *grad_y_rows, *grad_similarity;  // backward; null: 0
  void *grad_x, *grad_y;                                    // in the dtypes of x and y
};

// Either pass over the rows [begin, end), with room for kUnitRowsScratch * dim numbers.
struct UnitRowsKernel {
  void (*forward)(const UnitRowsJob&, int64_t begin, int64_t end, double* scratch);
  void (*backward)(const UnitRowsJob&, int64_t begin, int64_t end, double* scratch);
};
constexpr int64_t kUnitRowsScratch = 4;

// parallel(n, body): runs body(begin, end) over a partition of [0, n).
template <class Parallel>
void run_unit_rows(const UnitRowsJob& job, const UnitRowsKernel& kernel, bool backward, int64_t threads,
                   const Parallel& parallel) {
  constexpr int64_t kWorthAThread = int64_t{1} << 14;  // elements; to start one takes some microseconds
  const int64_t workers = std::clamp<int64_t>(job.rows * job.dim / kWorthAThread, 1, threads);
  parallel(workers, [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(kUnitRowsScratch * job.dim);
    (backward ? kernel.backward : kernel.forward)(job, job.rows * begin / workers, job.rows * end / workers,
                                                  scratch.data());
  });
}

}  // namespace sslkernels

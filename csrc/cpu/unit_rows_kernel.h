// The loops of unit_rows.h. Every row is read once, into fp64: what is rounded is the result alone. Compiled once per
// instruction set.
#pragma once
#include "logits.h"
#include "storage.h"
#include "unit_rows.h"

namespace sslkernels::SSLK_ISA {

SSLK_INLINE void read_row(const RowsToScale& in, int64_t row, int64_t dim, double* out) {
  with_any_storage(in.dtype, [&](auto type) __attribute__((always_inline)) {
    typedef decltype(type) S;
    const typename S::Storage* from = static_cast<const typename S::Storage*>(in.data) + row * in.row_stride;
    if (in.column_stride == 1)
      for (int64_t d = 0; d < dim; d++) out[d] = S::load(from[d]);
    else
      for (int64_t d = 0; d < dim; d++) out[d] = S::load(from[d * in.column_stride]);
  });
}

// Row `row` of a contiguous matrix := f(column).
template <class F>
SSLK_INLINE void write_row(void* matrix, Dtype dtype, int64_t row, int64_t dim, const F& f) {
  with_any_storage(dtype, [&](auto type) __attribute__((always_inline)) {
    typedef decltype(type) S;
    typename S::Storage* to = static_cast<typename S::Storage*>(matrix) + row * dim;
    for (int64_t d = 0; d < dim; d++) to[d] = S::store(f(d));
  });
}

SSLK_INLINE double dot(const double* a, const double* b, int64_t dim) {
  constexpr int kChains = 8;
  double sums[kChains] = {};
  int64_t d = 0;
  for (; d + kChains <= dim; d += kChains) SSLK_UNROLL for (int c = 0; c < kChains; c++) sums[c] += a[d + c] * b[d + c];
  for (; d < dim; d++) sums[d % kChains] += a[d] * b[d];
  return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}

// One row of a matrix, and what it is multiplied by to have unit length.
struct UnitRow {
  const double* values;
  double factor;
  bool clamped;  // so short that its length counts as a constant

  SSLK_INLINE UnitRow(const RowsToScale& in, int64_t row, int64_t dim, double* room) : values(room) {
    read_row(in, row, dim, room);
    const double length = __builtin_sqrt(dot(room, room, dim));
    clamped = length <= kNormalizeEps;  // not a NaN, which stays one
    factor = 1 / (clamped ? kNormalizeEps : length);
  }
  SSLK_INLINE double operator[](int64_t d) const { return values[d] * factor; }
};

SSLK_INLINE double similarity_of(const UnitRow& x, const UnitRow& y, int64_t dim) {
  return dot(x.values, y.values, dim) * x.factor * y.factor;
}

SSLK_INLINE Dtype result_dtype(const UnitRowsJob& job) { return job.is_double ? Dtype::kFloat64 : Dtype::kFloat32; }

inline void unit_rows_forward(const UnitRowsJob& job, int64_t begin, int64_t end, double* scratch) {
  const Dtype dtype = result_dtype(job);
  for (int64_t row = begin; row < end; row++) {
    const UnitRow x(job.x, row, job.dim, scratch);
    write_row(job.x_rows, dtype, row, job.dim, [&](int64_t d) { return x[d]; });
    if (!job.y.data) continue;
    const UnitRow y(job.y, row, job.dim, scratch + job.dim);
    write_row(job.y_rows, dtype, row, job.dim, [&](int64_t d) { return y[d]; });
    const double similarity = similarity_of(x, y, job.dim);
    write_row(job.similarity, dtype, row, 1, [&](int64_t) { return similarity; });
  }
}

// The gradient of a row of which the unit row has the gradient `grad`, or none, and pull * partner besides.
SSLK_INLINE void write_gradient(void* out, Dtype dtype, int64_t row, int64_t dim, const UnitRow& x, const double* grad,
                                double pull, const UnitRow* partner) {
  double radial = 0;
  if (!x.clamped) {
    if (grad) radial += dot(x.values, grad, dim) * x.factor;
    if (partner) radial += pull * similarity_of(x, *partner, dim);
  }
  write_row(out, dtype, row, dim, [&](int64_t d) {
    double total = grad ? grad[d] : 0;
    if (partner) total += pull * (*partner)[d];
    return (total - x[d] * radial) * x.factor;
  });
}

inline void unit_rows_backward(const UnitRowsJob& job, int64_t begin, int64_t end, double* scratch) {
  const Dtype dtype = result_dtype(job);
  const int64_t dim = job.dim;
  const auto gradient = [&](const void* of, int64_t row, double* room) -> const double* {
    if (!of) return nullptr;
    read_row({of, dim, 1, dtype}, row, dim, room);
    return room;
  };
  for (int64_t row = begin; row < end; row++) {
    const UnitRow x(job.x, row, dim, scratch);
    const double* grad = gradient(job.grad_x_rows, row, scratch + 2 * dim);
    if (!job.y.data) {
      write_gradient(job.grad_x, job.x.dtype, row, dim, x, grad, 0, nullptr);
      continue;
    }
    const UnitRow y(job.y, row, dim, scratch + dim);
    double pull = 0;
    if (job.grad_similarity) read_row({job.grad_similarity, 1, 1, dtype}, row, 1, &pull);
    write_gradient(job.grad_x, job.x.dtype, row, dim, x, grad, pull, job.grad_similarity ? &y : nullptr);
    grad = gradient(job.grad_y_rows, row, scratch + 3 * dim);
    write_gradient(job.grad_y, job.y.dtype, row, dim, y, grad, pull, job.grad_similarity ? &x : nullptr);
  }
}

UnitRowsKernel unit_rows_kernel() { return {unit_rows_forward, unit_rows_backward}; }

}  // namespace sslkernels::SSLK_ISA

// Rows at unit length in C++ against the definition in float64: every instruction set that runs here, odd sizes,
// strides, dtypes, missing gradients, several threads. Without torch, so that it runs under the sanitizers. Exit status
// 1 and a line per failure.
#include "cpu/unit_rows.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "std_threads.h"

using namespace sslkernels;

namespace {

int failures = 0;

void expect(double error, double bound, const std::string& what) {
  if (error <= bound) return;
  failures++;
  std::printf("FAILED %s: error %g, allowed %g\n", what.c_str(), error, bound);
}

// A matrix of float32, transposed or not, and its values; row 0 is zero.
struct Matrix {
  std::vector<double> values;
  std::vector<float> stored;
  RowsToScale view;

  Matrix(int64_t rows, int64_t dim, double phase, bool transposed) : values(rows * dim), stored(rows * dim) {
    for (int64_t i = 0; i < rows; i++)
      for (int64_t d = 0; d < dim; d++) {
        const float value = i == 0 && rows > 1 ? 0.f : static_cast<float>(std::sin(phase + 7 * i + d) * (i + 1));
        values[i * dim + d] = value;
        stored[transposed ? d * rows + i : i * dim + d] = value;
      }
    view = {stored.data(), transposed ? 1 : dim, transposed ? rows : 1, Dtype::kFloat32};
  }
};

struct Results {
  std::vector<float> x, y, similarity;
  Results(int64_t rows, int64_t dim) : x(rows * dim, NAN), y(rows * dim, NAN), similarity(rows, NAN) {}
};

double length_of(const double* row, int64_t dim) {
  double square = 0;
  for (int64_t d = 0; d < dim; d++) square += row[d] * row[d];
  return std::sqrt(square);
}

void check(const Isa& isa, int64_t rows, int64_t dim, bool transposed, bool paired, bool pulled, int64_t threads) {
  const std::string name = std::string(isa.name) + " " + std::to_string(rows) + " x " + std::to_string(dim) +
                           (transposed ? " transposed" : "") + (paired ? " paired" : "") + (pulled ? " pulled" : "");
  const Matrix x(rows, dim, 0.3, transposed), y(rows, dim, 1.1, false), grads(rows, dim, 2.7, false);
  std::vector<float> pull(rows);
  for (int64_t i = 0; i < rows; i++) pull[i] = static_cast<float>(std::cos(i));
  UnitRowsJob job{};
  job.rows = rows, job.dim = dim, job.x = x.view;
  if (paired) job.y = y.view;
  Results forward(rows, dim), backward(rows, dim);
  job.x_rows = forward.x.data(), job.y_rows = forward.y.data(), job.similarity = forward.similarity.data();
  run_unit_rows(job, isa.unit_rows(), false, threads, StdThreads{});
  job.grad_x_rows = grads.stored.data(), job.grad_similarity = pulled ? pull.data() : nullptr;
  job.grad_x = backward.x.data(), job.grad_y = backward.y.data();
  run_unit_rows(job, isa.unit_rows(), true, threads, StdThreads{});

  for (int64_t i = 0; i < rows; i++) {
    const double *a = &x.values[i * dim], *b = &y.values[i * dim], *g = &grads.values[i * dim];
    const double x_length = length_of(a, dim), y_length = length_of(b, dim);
    const double x_factor = 1 / std::fmax(x_length, 1e-12), y_factor = 1 / std::fmax(y_length, 1e-12);
    double along = 0, similarity = 0;
    for (int64_t d = 0; d < dim; d++) similarity += a[d] * x_factor * b[d] * y_factor;
    const double weight = paired && pulled ? pull[i] : 0;
    for (int64_t d = 0; d < dim; d++) along += a[d] * x_factor * (g[d] + weight * b[d] * y_factor);
    if (paired) expect(std::fabs(forward.similarity[i] - similarity), 1e-7, name + ", similarity");
    for (int64_t d = 0; d < dim; d++) {
      expect(std::fabs(forward.x[i * dim + d] - a[d] * x_factor), 1e-7, name + ", row");
      const double total = g[d] + weight * b[d] * y_factor;
      const double exact = (total - (x_length > 1e-12 ? a[d] * x_factor * along : 0)) * x_factor;
      expect(std::fabs(backward.x[i * dim + d] - exact), 1e-6 * (std::fabs(exact) + std::fabs(total) * x_factor + 1),
             name + ", gradient");
    }
    for (int64_t d = 0; paired && d < dim; d++) {
      expect(std::fabs(forward.y[i * dim + d] - b[d] * y_factor), 1e-7, name + ", other row");
      const double radial = y_length > 1e-12 ? weight * similarity * b[d] * y_factor : 0;
      const double exact = (weight * a[d] * x_factor - radial) * y_factor;
      expect(std::fabs(backward.y[i * dim + d] - exact), 1e-6 * (std::fabs(exact) + y_factor),
             name + ", other gradient");
    }
  }
}

}  // namespace

int main() {
  for (const Isa& isa : built_isas()) {
    if (!isa.supported()) continue;
    for (const int64_t rows : {0, 1, 5, 200})
      for (const int64_t dim : {1, 7, 8, 129})
        for (const bool transposed : {false, true}) {
          check(isa, rows, dim, transposed, false, false, 3);
          check(isa, rows, dim, transposed, true, true, 3);
          check(isa, rows, dim, transposed, true, false, 1);
        }
  }
  return failures != 0;
}

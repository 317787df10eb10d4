// The contrastive core's kernels, in the order in which the launcher runs them, on ragged sizes under every schedule,
// against plain loops. For the sanitizers: exit status 1 and a line per failure.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <vector>

#include "contrast_host.h"

using namespace sslkernels;
using contrast::Inputs;

namespace {

int failures = 0;

struct Problem {
  int64_t rows, columns, dim;
  std::vector<float> query, key;
  std::vector<int64_t> skip, query_ids, key_ids;
  float scale = 1.5f, bias = -0.5f;

  Problem(int64_t rows, int64_t columns, int64_t dim) : rows(rows), columns(columns), dim(dim) {
    for (int64_t i = 0; i < rows * dim; i++) query.push_back(std::sin(static_cast<float>(i)));
    for (int64_t i = 0; i < columns * dim; i++) key.push_back(std::cos(static_cast<float>(3 * i)));
    for (int64_t i = 0; i < rows; i++) {
      skip.push_back(i);
      skip.push_back(columns - 1);
      query_ids.push_back(i % 9);
    }
    for (int64_t j = 0; j < columns; j++) key_ids.push_back(j % 5);
  }

  Inputs inputs(Dtype matmul) const {
    Inputs in{};
    in.query = query.data();
    in.rows = rows;
    in.dim = dim;
    in.key = key.data();
    in.key_dtype = Dtype::kFloat32;
    in.scale = &scale;
    in.pairs = {columns, false, skip.data(), 2, query_ids.data(), key_ids.data()};
    in.matmul = matmul;
    in.chunk_bytes = 1;  // as many chunks as there can be
    return in;
  }

  bool special(int64_t i, int64_t j) const { return j == i || j == columns - 1 || query_ids[i] == key_ids[j]; }
  double logit(int64_t i, int64_t j) const {
    double sum = 0;
    for (int64_t d = 0; d < dim; d++) sum += static_cast<double>(query[i * dim + d]) * key[j * dim + d];
    return sum * scale;
  }
};

struct Check {
  const char* what;
  const Problem& problem;
  int schedule;
  void operator()(bool holds) const {
    if (holds) return;
    failures++;
    std::printf("FAILED %s of (%ld, %ld, %ld) under schedule %d\n", what, static_cast<long>(problem.rows),
                static_cast<long>(problem.columns), static_cast<long>(problem.dim), schedule);
  }
};

bool close(double actual, double expected, double tolerance) {
  return actual == expected || std::fabs(actual - expected) <= tolerance * (1 + std::fabs(expected));
}

struct Softmaxes {
  std::vector<double> rows, columns;  // log-sum-exps

  explicit Softmaxes(const Problem& p) : rows(p.rows), columns(p.columns) {
    for (int64_t i = 0; i < p.rows; i++)
      for (int64_t j = 0; j < p.columns; j++)
        if (!p.special(i, j)) {
          rows[i] += std::exp(p.logit(i, j));
          columns[j] += std::exp(p.logit(i, j));
        }
    for (double& x : rows) x = std::log(x);
    for (double& x : columns) x = std::log(x);
  }
};

void check_forward(const Problem& p, int schedule) {
  const Softmaxes exact(p);
  std::vector<double> rows(p.rows), columns(p.columns);
  std::vector<float> peaks(p.rows), column_peaks(p.columns), skipped(p.rows), attraction(p.rows * p.dim);
  CpuHost host;
  contrast::forward(host, p.inputs(Dtype::kFloat32),
                    {{rows.data(), peaks.data(), skipped.data()}, {columns.data(), column_peaks.data()}, nullptr});
  bool right = true;
  for (int64_t i = 0; i < p.rows; i++) right = right && close(rows[i], exact.rows[i], 1e-5);
  for (int64_t j = 0; j < p.columns; j++) right = right && close(columns[j], exact.columns[j], 1e-5);
  Check{"log-sum-exps", p, schedule}(right);
  const Dtype matmul = std::array{Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16}[schedule % 3];
  contrast::forward(host, p.inputs(matmul), {{rows.data(), nullptr, nullptr}, {}, attraction.data()});
  for (int64_t i = 0; i < p.rows; i++)
    for (int64_t d = 0; d < p.dim; d++) {
      double mean = 0;
      for (int64_t j = 0; j < p.columns; j++)
        if (!p.special(i, j)) mean += std::exp(p.logit(i, j) - exact.rows[i]) * p.key[j * p.dim + d];
      right = right && close(attraction[i * p.dim + d], mean, matmul == Dtype::kFloat32 ? 1e-5 : 5e-2);
    }
  Check{"attraction", p, schedule}(right);
}

// The gradient of the queries, and the sum of all gradients of logits times what they are multiplied with.
template <class Gradient>
void check_gradients(const char* what, const Problem& p, int schedule, const std::vector<float>& grad_query,
                     float grad_scale, const Gradient& gradient) {
  bool right = true;
  double of_scale = 0;
  for (int64_t i = 0; i < p.rows; i++)
    for (int64_t d = 0; d < p.dim; d++) {
      double sum = 0;
      for (int64_t j = 0; j < p.columns; j++) sum += gradient(i, j) * p.scale * p.key[j * p.dim + d];
      of_scale += sum * p.query[i * p.dim + d] / p.scale;
      right = right && close(grad_query[i * p.dim + d], sum, 1e-5);
    }
  Check{what, p, schedule}(right && close(grad_scale, of_scale, 1e-5));
}

void check_backward(const Problem& p, int schedule) {
  const Softmaxes exact(p);
  std::vector<double> grad_rows(p.rows, 0.5), grad_columns(p.columns, 0.25);
  std::vector<float> grad_query(p.rows * p.dim), grad_key(p.columns * p.dim);
  float grad_scale = 0, grad_bias = 0;
  CpuHost host;
  contrast::softmax_backward(host, p.inputs(Dtype::kFloat32), grad_rows.data(), grad_columns.data(), exact.rows.data(),
                             exact.columns.data(), {grad_query.data(), grad_key.data(), &grad_scale, nullptr});
  check_gradients("softmax gradients", p, schedule, grad_query, grad_scale, [&](int64_t i, int64_t j) {
    const double logit = p.logit(i, j);
    return p.special(i, j) ? 0 : 0.5 * std::exp(logit - exact.rows[i]) + 0.25 * std::exp(logit - exact.columns[j]);
  });

  std::vector<double> loss(p.rows);
  std::fill(grad_query.begin(), grad_query.end(), 0.f);
  std::fill(grad_key.begin(), grad_key.end(), 0.f);
  contrast::sigmoid_forward(host, p.inputs(Dtype::kFloat32), &p.bias, loss.data());
  contrast::sigmoid_backward(host, p.inputs(Dtype::kFloat32), &p.bias, grad_rows.data(),
                             {grad_query.data(), grad_key.data(), &grad_scale, &grad_bias});
  bool right = true;
  for (int64_t i = 0; i < p.rows; i++) {
    double sum = 0;
    for (int64_t j = 0; j < p.columns; j++)
      sum += std::log1p(std::exp((p.special(i, j) ? -1 : 1) * (p.logit(i, j) + p.bias)));
    right = right && close(loss[i], sum, 1e-5);
  }
  Check{"sigmoid loss", p, schedule}(right);
  check_gradients("sigmoid gradients", p, schedule, grad_query, grad_scale, [&](int64_t i, int64_t j) {
    const double y = p.special(i, j) ? 1 : -1;
    return -y * 0.5 / (1 + std::exp(y * (p.logit(i, j) + p.bias)));
  });
}

}  // namespace

int main() {
  for (int schedule = 0; schedule < cuda_on_cpu::kSchedules; schedule++) {
    cuda_on_cpu::set_schedule(schedule);
    for (const auto& [rows, columns, dim] : {std::array<int64_t, 3>{34, 41, 8}, {3, 530, 5}}) {
      const Problem problem(rows, columns, dim);
      check_forward(problem, schedule);
      check_backward(problem, schedule);
    }
  }
  std::printf("%d failed\n", failures);
  return failures != 0;
}

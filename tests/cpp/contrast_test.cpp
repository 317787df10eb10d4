// The contrastive core's C++ against the definition in float64: every instruction set that runs here, odd shapes,
// columns left out by index and by id, both softmaxes, the sigmoid loss, a queue, several threads. Without torch, so
// that it runs under the sanitizers. Exit status 1 and a line per failure.
#include "cpu/contrast.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "std_threads.h"

using namespace sslkernels;

namespace {

struct Problem {
  int64_t rows, keys, dim;
  double scale;
  bool unit = true, columns = false, attract = false, symmetric = false, skips = false, ids = false, sigmoid = false;
};

struct Result {
  std::vector<double> lse_rows, lse_columns, grad_query, grad_key, attraction;
  double grad_scale = 0, grad_bias = 0;
};

constexpr double kBias = -0.5;

std::vector<float> unit_rows(int64_t rows, int64_t dim, int seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(rows * dim);
  for (float& value : x) value = normal(engine);
  for (int64_t i = 0; i < rows; i++) {
    double square = 0;
    for (int64_t d = 0; d < dim; d++) square += x[i * dim + d] * x[i * dim + d];
    for (int64_t d = 0; d < dim; d++) x[i * dim + d] /= static_cast<float>(std::sqrt(square));
  }
  return x;
}

struct Inputs {
  std::vector<float> query, key;
  std::vector<int64_t> skip, query_ids, key_ids;
  std::vector<double> weights, column_weights;

  explicit Inputs(const Problem& p) : query(unit_rows(p.rows, p.dim, 1)), key(unit_rows(p.keys, p.dim, 2)) {
    for (int64_t i = 0; i < p.rows; i++) {
      skip.push_back(i % (p.keys + 2));  // some name columns that are not there
      skip.push_back(i % 3 ? -1 : i / 2 % p.keys);
      query_ids.push_back((i % 5) << 32 | 7);
      weights.push_back(0.25 + i % 3);
    }
    for (int64_t j = 0; j < p.keys; j++) {
      key_ids.push_back((j % 6) << 32 | 7);
      column_weights.push_back(0.5 + j % 2);
    }
  }
  bool left_out(const Problem& p, int64_t i, int64_t j) const {
    if (p.symmetric) return i == j;
    if (p.skips && (skip[2 * i] == j || skip[2 * i + 1] == j)) return true;
    return p.ids && query_ids[i] == key_ids[j];
  }
};

Result run(const Problem& p, const Inputs& in, const ContrastKernel& kernel, int64_t threads) {
  ContrastJob job{};
  const auto rows_of = [&](const std::vector<float>& x, int64_t count) {
    return Rows{{x.data(), nullptr}, {p.dim, 0}, {1, 0}, 1, count, p.dim, Dtype::kFloat32, false};
  };
  job.query.in = rows_of(in.query, p.rows);
  job.symmetric = p.symmetric;
  if (!p.symmetric) job.key.in = rows_of(in.key, p.keys);
  job.scale = p.scale, job.bias = p.sigmoid ? kBias : 0;
  job.bounded = p.unit && 2 * std::fabs(p.scale) <= kMaxBoundedSpan;
  job.columns = p.columns, job.attract = p.attract;
  if (p.skips) job.skip = in.skip.data(), job.skips = 2;
  if (p.ids) job.query.ids = in.query_ids.data(), job.key.ids = in.key_ids.data();
  Result r;
  r.lse_rows.assign(p.rows, NAN), r.lse_columns.assign(p.columns ? p.keys : 0, NAN);
  std::vector<float> attraction(p.attract ? p.rows * p.dim : 0, NAN), grad_query(p.rows * p.dim, NAN),
      grad_key(p.keys * p.dim, NAN);
  job.lse_rows = r.lse_rows.data(), job.lse_columns = r.lse_columns.data(), job.attraction = attraction.data();
  const StdThreads parallel;
  ContrastRunner runner(job, kernel, threads, parallel);
  if (p.sigmoid)
    runner.sigmoid_forward();
  else
    runner.forward();
  job.attract = false;
  job.query.gradient = in.weights.data(), job.query.logsumexp = p.sigmoid ? nullptr : r.lse_rows.data();
  if (p.columns) job.key.gradient = in.column_weights.data(), job.key.logsumexp = r.lse_columns.data();
  job.grad_query = grad_query.data(), job.grad_key = grad_key.data();
  ContrastRunner(job, kernel, threads, parallel).backward(p.sigmoid);
  r.grad_scale = job.grad_scale, r.grad_bias = p.sigmoid ? job.grad_bias : 0;
  r.grad_query.assign(grad_query.begin(), grad_query.end());
  if (!p.symmetric) r.grad_key.assign(grad_key.begin(), grad_key.end());
  r.attraction.assign(attraction.begin(), attraction.end());
  return r;
}

// G by the definition, and what follows from it.
Result define(const Problem& p, const Inputs& in) {
  const std::vector<float>& key = p.symmetric ? in.query : in.key;
  const int64_t keys = p.symmetric ? p.rows : p.keys;
  std::vector<double> s(p.rows * keys), g(p.rows * keys);
  Result r;
  r.lse_rows.assign(p.rows, 0), r.lse_columns.assign(p.columns ? keys : 0, 0);
  std::vector<double> row_sums(p.rows), column_sums(keys);
  for (int64_t i = 0; i < p.rows; i++)
    for (int64_t j = 0; j < keys; j++) {
      for (int64_t d = 0; d < p.dim; d++) s[i * keys + j] += double{in.query[i * p.dim + d]} * key[j * p.dim + d];
      const double l = p.scale * s[i * keys + j];
      const bool out = in.left_out(p, i, j);
      if (p.sigmoid) {
        const double x = out ? -(l + kBias) : l + kBias;
        r.lse_rows[i] += std::fmax(x, 0) + std::log1p(std::exp(-std::fabs(x)));
        g[i * keys + j] = in.weights[i] * (1 / (1 + std::exp(-(l + kBias))) - out);
        r.grad_bias += g[i * keys + j];
      } else if (!out) {
        row_sums[i] += std::exp(l), column_sums[j] += std::exp(l);
      }
    }
  if (!p.sigmoid) {
    for (int64_t i = 0; i < p.rows; i++) r.lse_rows[i] = std::log(row_sums[i]);
    for (int64_t j = 0; p.columns && j < keys; j++) r.lse_columns[j] = std::log(column_sums[j]);
  }
  r.grad_query.assign(p.rows * p.dim, 0), r.grad_key.assign(p.symmetric ? 0 : keys * p.dim, 0);
  r.attraction.assign(p.attract ? p.rows * p.dim : 0, 0);
  for (int64_t i = 0; i < p.rows; i++)
    for (int64_t j = 0; j < keys; j++) {
      double& weight = g[i * keys + j];
      if (!p.sigmoid && !in.left_out(p, i, j)) {
        const double e = std::exp(p.scale * s[i * keys + j]);
        weight = in.weights[i] * e / row_sums[i] + (p.columns ? in.column_weights[j] * e / column_sums[j] : 0);
        for (int64_t d = 0; p.attract && d < p.dim; d++)
          r.attraction[i * p.dim + d] += e / row_sums[i] * key[j * p.dim + d];
      }
      r.grad_scale += weight * s[i * keys + j];
      for (int64_t d = 0; d < p.dim; d++) {
        r.grad_query[i * p.dim + d] += p.scale * weight * key[j * p.dim + d];
        (p.symmetric ? r.grad_query : r.grad_key)[j * p.dim + d] += p.scale * weight * in.query[i * p.dim + d];
      }
    }
  return r;
}

int failures = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  failures++;
  std::printf("FAILED %s\n", what.c_str());
}

double error(const std::vector<double>& actual, const std::vector<double>& exact) {
  if (actual.size() != exact.size()) return INFINITY;
  double worst = 0, largest = 1e-3;
  for (size_t i = 0; i < exact.size(); i++) {
    if (actual[i] == exact[i]) continue;  // infinities
    const double difference = std::fabs(actual[i] - exact[i]);
    worst = difference <= worst ? worst : difference;  // a NaN is kept
    largest = std::fmax(largest, std::fabs(exact[i]));
  }
  return worst / largest;
}

bool same(const std::vector<double>& a, const std::vector<double>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0);
}

void check(const Problem& p, const Isa& isa, bool bf16) {
  const Inputs in(p);
  const ContrastKernel kernel = isa.contrast(bf16);
  const Result one = run(p, in, kernel, 1), four = run(p, in, kernel, 4), exact = define(p, in);
  const std::string name = std::string(isa.name) + (bf16 ? " bf16 " : " fp32 ") + std::to_string(p.rows) + " x " +
                           std::to_string(p.keys) + " x " + std::to_string(p.dim) + " scale " + std::to_string(p.scale);
  const double tolerance = (kernel.bf16 ? 3e-2 : 5e-6) * std::fmax(1, 0.1 * std::fabs(p.scale));
  expect(error(four.lse_rows, exact.lse_rows) < tolerance, name + " rows");
  expect(error(four.lse_columns, exact.lse_columns) < tolerance, name + " columns");
  expect(error(four.attraction, exact.attraction) < tolerance, name + " attraction");
  expect(error(four.grad_query, exact.grad_query) < tolerance, name + " gradient of the query");
  expect(error(four.grad_key, exact.grad_key) < tolerance, name + " gradient of the key");
  expect(error({four.grad_scale, four.grad_bias}, {exact.grad_scale, exact.grad_bias}) < 10 * tolerance,
         name + " gradient of scale and bias");
  expect(same(one.lse_rows, four.lse_rows) && same(one.lse_columns, four.lse_columns) &&
             same(one.grad_query, four.grad_query) && same(one.grad_key, four.grad_key) &&
             same(one.attraction, four.attraction) && one.grad_scale == four.grad_scale,
         name + " depends on the number of threads");
}

}  // namespace

int main() {
  //                              unit  columns attract symmetric skips ids sigmoid
  const Problem problems[] = {
      {1, 1, 3, 2.0},
      {5, 70, 33, 3.0, true, true},
      {70, 5, 20, -3.0, false, true, false, false, true},
      {66, 130, 17, 60.0, true, true, false, false, true, true},
      {40, 300, 24, 5.0, true, false, true, false, true},
      {40, 300, 24, 90.0, false, false, true, false, false, true},
      {130, 700, 140, 8.0, true, false, true},
      {90, 90, 12, 6.0, true, false, false, true},
      {33, 33, 40, 50.0, false, false, false, true},
      {45, 77, 9, 4.0, false, false, false, false, true, true, true},
      {130, 20, 30, 10.0, false, false, false, false, true, false, true},
  };
  for (const Isa& isa : built_isas()) {
    if (!isa.supported()) continue;
    for (const Problem& p : problems) check(p, isa, false);
    for (const Problem& p : problems)
      if (isa.contrast(true).bf16) check(p, isa, true);
  }
  std::printf("%d failed\n", failures);
  return failures != 0;
}

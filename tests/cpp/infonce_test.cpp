// NT-Xent's C++ against the definition in float64: every instruction set that runs here, odd shapes, strides, several
// threads, two calls at once. Without torch, so that it runs under the sanitizers. Exit status 1 and a line per
// failure.
#include "cpu/infonce.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/isa.h"
#include "std_threads.h"

using namespace sslkernels;

namespace {

struct Problem {
  int64_t pairs, dim;
  double temperature;
  bool normalize = true, top1 = false, strided = false;
  int zero_every = 0;
};

struct Result {
  std::vector<float> loss, grad[2];
  std::vector<double> logsumexp;
  std::vector<char> hit;
  double grad_temperature = 0;
};

std::vector<float> random_view(const Problem& p, int seed) {
  std::mt19937 shared(1), own(seed);
  std::normal_distribution<float> point, noise;
  std::vector<float> x(p.pairs * p.dim);
  for (int64_t i = 0; i < p.pairs * p.dim; i++) {
    x[i] = point(shared) + 2 * noise(own);
    if (p.zero_every && i / p.dim % p.zero_every == 0) x[i] = 0;
  }
  return x;
}

Result run(const Problem& p, const std::vector<float> (&views)[2], const NtXentKernel& kernel, int64_t threads) {
  NtXentJob job{};
  job.in.views = 2, job.in.count = 2 * p.pairs, job.in.dim = p.dim, job.in.normalize = p.normalize;
  job.temperature = p.temperature;
  job.in.dtype = Dtype::kFloat32;
  const bool can_bound = p.normalize && 2 / std::fabs(p.temperature) <= 80;
  job.top1 = p.top1, job.bounded = can_bound && !p.top1;
  const int64_t step = p.strided ? 3 : 1;
  std::vector<float> stored[2];
  Result r;
  for (int v = 0; v < 2; v++) {
    stored[v].assign(p.pairs * p.dim * step, NAN);
    for (int64_t i = 0; i < p.pairs * p.dim; i++) stored[v][i * step] = views[v][i];
    job.in.view[v] = stored[v].data(), job.in.row_stride[v] = p.dim * step, job.in.column_stride[v] = step;
    r.grad[v].assign(p.pairs * p.dim, NAN);
    job.grad_view[v] = r.grad[v].data();
  }
  r.loss.assign(2 * p.pairs, NAN), r.logsumexp.assign(2 * p.pairs, NAN), r.hit.assign(2 * p.pairs, 2);
  std::vector<float> positive(2 * p.pairs), weights(2 * p.pairs);
  for (int64_t i = 0; i < 2 * p.pairs; i++) weights[i] = 0.25f + i % 3;
  job.loss = r.loss.data(), job.logsumexp = r.logsumexp.data(), job.positive = positive.data();
  job.hit = reinterpret_cast<bool*>(r.hit.data());
  const StdThreads parallel;
  NtXentRunner(job, kernel, threads, parallel).forward();
  job.bounded = can_bound, job.top1 = false;
  job.grad_loss = weights.data(), job.saved_loss = r.loss.data(), job.saved_logsumexp = r.logsumexp.data();
  NtXentRunner(job, kernel, threads, parallel).backward();
  r.grad_temperature = job.grad_temperature;
  return r;
}

struct Exact {
  std::vector<double> loss, grad[2];
  double grad_temperature = 0;
};

// The definition, in the order of the public op.
Exact define(const Problem& p, const std::vector<float> (&views)[2]) {
  const int64_t n = 2 * p.pairs, dim = p.dim;
  std::vector<double> z(n * dim), scale(n, 1), g(n * dim), logits(n * n), lse(n);
  for (int64_t i = 0; i < n; i++) {
    double square = 0;
    for (int64_t d = 0; d < dim; d++) {
      z[i * dim + d] = views[i / p.pairs][i % p.pairs * dim + d];
      square += z[i * dim + d] * z[i * dim + d];
    }
    if (p.normalize) scale[i] = 1 / std::fmax(std::sqrt(square), kNormalizeEps);
    for (int64_t d = 0; d < dim; d++) z[i * dim + d] *= scale[i];
  }
  Exact e;
  e.loss.resize(n);
  for (int64_t i = 0; i < n; i++) {
    double top = -INFINITY, sum = 0;
    for (int64_t j = 0; j < n; j++) {
      double s = 0;
      for (int64_t d = 0; d < dim; d++) s += z[i * dim + d] * z[j * dim + d];
      logits[i * n + j] = s / p.temperature;
      if (j != i) top = std::fmax(top, logits[i * n + j]);
    }
    for (int64_t j = 0; j < n; j++)
      if (j != i) sum += std::exp(logits[i * n + j] - top);
    lse[i] = top + std::log(sum);
    e.loss[i] = lse[i] - logits[i * n + (i + p.pairs) % n];
  }
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < n; j++) {
      if (i == j) continue;
      const double weight = 0.25 + i % 3, positive = (i + p.pairs) % n == j;
      const double gradient = weight * (std::exp(logits[i * n + j] - lse[i]) - positive);
      e.grad_temperature -= gradient * logits[i * n + j] / p.temperature;
      for (int64_t d = 0; d < dim; d++) {
        g[i * dim + d] += gradient / p.temperature * z[j * dim + d];
        g[j * dim + d] += gradient / p.temperature * z[i * dim + d];
      }
    }
  for (int v = 0; v < 2; v++) e.grad[v].resize(p.pairs * dim);
  for (int64_t i = 0; i < n; i++) {
    double along = 0;
    for (int64_t d = 0; d < dim; d++) along += g[i * dim + d] * z[i * dim + d];
    if (!p.normalize || scale[i] >= 1 / kNormalizeEps) along = 0;
    for (int64_t d = 0; d < dim; d++)
      e.grad[i / p.pairs][i % p.pairs * dim + d] = scale[i] * (g[i * dim + d] - along * z[i * dim + d]);
  }
  return e;
}

int failures = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  failures++;
  std::printf("FAILED %s\n", what.c_str());
}

// Largest error against the largest exact value. With one column the gradient through the normalisation is 0: the
// floor.
template <class A, class B>
double error(const A& actual, const B& exact) {
  double worst = 0, largest = 1e-3;
  for (size_t i = 0; i < exact.size(); i++) {
    const double difference = std::fabs(actual[i] - exact[i]);
    worst = difference <= worst ? worst : difference;  // a NaN is kept
    largest = std::fmax(largest, std::fabs(exact[i]));
  }
  return worst / largest;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void check(const Problem& p, const Isa& isa, bool bf16) {
  const std::vector<float> views[2] = {random_view(p, 2), random_view(p, 3)};
  const NtXentKernel kernel = isa.nt_xent(bf16);
  const Result one = run(p, views, kernel, 1), four = run(p, views, kernel, 4);
  const Exact exact = define(p, views);
  const std::string name = std::string(isa.name) + (bf16 ? " bf16 " : " fp32 ") + std::to_string(2 * p.pairs) + " x " +
                           std::to_string(p.dim) + " tau " + std::to_string(p.temperature);
  const double tolerance = (kernel.bf16 ? 3e-2 : 5e-6) * std::fmax(1, 0.1 / std::fabs(p.temperature));
  expect(error(four.loss, exact.loss) < tolerance, name + " loss");
  for (int v = 0; v < 2; v++) expect(error(four.grad[v], exact.grad[v]) < tolerance, name + " gradient");
  const std::vector<double> ours = {four.grad_temperature}, theirs = {exact.grad_temperature};
  expect(error(ours, theirs) < 10 * tolerance, name + " gradient of the temperature");
  expect(same(one.loss, four.loss) && same(one.grad[0], four.grad[0]) && same(one.grad[1], four.grad[1]) &&
             one.grad_temperature == four.grad_temperature,
         name + " depends on the number of threads");
}

}  // namespace

int main() {
  const Problem problems[] = {
      {1, 4, 0.5},
      {3, 1, 0.5},
      {17, 3, 0.5},
      {33, 100, 0.1},
      {65, 33, 0.1, true, true},
      {70, 40, 0.01},
      {70, 20, -1.0},
      {129, 16, 4.0, false},
      {40, 24, 0.5, true, false, true},
      {80, 8, 0.2, true, false, false, 4},
      {20, 600, 0.1},
      {520, 12, 0.1},
  };
  for (const Isa& isa : built_isas()) {
    if (!isa.supported()) continue;
    for (const Problem& p : problems) check(p, isa, false);
    for (const Problem& p : problems)
      if (isa.nt_xent(true).bf16) check(p, isa, true);
  }
  const Problem both[] = {{150, 30, 0.1}, {40, 30, 0.1}};  // at once: each call has a workspace of its own
  std::thread other([&] { check(both[0], isa(), false); });
  for (int i = 0; i < 3; i++) check(both[1], isa(), false);
  other.join();
  std::printf("%d failed\n", failures);
  return failures != 0;
}

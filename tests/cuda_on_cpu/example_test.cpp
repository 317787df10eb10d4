// The example kernels and the primitives under every schedule, for the sanitizers. With the name of a bug (see Bug in
// example.cuh) and a schedule: that bug alone, for the tests to see it found. Exit status 1 and a line per failure.
#include "example.cuh"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "primitives.cuh"

using namespace sslkernels;
using example::Bug;

namespace {

int failures = 0, schedule = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  failures++;
  std::printf("FAILED %s under schedule %d\n", what.c_str(), schedule);
}

std::vector<float> random_values(size_t n) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> x(n);
  for (float& value : x) value = normal(random);
  return x;
}

void check_row_logsumexp(Bug bug, int rows, int columns, int threads) {
  const std::vector<float> x = random_values(static_cast<size_t>(rows) * columns);
  std::vector<float> actual(rows, NAN);
  float total = 0;
  int positives = 0, exact_positives = 0;
  example::row_logsumexp(x.data(), actual.data(), &total, &positives, rows, columns, threads, nullptr, bug);
  double exact_total = 0;
  for (int i = 0; i < rows; i++) {
    double sum = 0;
    for (int j = 0; j < columns; j++) {
      sum += std::exp(static_cast<double>(x[i * columns + j]));
      exact_positives += x[i * columns + j] > 0;
    }
    expect(std::fabs(actual[i] - std::log(sum)) < 1e-5, "log-sum-exp of row " + std::to_string(i));
    exact_total += std::log(sum);
  }
  expect(std::fabs(total - exact_total) < 1e-4 * rows, "total");
  expect(positives == exact_positives, "number of positives");
}

template <class T>
void check_product(Bug bug, int m, int n, int depth) {
  const std::vector<float> x = random_values(static_cast<size_t>(m + n) * depth);
  std::vector<T> a(x.begin(), x.begin() + m * depth), b(x.begin() + m * depth, x.end());
  std::vector<float> c(m * n, NAN);
  example::product<T>(a.data(), b.data(), c.data(), m, n, depth, nullptr, bug);
  for (int i = 0; i < m; i++)
    for (int j = 0; j < n; j++) {
      double exact = 0;
      for (int k = 0; k < depth; k++) exact += double{a[i * depth + k]} * b[j * depth + k];
      expect(std::fabs(c[i * n + j] - exact) < 1e-4, "product at " + std::to_string(i) + ", " + std::to_string(j));
    }
}

void check_sum4(Bug bug, int n) {
  const std::vector<float> x = random_values(4 * n + 4);
  std::vector<float> out(n, NAN);
  example::sum4(x.data(), out.data(), n, nullptr, bug);
  for (int i = 0; i < n; i++)
    expect(std::fabs(out[i] - (x[4 * i] + x[4 * i + 1] + x[4 * i + 2] + x[4 * i + 3])) < 1e-5, "sum of four");
}

void check_primitives() {
  int lock = 0, count = 0, spins = 0;
  SSLK_LAUNCH(primitives::lock_kernel, 3, 64, 0, nullptr, &lock, &count, &spins);
  expect(count == 3 * 64, "count behind a lock");

  std::vector<float> parts(5);
  unsigned arrived = 0;
  float total = 0;
  SSLK_LAUNCH(primitives::last_block_kernel, 5, 64, 0, nullptr, parts.data(), &arrived, &total);
  expect(total == 15, "sum by the last block");

  int integers[3] = {0, 0, 0};
  unsigned word = 0;
  unsigned long long large = 0;
  float sum = 0;
  SSLK_LAUNCH(primitives::atomic_kernel, 2, 96, 0, nullptr, integers, &word, &large, &sum);
  expect(integers[0] == 191 * 96 && integers[1] == 70 && integers[2] == -191, "atomics on integers");
  expect(word == 2 && large == 192ull << 33 && sum == 96, "atomics on other types");

  std::vector<int> shuffled(primitives::kShuffles * 32);
  SSLK_LAUNCH(primitives::shuffle_kernel, 1, 32, 0, nullptr, shuffled.data());
  expect(shuffled[8 * 32 + 1] == 0 && shuffled[8 * 32 + 17] == 19, "shuffles of half warps");

  std::vector<unsigned> votes(7);
  SSLK_LAUNCH(primitives::vote_kernel, 1, 96, 0, nullptr, votes.data());
  expect(votes[0] == 0xaaaaaaaau && votes[4] == 32, "votes");
}

void check_intrinsics() {
  expect(__umulhi(0xd2511f53u, 0x12345678u) == 0xef4b3b8u, "__umulhi");
  expect(__mulhi(-1, 1) == -1 && __umul64hi(1ull << 63, 6) == 3, "__mulhi, __umul64hi");
  expect(__popc(0xf0f0u) == 8 && __clz(1) == 31 && __clz(0) == 32 && __ffs(8) == 4 && __brev(1) == 1u << 31, "bits");
  expect(__float_as_uint(1.f) == 0x3f800000u && __uint_as_float(0x40000000u) == 2, "bits of a float");
  expect(rsqrtf(4.f) == 0.5f && __fdividef(3.f, 2.f) == 1.5f && __expf(0.f) == 1 && __logf(1.f) == 0, "arithmetic");
  expect(__fmaf_rn(1 + 0x1p-12f, 1 - 0x1p-12f, -1.f) == -0x1p-24f, "__fmaf_rn rounds once");
  expect(min(NAN, 1.f) == 1 && max(1.f, NAN) == 1 && min(2, -3) == -3 && max(2u, 3u) == 3, "min and max");
  const float4 v = make_float4(1, 2, 3, 4);
  expect(__ldg(&v).w == 4 && sizeof(v) == 16 && alignof(uint4) == 16 && alignof(float2) == 8, "vectors");
}

void check(Bug bug) {
  check_row_logsumexp(bug, 5, 100, 128);
  check_row_logsumexp(bug, 3, 77, 32);
  check_product<__nv_bfloat16>(bug, 32, 16, 48);
  check_product<__half>(bug, 16, 8, 64);
  check_sum4(bug, 100);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 3) {
    schedule = std::atoi(argv[2]);
    cuda_on_cpu::set_schedule(schedule);
    check(static_cast<Bug>(std::atoi(argv[1])));
  } else {
    for (schedule = 0; schedule < cuda_on_cpu::kSchedules; schedule++) {
      cuda_on_cpu::set_schedule(schedule);
      check(Bug::kNone);
      check_primitives();
      check_intrinsics();
    }
    try {  // what an error leaves behind must not disturb the next launch
      check_row_logsumexp(Bug::kDivergentBarrier, 2, 100, 128);
      expect(false, "a divergent barrier");
    } catch (const std::runtime_error&) {
      check(Bug::kNone);
    }
  }
  std::printf("%d failed\n", failures);
  return failures != 0;
}

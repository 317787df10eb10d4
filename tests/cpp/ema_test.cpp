// The moving average's C++ on every instruction set that runs here: odd sizes, many tensors, several threads, strides.
// Without torch, so that it runs under the sanitizers. Exit status 1 and a line per failure.
#include "cpu/ema.h"

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

void expect(bool holds, const std::string& what) {
  if (holds) return;
  failures++;
  std::printf("FAILED %s\n", what.c_str());
}

// Tensors of these sizes with a step between their elements, all at once.
struct Memory {
  std::vector<std::vector<float>> teacher, student;
  std::vector<std::vector<uint16_t>> narrow;
  std::vector<int64_t> sizes, strides;

  Memory(const std::vector<int64_t>& counts, int64_t step) : sizes(counts), strides(counts.size(), step) {
    for (int64_t count : counts) {
      teacher.emplace_back(count * step), student.emplace_back(count * step), narrow.emplace_back(count * step, 0x3f80);
      for (int64_t i = 0; i < count * step; i++) {
        teacher.back()[i] = std::sin(static_cast<float>(i));
        student.back()[i] = std::cos(static_cast<float>(3 * i));
      }
    }
  }
  TensorView view(size_t t, void* data, Dtype dtype) const { return {data, dtype, 1, &sizes[t], &strides[t]}; }

  void update(const Isa& isa, int64_t threads, bool stochastic) {
    EmaList list(2 * sizes.size());
    for (size_t t = 0; t < sizes.size(); t++) {
      const TensorView source = view(t, student[t].data(), Dtype::kFloat32);
      list.add(view(t, teacher[t].data(), Dtype::kFloat32), source, nullptr, static_cast<uint32_t>(t), 0);
      list.add(view(t, narrow[t].data(), Dtype::kBFloat16), source, nullptr, static_cast<uint32_t>(t), 5);
    }
    run_ema(list.tensors, EmaJob{0.25, stochastic, 99, 7}, isa.ema(), threads, StdThreads{});
  }
};

void check(const Isa& isa, const std::vector<int64_t>& counts, int64_t step, bool stochastic) {
  const std::string name = std::string(isa.name) + " " + std::to_string(counts.size()) + " tensors of " +
                           std::to_string(counts[0]) + " by " + std::to_string(step) +
                           (stochastic ? " stochastic" : "");
  const Memory before(counts, step);
  Memory one(counts, step), four(counts, step);
  one.update(isa, 1, stochastic);
  four.update(isa, 4, stochastic);
  bool right = true, untouched = true;
  for (size_t t = 0; t < counts.size(); t++)
    for (size_t i = 0; i < four.teacher[t].size(); i++) {
      const float start = before.teacher[t][i], expected = std::fma(0.25f, before.student[t][i] - start, start);
      if (i % step)
        untouched = untouched && four.teacher[t][i] == start && four.narrow[t][i] == 0x3f80;
      else
        right = right && four.teacher[t][i] == expected;
    }
  expect(right, name);
  expect(untouched, name + " writes between the elements");
  expect(one.teacher == four.teacher && one.narrow == four.narrow, name + " depends on the number of threads");
}

}  // namespace

int main() {
  for (const Isa& isa : built_isas()) {
    if (!isa.supported()) continue;
    for (bool stochastic : {false, true}) {
      check(isa, {1}, 1, stochastic);
      check(isa, {3 * kEmaChunk + 77, 5, kEmaChunk}, 1, stochastic);
      check(isa, std::vector<int64_t>(2000, 64), 1, stochastic);
      check(isa, {20000, 3}, 3, stochastic);
    }
  }
  std::printf("%d failed\n", failures);
  return failures != 0;
}

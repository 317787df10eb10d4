// The moving average's kernel on ragged, strided and misaligned tensors under every schedule, against plain loops. For
// the sanitizers: exit status 1 and a line per failure.
#include "cuda/ema.cuh"

#include <cmath>
#include <cstdio>
#include <vector>

using namespace sslkernels;

namespace {

int failures = 0;

void expect(bool holds, const char* what, int schedule, int64_t count) {
  if (holds) return;
  failures++;
  std::printf("FAILED %s of %ld elements under schedule %d\n", what, static_cast<long>(count), schedule);
}

struct Fp32Pair {
  std::vector<float> teacher, student;
  std::vector<uint16_t> copy;

  explicit Fp32Pair(int64_t count) : teacher(count), student(count), copy(count) {
    for (int64_t i = 0; i < count; i++) {
      teacher[i] = std::sin(static_cast<float>(i));
      student[i] = std::cos(static_cast<float>(3 * i));
    }
  }
};

void run(const EmaList& list, int schedule, bool stochastic) {
  cuda_on_cpu::set_schedule(schedule);
  const double momentum = 0.75;
  const int64_t step = 9;
  const float found_inf = 0;
  const ema::Options options{&momentum, &found_inf, stochastic ? &step : nullptr, 12345};
  for (const ema::Table& table : ema::tables_of(list.tensors))
    ema::launch(table, table.entries.data(), options, nullptr);
}

// Whole vectors with a tail, in fp32 with a copy; `offset` elements past an aligned address.
void check_dense(int schedule, int64_t count, int64_t offset) {
  Fp32Pair memory(count + offset);
  const Fp32Pair before = memory;
  const int64_t sizes[] = {count}, strides[] = {1};
  const TensorView teacher{memory.teacher.data() + offset, Dtype::kFloat32, 1, sizes, strides};
  const TensorView student{memory.student.data() + offset, Dtype::kFloat32, 1, sizes, strides};
  const TensorView copy{memory.copy.data() + offset, Dtype::kBFloat16, 1, sizes, strides};
  EmaList list(1);
  list.add(teacher, student, &copy, 0, 0);
  run(list, schedule, false);
  bool right = true;
  for (int64_t i = offset; i < count + offset; i++) {
    const float expected = std::fma(0.25f, before.student[i] - before.teacher[i], before.teacher[i]);
    right = right && memory.teacher[i] == expected && memory.copy[i] == Bf16::store(expected);
  }
  for (int64_t i = 0; i < offset; i++) right = right && memory.teacher[i] == before.teacher[i];
  expect(right, "dense", schedule, count);
}

// A bf16 teacher behind strides, or dense with channels last, rounded stochastically: every element to a neighbour.
void check_stochastic(int schedule, int64_t rows, int64_t columns, int64_t step) {
  std::vector<uint16_t> teacher(rows * columns * step, 0x3f80);  // 1
  const std::vector<float> student(rows * columns * step, 1.02f);
  const int64_t sizes[] = {rows, columns}, strides[] = {step, rows * step};
  EmaList list(1);
  list.add({teacher.data(), Dtype::kBFloat16, 2, sizes, strides},
           {const_cast<float*>(student.data()), Dtype::kFloat32, 2, sizes, strides}, nullptr, 3, 5);
  run(list, schedule, true);
  bool right = true, up = false;
  for (size_t i = 0; i < teacher.size(); i++) {
    right = right && (teacher[i] == 0x3f80 || (teacher[i] == 0x3f81 && i % step == 0));
    up = up || teacher[i] == 0x3f81;
  }
  expect(right && up, "stochastic", schedule, rows * columns);
}

}  // namespace

int main() {
  for (int schedule = 0; schedule < cuda_on_cpu::kSchedules; schedule++) {
    for (int64_t count : {1, 7, 8, 2049, 4097}) check_dense(schedule, count, 0);
    check_dense(schedule, 100, 3);
    check_stochastic(schedule, 9, 40, 1);
    check_stochastic(schedule, 9, 40, 3);
  }
  std::printf("%d failed\n", failures);
  return failures != 0;
}

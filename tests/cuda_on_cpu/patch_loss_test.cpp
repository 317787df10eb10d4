// The masked patch loss's kernels on dense, odd and large patches under every schedule, against plain loops. For the
// sanitizers: exit status 1 and a line per failure.
#include "cuda/patch_loss.cuh"

#include <cmath>
#include <cstdio>
#include <vector>

using namespace sslkernels;

namespace {

int failures = 0;

void expect(bool holds, const char* what, int schedule, int64_t width) {
  if (holds) return;
  failures++;
  std::printf("FAILED %s of %ld elements under schedule %d\n", what, static_cast<long>(width), schedule);
}

// Three samples of a row of patches, `channels` planes of rows by columns each.
struct Memory {
  std::vector<float> pred, images, grad;
  std::vector<uint8_t> mask;
  std::vector<double> workspace;
  PatchLossJob job{};

  Memory(int64_t patches, int64_t channels, int64_t rows, int64_t columns) {
    const int64_t plane = rows * columns * patches, width = channels * rows * columns;
    for (int64_t i = 0; i < 3 * channels * plane; i++) images.push_back(static_cast<float>(i * 37 % 101) / 64);
    for (int64_t i = 0; i < 3 * patches * width; i++) pred.push_back(static_cast<float>(i * 53 % 89) / 64);
    for (int64_t i = 0; i < 3 * patches; i++) mask.push_back(i % 3 != 1);
    grad.assign(pred.size(), 7);
    job = {pred.data(),
           images.data(),
           reinterpret_cast<const bool*>(mask.data()),
           grad.data(),
           Dtype::kFloat32,
           Dtype::kFloat32,
           true,
           1e-6,
           3,
           {1, 1, patches},
           channels,
           {1, rows, columns},
           {patches * width, width},
           channels * plane,
           {0, 0, columns},
           plane,
           {0, columns * patches, 1}};
    workspace.resize(patch_loss::workspace_bytes(job) / 8);
  }

  std::vector<double> target(int64_t index) const {
    const int64_t patches = job.grid[2], start = index / patches * job.sample_stride + index % patches * job.patch[2];
    std::vector<double> x;
    for (int64_t p = 0; p < job.patch[1]; p++)
      for (int64_t q = 0; q < job.patch[2]; q++)
        for (int64_t c = 0; c < job.channels; c++)
          x.push_back(images[start + c * job.channel_stride + p * job.patch_strides[1] + q]);
    double mean = 0, square = 0;
    for (double v : x) mean += v / static_cast<double>(x.size());
    for (double v : x) square += (v - mean) * (v - mean) / static_cast<double>(x.size() - 1);
    for (double& v : x) v = (v - mean) / std::sqrt(square + job.eps);
    return x;
  }
};

void check(int schedule, int64_t patches, int64_t channels, int64_t rows, int64_t columns) {
  cuda_on_cpu::set_schedule(schedule);
  Memory memory(patches, channels, rows, columns);
  float loss = NAN;
  patch_loss::forward(memory.job, memory.workspace.data(), &loss, nullptr);
  const int64_t width = memory.job.width();
  double sum = 0, masked = 0, worst = 0;
  for (uint8_t is_masked : memory.mask) masked += is_masked;
  for (size_t i = 0; i < memory.mask.size(); i++) {
    const std::vector<double> target = memory.target(static_cast<int64_t>(i));
    for (int64_t k = 0; k < width; k++) {
      const double d = memory.mask[i] ? memory.pred[i * width + k] - target[k] : 0;
      sum += d * d;
      worst = std::fmax(worst, std::fabs(memory.grad[i * width + k] * masked * width / 2 - d));
    }
  }
  expect(std::fabs(loss - sum / (masked * width)) <= 2e-6 * loss, "loss", schedule, width);
  expect(worst <= 1e-5, "gradient", schedule, width);
}

void check_backward(int schedule, int64_t rows, int64_t width) {
  cuda_on_cpu::set_schedule(schedule);
  const std::vector<float> from(rows * width, 1e-6f);
  std::vector<uint8_t> mask(rows);
  std::vector<uint16_t> to(rows * width, 7);
  for (int64_t i = 0; i < rows; i++) mask[i] = i % 3 != 0;
  const float grad_loss = 1e6f;
  patch_loss::backward({from.data(), reinterpret_cast<const bool*>(mask.data()), to.data(), Dtype::kFloat32,
                        Dtype::kFloat16, rows, width},
                       &grad_loss, false, nullptr);
  bool right = true;
  for (int64_t i = 0; i < rows * width; i++) right = right && to[i] == (mask[i / width] ? 0x3c00 : 0);
  expect(right, "backward", schedule, width);
}

}  // namespace

int main() {
  for (int schedule = 0; schedule < cuda_on_cpu::kSchedules; schedule++) {
    check(schedule, 2, 3, 16, 16);
    check(schedule, 3, 3, 5, 7);
    check(schedule, 2, 1, 4, 4);
    check(schedule, 7, 2, 1, 3);
    check_backward(schedule, 5, 13);
    check_backward(schedule, 4, 768);
  }
  check(0, 1, 3, 64, 64);  // too large for shared memory
  std::printf("%d failed\n", failures);
  return failures != 0;
}

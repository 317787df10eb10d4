// The masked patch loss's C++ on every instruction set that runs here: odd patches, any number of channels, strides,
// dtypes, several threads. Without torch, so that it runs under the sanitizers. Exit status 1 and a line per failure.
#include "cpu/patch_loss.h"

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

struct Shape {
  int64_t samples, channels, grid[3], patch[3];
  bool channels_last;
};

uint16_t bf16(float x) {  // of numbers that it holds exactly
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>(bits >> 16);
}

// Images, predictions and a mask in blocks of exactly their size, so that a step beyond shows.
struct Memory {
  Shape shape;
  std::vector<float> pred, images, grad;
  std::vector<uint16_t> narrow_pred, narrow_images, narrow_grad;
  std::vector<uint8_t> mask;
  PatchLossJob job{};

  Memory(const Shape& given, bool narrow) : shape(given) {
    int64_t strides[5], size = 1;
    const int order[] = {0, 2, 3, 4, 1}, plain[] = {0, 1, 2, 3, 4};
    for (int d = 4; d >= 0; d--) {
      const int axis = (shape.channels_last ? order : plain)[d];
      strides[axis] = size;
      size *= axis == 0 ? shape.samples : axis == 1 ? shape.channels : shape.grid[axis - 2] * shape.patch[axis - 2];
    }
    job.samples = shape.samples;
    job.channels = shape.channels;
    job.sample_stride = strides[0];
    job.channel_stride = strides[1];
    for (int d = 0; d < 3; d++) {
      job.grid[d] = shape.grid[d];
      job.patch[d] = shape.patch[d];
      job.patch_strides[d] = strides[d + 2];
      job.grid_strides[d] = strides[d + 2] * shape.patch[d];
    }
    const int64_t patches = job.samples * job.tokens(), width = job.width();
    for (int64_t i = 0; i < size; i++) images.push_back(static_cast<float>(i * 37 % 101) / 64 - 0.5f);
    for (int64_t i = 0; i < patches * width; i++) pred.push_back(static_cast<float>(i * 53 % 89) / 64 - 0.75f);
    for (int64_t i = 0; i < patches; i++) mask.push_back(i % 3 != 1);
    for (float x : images) narrow_images.push_back(bf16(x));
    for (float x : pred) narrow_pred.push_back(bf16(x));
    grad.assign(narrow ? 0 : patches * width, 7);
    narrow_grad.assign(narrow ? patches * width : 0, 7);
    job.pred_dtype = job.images_dtype = narrow ? Dtype::kBFloat16 : Dtype::kFloat32;
    job.pred = narrow ? static_cast<void*>(narrow_pred.data()) : pred.data();
    job.images = narrow ? static_cast<void*>(narrow_images.data()) : images.data();
    job.grad = narrow ? static_cast<void*>(narrow_grad.data()) : grad.data();
    job.mask = reinterpret_cast<const bool*>(mask.data());
    job.pred_strides[0] = job.tokens() * width;
    job.pred_strides[1] = width;
    job.norm_pix = width > 1;
    job.eps = 1e-6;
    plain_job = job;
    job.merge_channels();
  }

  // The target of a patch, by the definition.
  std::vector<double> target(int64_t index) const {
    const PatchLossJob& j = plain_job;
    const int64_t tokens = j.tokens(), cell = index % tokens, column = cell % j.grid[2],
                  row = cell / j.grid[2] % j.grid[1], frame = cell / (j.grid[2] * j.grid[1]);
    const int64_t start = index / tokens * j.sample_stride + frame * j.grid_strides[0] + row * j.grid_strides[1] +
                          column * j.grid_strides[2];
    std::vector<double> x;
    for (int64_t t = 0; t < j.patch[0]; t++)
      for (int64_t p = 0; p < j.patch[1]; p++)
        for (int64_t q = 0; q < j.patch[2]; q++)
          for (int64_t c = 0; c < j.channels; c++)
            x.push_back(images[start + t * j.patch_strides[0] + p * j.patch_strides[1] + q * j.patch_strides[2] +
                               c * j.channel_stride]);
    if (!j.norm_pix) return x;
    double mean = 0, square = 0;
    for (double v : x) mean += v / static_cast<double>(x.size());
    for (double v : x) square += (v - mean) * (v - mean) / static_cast<double>(x.size() - 1);
    for (double& v : x) v = (v - mean) / std::sqrt(square + j.eps);
    return x;
  }

  PatchLossJob plain_job{};
};

float widened(uint16_t x) {
  const uint32_t bits = uint32_t{x} << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

void check(const Isa& isa, const Shape& shape, bool narrow) {
  const std::string name = std::string(isa.name) + " " + std::to_string(shape.channels) + " channels, patches of " +
                           std::to_string(shape.patch[1]) + " by " + std::to_string(shape.patch[2]) +
                           (shape.channels_last ? ", channels last" : "") + (narrow ? ", bf16" : "");
  Memory one(shape, narrow), four(shape, narrow);
  const double loss = run_patch_loss(one.job, isa.patch_loss(), 1, StdThreads{});
  expect(loss == run_patch_loss(four.job, isa.patch_loss(), 4, StdThreads{}) && one.grad == four.grad &&
             one.narrow_grad == four.narrow_grad,
         name + " depends on the number of threads");
  const int64_t width = one.job.width();
  double sum = 0, masked = 0, worst = 0;
  bool zeros = true;
  for (size_t i = 0; i < one.mask.size(); i++) masked += one.mask[i];
  for (size_t i = 0; i < one.mask.size(); i++) {
    const std::vector<double> target = one.target(static_cast<int64_t>(i));
    for (int64_t k = 0; k < width; k++) {
      const size_t at = i * width + k;
      const double grad = narrow ? widened(one.narrow_grad[at]) : one.grad[at], d = one.pred[at] - target[k];
      if (one.mask[i]) {
        sum += d * d;
        worst = std::fmax(worst, std::fabs(grad * masked * width / 2 - d) / (std::fabs(d) + 1));
      } else {
        zeros = zeros && grad == 0;
      }
    }
  }
  expect(std::fabs(loss - sum / (masked * width)) <= 2e-6 * loss, name);
  expect(worst <= (narrow ? 0.004 : 2e-6) && zeros, name + ", gradient");
}

// fp32 gradients of which every third row is to be zero, in fp16 and in fp32.
void check_backward(const Isa& isa, int64_t rows, int64_t width) {
  const std::vector<float> from(rows * width, 1e-6f);
  std::vector<uint8_t> mask(rows);
  std::vector<float> wide(rows * width, 7);
  std::vector<uint16_t> half(rows * width, 7);
  for (int64_t i = 0; i < rows; i++) mask[i] = i % 3 != 0;
  const auto* bits = reinterpret_cast<const bool*>(mask.data());
  const PatchGradJob same{from.data(), bits, wide.data(), Dtype::kFloat32, Dtype::kFloat32, rows, width};
  const PatchGradJob narrower{from.data(), bits, half.data(), Dtype::kFloat32, Dtype::kFloat16, rows, width};
  run_patch_grad(same, 1e6, isa.patch_loss(), 3, StdThreads{});
  run_patch_grad(narrower, 1e6, isa.patch_loss(), 3, StdThreads{});
  bool right = true;
  for (int64_t i = 0; i < rows * width; i++) {
    const bool masked = mask[i / width];
    right = right && std::fabs(wide[i] - masked) < 1e-6 && half[i] == (masked ? 0x3c00 : 0);
  }
  expect(right, std::string(isa.name) + " backward of " + std::to_string(rows) + " by " + std::to_string(width));
}

}  // namespace

int main() {
  for (const Isa& isa : built_isas()) {
    if (!isa.supported()) continue;
    for (int64_t channels : {1, 2, 3, 4})
      for (bool channels_last : {false, true})
        for (bool narrow : {false, true}) {
          check(isa, {2, channels, {1, 3, 2}, {1, 5, 7}, channels_last}, narrow);
          check(isa, {3, channels, {2, 2, 3}, {2, 4, 16}, channels_last}, narrow);
          check(isa, {1, channels, {1, 2, 2}, {1, 3, 37}, channels_last}, narrow);
        }
    check(isa, {40, 3, {1, 4, 4}, {1, 8, 8}, false}, false);  // several chunks
    check(isa, {2, 3, {1, 1, 2}, {1, 48, 64}, false}, false);
    check(isa, {5, 1, {1, 3, 3}, {1, 1, 1}, false}, false);
    check_backward(isa, 7, 13);
    check_backward(isa, 300, 768);
  }
  std::printf("%d failed\n", failures);
  return failures != 0;
}

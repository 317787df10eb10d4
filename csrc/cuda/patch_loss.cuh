// The masked patch loss on a GPU: a block for each patch, whose pixels it gathers into shared memory, channels last.
// Predictions and gradients move 16 bytes at a time where they are aligned, and so do pixels where they are dense.
#pragma once
#include <type_traits>

#include "cuda/platform.h"
#include "cuda/storage.cuh"
#include "patch_loss_job.h"

namespace sslkernels {
namespace patch_loss {

constexpr int kMaxThreads = 256, kMaxWarps = kMaxThreads / 32;
constexpr int kSumThreads = 512;             // of the one block that counts, and of the one that adds up the patches
constexpr int64_t kMaxStaged = 46 * 1024;    // bytes of a patch in shared memory; the pixels of larger ones are
                                             // fetched anew for each pass over them
constexpr int64_t kMaxPatches = 0x7fffffff;  // blocks of a launch

// ---- sums in a fixed order

// The sum over the threads of a block, which each of them gets. `parts` has room for a number of every warp; no other
// sum of the kernel may use it.
template <class T>
__device__ __forceinline__ T block_sum(T x, T* parts) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  x = parts[0];
  for (unsigned warp = 1; warp < blockDim.x / 32; warp++) x += parts[warp];
  return x;
}

// One block: how many patches are masked.
__global__ void __launch_bounds__(kSumThreads)
    patch_loss_count_kernel(const bool* __restrict__ mask, int64_t patches, int64_t* __restrict__ count) {
  SSLK_SHARED(int64_t, parts, [kSumThreads / 32]);
  int64_t found = 0;
  const int64_t wide = aligned(mask) ? patches / 16 * 16 : 0;
  for (int64_t at = threadIdx.x * 16L; at < wide; at += kSumThreads * 16L) {
    const uint4 x = load16(mask + at);
    found += __popc(x.x) + __popc(x.y) + __popc(x.z) + __popc(x.w);
  }
  for (int64_t at = wide + threadIdx.x; at < patches; at += kSumThreads) found += mask[at];
  found = block_sum(found, parts);
  if (threadIdx.x == 0) *count = found;
}

// One block: the loss, from the sums of squared errors of all patches.
template <class Real>
__global__ void __launch_bounds__(kSumThreads)
    patch_loss_total_kernel(const Real* __restrict__ sums, int64_t patches, int64_t width,
                            const int64_t* __restrict__ count, Real* __restrict__ loss) {
  SSLK_SHARED(double, parts, [kSumThreads / 32]);
  double total = 0;
  for (int64_t at = threadIdx.x; at < patches; at += kSumThreads) total += static_cast<double>(sums[at]);
  total = block_sum(total, parts);
  const double elements = static_cast<double>(*count > 0 ? *count : 1) * static_cast<double>(width);
  if (threadIdx.x == 0) *loss = static_cast<Real>(total / elements);
}

// ---- the pixels of a patch

// Where element `k` of a patch, in the order of predictions, lies behind its first pixel.
__device__ __forceinline__ int64_t pixel_offset(const PatchLossJob& job, unsigned k) {
  const unsigned channels = job.channels, columns = job.patch[2], rows = job.patch[1];
  const unsigned pixel = k / channels, line = pixel / columns;
  return (k - pixel * channels) * job.channel_stride + (pixel - line * columns) * job.patch_strides[2] +
         line % rows * job.patch_strides[1] + line / rows * job.patch_strides[0];
}

// The first pixel of patch `index`.
__device__ __forceinline__ int64_t patch_offset(const PatchLossJob& job, unsigned index) {
  const unsigned tokens = job.tokens(), columns = job.grid[2], rows = job.grid[1];
  const unsigned sample = index / tokens, cell = index - sample * tokens, line = cell / columns;
  return sample * job.sample_stride + (cell - line * columns) * job.grid_strides[2] +
         line % rows * job.grid_strides[1] + line / rows * job.grid_strides[0];
}

// Whether every row of the patch's planes consists of 16-byte pieces.
template <class Image>
__device__ __forceinline__ bool has_wide_rows(const PatchLossJob& job, const typename Image::Storage* from) {
  constexpr int kPiece = 16 / sizeof(typename Image::Storage);
  const bool planes = job.channels == 1 || job.channel_stride % kPiece == 0;
  return job.patch_strides[2] == 1 && job.patch[2] % kPiece == 0 && planes && job.patch_strides[1] % kPiece == 0 &&
         job.patch_strides[0] % kPiece == 0 && aligned(from);
}

template <class Real, class Image>
__device__ __forceinline__ void stage(const PatchLossJob& job, const typename Image::Storage* from, Real* pixels) {
  using Storage = typename Image::Storage;
  constexpr unsigned kPiece = 16 / sizeof(Storage);
  const unsigned width = job.width();
  if (!has_wide_rows<Image>(job, from)) {
    for (unsigned k = threadIdx.x; k < width; k += blockDim.x)
      pixels[k] = static_cast<Real>(Image::load(from[pixel_offset(job, k)]));
    return;
  }
  const unsigned channels = job.channels, pieces = job.patch[2] / kPiece, rows = job.patch[1], frames = job.patch[0];
  for (unsigned piece = threadIdx.x; piece < width / kPiece; piece += blockDim.x) {
    const unsigned line = piece / pieces, column = (piece - line * pieces) * kPiece, plane = line / rows;
    const unsigned row = line - plane * rows, channel = plane / frames, frame = plane - channel * frames;
    alignas(16) Storage raw[kPiece];
    *reinterpret_cast<uint4*>(raw) = load16(from + channel * job.channel_stride + frame * job.patch_strides[0] +
                                            row * job.patch_strides[1] + column);
    Real* to = pixels + ((frame * rows + row) * pieces * kPiece + column) * channels + channel;
#pragma unroll
    for (unsigned i = 0; i < kPiece; i++) to[i * channels] = static_cast<Real>(Image::load(raw[i]));
  }
}

// The pixels of a patch as Real, from shared memory or, without `staged`, from where they are.
template <class Real, class Image>
struct Pixels {
  const PatchLossJob& job;
  const typename Image::Storage* from;
  const Real* staged;

  __device__ __forceinline__ Real operator[](unsigned k) const {
    return staged ? staged[k] : static_cast<Real>(Image::load(from[pixel_offset(job, k)]));
  }
  __device__ __forceinline__ void read8(unsigned at, Real (&x)[kVector]) const {
    if (staged) {
#pragma unroll
      for (int w = 0; w < static_cast<int>(sizeof x) / 16; w++)
        reinterpret_cast<uint4*>(x)[w] = reinterpret_cast<const uint4*>(staged + at)[w];
    } else {
#pragma unroll
      for (int i = 0; i < kVector; i++) x[i] = (*this)[at + i];
    }
  }
};

// ---- statistics

// The target of a pixel x is (x - near - rest) * factor. `near` is the mean up to its rounding, which may be more than
// the pixels differ by; `rest` is what that leaves.
template <class Real>
struct Target {
  Real near, rest, factor;
  __device__ __forceinline__ Real operator()(Real x) const { return (x - near - rest) * factor; }
};

template <class Real, class Image>
__device__ __forceinline__ Target<Real> normalization(const Pixels<Real, Image>& pixels, unsigned width, double eps) {
  SSLK_SHARED(Real, parts, [3][kMaxWarps]);
  Real sum = 0, linear = 0, square = 0;
  for (unsigned k = threadIdx.x; k < width; k += blockDim.x) sum += pixels[k];
  const Real near = block_sum(sum, parts[0]) / static_cast<Real>(width);
  for (unsigned k = threadIdx.x; k < width; k += blockDim.x) {
    const Real d = pixels[k] - near;
    linear += d;
    square += d * d;
  }
  linear = block_sum(linear, parts[1]);
  square = block_sum(square, parts[2]);
  const Real rest = linear / static_cast<Real>(width), deviation = square - linear * rest;
  const Real variance = (deviation < 0 ? 0 : deviation) / static_cast<Real>(width - 1);
  return {near, rest, 1 / sqrt(variance + static_cast<Real>(eps))};
}

// ---- loss and gradient

// What a gradient is kept in.
template <class Pred>
using GradOf = std::conditional_t<std::is_same_v<Pred, Fp16>, Fp32, Pred>;

template <class T>
__device__ __forceinline__ void zero_row(typename T::Storage* row, unsigned width) {
  const unsigned wide = aligned(row) && !std::is_same_v<T, Fp64> ? width / kVector * kVector : 0;
  const typename T::Storage zeros[kVector] = {};
  for (unsigned at = threadIdx.x * kVector; at < wide; at += blockDim.x * kVector) store8(zeros, row + at);
  for (unsigned at = wide + threadIdx.x; at < width; at += blockDim.x) row[at] = 0;
}

// The sum of squared errors that this thread sees of a patch; writes their gradient unless `grad` is null.
template <class Pred, class Real, class Image>
__device__ __forceinline__ Real compare(const Pixels<Real, Image>& pixels, const Target<Real>& target,
                                        const typename Pred::Storage* pred, typename GradOf<Pred>::Storage* grad,
                                        unsigned width, Real scale) {
  using Grad = GradOf<Pred>;
  Real sum = 0;
  const auto error = [&](Real pixel, Real value) {
    const Real d = value - target(pixel);
    sum += d * d;
    return static_cast<typename Grad::Real>(d * scale);
  };
  unsigned wide = 0;
  if constexpr (!std::is_same_v<Pred, Fp64>) {
    if (aligned(pred) && aligned(grad)) wide = width / kVector * kVector;
    for (unsigned at = threadIdx.x * kVector; at < wide; at += blockDim.x * kVector) {
      float value[kVector];
      alignas(16) Real pixel[kVector];
      alignas(16) typename Grad::Storage raw[kVector];
      load8<Pred>(pred + at, value);
      pixels.read8(at, pixel);
#pragma unroll
      for (int i = 0; i < kVector; i++) raw[i] = Grad::store(error(pixel[i], static_cast<Real>(value[i])));
      if (grad) store8(raw, grad + at);
    }
  }
  for (unsigned k = wide + threadIdx.x; k < width; k += blockDim.x) {
    const auto x = error(pixels[k], static_cast<Real>(Pred::load(pred[k])));
    if (grad) grad[k] = Grad::store(x);
  }
  return sum;
}

template <class Real, class Pred, class Image>
__device__ __forceinline__ Real compare_patch(const PatchLossJob& job, bool staged, Real* shared, Real scale) {
  const unsigned index = blockIdx.x, width = job.width(), tokens = job.tokens(), sample = index / tokens;
  const auto* from = static_cast<const typename Image::Storage*>(job.images) + patch_offset(job, index);
  if (staged) {
    stage<Real, Image>(job, from, shared);
    __syncthreads();
  }
  const Pixels<Real, Image> pixels{job, from, staged ? shared : nullptr};
  const Target<Real> target = job.norm_pix ? normalization(pixels, width, job.eps) : Target<Real>{0, 0, 1};
  const auto* pred = static_cast<const typename Pred::Storage*>(job.pred) + sample * job.pred_strides[0] +
                     (index - sample * tokens) * job.pred_strides[1];
  auto* grad = static_cast<typename GradOf<Pred>::Storage*>(job.grad);
  if (grad) grad += static_cast<int64_t>(index) * width;
  return compare<Pred>(pixels, target, pred, grad, width, scale);
}

// A block for each patch. `sums` has an element for each. Dynamic shared memory: with `staged` the pixels of a patch.
template <class Real, class Pred>
__global__ void __launch_bounds__(kMaxThreads)
    patch_loss_kernel(const PatchLossJob job, bool staged, const int64_t* __restrict__ count, Real* __restrict__ sums) {
  SSLK_DYNAMIC_SHARED(Real, shared);
  SSLK_SHARED(Real, parts, [kMaxWarps]);
  const unsigned index = blockIdx.x, width = job.width();
  if (!job.mask[index]) {
    auto* grad = static_cast<typename GradOf<Pred>::Storage*>(job.grad);
    if (grad) zero_row<GradOf<Pred>>(grad + static_cast<int64_t>(index) * width, width);
    if (threadIdx.x == 0) sums[index] = 0;
    return;
  }
  const Real scale = 2 / (static_cast<Real>(*count) * static_cast<Real>(width));
  Real sum = 0;
  if (job.images_dtype == Dtype::kFloat32) sum = compare_patch<Real, Pred, Fp32>(job, staged, shared, scale);
  if (job.images_dtype == Dtype::kBFloat16) sum = compare_patch<Real, Pred, Bf16>(job, staged, shared, scale);
  if (job.images_dtype == Dtype::kFloat16) sum = compare_patch<Real, Pred, Fp16>(job, staged, shared, scale);
  if constexpr (std::is_same_v<Real, double>) {
    if (job.images_dtype == Dtype::kFloat64) sum = compare_patch<Real, Pred, Fp64>(job, staged, shared, scale);
  }
  sum = block_sum(sum, parts);
  if (threadIdx.x == 0) sums[index] = sum;
}

// A block for each patch: its gradient times that of the loss.
template <class From, class To>
__global__ void __launch_bounds__(kMaxThreads)
    patch_loss_grad_kernel(const PatchGradJob job, const void* __restrict__ grad_loss, bool is_double) {
  const int64_t start = blockIdx.x * job.width;
  const unsigned width = job.width;
  const auto* from = static_cast<const typename From::Storage*>(job.grad_pred) + start;
  auto* to = static_cast<typename To::Storage*>(job.grad) + start;
  if (!job.mask[blockIdx.x]) return zero_row<To>(to, width);
  using Real = typename From::Real;
  const Real factor = is_double ? static_cast<Real>(*static_cast<const double*>(grad_loss))
                                : static_cast<Real>(*static_cast<const float*>(grad_loss));
  unsigned wide = 0;
  if constexpr (!std::is_same_v<From, Fp64>) {
    if (aligned(from) && aligned(to)) wide = width / kVector * kVector;
    for (unsigned at = threadIdx.x * kVector; at < wide; at += blockDim.x * kVector) {
      float x[kVector];
      alignas(16) typename To::Storage raw[kVector];
      load8<From>(from + at, x);
#pragma unroll
      for (int i = 0; i < kVector; i++) raw[i] = To::store(x[i] * factor);
      store8(raw, to + at);
    }
  }
  for (unsigned k = wide + threadIdx.x; k < width; k += blockDim.x) to[k] = To::store(From::load(from[k]) * factor);
}

// ---- launching

// Threads of a block: so many that each has eight elements or more.
inline int threads_for(int64_t width) { return width <= 512 ? 64 : width <= 1024 ? 128 : kMaxThreads; }

// What the forward needs besides its job, on the device: 8 bytes for the count and 8 for every patch.
inline int64_t workspace_bytes(const PatchLossJob& job) { return 8 * (1 + job.samples * job.tokens()); }

template <class Real, class Pred>
void launch_patches(const PatchLossJob& job, const int64_t* count, Real* sums, cudaStream_t stream) {
  const int64_t bytes = job.width() * static_cast<int64_t>(sizeof(Real));
  const bool staged = bytes <= kMaxStaged;
  const unsigned patches = static_cast<unsigned>(job.samples * job.tokens());
  SSLK_LAUNCH((patch_loss_kernel<Real, Pred>), patches, threads_for(job.width()), staged ? bytes : 0, stream, job,
              staged, count, sums);
}

template <class Real>
void forward_in(const PatchLossJob& job, void* workspace, void* loss, cudaStream_t stream) {
  const int64_t patches = job.samples * job.tokens();
  auto* count = static_cast<int64_t*>(workspace);
  auto* sums = reinterpret_cast<Real*>(count + 1);
  SSLK_LAUNCH(patch_loss_count_kernel, 1, kSumThreads, 0, stream, job.mask, patches, count);
  if (patches > 0) {
    switch (job.pred_dtype) {
      case Dtype::kFloat32:
        launch_patches<Real, Fp32>(job, count, sums, stream);
        break;
      case Dtype::kBFloat16:
        launch_patches<Real, Bf16>(job, count, sums, stream);
        break;
      case Dtype::kFloat16:
        launch_patches<Real, Fp16>(job, count, sums, stream);
        break;
      case Dtype::kFloat64:
        if constexpr (std::is_same_v<Real, double>) launch_patches<Real, Fp64>(job, count, sums, stream);
        break;
    }
  }
  SSLK_LAUNCH(patch_loss_total_kernel<Real>, 1, kSumThreads, 0, stream, sums, patches, job.width(), count,
              static_cast<Real*>(loss));
}

// The loss, in the dtype of the sums, and with job.grad the gradient; at most kMaxPatches patches.
inline void forward(const PatchLossJob& job, void* workspace, void* loss, cudaStream_t stream) {
  if (job.is_double()) {
    forward_in<double>(job, workspace, loss, stream);
  } else {
    forward_in<float>(job, workspace, loss, stream);
  }
}

template <class From, class To>
void launch_grad(const PatchGradJob& job, const void* grad_loss, bool is_double, cudaStream_t stream) {
  SSLK_LAUNCH((patch_loss_grad_kernel<From, To>), static_cast<unsigned>(job.rows), threads_for(job.width), 0, stream,
              job, grad_loss, is_double);
}

// grad_loss is a float, or a double, on the device.
inline void backward(const PatchGradJob& job, const void* grad_loss, bool is_double, cudaStream_t stream) {
  if (job.rows == 0) return;
  if (job.from == Dtype::kFloat64) return launch_grad<Fp64, Fp64>(job, grad_loss, is_double, stream);
  if (job.from == Dtype::kBFloat16) return launch_grad<Bf16, Bf16>(job, grad_loss, is_double, stream);
  if (job.to == Dtype::kFloat16) return launch_grad<Fp32, Fp16>(job, grad_loss, is_double, stream);
  launch_grad<Fp32, Fp32>(job, grad_loss, is_double, stream);
}

}  // namespace patch_loss
}  // namespace sslkernels

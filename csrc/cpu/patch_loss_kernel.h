// The loops of the masked patch loss, compiled once per instruction set. The pixels of a patch are gathered, channels
// last, into a buffer of the first-level cache; statistics, loss and gradient are taken from there.
#pragma once
#include "patch_loss.h"
#include "storage.h"

namespace sslkernels::SSLK_ISA {

// As many numbers as a register holds.
template <class Real>
struct Register {
  static constexpr int64_t kCount = 4 * kLanes / static_cast<int64_t>(sizeof(Real));
  typedef Real Vector __attribute__((vector_size(4 * kLanes), may_alias));
  typedef Real Unaligned __attribute__((vector_size(4 * kLanes), aligned(sizeof(Real)), may_alias));

  static SSLK_INLINE Vector load(const Real* p) { return *reinterpret_cast<const Unaligned*>(p); }
  static SSLK_INLINE void store(Real* p, Vector v) { *reinterpret_cast<Unaligned*>(p) = v; }
  static SSLK_INLINE double sum(const Vector& v) {
    double total = 0;
    for (int64_t i = 0; i < kCount; i++) total += static_cast<double>(v[i]);
    return total;
  }
};

constexpr int64_t kChains = 4;         // sums side by side: an addition takes as many cycles
constexpr int64_t kPixelBlock = 1024;  // elements converted at a time
constexpr int64_t kLongestSum = 4096;  // numbers added up in fp32 before fp64 takes over
template <class Real>
constexpr int64_t kPadding = kChains * Register<Real>::kCount;

// ---- gathering

// The first pixel of a patch.
SSLK_INLINE int64_t patch_offset(const PatchLossJob& job, int64_t index) {
  const int64_t tokens = job.tokens(), sample = index / tokens, cell = index % tokens;
  const int64_t column = cell % job.grid[2], row = cell / job.grid[2] % job.grid[1];
  const int64_t frame = cell / (job.grid[2] * job.grid[1]);
  return sample * job.sample_stride + frame * job.grid_strides[0] + row * job.grid_strides[1] +
         column * job.grid_strides[2];
}

// out = x0 y0 z0 x1 y1 z1 ..., three vectors from three planes.
SSLK_INLINE void interleave3(const Vec (&plane)[3], float* out) {
  SSLK_UNROLL for (int v = 0; v < 3; v++) {
    VecInt two{}, three{};
    SSLK_UNROLL for (int i = 0; i < kLanes; i++) {
      const int at = v * kLanes + i, pixel = at / 3, channel = at % 3;
      two[i] = channel == 1 ? kLanes + pixel : pixel;
      three[i] = channel == 2 ? kLanes + pixel : i;
    }
    store_unaligned(out + v * kLanes, __builtin_shuffle(__builtin_shuffle(plane[0], plane[1], two), plane[2], three));
  }
}

// A row of a patch whose three planes are dense in memory. May write up to three vectors past its end.
template <class Image>
SSLK_INLINE void gather_three(const typename Image::Storage* from, int64_t plane_stride, int64_t pixels, float* out) {
  for (int64_t at = 0; at < pixels; at += kLanes) {
    const int64_t count = min(kLanes, pixels - at);
    Vec plane[3];
    SSLK_UNROLL for (int c = 0; c < 3; c++) {
      const auto* x = from + c * plane_stride + at;
      alignas(64) float lanes[kLanes];
      if (count == kLanes) {
        for (int i = 0; i < kLanes; i++) lanes[i] = Image::load(x[i]);
      } else {
        for (int64_t i = 0; i < count; i++) lanes[i] = Image::load(x[i]);
        for (int64_t i = count; i < kLanes; i++) lanes[i] = 0;
      }
      plane[c] = load(lanes);
    }
    interleave3(plane, out + 3 * at);
  }
}

template <class Real, class Image>
SSLK_INLINE void gather_row(const PatchLossJob& job, const typename Image::Storage* from, Real* out) {
  const int64_t channels = job.channels, pixels = job.patch[2], step = job.patch_strides[2];
  if (channels == 1 && step == 1) {
    for (int64_t i = 0; i < pixels; i++) out[i] = static_cast<Real>(Image::load(from[i]));
    return;
  }
  if constexpr (sizeof(Real) == 4) {
    if (channels == 3 && step == 1) return gather_three<Image>(from, job.channel_stride, pixels, out);
  }
  for (int64_t c = 0; c < channels; c++)
    for (int64_t q = 0; q < pixels; q++)
      out[q * channels + c] = static_cast<Real>(Image::load(from[c * job.channel_stride + q * step]));
}

template <class Real, class Image>
void gather(const PatchLossJob& job, int64_t index, Real* out) {
  const auto* from = static_cast<const typename Image::Storage*>(job.images) + patch_offset(job, index);
  const int64_t row = job.channels * job.patch[2];
  for (int64_t t = 0; t < job.patch[0]; t++)
    for (int64_t p = 0; p < job.patch[1]; p++, out += row)
      gather_row<Real, Image>(job, from + t * job.patch_strides[0] + p * job.patch_strides[1], out);
}

// ---- statistics

// The target of a pixel x is (x - near - rest) * factor. `near` is the mean up to its rounding, which may be more than
// the pixels differ by; `rest` is what that leaves.
template <class Real>
struct Target {
  Real near = 0, rest = 0, factor = 1;
};

// Sums of d and d^2, d = x - shift; `padded` is a multiple of kPadding.
template <class Real>
SSLK_INLINE void moments(const Real* x, int64_t padded, Real shift, double& sum, double& squares) {
  typedef Register<Real> R;
  sum = squares = 0;
  for (int64_t start = 0; start < padded; start += kLongestSum) {
    typename R::Vector linear[kChains] = {}, square[kChains] = {};
    for (int64_t i = start; i < min(start + kLongestSum, padded); i += kPadding<Real>)
      SSLK_UNROLL for (int64_t k = 0; k < kChains; k++) {
        const typename R::Vector d = R::load(x + i + k * R::kCount) - shift;
        linear[k] += d;
        square[k] += d * d;
      }
    sum += R::sum((linear[0] + linear[1]) + (linear[2] + linear[3]));
    squares += R::sum((square[0] + square[1]) + (square[2] + square[3]));
  }
}

// The pixels x[0, count); x is written beyond them, to the next multiple of kPadding.
template <class Real>
Target<Real> normalization(Real* x, int64_t count, double eps) {
  const int64_t padded = (count + kPadding<Real> - 1) / kPadding<Real> * kPadding<Real>;
  const double inverse = 1 / static_cast<double>(count);
  double sum, squares;
  for (int64_t i = count; i < padded; i++) x[i] = 0;
  moments<Real>(x, padded, 0, sum, squares);
  const Real near = static_cast<Real>(sum * inverse);
  for (int64_t i = count; i < padded; i++) x[i] = near;
  moments<Real>(x, padded, near, sum, squares);
  const double rest = sum * inverse, deviation = squares - sum * rest;
  const double variance = (deviation < 0 ? 0 : deviation) / static_cast<double>(count - 1);
  return {near, static_cast<Real>(rest), static_cast<Real>(1 / __builtin_sqrt(variance + eps))};
}

// ---- loss and gradient

// `count` elements as Real: where they lie, or converted into `buffer`.
template <class Real, class Type>
SSLK_INLINE const Real* as_real(const typename Type::Storage* x, int64_t count, Real* buffer) {
  if constexpr (sizeof(typename Type::Storage) == sizeof(Real)) {
    return x;
  } else {
    for (int64_t i = 0; i < count; i++) buffer[i] = static_cast<Real>(Type::load(x[i]));
    return buffer;
  }
}

// The sum of (pred - target)^2 over `count` elements; error = scale * (pred - target), unless it is null.
template <class Real>
SSLK_INLINE double compare(const Real* pred, const Real* x, const Target<Real>& target, int64_t count, Real scale,
                           Real* error) {
  typedef Register<Real> R;
  const auto difference = [&](auto pixel, auto value) {
    return value - (pixel - target.near - target.rest) * target.factor;
  };
  typename R::Vector sum[kChains] = {};
  int64_t i = 0;
  const auto step = [&](int64_t k) {
    const typename R::Vector d = difference(R::load(x + i), R::load(pred + i));
    sum[k] += d * d;
    if (error) R::store(error + i, d * scale);
    i += R::kCount;
  };
  while (i + kPadding<Real> <= count) SSLK_UNROLL for (int64_t k = 0; k < kChains; k++) step(k);
  while (i + R::kCount <= count) step(0);
  double total = R::sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; i < count; i++) {
    const Real d = difference(x[i], pred[i]);
    total += static_cast<double>(d * d);
    if (error) error[i] = d * scale;
  }
  return total;
}

// What a gradient is kept in.
template <class Pred>
struct GradOf {
  typedef Pred Type;
};
template <>
struct GradOf<Fp16> {
  typedef Fp32 Type;
};

// The sum of squared errors of a patch whose pixels are x; writes its gradient where the job has one.
template <class Real, class Pred>
double finish(const PatchLossJob& job, double scale, int64_t index, const Real* x, const Target<Real>& target) {
  typedef typename GradOf<Pred>::Type Grad;
  constexpr bool kInPlace = sizeof(typename Grad::Storage) == sizeof(Real);
  const int64_t width = job.width(), sample = index / job.tokens(), token = index % job.tokens();
  const auto* pred =
      static_cast<const typename Pred::Storage*>(job.pred) + sample * job.pred_strides[0] + token * job.pred_strides[1];
  auto* grad = job.grad ? static_cast<typename Grad::Storage*>(job.grad) + index * width : nullptr;
  alignas(64) Real values[kPixelBlock], errors[kPixelBlock];
  double sum = 0;
  for (int64_t at = 0; at < width; at += kPixelBlock) {
    const int64_t count = min(kPixelBlock, width - at);
    const Real* from = as_real<Real, Pred>(pred + at, count, values);
    Real* to = grad ? errors : nullptr;
    if constexpr (kInPlace) to = grad ? grad + at : nullptr;
    sum += compare(from, x + at, target, count, static_cast<Real>(scale), to);
    if constexpr (!kInPlace) {
      typedef decltype(Grad::load({})) Value;
      for (int64_t i = 0; grad && i < count; i++) grad[at + i] = Grad::store(static_cast<Value>(errors[i]));
    }
  }
  return sum;
}

// ---- the choice

template <class Real>
struct PatchSteps {
  void (*gather)(const PatchLossJob&, int64_t index, Real* out);
  double (*finish)(const PatchLossJob&, double scale, int64_t index, const Real* x, const Target<Real>&);
};

template <class Real>
PatchSteps<Real> patch_steps(const PatchLossJob& job) {
  PatchSteps<Real> steps{};
  const auto set_gather = [&](auto image) { steps.gather = gather<Real, decltype(image)>; };
  const auto set_finish = [&](auto pred) { steps.finish = finish<Real, decltype(pred)>; };
  if constexpr (sizeof(Real) == 8) {
    with_any_storage(job.images_dtype, set_gather);
    with_any_storage(job.pred_dtype, set_finish);
  } else {
    with_storage(job.images_dtype, set_gather);
    with_storage(job.pred_dtype, set_finish);
  }
  return steps;
}

template <class Real>
double patch_loss_forward(const PatchLossJob& job, double scale, int64_t begin, int64_t end, Real* x) {
  const PatchSteps<Real> steps = patch_steps<Real>(job);
  const int64_t width = job.width(), row_bytes = width * itemsize(job.grad_dtype());
  double sum = 0;
  for (int64_t index = begin; index < end; index++) {
    if (!job.mask[index]) {
      if (job.grad) __builtin_memset(static_cast<char*>(job.grad) + index * row_bytes, 0, row_bytes);
      continue;
    }
    steps.gather(job, index, x);
    const Target<Real> target = job.norm_pix ? normalization(x, width, job.eps) : Target<Real>{};
    sum += steps.finish(job, scale, index, x, target);
  }
  return sum;
}

inline double forward_patches(const PatchLossJob& job, double scale, int64_t begin, int64_t end, void* scratch) {
  if (job.is_double()) return patch_loss_forward(job, scale, begin, end, static_cast<double*>(scratch));
  return patch_loss_forward(job, scale, begin, end, static_cast<float*>(scratch));
}

template <class From, class To>
void scale_rows(const PatchGradJob& job, double grad_loss, int64_t begin, int64_t end) {
  typedef decltype(From::load({})) Real;
  const Real factor = static_cast<Real>(grad_loss);
  for (int64_t row = begin; row < end; row++) {
    auto* to = static_cast<typename To::Storage*>(job.grad) + row * job.width;
    const auto* from = static_cast<const typename From::Storage*>(job.grad_pred) + row * job.width;
    if (job.mask[row]) {
#pragma GCC ivdep
      for (int64_t i = 0; i < job.width; i++) to[i] = To::store(From::load(from[i]) * factor);
    } else {
      __builtin_memset(to, 0, job.width * sizeof(*to));
    }
  }
}

inline void backward_patches(const PatchGradJob& job, double grad_loss, int64_t begin, int64_t end) {
  if (job.from == Dtype::kFloat32 && job.to == Dtype::kFloat16)
    return scale_rows<Fp32, Fp16>(job, grad_loss, begin, end);
  with_any_storage(job.from,
                   [&](auto type) { scale_rows<decltype(type), decltype(type)>(job, grad_loss, begin, end); });
}

PatchLossKernel patch_loss_kernel() { return {forward_patches, backward_patches}; }

}  // namespace sslkernels::SSLK_ISA

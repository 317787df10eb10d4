// The O(N D) part of NT-Xent: reading rows of any dtype and stride, packing them, and what happens to whole rows before
// and after the tiles. Included by infonce_kernel.h, once per instruction set.
#pragma once
#include "infonce.h"
#include "storage.h"
#include "tile_gemm.h"

namespace sslkernels::SSLK_ISA {

constexpr int64_t kChunk = 512;  // columns of a row handled at a time
constexpr double kLog2E = 1.4426950408889634;

template <class Type>
SSLK_INLINE const typename Type::Storage* row_start(const NtXentJob& job, int64_t row, int64_t column) {
  return static_cast<const typename Type::Storage*>(job.view[row % 2]) + row / 2 * job.row_stride[row % 2] +
         column * job.column_stride[row % 2];
}

// The values x[row][column] to x[row][column + count) as floats: in place, or converted into `buffer`.
SSLK_INLINE const float* row_values(const NtXentJob& job, int64_t row, int64_t column, int64_t count, float* buffer) {
  const int64_t stride = job.column_stride[row % 2];
  if (job.dtype == Dtype::kFloat32 && stride == 1) return row_start<Fp32>(job, row, column);
  with_storage(job.dtype, [&](auto type) {
    const auto* x = row_start<decltype(type)>(job, row, column);
    if (stride == 1) {
      for (int64_t c = 0; c < count; c++) buffer[c] = type.load(x[c]);
    } else {
      for (int64_t c = 0; c < count; c++) buffer[c] = type.load(x[c * stride]);
    }
  });
  return buffer;
}

// out[c] = scale * x[row][column + c], for `count` columns. The product is taken in float64: it has the range.
inline void read_row(const NtXentJob& job, int64_t row, int64_t column, int64_t count, double scale, float* out) {
  const float* x = row_values(job, row, column, count, out);
  for (int64_t c = 0; c < count; c++) out[c] = static_cast<float>(scale * x[c]);
}

SSLK_INLINE double sum8(const double (&parts)[8]) {
  return ((parts[0] + parts[1]) + (parts[2] + parts[3])) + ((parts[4] + parts[5]) + (parts[6] + parts[7]));
}

// a . b in float64, along eight chains.
SSLK_INLINE double dot(const float* a, const float* b, int64_t count) {
  double parts[8] = {};
  int64_t c = 0;
  for (; c + 8 <= count; c += 8)
    for (int k = 0; k < 8; k++) parts[k] += static_cast<double>(a[c + k]) * b[c + k];
  for (; c < count; c++) parts[0] += static_cast<double>(a[c]) * b[c];
  return sum8(parts);
}

// Length of a row; float64 holds the square of any float32. `buffer` has room for a chunk.
inline double row_norm(const NtXentJob& job, int64_t row, float* buffer) {
  double square = 0;
  for (int64_t column = 0; column < job.dim; column += kChunk) {
    const int64_t count = min(kChunk, job.dim - column);
    const float* x = row_values(job, row, column, count, buffer);
    square += dot(x, x, count);
  }
  return __builtin_sqrt(square);
}

// Sets scale and residual of a row; returns the factor to pack it with. fp32 tiles hold the row of Z itself; bf16 tiles
// hold the input times a power of two, which is exact for bf16 inputs, and leave the rest to `residual`.
template <bool kBf16>
SSLK_INLINE double prepare_row(const NtXentJob& job, int64_t row, float* buffer) {
  double scale = 1, packed = 1;
  if (job.normalize) {
    const double norm = row_norm(job, row, buffer), length = norm < kNormalizeEps ? kNormalizeEps : norm;
    scale = packed = 1 / length;
    if (kBf16 && __builtin_isfinite(length)) packed = __builtin_ldexp(1.0, -__builtin_ilogb(length));
  }
  job.scale[row] = scale;
  job.residual[row] = static_cast<float>(scale / packed);
  return packed;
}

// to[k * kPanel + r] = from[r * from_stride + k] for k < steps and the kPanel rows r; `from` may be read to the next
// multiple of 4.
SSLK_INLINE void transpose_panel(const uint32_t* from, int64_t from_stride, int64_t steps, uint32_t* to) {
  for (int64_t k = 0; k < steps; k += 4)
    for (int r = 0; r < kPanel; r += 4) {
      Quad row[4];
      for (int q = 0; q < 4; q++) row[q] = *reinterpret_cast<const Quad*>(from + (r + q) * from_stride + k);
      transpose(row);
      for (int q = 0; q < 4 && k + q < steps; q++) *reinterpret_cast<Quad*>(to + (k + q) * kPanel + r) = row[q];
    }
}

template <bool kBf16>
struct PackScratch {
  alignas(64) float rows[kPanel * kChunk];
  alignas(64) uint16_t halves[kBf16 ? kPanel * kChunk : 1];
};

// Packs the kPanel rows of a panel into `panels` and, for the backward, into `columns`.
template <bool kBf16>
void pack_chunk(const NtXentJob& job, int64_t panel, int64_t column, bool backward, PackScratch<kBf16>& s) {
  const int64_t count = min(kChunk, job.dim - column), padded = (count + kPanel - 1) / kPanel * kPanel;
  uint32_t* to = job.panels + panel * job.words * kPanel + column / (kBf16 ? 2 : 1) * kPanel;
  if constexpr (kBf16) {
    for (int64_t r = 0; r < kPanel; r++)
      for (int64_t c = 0; c < padded; c++) s.halves[r * kChunk + c] = to_bf16(s.rows[r * kChunk + c]);
    const auto* words = reinterpret_cast<const uint32_t*>(s.halves);
    transpose_panel(words, kChunk / 2, (count + 1) / 2, to);
  } else {
    transpose_panel(reinterpret_cast<const uint32_t*>(s.rows), kChunk, count, to);
  }
  if (!backward) return;
  constexpr int64_t kPerWord = kBf16 ? 2 : 1;
  for (int64_t c = 0; c < padded; c += kPanel) {
    uint32_t* out = job.columns + ((column + c) * job.padded_rows + panel * kPanel * kPanel) / kPerWord;
    for (int64_t r = 0; r < kPanel; r += kPerWord, out += kPanel)
      for (int64_t k = 0; k < kPanel; k++) {
        if constexpr (kBf16)
          out[k] = s.halves[r * kChunk + c + k] | uint32_t{s.halves[(r + 1) * kChunk + c + k]} << 16;
        else
          out[k] = to_bits(s.rows[r * kChunk + c + k]);
      }
  }
}

// Per row, for the backward: G_ij = e_ij (weight_i + weight_j) when bounded, where e_ij = exp(l_ij - 1/|tau|), and
// otherwise G_ij = exp(l_ij - logsumexp_i) weight_i + exp(l_ij - logsumexp_j) weight_j.
SSLK_INLINE void prepare_gradient(const NtXentJob& job, int64_t row) {
  const int64_t at = job.output_row(row);
  const double weight = job.grad_loss[at] / job.grad_scale, logsumexp = job.saved_logsumexp[at];
  const double bound = 1 / __builtin_fabs(job.temperature);
  job.weight[row] = static_cast<float>(job.bounded ? weight * __builtin_exp(bound - logsumexp) : weight);
  const double offset = logsumexp * kLog2E;
  job.logsumexp2[row] = static_cast<float>(offset);
  job.logsumexp2_low[row] = static_cast<float>(offset - job.logsumexp2[row]);
}

constexpr float kMasked = -2e38f;     // a logit that takes no part
constexpr float kNoMaximum = -1e38f;  // the maximum of none: exp2(kMasked - kNoMaximum) is 0

// Gives every row of a panel, padding too, its scalars and empty sums; returns the factors to pack the rows with.
template <bool kBf16>
SSLK_INLINE void prepare_panel(const NtXentJob& job, int64_t panel, bool backward, double (&packed)[kPanel],
                               float* buffer) {
  for (int64_t r = 0; r < kPanel; r++) {
    const int64_t row = panel * kPanel + r;
    packed[r] = job.residual[row] = 0;
    if (backward)
      job.weight[row] = job.logsumexp2[row] = job.logsumexp2_low[row] = 0;
    else
      job.negatives[row] = 0, job.maxima[row] = kNoMaximum;
    if (row >= job.rows) continue;
    packed[r] = prepare_row<kBf16>(job, row, buffer);
    if (backward) prepare_gradient(job, row);
  }
  for (int64_t column = 0; backward && column < job.dim; column += kPanel) {
    float* sums = job.grad_z + column * job.padded_rows + panel * kPanel * kPanel;
    for (int64_t at = 0; at < kPanel * kPanel; at += kLanes) store(sums + at, Vec{});
  }
}

template <bool kBf16>
void pack(const NtXentJob& job, int64_t panel, bool backward, void* scratch) {
  auto& s = *static_cast<PackScratch<kBf16>*>(scratch);
  double packed[kPanel];
  prepare_panel<kBf16>(job, panel, backward, packed, s.rows);
  double cosine[kPanel / 2] = {};
  for (int64_t column = 0; column < job.dim; column += kChunk) {
    const int64_t count = min(kChunk, job.dim - column), padded = (count + kPanel - 1) / kPanel * kPanel;
    for (int64_t r = 0; r < kPanel; r++) {
      float* out = s.rows + r * kChunk;
      const int64_t row = panel * kPanel + r, read = row < job.rows ? count : 0;
      if (read) read_row(job, row, column, read, packed[r], out);
      for (int64_t c = read; c < padded; c++) out[c] = 0;
    }
    pack_chunk<kBf16>(job, panel, column, backward, s);
    for (int64_t r = 0; !backward && r < kPanel; r += 2)
      cosine[r / 2] += dot(s.rows + r * kChunk, s.rows + (r + 1) * kChunk, count);
  }
  for (int64_t r = 0; !backward && r < kPanel; r++) {
    const int64_t pair = panel * kPanel + r / 2 * 2;
    job.cosine[panel * kPanel + r] = cosine[r / 2] * job.residual[pair] * job.residual[pair + 1];
  }
}

// Closes the forward for the rows of a panel: adds the positive, apart and in float64, to the sum of its negatives.
inline void forward_rows(const NtXentJob& job, int64_t panel, void* /*scratch*/) {
  for (int64_t row = panel * kPanel; row < min((panel + 1) * kPanel, job.rows); row++) {
    const int64_t at = job.output_row(row);
    const double positive = job.cosine[row] / job.temperature;
    const double offset = job.bounded ? 1 / __builtin_fabs(job.temperature) : job.maxima[row] / kLog2E;
    const double top = offset > positive ? offset : positive;
    const double others = job.negatives[row] * __builtin_exp(offset - top), own = __builtin_exp(positive - top);
    double loss = others < own ? __builtin_log1p(others / own) : __builtin_log(others + own) + top - positive;
    job.logsumexp[at] = loss + positive;
    if (job.positive_weight) {
      job.logsumexp[at] = job.rows > 2 ? __builtin_log(static_cast<double>(job.negatives[row])) + offset : 0;
      loss = job.logsumexp[at] - job.positive_weight[at] * positive;
    }
    job.loss[at] = static_cast<float>(loss);
    job.positive[at] = static_cast<float>(positive);
    if (job.top1) job.hit[at] = job.packed_positive[row] > job.maxima[row];
  }
}

// Gradient with respect to two rows of Z, chunk by chunk: the tiles' part, and the positive's, which is added last and
// in fp32 so that nothing cancels.
SSLK_INLINE void gradient_chunk(const NtXentJob& job, int64_t row, int64_t column, int64_t count, double positive,
                                float (*z)[kChunk], float (*g)[kChunk]) {
  const float scale = static_cast<float>(job.grad_scale / job.temperature), partner = static_cast<float>(positive);
  for (int64_t v = 0; v < 2; v++) read_row(job, row + v, column, count, job.scale[row + v], z[v]);
  for (int64_t v = 0; v < 2; v++)
    for (int64_t c = 0; c < count; c += kPanel) {
      const float* tiles = job.grad_z + (column + c) * job.padded_rows + (row + v) * kPanel;
      const int64_t width = min(kPanel, count - c);
      for (int64_t k = 0; k < width; k++) g[v][c + k] = scale * tiles[k] + partner * z[1 - v][c + k];
    }
}

// Closes the backward for the pairs of a panel: through the temperature and the normalisation, into the input's dtype.
inline void backward_rows(const NtXentJob& job, int64_t panel, void* scratch) {
  auto* z = static_cast<float (*)[kChunk]>(scratch);
  auto* g = z + 2;
  double grad_temperature = 0;
  for (int64_t row = panel * kPanel; row < min((panel + 1) * kPanel, job.rows); row += 2) {
    double positive = 0;  // 1 - p of the positive is -expm1(-loss), exact when p is nearly 1
    for (int64_t v = 0; v < 2; v++) {
      const int64_t at = job.output_row(row + v);
      const double pull = job.positive_weight ? -static_cast<double>(job.positive_weight[at])
                                              : __builtin_expm1(-static_cast<double>(job.saved_loss[at]));
      positive += job.grad_loss[at] * pull / job.temperature;
    }
    double along[2] = {};
    for (int64_t column = 0; column < job.dim; column += kChunk) {
      const int64_t count = min(kChunk, job.dim - column);
      gradient_chunk(job, row, column, count, positive, z, g);
      for (int64_t v = 0; v < 2; v++) along[v] += dot(z[v], g[v], count);
    }
    grad_temperature -= (along[0] + along[1]) / (2 * job.temperature);
    for (int64_t column = 0; column < job.dim; column += kChunk) {
      const int64_t count = min(kChunk, job.dim - column);
      if (job.dim > kChunk) gradient_chunk(job, row, column, count, positive, z, g);
      for (int64_t v = 0; v < 2; v++) {
        const double scale = job.scale[row + v], shrink = job.normalize && scale < 1 / kNormalizeEps ? along[v] : 0;
        with_storage(job.dtype, [&](auto type) {
          auto* out = static_cast<typename decltype(type)::Storage*>(job.grad_view[v]) + row / 2 * job.dim + column;
          for (int64_t c = 0; c < count; c++)
            out[c] = type.store(static_cast<float>(scale * (g[v][c] - shrink * z[v][c])));
        });
      }
    }
  }
  job.grad_temperature_parts[panel] = grad_temperature;
}

}  // namespace sslkernels::SSLK_ISA

// Reading rows of any dtype and stride, packing them for the tiles, and the scalars that tiles keep for each row.
// Included by the kernels, once per instruction set.
#pragma once
#if defined(__AMX_BF16__)
#include "tile_amx.h"
#else
#include "tile_vector.h"
#endif

namespace sslkernels::SSLK_ISA {

template <class Type>
SSLK_INLINE const typename Type::Storage* row_start(const Rows& in, int64_t row, int64_t column) {
  const int64_t view = row % in.views;
  return static_cast<const typename Type::Storage*>(in.view[view]) + row / in.views * in.row_stride[view] +
         column * in.column_stride[view];
}

// The values x[row][column] to x[row][column + count) as floats: in place, or converted into `buffer`.
SSLK_INLINE const float* row_values(const Rows& in, int64_t row, int64_t column, int64_t count, float* buffer) {
  const int64_t stride = in.column_stride[row % in.views];
  if (in.dtype == Dtype::kFloat32 && stride == 1) return row_start<Fp32>(in, row, column);
  with_storage(in.dtype, [&](auto type) {
    const auto* x = row_start<decltype(type)>(in, row, column);
    if (stride == 1) {
      for (int64_t c = 0; c < count; c++) buffer[c] = type.load(x[c]);
    } else {
      for (int64_t c = 0; c < count; c++) buffer[c] = type.load(x[c * stride]);
    }
  });
  return buffer;
}

// out[c] = scale * x[row][column + c], for `count` columns. The product is taken in float64: it has the range.
inline void read_row(const Rows& in, int64_t row, int64_t column, int64_t count, double scale, float* out) {
  const float* x = row_values(in, row, column, count, out);
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
inline double row_norm(const Rows& in, int64_t row, float* buffer) {
  double square = 0;
  for (int64_t column = 0; column < in.dim; column += kChunk) {
    const int64_t count = min(kChunk, in.dim - column);
    const float* x = row_values(in, row, column, count, buffer);
    square += dot(x, x, count);
  }
  return __builtin_sqrt(square);
}

// As a float; of a NaN no bits but those that are left of it in bf16.
SSLK_INLINE float plain_nan(double x) { return x == x ? static_cast<float>(x) : __builtin_nanf(""); }

// Sets scale and residual of a row; returns the factor to pack it with. fp32 tiles hold the row of A itself; bf16 tiles
// hold the input times a power of two, which is exact for bf16 inputs, and leave the rest to `residual`.
template <bool kBf16>
SSLK_INLINE double prepare_row(const Rows& in, const Side& side, int64_t row, float* buffer) {
  double scale = 1, packed = 1;
  if (in.normalize) {
    const double norm = row_norm(in, row, buffer), length = norm < kNormalizeEps ? kNormalizeEps : norm;
    scale = packed = 1 / length;
    if (kBf16 && __builtin_isfinite(length)) packed = __builtin_ldexp(1.0, -__builtin_ilogb(length));
  }
  side.scale[row] = scale;
  side.residual[row] = plain_nan(scale / packed);
  return packed;
}

// Packs a panel of rows, padding with zeros, and sets their scale and residual. chunk(column, count) sees each chunk of
// the packed rows in `s.rows`.
template <bool kBf16, class Chunk>
SSLK_INLINE void pack_panel(const Rows& in, const Side& side, int64_t words, int64_t panel, PackScratch<kBf16>& s,
                            const Chunk& chunk) {
  double packed[kPanel];
  for (int64_t r = 0; r < kPanel; r++) {
    const int64_t row = panel * kPanel + r;
    packed[r] = side.residual[row] = 0;
    if (row < side.rows) packed[r] = prepare_row<kBf16>(in, side, row, s.rows);
  }
  for (int64_t column = 0; column < in.dim; column += kChunk) {
    const int64_t count = min(kChunk, in.dim - column), padded = (count + kPanel - 1) / kPanel * kPanel;
    for (int64_t r = 0; r < kPanel; r++) {
      float* out = s.rows + r * kChunkStride;
      const int64_t row = panel * kPanel + r, read = row < side.rows ? count : 0;
      if (read) read_row(in, row, column, read, packed[r], out);
      for (int64_t c = read; c < padded; c++) out[c] = 0;
    }
    pack_chunk<kBf16>(side, in.dim, words, panel, column, s);
    chunk(column, count);
  }
}

// Gives every row of a panel, padding too, empty sums of the forward.
SSLK_INLINE void clear_sums(const Logits& logits, const Side& side, int64_t panel) {
  for (int64_t row = panel * kPanel; row < (panel + 1) * kPanel; row++)
    side.sums[row] = 0, side.maxima[row] = -logits.none2;
}

// Gives a panel gradients of zeros.
SSLK_INLINE void clear_grad(const Side& side, int64_t dim, int64_t panel) {
  float* const grads[] = {side.grad, side.turned_grad};
  for (float* grad : grads)
    for (int64_t column = 0; grad && column < dim; column += kPanel) {
      float* sums = grad + column * side.padded_rows + panel * kPanel * kPanel;
      for (int64_t at = 0; at < kPanel * kPanel; at += kLanes) store(sums + at, Vec{});
    }
}

// What the backward needs of a row: with P its softmax, whose log-sum-exp is given, its share of G is gradient * P.
// When bounded, e_ij = exp(l_ij - |scale|) is formed but once, and weight turns it into that share. A row with nothing
// to sum has a log-sum-exp of -inf.
SSLK_INLINE void prepare_gradient(const Logits& logits, const Side& side, int64_t row, double gradient,
                                  double logsumexp) {
  const bool empty = logsumexp < -1e300;
  const double offset = empty ? 0 : logsumexp * kLog2E, bound = logits.bound2 / kLog2E;
  const double weight = logits.bounded ? gradient * __builtin_exp(bound - logsumexp) : gradient;
  side.weight[row] = empty ? 0 : plain_nan(weight);
  side.logsumexp2[row] = static_cast<float>(offset);
  side.logsumexp2_low[row] = static_cast<float>(offset - side.logsumexp2[row]);
}
SSLK_INLINE void clear_gradient(const Side& side, int64_t row) {
  side.weight[row] = side.logsumexp2[row] = side.logsumexp2_low[row] = 0;
}

// The accumulated gradient of a row, columns [column, column + count), which is a multiple of kPanel or ends the row.
SSLK_INLINE void read_grad(const Side& side, int64_t row, int64_t column, int64_t count, float* out) {
  for (int64_t c = 0; c < count; c += kPanel) {
    const float* tiles = side.grad + (column + c) * side.padded_rows + row * kPanel;
    const int64_t width = min(kPanel, count - c);
    for (int64_t k = 0; k < width; k++) out[c + k] = tiles[k];
  }
}

}  // namespace sslkernels::SSLK_ISA

// NT-Xent's rows before and after the tiles, and its table of loops. Compiled once per instruction set.
#pragma once
#include "infonce.h"
#include "online_tiles.h"

namespace sslkernels::SSLK_ISA {

template <bool kBf16>
void pack(const NtXentJob& job, int64_t panel, bool backward, void* scratch) {
  auto& s = *static_cast<PackScratch<kBf16>*>(scratch);
  double cosine[kPanel / 2] = {};
  pack_panel<kBf16>(job.in, job.z, job.logits.words, panel, s, [&](int64_t /*column*/, int64_t count) {
    for (int64_t r = 0; !backward && r < kPanel; r += 2)
      cosine[r / 2] += dot(s.rows + r * kChunkStride, s.rows + (r + 1) * kChunkStride, count);
  });
  if (!backward) {
    clear_sums(job.logits, job.z, panel);
    for (int64_t r = 0; r < kPanel; r++) {
      const int64_t pair = panel * kPanel + r / 2 * 2;
      job.cosine[panel * kPanel + r] = cosine[r / 2] * job.z.residual[pair] * job.z.residual[pair + 1];
    }
    return;
  }
  clear_grad(job.z, job.in.dim, panel);
  for (int64_t row = panel * kPanel; row < (panel + 1) * kPanel; row++) {
    clear_gradient(job.z, row);
    if (row >= job.z.rows) continue;
    const int64_t at = job.output_row(row);
    prepare_gradient(job.logits, job.z, row, job.grad_loss[at] / job.grad_scale, job.saved_logsumexp[at]);
  }
}

// Closes the forward for the rows of a panel: adds the positive, apart and in float64, to the sum of its negatives.
inline void forward_rows(const NtXentJob& job, int64_t panel, void* /*scratch*/) {
  for (int64_t row = panel * kPanel; row < min((panel + 1) * kPanel, job.z.rows); row++) {
    const int64_t at = job.output_row(row);
    const double positive = job.cosine[row] / job.temperature;
    const double offset = (job.bounded ? job.logits.bound2 : job.z.maxima[row]) / kLog2E;
    const double top = offset > positive ? offset : positive;
    const double others = job.z.sums[row] * __builtin_exp(offset - top), own = __builtin_exp(positive - top);
    double loss = others < own ? __builtin_log1p(others / own) : __builtin_log(others + own) + top - positive;
    job.logsumexp[at] = loss + positive;
    if (job.positive_weight) {
      job.logsumexp[at] = job.z.rows > 2 ? __builtin_log(static_cast<double>(job.z.sums[row])) + offset : 0;
      loss = job.logsumexp[at] - job.positive_weight[at] * positive;
    }
    job.loss[at] = static_cast<float>(loss);
    job.positive[at] = static_cast<float>(positive);
    if (job.top1) job.hit[at] = job.logits.own_logit[row] > job.z.maxima[row];
  }
}

// Gradient with respect to two rows of Z, chunk by chunk: the tiles' part, and the positive's, which is added last and
// in fp32 so that nothing cancels.
SSLK_INLINE void gradient_chunk(const NtXentJob& job, int64_t row, int64_t column, int64_t count, double positive,
                                float (*z)[kChunk], float (*g)[kChunk]) {
  const float scale = static_cast<float>(job.grad_scale / job.temperature), partner = static_cast<float>(positive);
  for (int64_t v = 0; v < 2; v++) read_row(job.in, row + v, column, count, job.z.scale[row + v], z[v]);
  for (int64_t v = 0; v < 2; v++) {
    read_grad(job.z, row + v, column, count, g[v]);
    for (int64_t c = 0; c < count; c++) g[v][c] = scale * g[v][c] + partner * z[1 - v][c];
  }
}

// Closes the backward for the pairs of a panel: through the temperature and the normalisation, into the input's dtype.
inline void backward_rows(const NtXentJob& job, int64_t panel, void* scratch) {
  auto* z = static_cast<float (*)[kChunk]>(scratch);
  auto* g = z + 2;
  double grad_temperature = 0;
  gather_grad(job.z, job.in.dim, panel);
  for (int64_t row = panel * kPanel; row < min((panel + 1) * kPanel, job.z.rows); row += 2) {
    double positive = 0;  // 1 - p of the positive is -expm1(-loss), exact when p is nearly 1
    for (int64_t v = 0; v < 2; v++) {
      const int64_t at = job.output_row(row + v);
      const double pull = job.positive_weight ? -static_cast<double>(job.positive_weight[at])
                                              : __builtin_expm1(-static_cast<double>(job.saved_loss[at]));
      positive += job.grad_loss[at] * pull / job.temperature;
    }
    double along[2] = {};
    for (int64_t column = 0; column < job.in.dim; column += kChunk) {
      const int64_t count = min(kChunk, job.in.dim - column);
      gradient_chunk(job, row, column, count, positive, z, g);
      for (int64_t v = 0; v < 2; v++) along[v] += dot(z[v], g[v], count);
    }
    grad_temperature -= (along[0] + along[1]) / (2 * job.temperature);
    for (int64_t column = 0; column < job.in.dim; column += kChunk) {
      const int64_t count = min(kChunk, job.in.dim - column);
      if (job.in.dim > kChunk) gradient_chunk(job, row, column, count, positive, z, g);
      for (int64_t v = 0; v < 2; v++) {
        const double scale = job.z.scale[row + v],
                     shrink = job.in.normalize && scale < 1 / kNormalizeEps ? along[v] : 0;
        with_storage(job.in.dtype, [&](auto type) {
          auto* out = static_cast<typename decltype(type)::Storage*>(job.grad_view[v]) + row / 2 * job.in.dim + column;
          for (int64_t c = 0; c < count; c++)
            out[c] = type.store(static_cast<float>(scale * (g[v][c] - shrink * z[v][c])));
        });
      }
    }
  }
  job.grad_temperature_parts[panel] = grad_temperature;
}

template <bool kBf16>
void forward_tile(const NtXentJob& job, int64_t i0, int64_t j0, void* scratch) {
  const TileConfig config;
  forward_logits<kBf16>(job.logits, job.z, job.z, i0, j0, false, scratch);
}
template <bool kBf16>
void backward_tile(const NtXentJob& job, int64_t i0, int64_t j0, void* scratch) {
  const TileConfig config;
  LogitTile<kBf16>{job.logits, job.z, job.z, *static_cast<TileScratch<kBf16>*>(scratch), i0, j0}.backward();
}

template <bool kBf16>
NtXentKernel kernel_of() {
  constexpr int64_t tiles = sizeof(TileScratch<kBf16>), packing = sizeof(PackScratch<kBf16>);
  return {packing_of<kBf16>(), tiles > packing ? tiles : packing,
          pack<kBf16>,         forward_tile<kBf16>,
          forward_rows,        backward_tile<kBf16>,
          backward_rows};
}

NtXentKernel nt_xent_kernel(bool bf16) { return bf16 && kHasBf16 ? kernel_of<kHasBf16>() : kernel_of<false>(); }

}  // namespace sslkernels::SSLK_ISA

// The contrastive core's table of loops. Compiled once per instruction set.
#pragma once
#include "contrast.h"
#include "online_tiles.h"
#include "sigmoid_tiles.h"

namespace sslkernels::SSLK_ISA {

// Packs a panel of a side and prepares what its rows need: a side has the arrays of its pass alone.
template <bool kBf16>
void pack_contrast(const ContrastJob& job, const ContrastSide& of, int64_t panel, void* scratch) {
  const Side& side = of.side;
  pack_panel<kBf16>(of.in, side, job.logits.words, panel, *static_cast<PackScratch<kBf16>*>(scratch),
                    [](int64_t, int64_t) {});
  for (int64_t row = panel * kPanel; side.id_low && row < (panel + 1) * kPanel; row++) {
    const int64_t id = row < side.rows ? of.ids[row] : 0;
    side.id_low[row] = static_cast<int32_t>(id);
    side.id_high[row] = static_cast<int32_t>(id >> 32);
  }
  if (side.sums) clear_sums(job.logits, side, panel);
  if (side.grad) clear_grad(side, of.in.dim, panel);
  for (int64_t row = panel * kPanel; side.weight && row < (panel + 1) * kPanel; row++) {
    clear_gradient(side, row);
    if (row >= side.rows || !of.gradient) continue;
    const double gradient = of.gradient[row] / job.largest_gradient;
    if (of.logsumexp)
      prepare_gradient(job.logits, side, row, gradient, of.logsumexp[row]);
    else
      side.weight[row] = plain_nan(gradient);
  }
}

template <bool kBf16>
void contrast_tile(const ContrastJob& job, Pass pass, const Side& a, const Side& b, int64_t i0, int64_t j0,
                   void* scratch) {
  const TileConfig config;
  if (pass == Pass::kForward) return forward_logits<kBf16>(job.logits, a, b, i0, j0, job.attract, scratch);
  LogitTile<kBf16> tile{job.logits, a, b, *static_cast<TileScratch<kBf16>*>(scratch), i0, j0};
  if (pass == Pass::kBackward) return tile.backward();
  SigmoidTile<kBf16> sigmoid{tile};
  pass == Pass::kSigmoidForward ? sigmoid.forward() : sigmoid.backward();
}

template <bool kBf16>
ContrastKernel contrast_kernel_of() {
  constexpr int64_t tiles = sizeof(TileScratch<kBf16>), packing = sizeof(PackScratch<kBf16>);
  return {packing_of<kBf16>(), tiles > packing ? tiles : packing, pack_contrast<kBf16>, contrast_tile<kBf16>,
          gather_grad};
}

ContrastKernel contrast_kernel(bool bf16) {
  return bf16 && kHasBf16 ? contrast_kernel_of<kHasBf16>() : contrast_kernel_of<false>();
}

}  // namespace sslkernels::SSLK_ISA

"""The torch operator of the moving average: schema, and the Triton kernel under CUDA."""

from __future__ import annotations

import torch

from sslkernels import _library
from sslkernels.ops.ema import reference

# momentum: 0-dim fp64, read on the device of the tensors; found_inf: one element, nonzero skips the update
# bf16_copy: empty, or one for each teacher, written even where the teacher stays as it is
# seed: None rounds to nearest; step: 0-dim int64 on the device of the tensors
# keys: two integers a tensor, its index and that of its first element, or empty where nothing is drawn
torch.library.define(
    "sslkernels::ema_update_",
    "(Tensor(a!)[] teacher, Tensor[] student, Tensor momentum, Tensor? found_inf, Tensor(b!)[] bf16_copy,"
    " int? seed, Tensor? step, int[] keys) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)

torch.library.impl("sslkernels::ema_update_", "default", reference.ema_update_op_)


@torch.library.register_fake("sslkernels::ema_update_")
def _(teacher, student, momentum, found_inf, bf16_copy, seed, step, keys):
    return None


if _library.claim_cuda("ema_update_") == "triton":

    @torch.library.impl("sslkernels::ema_update_", "cuda")
    def _(*args):
        from sslkernels.ops.ema import kernels  # triton takes a while to import: only where it is used

        return kernels.ema_update_(*args)

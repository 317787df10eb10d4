"""The torch operators of the contrastive slice: schema, shapes, autograd, and the Triton kernels under CUDA."""

from __future__ import annotations

import torch

from sslkernels import _library, _operators
from sslkernels.ops.infonce import reference

# loss, positive: (2N,) in the dtype of temperature (fp32, or fp64 for fp64 inputs); top1_hit: (2N,) bool, or (0,)
# positive_weight: None, or (2N,) weights w in the dtype of temperature: the loss is then that of decoupled_nt_xent,
# logsumexp(negatives) - w * positive, and logsumexp that of the negatives, 0 where there are none
# logsumexp: (2N,) in fp64, because the backward subtracts it from logits as large as itself: 1 / |temperature|
# bounded: the caller knows that normalize holds and that 2 / |temperature| leaves exp(s - 1/|temperature|) in range
# bf16_matmul: fp32 inputs may be multiplied as bf16
torch.library.define(
    "sslkernels::nt_xent_fwd",
    "(Tensor z0, Tensor z1, Tensor temperature, Tensor? positive_weight, bool normalize, bool bounded, bool top1,"
    " bool bf16_matmul) -> (Tensor loss, Tensor logsumexp, Tensor positive, Tensor top1_hit)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "sslkernels::nt_xent_bwd",
    "(Tensor grad_loss, Tensor z0, Tensor z1, Tensor temperature, Tensor? positive_weight, Tensor loss,"
    " Tensor logsumexp, bool normalize, bool bounded, bool bf16_matmul)"
    " -> (Tensor grad_z0, Tensor grad_z1, Tensor grad_temperature)",
    tags=torch.Tag.pt2_compliant_tag,
)

nt_xent_fwd, _nt_xent_bwd = (_operators.operator(name, "nt_xent") for name in ("nt_xent_fwd", "nt_xent_bwd"))

torch.library.impl("sslkernels::nt_xent_fwd", "default", reference.nt_xent_fwd)
torch.library.impl("sslkernels::nt_xent_bwd", "default", reference.nt_xent_bwd)


@torch.library.register_fake("sslkernels::nt_xent_fwd")
def _(z0, z1, temperature, positive_weight, normalize, bounded, top1, bf16_matmul):
    rows = temperature.new_empty(2 * z0.shape[0])
    hits = z0.new_empty(2 * z0.shape[0] if top1 else 0, dtype=torch.bool)
    return rows, rows.new_empty(rows.shape, dtype=torch.float64), torch.empty_like(rows), hits


@torch.library.register_fake("sslkernels::nt_xent_bwd")
def _(grad_loss, z0, z1, temperature, positive_weight, loss, logsumexp, normalize, bounded, bf16_matmul):
    return z0.new_empty(z0.shape), z1.new_empty(z1.shape), torch.empty_like(temperature)


def _save(ctx, inputs, output):
    z0, z1, temperature, positive_weight, ctx.normalize, ctx.bounded, _, ctx.bf16_matmul = inputs
    loss, logsumexp, _, _ = output
    ctx.set_materialize_grads(False)  # zeros for every output that has no gradient cost a launch each
    ctx.save_for_backward(z0, z1, temperature, positive_weight, loss, logsumexp)


def _backward(ctx, grad_loss, *_):
    if grad_loss is None:
        grad_loss = torch.zeros_like(ctx.saved_tensors[4])
    grads = _nt_xent_bwd(grad_loss, *ctx.saved_tensors, ctx.normalize, ctx.bounded, ctx.bf16_matmul)
    return *grads, None, None, None, None, None


_operators.register_autograd("nt_xent_fwd", _backward, save=_save)
_operators.refuse_double_backward("nt_xent_bwd", "nt_xent")

if _library.claim_cuda("nt_xent_fwd") == "triton":

    @torch.library.impl("sslkernels::nt_xent_fwd", "cuda")
    def _(*args):
        from sslkernels.ops.infonce import kernels  # triton takes a while to import: only where it is used

        return kernels.nt_xent_fwd(*args)

    @torch.library.impl("sslkernels::nt_xent_bwd", "cuda")
    def _(*args):
        from sslkernels.ops.infonce import kernels

        return kernels.nt_xent_bwd(*args)

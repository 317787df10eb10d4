"""Rows divided by their lengths and the products of pairs of them, as one operator with C++ and Triton kernels.

Plain PyTorch takes a dozen calls for it and thirty for its gradient, which cost the host more than all the rest of a
loss of a few hundred rows. Where there is no kernel the losses call plain PyTorch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sslkernels import _library, _operators
from sslkernels.ops.infonce.reference import NORMALIZE_EPS

# x (N, D), and y (N, D) or None, of any floating-point dtype. x_rows, y_rows: the rows divided by max(length, 1e-12);
# similarity (N,): the products <x_rows[i], y_rows[i]>; all in fp32, or fp64 for fp64. Without y, (0, 0) and (0,).
SCHEMAS = {
    "unit_rows_fwd": "(Tensor x, Tensor? y) -> (Tensor x_rows, Tensor y_rows, Tensor similarity)",
    # grad_x and grad_y in the dtypes of x and y, grad_y (0, 0) without y; a gradient that is not given is 0
    "unit_rows_bwd": (
        "(Tensor? grad_x_rows, Tensor? grad_y_rows, Tensor? grad_similarity, Tensor x, Tensor? y)"
        " -> (Tensor grad_x, Tensor grad_y)"
    ),
}


def _compute(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def definition_fwd(x, y):
    """Default kernel of ``sslkernels::unit_rows_fwd``."""
    x_rows = F.normalize(x.to(_compute(x)), dim=1, eps=NORMALIZE_EPS).contiguous()
    if y is None:
        return x_rows, x_rows.new_empty(0, 0), x_rows.new_empty(0)
    y_rows = F.normalize(y.to(_compute(x)), dim=1, eps=NORMALIZE_EPS).contiguous()
    return x_rows, y_rows, (x_rows * y_rows).sum(dim=1)


def definition_bwd(grad_x_rows, grad_y_rows, grad_similarity, x, y):
    """Default kernel of ``sslkernels::unit_rows_bwd``: dx = (dz - z (z . dz)) / |x|; a clamped length is a constant."""
    x_rows, y_rows, _ = definition_fwd(x, y)
    pull = None if grad_similarity is None or y is None else grad_similarity[:, None]

    def through(grad, x, z, partner):
        total = torch.zeros_like(z) if grad is None else grad
        if pull is not None:
            total = total + pull * partner
        length = x.to(z.dtype).norm(dim=1, keepdim=True)
        radial = torch.where(length > NORMALIZE_EPS, (z * total).sum(dim=1, keepdim=True), 0)
        return ((total - z * radial) / length.clamp_min(NORMALIZE_EPS)).to(x.dtype).contiguous()

    grad_x = through(grad_x_rows, x, x_rows, y_rows)
    return grad_x, x.new_empty(0, 0) if y is None else through(grad_y_rows, y, y_rows, x_rows)


for _name, _schema in SCHEMAS.items():
    torch.library.define(f"sslkernels::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)
torch.library.impl("sslkernels::unit_rows_fwd", "default", definition_fwd)
torch.library.impl("sslkernels::unit_rows_bwd", "default", definition_bwd)

unit_rows_fwd, _unit_rows_bwd = (_operators.operator(name, "sslkernels") for name in SCHEMAS)


@torch.library.register_fake("sslkernels::unit_rows_fwd")
def _(x, y):
    x_rows = x.new_empty(x.shape, dtype=_compute(x))
    pairs = 0 if y is None else x.shape[0]
    return x_rows, x_rows.new_empty((0, 0) if y is None else y.shape), x_rows.new_empty(pairs)


@torch.library.register_fake("sslkernels::unit_rows_bwd")
def _(grad_x_rows, grad_y_rows, grad_similarity, x, y):
    return x.new_empty(x.shape), x.new_empty(0, 0) if y is None else y.new_empty(y.shape)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # zeros for what has no gradient cost a launch each
    ctx.save_for_backward(*inputs)


def _backward(ctx, *grads):
    x, y = ctx.saved_tensors
    grad_x, grad_y = _unit_rows_bwd(*grads, x, y)
    return grad_x, None if y is None else grad_y


_operators.register_autograd("unit_rows_fwd", _backward, save=_save)
_operators.refuse_double_backward("unit_rows_bwd", "sslkernels")

_owners = [_library.claim_cuda(name) for name in SCHEMAS]
if _owners[0] == "triton":

    @torch.library.impl("sslkernels::unit_rows_fwd", "cuda")
    def _(*args):
        from sslkernels.ops.infonce import unit_rows_kernels  # triton takes a while to import: only where it is used

        return unit_rows_kernels.unit_rows_fwd(*args)

    @torch.library.impl("sslkernels::unit_rows_bwd", "cuda")
    def _(*args):
        from sslkernels.ops.infonce import unit_rows_kernels

        return unit_rows_kernels.unit_rows_bwd(*args)


def serves(x: torch.Tensor, backend: str | None) -> bool:
    """Whether there are kernels for such rows."""
    if x.dtype == torch.float64:
        return False
    if _on_gpu(x):
        return _owners[0] == "triton" and backend in (None, "triton")
    return x.device.type == "cpu" and _library.extension is not None and backend in (None, "cpp")


def _on_gpu(x: torch.Tensor) -> bool:
    return x.is_cuda

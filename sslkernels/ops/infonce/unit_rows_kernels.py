"""Launches the Triton kernels of rows at unit length."""

from __future__ import annotations

import torch

from sslkernels.ops.infonce import unit_rows_op as operators
from sslkernels.ops.infonce.kernels import PAIRS, ROW_DEPTH, cdiv
from sslkernels.ops.infonce.unit_rows_triton import _unit_rows_bwd_kernel, _unit_rows_fwd_kernel


def unit_rows_fwd(x, y):
    """``sslkernels::unit_rows_fwd`` on a GPU."""
    if x.numel() == 0 or x.dtype == torch.float64:
        return operators.definition_fwd(x, y)
    x_rows = x.new_empty(x.shape, dtype=torch.float32)
    paired = y is not None
    y_rows = torch.empty_like(x_rows) if paired else x_rows.new_empty((0, 0))
    similarity = x_rows.new_empty(len(x) if paired else 0)
    with torch.cuda.device_of(x):
        _unit_rows_fwd_kernel[(cdiv(len(x), PAIRS),)](
            x_rows_ptr=x_rows, y_rows_ptr=y_rows, similarity_ptr=similarity, **_rows(x, y)
        )
    return x_rows, y_rows, similarity


def unit_rows_bwd(grad_x_rows, grad_y_rows, grad_similarity, x, y):
    """``sslkernels::unit_rows_bwd`` on a GPU."""
    if x.numel() == 0 or x.dtype == torch.float64:
        return operators.definition_bwd(grad_x_rows, grad_y_rows, grad_similarity, x, y)
    grad_x = x.new_empty(x.shape)
    paired = y is not None
    grad_y = y.new_empty(y.shape) if paired else x.new_empty((0, 0))
    if paired and grad_similarity is None:
        grad_similarity = x.new_zeros(len(x), dtype=torch.float32)
    given = [None if grad is None else grad.contiguous() for grad in (grad_x_rows, grad_y_rows)]
    with torch.cuda.device_of(x):
        _unit_rows_bwd_kernel[(cdiv(len(x), PAIRS), 1 + paired)](
            grad_x_rows_ptr=grad_x if given[0] is None else given[0],
            grad_y_rows_ptr=grad_x if given[1] is None else given[1],
            grad_similarity_ptr=grad_similarity if paired else grad_x, grad_x_ptr=grad_x, grad_y_ptr=grad_y,
            stride_similarity=grad_similarity.stride(0) if paired else 1, HAS_GRAD_X=given[0] is not None,
            HAS_GRAD_Y=given[1] is not None, **_rows(x, y),
        )  # fmt: skip
    return grad_x, grad_y


def _rows(x, y) -> dict:
    """Arguments of both kernels; where there is no y, x stands for it and is not read."""
    other = x if y is None else y
    return {
        "x_ptr": x,
        "y_ptr": other,
        "N": len(x),
        "stride_xn": x.stride(0),
        "stride_xd": x.stride(1),
        "stride_yn": other.stride(0),
        "stride_yd": other.stride(1),
        "PAIRED": y is not None,
        "D": x.shape[1],
        "ROWS": PAIRS,
        "DEPTH": ROW_DEPTH,
    }

"""The Triton kernels that divide rows by their lengths, those of two sides at once, and multiply the pairs."""

import triton
import triton.language as tl

from sslkernels.ops.infonce.shared_triton import EPS, _load_rows, _row_scales


@triton.jit(do_not_specialize=["N"])
def _unit_rows_fwd_kernel(
    x_ptr, y_ptr, x_rows_ptr, y_rows_ptr, similarity_ptr, N, stride_xn, stride_xd, stride_yn, stride_yd,
    PAIRED: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """x_rows (N, D) in fp32; with ``PAIRED`` y_rows too, and similarity (N,), the products of row i with row i."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    shrink_x, multiplier_x, _ = _row_scales(x_ptr, rows, stride_xn, stride_xd, N, D, True, ROWS, DEPTH)
    shrink_y, multiplier_y, _ = _row_scales(y_ptr, rows, stride_yn, stride_yd, N, D, PAIRED, ROWS, DEPTH)
    similarity = tl.zeros((ROWS,), tl.float32)
    for start in range(0, D, DEPTH):
        d = start + tl.arange(0, DEPTH)
        offsets = rows[:, None] * D + d[None, :]
        inside = (rows < N)[:, None] & (d < D)[None, :]
        x = _load_rows(x_ptr, rows, d, stride_xn, stride_xd, N, D) * shrink_x[:, None] * multiplier_x[:, None]
        tl.store(x_rows_ptr + offsets, x, mask=inside)
        if PAIRED:
            y = _load_rows(y_ptr, rows, d, stride_yn, stride_yd, N, D) * shrink_y[:, None] * multiplier_y[:, None]
            tl.store(y_rows_ptr + offsets, y, mask=inside)
            similarity += tl.sum(x * y, 1)
    if PAIRED:
        tl.store(similarity_ptr + rows, similarity, mask=rows < N)


@triton.jit
def _unit_grads(
    x_ptr, y_ptr, grad_x_rows_ptr, pull, scale_x, scale_y, rows, d, N, stride_xn, stride_xd, stride_yn, stride_yd,
    HAS_GRAD: tl.constexpr, PAIRED: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Elements d of the rows of x at unit length, and all that comes down to them."""
    shrink_x, multiplier_x = scale_x
    z = _load_rows(x_ptr, rows, d, stride_xn, stride_xd, N, D) * shrink_x[:, None] * multiplier_x[:, None]
    grad = tl.zeros_like(z)
    if HAS_GRAD:
        grad = _load_rows(grad_x_rows_ptr, rows, d, D, 1, N, D)
    if PAIRED:
        shrink_y, multiplier_y = scale_y
        y = _load_rows(y_ptr, rows, d, stride_yn, stride_yd, N, D) * shrink_y[:, None] * multiplier_y[:, None]
        grad += y * pull[:, None]
    return z, grad


@triton.jit
def _store_unit_grads(
    x_ptr, y_ptr, grad_x_rows_ptr, grad_x_ptr, pull, rows, N, stride_xn, stride_xd, stride_yn, stride_yd,
    HAS_GRAD: tl.constexpr, PAIRED: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """grad_x of these rows: what comes down to z, less its part along z, which no length lets through."""
    shrink_x, multiplier_x, inverse_x = _row_scales(x_ptr, rows, stride_xn, stride_xd, N, D, True, ROWS, DEPTH)
    shrink_y, multiplier_y, _ = _row_scales(y_ptr, rows, stride_yn, stride_yd, N, D, PAIRED, ROWS, DEPTH)
    along = tl.zeros((ROWS,), tl.float32)
    for start in range(0, D, DEPTH):
        z, grad = _unit_grads(
            x_ptr, y_ptr, grad_x_rows_ptr, pull, (shrink_x, multiplier_x), (shrink_y, multiplier_y), rows,
            start + tl.arange(0, DEPTH), N, stride_xn, stride_xd, stride_yn, stride_yd, HAS_GRAD, PAIRED, D,
        )  # fmt: skip
        along += tl.sum(z * grad, 1)
    radial = tl.where(inverse_x < 1 / EPS, along, 0.0)  # a clamped length is a constant
    for start in range(0, D, DEPTH):
        d = start + tl.arange(0, DEPTH)
        z, grad = _unit_grads(
            x_ptr, y_ptr, grad_x_rows_ptr, pull, (shrink_x, multiplier_x), (shrink_y, multiplier_y), rows, d, N,
            stride_xn, stride_xd, stride_yn, stride_yd, HAS_GRAD, PAIRED, D,
        )  # fmt: skip
        grad = (grad - z * radial[:, None]) * inverse_x[:, None]
        inside = (rows < N)[:, None] & (d < D)[None, :]
        tl.store(grad_x_ptr + rows[:, None] * D + d[None, :], grad.to(grad_x_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N"])
def _unit_rows_bwd_kernel(
    x_ptr, y_ptr, grad_x_rows_ptr, grad_y_rows_ptr, grad_similarity_ptr, grad_x_ptr, grad_y_ptr, N,
    stride_xn, stride_xd, stride_yn, stride_yd, stride_similarity,
    HAS_GRAD_X: tl.constexpr, HAS_GRAD_Y: tl.constexpr, PAIRED: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """grad_x (N, D), and in a second row of programs grad_y, through the lengths and, ``PAIRED``, the products."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    pull = tl.zeros((ROWS,), tl.float32)
    if PAIRED:
        pull = tl.load(grad_similarity_ptr + rows * stride_similarity, mask=rows < N, other=0.0)
    if tl.program_id(1) == 0:
        _store_unit_grads(
            x_ptr, y_ptr, grad_x_rows_ptr, grad_x_ptr, pull, rows, N, stride_xn, stride_xd, stride_yn, stride_yd,
            HAS_GRAD_X, PAIRED, D, ROWS, DEPTH,
        )  # fmt: skip
    else:
        _store_unit_grads(
            y_ptr, x_ptr, grad_y_rows_ptr, grad_y_ptr, pull, rows, N, stride_yn, stride_yd, stride_xn, stride_xd,
            HAS_GRAD_Y, PAIRED, D, ROWS, DEPTH,
        )  # fmt: skip

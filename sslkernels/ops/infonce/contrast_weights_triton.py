"""The Triton kernel with which the backward of the contrastive core begins: what each softmax is worth."""

import triton
import triton.language as tl

from sslkernels.ops.infonce.shared_triton import LOG2_E, MIN_NORMAL


@triton.jit
def _largest(grad_ptr, N, stride_grad, ROWS: tl.constexpr):
    """The largest |grad|."""
    largest = tl.zeros((ROWS,), tl.float64)
    for start in range(0, N, ROWS):
        rows = tl.cast(start, tl.int64) + tl.arange(0, ROWS)
        largest = tl.maximum(largest, tl.abs(tl.load(grad_ptr + rows * stride_grad, mask=rows < N, other=0.0)))
    return tl.max(largest, 0)


@triton.jit
def _store_weights(
    grad_ptr, lse_ptr, weights_ptr, peak, size, rows, N, stride_grad, SIGMOID: tl.constexpr, BOUNDED: tl.constexpr
):  # fmt: skip
    """weights (N, 2), weight and base: weight exp(|scale| (similarity - base)) is grad / peak times the softmax.

    The weight is 0 where nothing takes part, and NaN where the log-sum-exp is. ``SIGMOID``: it is grad / peak.
    """
    mask = rows < N
    grad = tl.load(grad_ptr + rows * stride_grad, mask=mask, other=0.0) / tl.maximum(peak, MIN_NORMAL)
    base = tl.full((rows.shape[0],), 1.0, tl.float32)
    weight = grad.to(tl.float32)
    if not SIGMOID:
        lse = tl.load(lse_ptr + rows, mask=mask, other=-float("inf"))
        some = lse != -float("inf")
        lse = tl.where(some, lse, 0.0)
        if not BOUNDED:
            base = tl.maximum(tl.minimum(lse / tl.maximum(size, MIN_NORMAL), 2.0**64), -(2.0**64)).to(tl.float32)
        exponent = (base.to(tl.float64) * size - lse) * LOG2_E
        whole = tl.floor(exponent)  # apart, since fp32 would round a large exponent
        power = tl.exp2((exponent - whole).to(tl.float32)) * tl.exp2(whole.to(tl.float32))
        weight = tl.where(some, grad.to(tl.float32) * power, 0.0)
    tl.store(weights_ptr + 2 * rows, weight, mask=mask)
    tl.store(weights_ptr + 2 * rows + 1, base, mask=mask)


@triton.jit(do_not_specialize=["N", "M"])
def _contrast_bwd_weights_kernel(
    grad_rows_ptr, lse_rows_ptr, grad_columns_ptr, lse_columns_ptr, scale_ptr, row_weights_ptr, column_weights_ptr,
    peak_ptr, N, M, stride_rows, stride_columns,
    HAS_COLUMNS: tl.constexpr, SIGMOID: tl.constexpr, BOUNDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """row_weights (N, 2), column_weights (M, 2), zeros without ``HAS_COLUMNS``, and the peak () of all gradients.

    Program (i, 0) takes ROWS rows, (i, 1) as many columns. Each looks for the peak itself: no launch is needed before.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    size = tl.abs(tl.load(scale_ptr)).to(tl.float64)
    peak = _largest(grad_rows_ptr, N, stride_rows, ROWS)
    if HAS_COLUMNS:
        peak = tl.maximum(peak, _largest(grad_columns_ptr, M, stride_columns, ROWS))
    if tl.program_id(1) == 0:
        if tl.program_id(0) == 0:
            tl.store(peak_ptr, peak)
        _store_weights(
            grad_rows_ptr, lse_rows_ptr, row_weights_ptr, peak, size, rows, N, stride_rows, SIGMOID, BOUNDED
        )  # fmt: skip
    elif HAS_COLUMNS:
        _store_weights(
            grad_columns_ptr, lse_columns_ptr, column_weights_ptr, peak, size, rows, M, stride_columns, SIGMOID,
            BOUNDED,
        )  # fmt: skip
    else:
        tl.store(column_weights_ptr + 2 * rows, 0.0, mask=rows < M)
        tl.store(column_weights_ptr + 2 * rows + 1, 0.0, mask=rows < M)

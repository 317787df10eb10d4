"""What the Triton kernels of the contrastive slice share: constants, a logarithm, rows and their lengths."""

import triton
import triton.language as tl

from sslkernels.ops.infonce import reference

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
EPS = tl.constexpr(reference.NORMALIZE_EPS)
# a gradient tile G holds up to 2 * TILE_SCALE, within fp16; probabilities down to 2^-28 stay normal numbers there
TILE_SCALE = tl.constexpr(2.0**14)
MIN_NORMAL = tl.constexpr(2.0**-126)


@triton.jit
def _log1p(x):
    """log(1 + x) for x in [0, 1]; the hardware's logarithm has no relative accuracy near 1."""
    s = x / (2 + x)
    q = s * s
    series = 1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15 + q / 17)))
    return 2 * s * (1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * series))))


@triton.jit
def _load_rows(x_ptr, rows, d, stride_xn, stride_xd, N, D):
    """(ROWS, DEPTH) of x in fp32, zeros outside."""
    offsets = rows[:, None] * stride_xn + d.to(tl.int64)[None, :] * stride_xd
    mask = (rows < N)[:, None] & (d < D)[None, :]
    return tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _row_extent(x_ptr, rows, stride_xn, stride_xd, N, D, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """A power of two that brings the row's largest element to [1, 2), and its inverse; both are normal numbers."""
    largest = tl.zeros((ROWS,), tl.float32)
    for start in range(0, D, DEPTH):
        x = _load_rows(x_ptr, rows, start + tl.arange(0, DEPTH), stride_xn, stride_xd, N, D)
        largest = tl.maximum(largest, tl.max(tl.abs(x), 1))
    exponent = largest.to(tl.int32, bitcast=True) & 0x7F800000
    exponent = tl.minimum(tl.maximum(exponent, 1 << 23), 252 << 23)
    return ((254 << 23) - exponent).to(tl.float32, bitcast=True), exponent.to(tl.float32, bitcast=True)


@triton.jit
def _row_scales(
    x_ptr, rows, stride_xn, stride_xd, N, D, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr
):
    """shrink: a power of two that brings the row's largest element to [1, 2). z = x * shrink * multiplier.

    inverse_norm: 1 / max(|x|, EPS).
    """
    if not NORMALIZE:
        one = tl.full((ROWS,), 1.0, tl.float32)
        return one, one, one
    shrink, grow = _row_extent(x_ptr, rows, stride_xn, stride_xd, N, D, ROWS, DEPTH)
    squares = tl.zeros((ROWS,), tl.float32)
    for start in range(0, D, DEPTH):
        x = _load_rows(x_ptr, rows, start + tl.arange(0, DEPTH), stride_xn, stride_xd, N, D) * shrink[:, None]
        squares += tl.sum(x * x, 1)
    norm = tl.sqrt_rn(squares)
    regular = norm * grow > EPS
    multiplier = tl.where(regular, tl.div_rn(1.0, norm), grow * (1 / EPS))
    inverse_norm = tl.where(regular, tl.div_rn(shrink, norm), 1 / EPS)
    return shrink, multiplier, inverse_norm

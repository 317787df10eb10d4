"""The Triton kernels of NT-Xent: of the 2N x 2N logits only tiles exist.

`_nt_xent_pack_kernel` first copies the rows of both views into one contiguous array, padded with zeros to whole tiles
and scaled row by row with a power of two. That is exact, keeps every product within fp32 and every element within
fp16, and leaves the tile kernels without strides and masked loads. z = packed * multiplier, applied in fp32 to the
products. A tile never crosses the views, so that a row meets itself or its positive exactly where both have the same
index within their view: one mask leaves both out. The positives are added apart, in fp32. Logits are in base 2.

Row r of the 2 * padded packed rows is row r of z0, or row r - padded of z1.
"""

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
def _one_minus_exp(x):
    """1 - exp(-x) for x >= 0, without cancellation."""
    series = 1 - x / 2 * (1 - x / 3 * (1 - x / 4 * (1 - x / 5 * (1 - x / 6 * (1 - x / 7 * (1 - x / 8))))))
    return tl.where(x < 0.5, x * series, 1 - tl.exp(-x))


@triton.jit
def _row_losses(log2_negatives, positive):
    """Loss from the logarithm of the negatives' sum and the positive logit, both in base 2."""
    excess = (log2_negatives - positive) * LN_2
    return tl.maximum(excess, 0) + _log1p(tl.exp(-tl.abs(excess)))


@triton.jit
def _load_rows(x_ptr, rows, d, stride_xn, stride_xd, N, D):
    """(ROWS, DEPTH) of x in fp32, zeros outside."""
    offsets = rows[:, None] * stride_xn + d.to(tl.int64)[None, :] * stride_xd
    mask = (rows < N)[:, None] & (d < D)[None, :]
    return tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)


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
    largest = tl.zeros((ROWS,), tl.float32)
    for start in range(0, D, DEPTH):
        x = _load_rows(x_ptr, rows, start + tl.arange(0, DEPTH), stride_xn, stride_xd, N, D)
        largest = tl.maximum(largest, tl.max(tl.abs(x), 1))
    exponent = largest.to(tl.int32, bitcast=True) & 0x7F800000
    exponent = tl.minimum(tl.maximum(exponent, 1 << 23), 252 << 23)  # the inverse, too, is a normal number
    grow = exponent.to(tl.float32, bitcast=True)
    shrink = ((254 << 23) - exponent).to(tl.float32, bitcast=True)
    squares = tl.zeros((ROWS,), tl.float32)
    for start in range(0, D, DEPTH):
        x = _load_rows(x_ptr, rows, start + tl.arange(0, DEPTH), stride_xn, stride_xd, N, D) * shrink[:, None]
        squares += tl.sum(x * x, 1)
    norm = tl.sqrt_rn(squares)
    regular = norm * grow > EPS
    multiplier = tl.where(regular, tl.div_rn(1.0, norm), grow * (1 / EPS))
    inverse_norm = tl.where(regular, tl.div_rn(shrink, norm), 1 / EPS)
    return shrink, multiplier, inverse_norm


@triton.jit(do_not_specialize=["N"])
def _nt_xent_pack_kernel(
    z0_ptr, z1_ptr, packed_ptr, multiplier_ptr, inverse_norm_ptr, similarity_ptr, N, padded,
    stride_z0n, stride_z0d, stride_z1n, stride_z1d,
    NORMALIZE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """packed (2, padded, WIDTH), multiplier and inverse_norm (2, padded), similarity of each pair (padded,)."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    shrink0, multiplier0, inverse0 = _row_scales(z0_ptr, rows, stride_z0n, stride_z0d, N, D, NORMALIZE, ROWS, DEPTH)
    shrink1, multiplier1, inverse1 = _row_scales(z1_ptr, rows, stride_z1n, stride_z1d, N, D, NORMALIZE, ROWS, DEPTH)
    similarity = tl.zeros((ROWS,), tl.float32)
    for start in range(0, WIDTH, DEPTH):
        d = start + tl.arange(0, DEPTH)
        x0 = _load_rows(z0_ptr, rows, d, stride_z0n, stride_z0d, N, D) * shrink0[:, None]
        x1 = _load_rows(z1_ptr, rows, d, stride_z1n, stride_z1d, N, D) * shrink1[:, None]
        similarity += tl.sum(x0 * x1, 1)
        offsets = rows[:, None] * WIDTH + d[None, :]
        tl.store(packed_ptr + offsets, x0.to(packed_ptr.dtype.element_ty))
        tl.store(packed_ptr + padded.to(tl.int64) * WIDTH + offsets, x1.to(packed_ptr.dtype.element_ty))
    tl.store(similarity_ptr + rows, similarity * multiplier0 * multiplier1)
    tl.store(multiplier_ptr + rows, multiplier0)
    tl.store(multiplier_ptr + padded + rows, multiplier1)
    tl.store(inverse_norm_ptr + rows, inverse0)
    tl.store(inverse_norm_ptr + padded + rows, inverse1)


@triton.jit
def _products(
    packed_ptr, row_start, column_start, D: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """(ROWS, COLUMNS) inner products of packed rows, in fp32."""
    d = tl.arange(0, DEPTH)[None, :]
    row_ptrs = packed_ptr + row_start * WIDTH + tl.arange(0, ROWS)[:, None] * WIDTH + d
    column_ptrs = packed_ptr + column_start * WIDTH + tl.arange(0, COLUMNS)[:, None] * WIDTH + d
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, D, DEPTH):
        a = tl.load(row_ptrs + start)
        b = tl.load(column_ptrs + start)
        products = tl.dot(a, tl.trans(b), products, input_precision="ieee")
    return products


@triton.jit
def _within_view(start, padded):
    return tl.where(start >= padded, start - padded, start)


@triton.jit
def _negatives(rows, columns, N):
    """Where a tile of logits holds negatives of its rows: not the row itself, not its positive, no padding."""
    return (rows[:, None] != columns[None, :]) & (columns < N)[None, :]


@triton.jit(do_not_specialize=["N"])
def _nt_xent_fwd_triangle_kernel(
    packed_ptr, multiplier_ptr, temperature_ptr, sums_ptr, N, padded,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """sums (2, padded) += exp(logit - 1/|temperature|) over the negatives. Needs normalised rows.

    Program p takes tile (i, i + k mod T) with i = p mod T, k = p // T. T is even, so T (T + 1) / 2 programs meet every
    unordered pair of the T blocks once.
    """
    blocks = 2 * (padded // BLOCK)
    i = tl.program_id(0) % blocks
    j = (i + tl.program_id(0) // blocks) % blocks
    row_start = i.to(tl.int64) * BLOCK
    column_start = j.to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    scale = LOG2_E / tl.load(temperature_ptr)
    row_factor = tl.load(multiplier_ptr + row_start + offsets) * scale
    column_factor = tl.load(multiplier_ptr + column_start + offsets)
    logits = _products(packed_ptr, row_start, column_start, D, WIDTH, BLOCK, BLOCK, DEPTH)
    logits *= row_factor[:, None] * column_factor[None, :]
    rows = _within_view(row_start, padded) + offsets
    keep = _negatives(rows, _within_view(column_start, padded) + offsets, N) & (rows < N)[:, None]
    terms = tl.where(keep, tl.exp2(logits - tl.abs(scale)), 0.0)
    tl.atomic_add(sums_ptr + row_start + offsets, tl.sum(terms, 1), sem="relaxed")
    if i != j:
        tl.atomic_add(sums_ptr + column_start + offsets, tl.sum(terms, 0), sem="relaxed")


@triton.jit(do_not_specialize=["N"])
def _nt_xent_fwd_finish_kernel(
    sums_ptr, similarity_ptr, temperature_ptr, loss_ptr, logsumexp_ptr, positive_ptr, N, padded, ROWS: tl.constexpr
):
    """The (2N,) outputs from the sums of the triangle."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = rows < 2 * N
    second = rows >= N
    temperature = tl.load(temperature_ptr)
    sums = tl.load(sums_ptr + rows + tl.where(second, padded - N, 0), mask=mask, other=1.0)
    similarity = tl.load(similarity_ptr + rows - tl.where(second, N, 0), mask=mask, other=0.0)
    bound = tl.abs(LOG2_E / temperature)
    loss = _row_losses(tl.log2(sums) + bound, similarity * (LOG2_E / temperature))
    positive = similarity / temperature
    tl.store(loss_ptr + rows, loss, mask=mask)
    tl.store(logsumexp_ptr + rows, positive + loss, mask=mask)
    tl.store(positive_ptr + rows, positive, mask=mask)


@triton.jit(do_not_specialize=["N"])
def _nt_xent_fwd_rows_kernel(
    packed_ptr, multiplier_ptr, similarity_ptr, temperature_ptr, loss_ptr, logsumexp_ptr, positive_ptr, top1_ptr,
    N, padded,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The (2N,) outputs, one program for ROWS of them, with a running maximum: any temperature, deterministic."""
    row_start = tl.program_id(0).to(tl.int64) * ROWS
    local_start = _within_view(row_start, padded)
    rows = local_start + tl.arange(0, ROWS)
    offsets = tl.arange(0, COLUMNS)
    temperature = tl.load(temperature_ptr)
    scale = LOG2_E / temperature
    row_factor = tl.load(multiplier_ptr + row_start + tl.arange(0, ROWS)) * scale
    peak = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, 2 * padded, COLUMNS):
        column_start = tl.cast(start, tl.int64)
        column_factor = tl.load(multiplier_ptr + column_start + offsets)
        logits = _products(packed_ptr, row_start, column_start, D, WIDTH, ROWS, COLUMNS, DEPTH)
        logits *= row_factor[:, None] * column_factor[None, :]
        columns = _within_view(column_start, padded) + offsets
        logits += tl.where(columns < N, 0.0, -float("inf"))[None, :]
        logits = tl.where(rows[:, None] != columns[None, :], logits, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # rows without negatives so far
        total = total * tl.exp2(peak - shift) + tl.sum(tl.exp2(logits - shift[:, None]), 1)
        peak = new_peak

    # top1 compares products of the same tiling, so that equal vectors tie
    tile_positive = tl.zeros((ROWS,), tl.float32)
    partner_start = tl.where(row_start < padded, row_start + padded, row_start - padded)
    for start in range(0, ROWS, COLUMNS):
        column_factor = tl.load(multiplier_ptr + partner_start + start + offsets)
        logits = _products(packed_ptr, row_start, partner_start + start, D, WIDTH, ROWS, COLUMNS, DEPTH)
        logits *= row_factor[:, None] * column_factor[None, :]
        own = rows[:, None] == (local_start + start + offsets)[None, :]
        tile_positive += tl.sum(tl.where(own, logits, 0.0), 1)

    mask = rows < N
    outputs = rows + tl.where(row_start < padded, 0, N)
    similarity = tl.load(similarity_ptr + rows)
    loss = _row_losses(peak + tl.log2(total), similarity * scale)
    positive = similarity / temperature
    tl.store(loss_ptr + outputs, loss, mask=mask)
    tl.store(logsumexp_ptr + outputs, positive + loss, mask=mask)
    tl.store(positive_ptr + outputs, positive, mask=mask)
    tl.store(top1_ptr + outputs, tile_positive > peak, mask=mask)


@triton.jit
def _row_weights(
    grad_loss_ptr, logsumexp_ptr, rows, second, stride_grad_loss, inverse_peak, bound, N, BOUNDED: tl.constexpr
):
    """Weight w_i and shift b_i such that w_i exp2(logit - b_i) is row i's share of dL/dlogit, up to the peak weight.

    With a fixed bound all shifts are equal, so that one exp2 serves the row and the column.
    """
    mask = rows < N
    index = rows + tl.where(second, N, 0)
    weight = tl.load(grad_loss_ptr + index * stride_grad_loss, mask=mask, other=0.0) * inverse_peak
    shift = tl.load(logsumexp_ptr + index, mask=mask, other=0.0) * LOG2_E
    if BOUNDED:
        weight *= tl.exp2(bound - shift)
    return weight, shift


@triton.jit(do_not_specialize=["N"])
def _nt_xent_bwd_kernel(
    packed_ptr, multiplier_ptr, temperature_ptr, grad_loss_ptr, peak_ptr, logsumexp_ptr, grad_z_ptr, N, padded,
    stride_grad_loss,
    BOUNDED: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, GRAD_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """grad_z (2, padded, WIDTH) from the negatives, in units of peak / (TILE_SCALE temperature).

    One program for ROWS x GRAD_WIDTH of it: G = w_i P_ij + w_j P_ji is formed again from each tile of logits.
    """
    row_start = (tl.program_id(0) // (WIDTH // GRAD_WIDTH)).to(tl.int64) * ROWS
    width_start = tl.program_id(0) % (WIDTH // GRAD_WIDTH) * GRAD_WIDTH
    rows = _within_view(row_start, padded) + tl.arange(0, ROWS)
    offsets = tl.arange(0, COLUMNS)
    width = width_start + tl.arange(0, GRAD_WIDTH)
    scale = LOG2_E / tl.load(temperature_ptr)
    bound = tl.abs(scale)
    inverse_peak = 1 / tl.maximum(tl.load(peak_ptr), MIN_NORMAL)
    row_factor = tl.load(multiplier_ptr + row_start + tl.arange(0, ROWS)) * scale
    row_weight, row_shift = _row_weights(
        grad_loss_ptr, logsumexp_ptr, rows, row_start >= padded, stride_grad_loss, inverse_peak, bound, N, BOUNDED
    )
    grad_z = tl.zeros((ROWS, GRAD_WIDTH), tl.float32)
    for start in range(0, 2 * padded, COLUMNS):
        column_start = tl.cast(start, tl.int64)
        columns = _within_view(column_start, padded) + offsets
        column_factor = tl.load(multiplier_ptr + column_start + offsets)
        column_weight, column_shift = _row_weights(
            grad_loss_ptr, logsumexp_ptr, columns, column_start >= padded, stride_grad_loss, inverse_peak, bound, N,
            BOUNDED,
        )  # fmt: skip
        logits = _products(packed_ptr, row_start, column_start, D, WIDTH, ROWS, COLUMNS, DEPTH)
        logits *= row_factor[:, None] * column_factor[None, :]
        if BOUNDED:
            g = tl.exp2(logits - bound) * (row_weight[:, None] + column_weight[None, :])
        else:
            g = row_weight[:, None] * tl.exp2(logits - row_shift[:, None])
            g += column_weight[None, :] * tl.exp2(logits - column_shift[None, :])
        g = tl.where(_negatives(rows, columns, N), g * (column_factor * TILE_SCALE)[None, :], 0.0)
        z = tl.load(packed_ptr + column_start * WIDTH + offsets[:, None] * WIDTH + width[None, :])
        grad_z = tl.dot(g.to(z.dtype), z, grad_z, input_precision="ieee")
    tl.store(grad_z_ptr + row_start * WIDTH + tl.arange(0, ROWS)[:, None] * WIDTH + width[None, :], grad_z)


@triton.jit
def _positive_weights(grad_loss_ptr, loss_ptr, index, mask, stride_grad_loss):
    weight = tl.load(grad_loss_ptr + index * stride_grad_loss, mask=mask, other=0.0)
    return weight * _one_minus_exp(tl.load(loss_ptr + index, mask=mask, other=0.0))


@triton.jit(do_not_specialize=["N"])
def _nt_xent_bwd_finish_kernel(
    z0_ptr, z1_ptr, grad_z_ptr, inverse_norm_ptr, temperature_ptr, grad_loss_ptr, peak_ptr, loss_ptr,
    grad_z0_ptr, grad_z1_ptr, along_ptr, N, padded,
    stride_z0n, stride_z0d, stride_z1n, stride_z1d, stride_grad_loss,
    NORMALIZE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """grad_z0, grad_z1 (N, D): the positives' part added, through the normalisation. along (2N,): z . dz by row."""
    row_start = tl.program_id(0).to(tl.int64) * ROWS
    second = row_start >= padded
    rows = _within_view(row_start, padded) + tl.arange(0, ROWS)
    mask = rows < N
    x_ptr, y_ptr = tl.where(second, z1_ptr, z0_ptr), tl.where(second, z0_ptr, z1_ptr)
    stride_xn, stride_yn = tl.where(second, stride_z1n, stride_z0n), tl.where(second, stride_z0n, stride_z1n)
    stride_xd, stride_yd = tl.where(second, stride_z1d, stride_z0d), tl.where(second, stride_z0d, stride_z1d)
    grad_x_ptr = tl.where(second, grad_z1_ptr, grad_z0_ptr)
    inverse_x = tl.load(inverse_norm_ptr + row_start + tl.arange(0, ROWS))
    inverse_y = tl.load(inverse_norm_ptr + tl.where(second, 0, padded) + rows)

    temperature = tl.load(temperature_ptr)
    scale = tl.maximum(tl.load(peak_ptr), MIN_NORMAL) / TILE_SCALE / temperature
    pull = _positive_weights(grad_loss_ptr, loss_ptr, rows, mask, stride_grad_loss)
    pull += _positive_weights(grad_loss_ptr, loss_ptr, rows + N, mask, stride_grad_loss)
    pull_y = pull / temperature * inverse_y
    grad_z_ptr += tl.where(second, padded, 0).to(tl.int64) * WIDTH
    along = tl.zeros((ROWS,), tl.float32)
    for start in range(0, D, DEPTH):
        d = start + tl.arange(0, DEPTH)
        y = _load_rows(y_ptr, rows, d, stride_yn, stride_yd, N, D)
        grad_z = _load_rows(grad_z_ptr, rows, d, WIDTH, 1, N, D) * scale - y * pull_y[:, None]
        x = _load_rows(x_ptr, rows, d, stride_xn, stride_xd, N, D)
        along += tl.sum(x * inverse_x[:, None] * grad_z, 1)
    tl.store(along_ptr + tl.where(second, N, 0) + rows, along, mask=mask)
    if NORMALIZE:
        radial = tl.where(inverse_x < 1 / EPS, along, 0.0) * inverse_x  # a clamped norm is a constant
    for start in range(0, D, DEPTH):
        d = start + tl.arange(0, DEPTH)
        y = _load_rows(y_ptr, rows, d, stride_yn, stride_yd, N, D)
        grad_x = _load_rows(grad_z_ptr, rows, d, WIDTH, 1, N, D) * scale - y * pull_y[:, None]
        if NORMALIZE:
            x = _load_rows(x_ptr, rows, d, stride_xn, stride_xd, N, D)
            grad_x = (grad_x - x * radial[:, None]) * inverse_x[:, None]
        inside = mask[:, None] & (d < D)[None, :]
        tl.store(grad_x_ptr + rows[:, None] * D + d[None, :], grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)

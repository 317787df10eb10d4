"""The Triton kernels of NT-Xent: of the 2N x 2N logits only tiles exist.

`_nt_xent_pack_kernel` first copies the rows of both views into one contiguous array, padded with zeros to whole tiles
and scaled row by row with a power of two. That is exact, keeps every product within fp32 and every element within
fp16, and leaves the tile kernels without strides and masked loads. z = packed * multiplier, applied in fp32 to the
products. A tile never crosses the views, so that a row meets itself or its positive exactly where both have the same
index within their view: one mask leaves both out. The positives are added apart, in fp32. Logits are in base 2.

At small temperatures a softmax near 0 or 1 is exact only if both passes find the same logits bit by bit. Hence the
symmetric order (a * b) * (row factor * column factor), the explicit fma, and the shifts in fp64.

Row r of the 2 * padded packed rows is row r of z0, or row r - padded of z1.
"""

import triton
import triton.language as tl

from sslkernels.ops.infonce.shared_triton import (
    EPS,
    LN_2,
    LOG2_E,
    MIN_NORMAL,
    TILE_SCALE,
    _load_rows,
    _log1p,
    _row_scales,
)


@triton.jit
def _one_minus_exp(x):
    """1 - exp(-x) for x >= 0, without cancellation."""
    series = 1 - x / 2 * (1 - x / 3 * (1 - x / 4 * (1 - x / 5 * (1 - x / 6 * (1 - x / 7 * (1 - x / 8))))))
    return tl.where(x < 0.5, x * series, 1 - tl.exp(-x))


@triton.jit
def _scale(temperature_ptr):
    """|log2(e) / temperature| and its sign: a logit in base 2 is sign * similarity * scale."""
    scale = LOG2_E / tl.load(temperature_ptr)
    return tl.abs(scale), tl.where(scale < 0, -1.0, 1.0)


@triton.jit
def _store_rows(
    similarity, sums, shift, scale, sign, temperature_ptr, positive_weight_ptr, decoupled, index, mask,
    loss_ptr, logsumexp_ptr, positive_ptr,
):  # fmt: skip
    """The outputs of rows whose negatives' exp2(logit - shift) have these sums.

    In fp64, since a loss is the difference of logits that may be much larger.
    """
    positive = similarity.to(tl.float64) * (sign * scale)
    negatives = shift.to(tl.float64) + tl.log2(sums)
    excess = (negatives - positive) * LN_2
    loss = tl.maximum(excess, 0.0) + _log1p(tl.exp(-tl.abs(excess.to(tl.float32))))
    logsumexp = positive * LN_2 + loss
    if decoupled:
        weight = tl.load(positive_weight_ptr + index, mask=mask, other=0.0)
        negatives = tl.where(sums == 0, 0.0, negatives)
        loss = (negatives - weight * positive) * LN_2
        logsumexp = negatives * LN_2
    tl.store(loss_ptr + index, loss.to(tl.float32), mask=mask)
    tl.store(logsumexp_ptr + index, logsumexp, mask=mask)
    tl.store(positive_ptr + index, similarity / tl.load(temperature_ptr), mask=mask)


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
    """Index within its view of a packed row; 32 bits, since tiles compare it element by element."""
    return tl.where(start >= padded, start - padded, start).to(tl.int32)


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
    scale, sign = _scale(temperature_ptr)
    row_factor = tl.load(multiplier_ptr + row_start + offsets)
    column_factor = tl.load(multiplier_ptr + column_start + offsets) * sign
    similarity = _products(packed_ptr, row_start, column_start, D, WIDTH, BLOCK, BLOCK, DEPTH)
    similarity *= row_factor[:, None] * column_factor[None, :]
    rows = _within_view(row_start, padded) + offsets
    keep = _negatives(rows, _within_view(column_start, padded) + offsets, N) & (rows < N)[:, None]
    terms = tl.where(keep, tl.exp2(tl.fma(similarity, scale, -scale)), 0.0)
    tl.atomic_add(sums_ptr + row_start + offsets, tl.sum(terms, 1), sem="relaxed")
    if i != j:
        tl.atomic_add(sums_ptr + column_start + offsets, tl.sum(terms, 0), sem="relaxed")


@triton.jit(do_not_specialize=["N", "decoupled"])
def _nt_xent_fwd_finish_kernel(
    sums_ptr, similarity_ptr, temperature_ptr, positive_weight_ptr, loss_ptr, logsumexp_ptr, positive_ptr,
    N, padded, decoupled, ROWS: tl.constexpr,
):  # fmt: skip
    """The (2N,) outputs from the sums of the triangle."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = rows < 2 * N
    second = rows >= N
    sums = tl.load(sums_ptr + rows + tl.where(second, padded - N, 0), mask=mask, other=1.0)
    similarity = tl.load(similarity_ptr + rows - tl.where(second, N, 0), mask=mask, other=0.0)
    scale, sign = _scale(temperature_ptr)
    _store_rows(
        similarity, sums, scale, scale, sign, temperature_ptr, positive_weight_ptr, decoupled, rows, mask,
        loss_ptr, logsumexp_ptr, positive_ptr,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "decoupled"])
def _nt_xent_fwd_rows_kernel(
    packed_ptr, multiplier_ptr, temperature_ptr, positive_weight_ptr, loss_ptr, logsumexp_ptr, positive_ptr, top1_ptr,
    N, padded, decoupled,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The (2N,) outputs, one program for ROWS of them, with a running maximum: any temperature, deterministic."""
    row_start = tl.program_id(0).to(tl.int64) * ROWS
    local_start = _within_view(row_start, padded)
    rows = local_start + tl.arange(0, ROWS)
    offsets = tl.arange(0, COLUMNS)
    scale, sign = _scale(temperature_ptr)
    row_factor = tl.load(multiplier_ptr + row_start + tl.arange(0, ROWS))
    peak = tl.full((ROWS,), -float("inf"), tl.float32)
    sums = tl.zeros((ROWS,), tl.float32)
    for start in range(0, 2 * padded, COLUMNS):
        column_start = tl.cast(start, tl.int64)
        columns = _within_view(column_start, padded) + offsets
        column_factor = tl.load(multiplier_ptr + column_start + offsets) * sign
        similarity = _products(packed_ptr, row_start, column_start, D, WIDTH, ROWS, COLUMNS, DEPTH)
        similarity *= row_factor[:, None] * column_factor[None, :]
        similarity += tl.where(columns < N, 0.0, -float("inf"))[None, :]
        similarity = tl.where(rows[:, None] != columns[None, :], similarity, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(similarity, 1))
        # differences of similarities, which round less than those of logits where the temperature is small
        base = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # there may be no negative so far
        sums = sums * tl.exp2((peak - base) * scale)
        sums += tl.sum(tl.exp2((similarity - base[:, None]) * scale), 1)
        peak = new_peak

    # products of the same tiling, so that equal vectors tie and their difference is 0 at any temperature
    positive = tl.zeros((ROWS,), tl.float32)
    partner_start = tl.where(row_start < padded, row_start + padded, row_start - padded)
    for start in range(0, ROWS, COLUMNS):
        column_factor = tl.load(multiplier_ptr + partner_start + start + offsets) * sign
        similarity = _products(packed_ptr, row_start, partner_start + start, D, WIDTH, ROWS, COLUMNS, DEPTH)
        similarity *= row_factor[:, None] * column_factor[None, :]
        own = rows[:, None] == (local_start + start + offsets)[None, :]
        positive += tl.sum(tl.where(own, similarity, 0.0), 1)

    mask = rows < N
    index = rows + tl.where(row_start < padded, 0, N)
    shift = tl.where(peak == -float("inf"), 0.0, peak).to(tl.float64) * scale
    _store_rows(
        positive * sign, sums, shift, scale, sign, temperature_ptr, positive_weight_ptr, decoupled, index, mask,
        loss_ptr, logsumexp_ptr, positive_ptr,
    )  # fmt: skip
    tl.store(top1_ptr + index, positive > peak, mask=mask)


@triton.jit(do_not_specialize=["N", "decoupled"])
def _nt_xent_bwd_weights_kernel(
    temperature_ptr, positive_weight_ptr, grad_loss_ptr, peak_ptr, loss_ptr, logsumexp_ptr,
    weight_ptr, shift_ptr, pull_ptr, N, padded, decoupled, stride_grad_loss, BOUNDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """weight and shift (2, padded): weight_i exp2(logit - shift_i) is row i's share of dL/dlogit, in units of the peak.

    With a fixed bound all shifts are equal to it, so that one exp2 serves the row and the column. pull (padded,) is
    what draws the two views of a pair together.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = rows < N
    scale, _ = _scale(temperature_ptr)
    peak = tl.maximum(tl.load(peak_ptr), MIN_NORMAL)
    pull = tl.zeros((ROWS,), tl.float32)
    for view in tl.static_range(2):
        index = rows + view * N
        grad_loss = tl.load(grad_loss_ptr + index * stride_grad_loss, mask=mask, other=0.0)
        share = _one_minus_exp(tl.load(loss_ptr + index, mask=mask, other=0.0))
        if decoupled:
            share = tl.load(positive_weight_ptr + index, mask=mask, other=0.0)
        pull += grad_loss * share
        logsumexp = tl.load(logsumexp_ptr + index, mask=mask, other=0.0) * LOG2_E  # fp64
        shift = tl.zeros((ROWS,), tl.float32) + scale if BOUNDED else logsumexp.to(tl.float32)
        weight = grad_loss / peak * tl.exp2((shift - logsumexp).to(tl.float32))
        tl.store(weight_ptr + view * padded + rows, weight)
        tl.store(shift_ptr + view * padded + rows, shift)
    tl.store(pull_ptr + rows, pull / tl.load(temperature_ptr))


@triton.jit(do_not_specialize=["N"])
def _nt_xent_bwd_kernel(
    packed_ptr, multiplier_ptr, temperature_ptr, weight_ptr, shift_ptr, grad_z_ptr, N, padded,
    BOUNDED: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, GRAD_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """grad_z (2, padded, WIDTH) from the negatives, in units of peak / (TILE_SCALE temperature).

    One program for ROWS x GRAD_WIDTH of it: G = w_i P_ij + w_j P_ji is formed again from each tile of logits.
    """
    row_start = (tl.program_id(0) // (WIDTH // GRAD_WIDTH)).to(tl.int64) * ROWS
    width = tl.program_id(0) % (WIDTH // GRAD_WIDTH) * GRAD_WIDTH + tl.arange(0, GRAD_WIDTH)
    rows = _within_view(row_start, padded) + tl.arange(0, ROWS)
    offsets = tl.arange(0, COLUMNS)
    scale, sign = _scale(temperature_ptr)
    row_factor = tl.load(multiplier_ptr + row_start + tl.arange(0, ROWS))
    row_weight = tl.load(weight_ptr + row_start + tl.arange(0, ROWS))
    row_shift = tl.load(shift_ptr + row_start + tl.arange(0, ROWS))
    grad_z = tl.zeros((ROWS, GRAD_WIDTH), tl.float32)
    for start in range(0, 2 * padded, COLUMNS):
        column_start = tl.cast(start, tl.int64)
        columns = _within_view(column_start, padded) + offsets
        column_factor = tl.load(multiplier_ptr + column_start + offsets)
        column_weight = tl.load(weight_ptr + column_start + offsets)
        similarity = _products(packed_ptr, row_start, column_start, D, WIDTH, ROWS, COLUMNS, DEPTH)
        similarity *= row_factor[:, None] * (column_factor * sign)[None, :]
        if BOUNDED:
            g = tl.exp2(tl.fma(similarity, scale, -scale)) * (row_weight[:, None] + column_weight[None, :])
        else:
            column_shift = tl.load(shift_ptr + column_start + offsets)
            g = row_weight[:, None] * tl.exp2(tl.fma(similarity, scale, -row_shift[:, None]))
            g += column_weight[None, :] * tl.exp2(tl.fma(similarity, scale, -column_shift[None, :]))
        g = tl.where(_negatives(rows, columns, N), g * (column_factor * TILE_SCALE)[None, :], 0.0)
        z = tl.load(packed_ptr + column_start * WIDTH + offsets[:, None] * WIDTH + width[None, :])
        grad_z = tl.dot(g.to(z.dtype), z, grad_z, input_precision="ieee")
    tl.store(grad_z_ptr + row_start * WIDTH + tl.arange(0, ROWS)[:, None] * WIDTH + width[None, :], grad_z)


@triton.jit(do_not_specialize=["N"])
def _nt_xent_bwd_finish_kernel(
    z0_ptr, z1_ptr, grad_z_ptr, inverse_norm_ptr, temperature_ptr, peak_ptr, pull_ptr,
    grad_z0_ptr, grad_z1_ptr, along_ptr, N, padded, stride_z0n, stride_z0d, stride_z1n, stride_z1d,
    NORMALIZE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """grad_z0, grad_z1 (N, D): the positives' part added, through the normalisation. along (2N,): z . dz by row."""
    row_start = tl.program_id(0).to(tl.int64) * ROWS
    second = row_start >= padded
    rows = _within_view(row_start, padded).to(tl.int64) + tl.arange(0, ROWS)
    mask = rows < N
    x_ptr, y_ptr = tl.where(second, z1_ptr, z0_ptr), tl.where(second, z0_ptr, z1_ptr)
    stride_xn, stride_yn = tl.where(second, stride_z1n, stride_z0n), tl.where(second, stride_z0n, stride_z1n)
    stride_xd, stride_yd = tl.where(second, stride_z1d, stride_z0d), tl.where(second, stride_z0d, stride_z1d)
    grad_x_ptr = tl.where(second, grad_z1_ptr, grad_z0_ptr)
    grad_z_ptr += tl.where(second, padded, 0).to(tl.int64) * WIDTH
    inverse_x = tl.load(inverse_norm_ptr + row_start + tl.arange(0, ROWS))
    inverse_y = tl.load(inverse_norm_ptr + tl.where(second, 0, padded) + rows)
    pull_y = tl.load(pull_ptr + rows) * inverse_y
    scale = tl.maximum(tl.load(peak_ptr), MIN_NORMAL) / TILE_SCALE / tl.load(temperature_ptr)

    along = tl.zeros((ROWS,), tl.float32)
    for start in range(0, D, DEPTH):
        d = start + tl.arange(0, DEPTH)
        x = _load_rows(x_ptr, rows, d, stride_xn, stride_xd, N, D)
        y = _load_rows(y_ptr, rows, d, stride_yn, stride_yd, N, D)
        grad = _load_rows(grad_z_ptr, rows, d, WIDTH, 1, N, D) * scale - y * pull_y[:, None]
        along += tl.sum(x * inverse_x[:, None] * grad, 1)
    tl.store(along_ptr + tl.where(second, N, 0) + rows, along, mask=mask)
    # a clamped norm is a constant
    radial = tl.where(inverse_x < 1 / EPS, along, 0.0) * inverse_x if NORMALIZE else tl.zeros_like(along)
    for start in range(0, D, DEPTH):
        d = start + tl.arange(0, DEPTH)
        x = _load_rows(x_ptr, rows, d, stride_xn, stride_xd, N, D)
        y = _load_rows(y_ptr, rows, d, stride_yn, stride_yd, N, D)
        grad = _load_rows(grad_z_ptr, rows, d, WIDTH, 1, N, D) * scale - y * pull_y[:, None]
        grad = (grad - x * radial[:, None]) * inverse_x[:, None]
        inside = mask[:, None] & (d < D)[None, :]
        tl.store(grad_x_ptr + rows[:, None] * D + d[None, :], grad.to(grad_x_ptr.dtype.element_ty), mask=inside)

"""The Triton kernels that move tokens and patches, ROWS rows of D columns by COLS columns at a time; R: rows in all."""

import triton
import triton.language as tl


@triton.jit
def _rows(R, LENGTH, ROWS: tl.constexpr):
    """A program's rows: which one of all, its sample, its place among the LENGTH of that, and whether it exists."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return row, row // LENGTH, row % LENGTH, row < R


@triton.jit
def _tile(start, column):
    """Offsets of a tile whose rows begin at `start`."""
    return start[:, None] + column[None, :]


@triton.jit
def _gather_tokens_fwd_kernel(
    x_ptr, ids_ptr, out_ptr, R, K, L, P, D, stride_xn, stride_xl,
    NAN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out[n, P + k] = x[n, P + ids[n, k]]; for ids outside [0, L) it is NaN, or 0 without NAN."""
    row, sample, place, in_rows = _rows(R, P + K, ROWS)
    column = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = in_rows[:, None] & (column < D)[None, :]
    chosen = place >= P
    token = tl.load(ids_ptr + sample * K + place - P, mask=in_rows & chosen, other=0)
    good = (chosen == 0) | (token >= 0) & (token < L)
    source = tl.where(chosen, P + token, place)
    x = tl.load(
        x_ptr + _tile(sample * stride_xn + source * stride_xl, column),
        mask=inside & good[:, None],
        other=float("nan") if NAN else 0.0,
    )
    tl.store(out_ptr + _tile(row * D, column), x, mask=inside)


@triton.jit
def _restore_tokens_fwd_kernel(
    x_ptr, ids_restore_ptr, mask_token_ptr, pos_ptr, out_ptr, R, K, L, P, D, POS, stride_xn, stride_xl,
    HAS_MASK_TOKEN: tl.constexpr, HAS_POS: tl.constexpr, COMPUTE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Kept tokens at their places, the mask token or 0 elsewhere, plus the last POS rows' positions."""
    row, sample, token, in_rows = _rows(R, P + L, ROWS)
    column = tl.program_id(1) * COLS + tl.arange(0, COLS)
    in_columns = column < D
    inside = in_rows[:, None] & in_columns[None, :]
    place = tl.load(ids_restore_ptr + sample * L + token - P, mask=in_rows & (token >= P), other=0)
    source = tl.where(token >= P, P + place, token)
    good = place >= 0
    kept = (token < P) | good & (place < K)
    out = tl.load(
        x_ptr + _tile(sample * stride_xn + source * stride_xl, column), mask=inside & kept[:, None], other=0.0
    )
    if HAS_MASK_TOKEN:
        mask_token = tl.load(mask_token_ptr + column, mask=in_columns, other=0.0)
        out = tl.where(kept[:, None], out, mask_token[None, :])
    if HAS_POS:
        position = token - (P + L - POS)
        pos = tl.load(pos_ptr + _tile(position * D, column), mask=inside & (position >= 0)[:, None], other=0.0)
        out = tl.where((position >= 0)[:, None], out.to(COMPUTE) + pos.to(COMPUTE), out.to(COMPUTE))
    out = tl.where(good[:, None], out, float("nan"))
    tl.store(out_ptr + _tile(row * D, column), out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _restore_tokens_bwd_kernel(
    grad_ptr, ids_restore_ptr, mask_token_sums_ptr, pos_sums_ptr, N, K, L, P, D, SAMPLES, stride_gn, stride_gl,
    HAS_MASK_TOKEN: tl.constexpr, HAS_POS: tl.constexpr, COMPUTE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Sums over SAMPLES samples of ROWS tokens: one row of mask_token_sums, and a row of pos_sums for each token."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLS + tl.arange(0, COLS)
    part = tl.program_id(2).to(tl.int64)
    inside = (token < P + L)[:, None] & (column < D)[None, :]
    listed = (token >= P) & (token < P + L)
    pos_sum = tl.zeros((ROWS, COLS), COMPUTE)
    removed_sum = tl.zeros((ROWS, COLS), COMPUTE)
    for sample in range(part * SAMPLES, tl.minimum((part + 1) * SAMPLES, N)):
        start = grad_ptr + sample * stride_gn
        grad = tl.load(start + _tile(token.to(tl.int64) * stride_gl, column), mask=inside, other=0.0).to(COMPUTE)
        if HAS_POS:
            pos_sum += grad
        if HAS_MASK_TOKEN:
            place = tl.load(ids_restore_ptr + sample * L + token - P, mask=listed, other=0)
            removed = listed & ((place < 0) | (place >= K))
            removed_sum += tl.where(removed[:, None], grad, 0.0)
    if HAS_MASK_TOKEN:
        row = part * tl.num_programs(0) + tl.program_id(0)
        tl.store(mask_token_sums_ptr + row * D + column, tl.sum(removed_sum, 0), mask=column < D)
    if HAS_POS:
        tl.store(pos_sums_ptr + _tile((part * (P + L) + token) * D, column), pos_sum, mask=inside)


@triton.jit
def _below(sorted_ptr, bound, K, mask):
    """How many of a row's K ascending ids are below each bound."""
    low = bound * 0
    high = tl.where(mask, low + K, 0)
    while tl.max(high - low) > 0:
        middle = (low + high) // 2
        searched = low < high
        below = tl.load(sorted_ptr + middle, mask=searched, other=0) < bound
        low = tl.where(searched & below, middle + 1, low)
        high = tl.where(searched & (below == 0), middle, high)
    return low


@triton.jit
def _sum_of_run(
    grad_ptr, sorted_ptr, order_ptr, sample, token, K, P, mask, column, in_columns, stride_gn, stride_gl,
    COMPUTE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """For each row the sum of the sample's gradients whose id is the token, in the order of their places."""
    sorted_ptr += sample * K
    first = _below(sorted_ptr, token, K, mask)
    count = _below(sorted_ptr, token + 1, K, mask) - first
    total = tl.zeros((ROWS, COLS), COMPUTE)
    for i in range(0, tl.max(count)):
        place = tl.load(order_ptr + sample * K + first + i, mask=i < count, other=0)
        start = sample * stride_gn + (P + place) * stride_gl
        grad = tl.load(grad_ptr + _tile(start, column), mask=(i < count)[:, None] & in_columns[None, :], other=0.0)
        total += grad.to(COMPUTE)
    return total


@triton.jit
def _gather_tokens_bwd_kernel(
    grad_ptr, sorted_ptr, order_ptr, out_ptr, R, K, L, P, D, stride_gn, stride_gl,
    COMPUTE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row, sample, token, in_rows = _rows(R, P + L, ROWS)
    column = tl.program_id(1) * COLS + tl.arange(0, COLS)
    in_columns = column < D
    total = _sum_of_run(
        grad_ptr, sorted_ptr, order_ptr, sample, token - P, K, P, in_rows & (token >= P), column, in_columns,
        stride_gn, stride_gl, COMPUTE, ROWS, COLS,
    )  # fmt: skip
    in_prefix = (in_rows & (token < P))[:, None] & in_columns[None, :]
    prefix = tl.load(grad_ptr + _tile(sample * stride_gn + token * stride_gl, column), mask=in_prefix, other=0.0)
    total = tl.where(in_prefix, prefix.to(COMPUTE), total)
    inside = in_rows[:, None] & in_columns[None, :]
    tl.store(out_ptr + _tile(row * D, column), total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _pixels(
    patch, element, GRID_H, GRID_W, stride_c, stride_t, stride_h, stride_w,
    PATCH_T: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr,
):  # fmt: skip
    """Offsets in an image of the elements (c, t, p, q) of its patches."""
    frame, line, across = patch // (GRID_H * GRID_W), patch // GRID_W % GRID_H, patch % GRID_W
    corner = frame * PATCH_T * stride_t + line * PATCH_H * stride_h + across * PATCH_W * stride_w
    q, p = element % PATCH_W, element // PATCH_W % PATCH_H
    t, c = element // (PATCH_W * PATCH_H) % PATCH_T, element // (PATCH_W * PATCH_H * PATCH_T)
    return _tile(corner, c * stride_c + t * stride_t + p * stride_h + q * stride_w)


@triton.jit
def _gather_patches_fwd_kernel(
    images_ptr, ids_ptr, out_ptr, R, K, L, D, GRID_H, GRID_W, stride_n, stride_c, stride_t, stride_h, stride_w,
    PATCH_T: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out[n, k] = patch ids[n, k] of image n; NaN for ids outside [0, L)."""
    row, sample, _, in_rows = _rows(R, K, ROWS)
    element = (tl.program_id(1) * COLS + tl.arange(0, COLS)).to(tl.int64)
    inside = in_rows[:, None] & (element < D)[None, :]
    patch = tl.load(ids_ptr + row, mask=in_rows, other=0)
    good = (patch >= 0) & (patch < L)
    pixels = _pixels(patch, element, GRID_H, GRID_W, stride_c, stride_t, stride_h, stride_w, PATCH_T, PATCH_H, PATCH_W)
    x = tl.load(images_ptr + (sample * stride_n)[:, None] + pixels, mask=inside & good[:, None], other=float("nan"))
    tl.store(out_ptr + _tile(row * D, element), x, mask=inside)


@triton.jit
def _gather_patches_bwd_kernel(
    grad_ptr, sorted_ptr, order_ptr, images_ptr, R, K, L, D, GRID_H, GRID_W, stride_gn, stride_gl,
    stride_n, stride_c, stride_t, stride_h, stride_w, PATCH_T: tl.constexpr, PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr, COMPUTE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Every patch of the images: the sum of its gradients, which is 0 where it was not chosen."""
    _, sample, patch, in_rows = _rows(R, L, ROWS)
    element = (tl.program_id(1) * COLS + tl.arange(0, COLS)).to(tl.int64)
    total = _sum_of_run(
        grad_ptr, sorted_ptr, order_ptr, sample, patch, K, 0, in_rows, element, element < D,
        stride_gn, stride_gl, COMPUTE, ROWS, COLS,
    )  # fmt: skip
    pixels = _pixels(patch, element, GRID_H, GRID_W, stride_c, stride_t, stride_h, stride_w, PATCH_T, PATCH_H, PATCH_W)
    tl.store(
        images_ptr + (sample * stride_n)[:, None] + pixels,
        total.to(images_ptr.dtype.element_ty),
        mask=in_rows[:, None] & (element < D)[None, :],
    )

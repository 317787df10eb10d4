"""The Triton kernels that move tokens and patches: of one sample, ROWS rows of the result by COLS of its D columns."""

import triton
import triton.language as tl


@triton.jit
def _tile(LENGTH, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A program's sample, and the rows, of which it has LENGTH, and columns of its tile."""
    blocks = (LENGTH + ROWS - 1) // ROWS
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLS + tl.arange(0, COLS)
    return (tl.program_id(0) // blocks).to(tl.int64), row.to(tl.int64), column


@triton.jit
def _gather_tokens_fwd_kernel(
    x_ptr, ids_ptr, out_ptr, K, L, P, D, stride_xn, stride_xl, fill, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """out[n, P + k] = x[n, P + ids[n, k]]; for ids outside [0, L) it is `fill`."""
    sample, row, column = _tile(P + K, ROWS, COLS)
    inside = (row < P + K)[:, None] & (column < D)[None, :]
    chosen = (row >= P) & (row < P + K)
    token = tl.load(ids_ptr + sample * K + row - P, mask=chosen, other=0)
    good = (chosen == 0) | (token >= 0) & (token < L)
    source = x_ptr + sample * stride_xn + (tl.where(chosen, P + token, row) * stride_xl)[:, None] + column[None, :]
    x = tl.load(source, mask=inside & good[:, None], other=fill)
    tl.store(out_ptr + sample * (P + K) * D + (row * D)[:, None] + column[None, :], x, mask=inside)


@triton.jit
def _restore_tokens_fwd_kernel(
    x_ptr, ids_restore_ptr, mask_token_ptr, pos_ptr, out_ptr, K, L, P, D, POS, stride_xn, stride_xl,
    HAS_MASK_TOKEN: tl.constexpr, HAS_POS: tl.constexpr, COMPUTE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Kept tokens at their places, the mask token or 0 elsewhere; and to the last POS rows their positions."""
    sample, row, column = _tile(P + L, ROWS, COLS)
    inside = (row < P + L)[:, None] & (column < D)[None, :]
    listed = (row >= P) & (row < P + L)
    place = tl.load(ids_restore_ptr + sample * L + row - P, mask=listed, other=0)
    kept = (listed == 0) | (place >= 0) & (place < K)
    source = x_ptr + sample * stride_xn + (tl.where(listed, P + place, row) * stride_xl)[:, None] + column[None, :]
    out = tl.load(source, mask=inside & kept[:, None], other=0.0)
    if HAS_MASK_TOKEN:
        mask_token = tl.load(mask_token_ptr + column, mask=column < D, other=0.0)
        out = tl.where(kept[:, None], out, mask_token[None, :])
    if HAS_POS:
        position = row - (P + L - POS)
        placed = (position >= 0)[:, None]
        pos = tl.load(pos_ptr + (position * D)[:, None] + column[None, :], mask=inside & placed, other=0.0)
        out = tl.where(placed, (out.to(COMPUTE) + pos.to(COMPUTE)).to(out.dtype), out)
    out = tl.where((place >= 0)[:, None], out, float("nan"))
    tl.store(out_ptr + sample * (P + L) * D + (row * D)[:, None] + column[None, :], out, mask=inside)


@triton.jit
def _restore_tokens_bwd_kernel(
    grad_ptr, ids_restore_ptr, mask_token_sums_ptr, pos_sums_ptr, N, K, L, P, D, SAMPLES, stride_gn, stride_gl,
    HAS_MASK_TOKEN: tl.constexpr, HAS_POS: tl.constexpr, COMPUTE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Sums over SAMPLES samples of ROWS tokens: a row of mask_token_sums, and for each token one of pos_sums."""
    part, row, column = _tile(P + L, ROWS, COLS)
    inside = (row < P + L)[:, None] & (column < D)[None, :]
    listed = (row >= P) & (row < P + L)
    source = grad_ptr + (row * stride_gl)[:, None] + column[None, :]
    pos_sum = tl.zeros((ROWS, COLS), COMPUTE)
    removed_sum = tl.zeros((ROWS, COLS), COMPUTE)
    for sample in range(part * SAMPLES, tl.minimum((part + 1) * SAMPLES, N)):
        grad = tl.load(source + sample * stride_gn, mask=inside, other=0.0).to(COMPUTE)
        if HAS_POS:
            pos_sum += grad
        if HAS_MASK_TOKEN:
            place = tl.load(ids_restore_ptr + sample * L + row - P, mask=listed, other=0)
            removed = listed & ((place < 0) | (place >= K))
            removed_sum += tl.where(removed[:, None], grad, 0.0)
    if HAS_MASK_TOKEN:
        block = tl.program_id(0).to(tl.int64)
        tl.store(mask_token_sums_ptr + block * D + column, tl.sum(removed_sum, 0), mask=column < D)
    if HAS_POS:
        tl.store(pos_sums_ptr + part * (P + L) * D + (row * D)[:, None] + column[None, :], pos_sum, mask=inside)


@triton.jit
def _below(ascending_ptr, bound, K):
    """How many of K ascending ids are below each bound."""
    low = bound * 0
    high = low + K
    while tl.max(high - low) > 0:
        middle = (low + high) // 2
        searched = low < high
        below = tl.load(ascending_ptr + middle, mask=searched, other=0) < bound
        low = tl.where(searched & below, middle + 1, low)
        high = tl.where(searched & (below == 0), middle, high)
    return low


@triton.jit
def _sum_of_run(
    grad_ptr, ascending_ptr, order_ptr, token, column, K, P, D, stride_gl,
    COMPUTE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """For each token the sum of a sample's gradients that have its id, in the order of their places."""
    first = _below(ascending_ptr, token, K)
    count = _below(ascending_ptr, token + 1, K) - first
    total = tl.zeros((ROWS, COLS), COMPUTE)
    for i in range(0, tl.max(count)):
        place = tl.load(order_ptr + first + i, mask=i < count, other=0)
        source = grad_ptr + ((P + place) * stride_gl)[:, None] + column[None, :]
        total += tl.load(source, mask=(i < count)[:, None] & (column < D)[None, :], other=0.0).to(COMPUTE)
    return total


@triton.jit
def _gather_tokens_bwd_kernel(
    grad_ptr, ascending_ptr, order_ptr, out_ptr, K, L, P, D, stride_gn, stride_gl,
    COMPUTE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """ascending: the ids of each sample, sorted; order: the places they had."""
    sample, row, column = _tile(P + L, ROWS, COLS)
    inside = (row < P + L)[:, None] & (column < D)[None, :]
    grad_ptr += sample * stride_gn
    total = _sum_of_run(
        grad_ptr, ascending_ptr + sample * K, order_ptr + sample * K, row - P, column, K, P, D, stride_gl,
        COMPUTE, ROWS, COLS,
    )  # fmt: skip
    in_prefix = (row < P)[:, None]
    source = grad_ptr + (row * stride_gl)[:, None] + column[None, :]
    prefix = tl.load(source, mask=inside & in_prefix, other=0.0)
    out = tl.where(in_prefix, prefix, total.to(prefix.dtype))
    tl.store(out_ptr + sample * (P + L) * D + (row * D)[:, None] + column[None, :], out, mask=inside)


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
    within = c.to(tl.int64) * stride_c + t.to(tl.int64) * stride_t + p.to(tl.int64) * stride_h
    return corner[:, None] + (within + q.to(tl.int64) * stride_w)[None, :]


@triton.jit
def _gather_patches_fwd_kernel(
    images_ptr, ids_ptr, out_ptr, K, L, D, GRID_H, GRID_W, stride_n, stride_c, stride_t, stride_h, stride_w,
    PATCH_T: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out[n, k] = patch ids[n, k] of image n; NaN for ids outside [0, L)."""
    sample, row, element = _tile(K, ROWS, COLS)
    inside = (row < K)[:, None] & (element < D)[None, :]
    patch = tl.load(ids_ptr + sample * K + row, mask=row < K, other=0)
    good = (patch >= 0) & (patch < L)
    pixels = _pixels(patch, element, GRID_H, GRID_W, stride_c, stride_t, stride_h, stride_w, PATCH_T, PATCH_H, PATCH_W)
    x = tl.load(images_ptr + sample * stride_n + pixels, mask=inside & good[:, None], other=float("nan"))
    tl.store(out_ptr + sample * K * D + (row * D)[:, None] + element[None, :], x, mask=inside)


@triton.jit
def _gather_patches_bwd_kernel(
    grad_ptr, ascending_ptr, order_ptr, images_ptr, K, L, D, GRID_H, GRID_W, stride_gn, stride_gl,
    stride_n, stride_c, stride_t, stride_h, stride_w, PATCH_T: tl.constexpr, PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr, COMPUTE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Every patch of the images, which is 0 where it was not chosen; arguments as in _gather_tokens_bwd_kernel."""
    sample, patch, element = _tile(L, ROWS, COLS)
    inside = (patch < L)[:, None] & (element < D)[None, :]
    total = _sum_of_run(
        grad_ptr + sample * stride_gn, ascending_ptr + sample * K, order_ptr + sample * K, patch, element, K, 0, D,
        stride_gl, COMPUTE, ROWS, COLS,
    )  # fmt: skip
    pixels = _pixels(patch, element, GRID_H, GRID_W, stride_c, stride_t, stride_h, stride_w, PATCH_T, PATCH_H, PATCH_W)
    tl.store(images_ptr + sample * stride_n + pixels, total.to(images_ptr.dtype.element_ty), mask=inside)

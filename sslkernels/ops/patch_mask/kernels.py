"""Launches the Triton kernels of patch masking."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sslkernels.ops.patch_mask.patch_mask_triton import (
    _complete_kernel,
    _invert_kernel,
    _order_kernel,
    _patch_mask_fwd_kernel,
)
from sslkernels.ops.patch_mask.tokens_triton import (
    _gather_patches_bwd_kernel,
    _gather_patches_fwd_kernel,
    _gather_tokens_bwd_kernel,
    _gather_tokens_fwd_kernel,
    _restore_tokens_bwd_kernel,
    _restore_tokens_fwd_kernel,
)


@dataclass(frozen=True)
class Config:
    """What a program does; one for all families of GPUs, whose memory bounds these kernels."""

    chunk: int = 1024  # tokens that are chosen from at a time: more need more registers than gfx942 has for masks
    sorted: int = 1024  # kept tokens that are sorted in registers: more take seconds to compile
    per_warp: int = 128  # tokens or pairs of them that a warp has
    tile_bytes: int = 8192  # moved by a program, and in flight together
    columns: int = 1024  # of a tile, at most
    sum_rows: int = 8  # tokens that a program sums over samples
    sum_columns: int = 128
    sum_samples: int = 16  # at least: partial sums are a sixteenth of what is summed
    sum_programs: int = 1024  # that keep every GPU busy, if there are so many samples


CONFIG = Config()
COMPUTE = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.float32,
    torch.float16: tl.float32,
    torch.float64: tl.float64,
}


def _warps(elements: int) -> int:
    return min(8, max(1, elements // CONFIG.per_warp))


def _tiles(samples: int, rows: int, columns: int, dtype: torch.dtype):
    """The grid whose tiles cover (samples, rows, columns), and ROWS and COLS of a tile.

    Most widths have a large power of two as a factor: tiles that divide them waste no lanes.
    """
    factor = columns & -columns
    width = min(max(factor, 128), CONFIG.columns, triton.next_power_of_2(columns))
    height = min(max(1, CONFIG.tile_bytes // dtype.itemsize // width), triton.next_power_of_2(rows))

    def grid(meta):
        return samples * triton.cdiv(rows, meta["ROWS"]), triton.cdiv(columns, meta["COLS"])

    return grid, {"ROWS": height, "COLS": width}


def _readable(x: torch.Tensor) -> torch.Tensor:
    """Rows are read in place, whatever lies between them."""
    return x if x.stride(-1) == 1 else x.contiguous()


# ---- which tokens stay


def patch_mask_fwd(seed, sample_ids, scores, samples, tokens, num_keep, ordered):
    """``sslkernels::patch_mask_fwd`` on a GPU: selection by counting, one program a sample, and a sort of the kept."""
    pairs, ids_restore = (
        torch.empty(samples, width, dtype=torch.int64, device=seed.device) for width in (num_keep, tokens)
    )
    mask = torch.empty(samples, tokens, dtype=torch.bool, device=seed.device)
    if not mask.numel():
        return pairs, ids_restore, mask
    chunk = min(CONFIG.chunk, max(triton.next_power_of_2(tokens), 64))
    ordered = ordered or num_keep == 0

    def grid(meta):
        return (samples,)

    with torch.cuda.device_of(seed):
        _patch_mask_fwd_kernel[grid](
            seed_ptr=seed, sample_ids_ptr=seed if sample_ids is None else sample_ids.contiguous(),
            scores_ptr=seed if scores is None else scores.contiguous(), ids_keep_ptr=pairs,
            ids_restore_ptr=ids_restore, mask_ptr=mask, L=tokens, K=num_keep, HAS_SAMPLE_IDS=sample_ids is not None,
            HAS_SCORES=scores is not None, ORDERED=ordered, CHUNK=chunk, num_warps=_warps(chunk),
        )  # fmt: skip
        ids_keep = pairs if ordered else _order(pairs, ids_restore)
    return ids_keep, ids_restore, mask


def _order(pairs, ids_restore):
    """The indices of (key, index) pairs, sorted; their places go into ids_restore."""
    samples, kept = pairs.shape
    sort = kept <= CONFIG.sorted
    if not sort:
        pairs = pairs.sort(dim=1).values
    block = min(CONFIG.sorted, triton.next_power_of_2(kept))
    ids_keep = torch.empty_like(pairs)

    def grid(meta):
        return samples, triton.cdiv(kept, block)

    _order_kernel[grid](
        pairs_ptr=pairs, ids_keep_ptr=ids_keep, ids_restore_ptr=ids_restore, K=kept, L=ids_restore.shape[1],
        SORT=sort, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return ids_keep


def _inverse(ids, tokens):
    """(N, tokens): the place of each token in its row of ids, or -1."""
    samples, kept = ids.shape
    places = ids.new_full((samples, tokens), -1)
    block = min(CONFIG.chunk, triton.next_power_of_2(max(kept, 1)))

    def grid(meta):
        return samples, triton.cdiv(kept, block)

    if samples and kept and tokens:
        _invert_kernel[grid](
            ids_ptr=ids.contiguous(), places_ptr=places, K=kept, L=tokens, BLOCK=block, num_warps=_warps(block)
        )
    return places


def invert_ids(ids_keep, tokens):
    """``sslkernels::invert_ids`` on a GPU."""
    samples, kept = ids_keep.shape
    chunk = min(CONFIG.chunk, triton.next_power_of_2(max(tokens, 1)))

    def grid(meta):
        return (samples,)

    with torch.cuda.device_of(ids_keep):
        ids_restore = _inverse(ids_keep, tokens)
        mask = torch.empty_like(ids_restore, dtype=torch.bool)
        if mask.numel():
            _complete_kernel[grid](
                ids_restore_ptr=ids_restore, mask_ptr=mask, K=kept, L=tokens, CHUNK=chunk, num_warps=_warps(chunk)
            )
    return ids_restore, mask


# ---- rows of tokens


def random_masking_fwd(x, seed, sample_ids, scores, num_keep, num_prefix, ordered):
    """``sslkernels::random_masking_fwd`` on a GPU."""
    samples, tokens, _ = x.shape
    ids_keep, ids_restore, mask = patch_mask_fwd(
        seed, sample_ids, scores, samples, tokens - num_prefix, num_keep, ordered
    )
    return gather_tokens_fwd(x, ids_keep, num_prefix), ids_keep, ids_restore, mask


def gather_tokens_fwd(x, ids, num_prefix):
    """``sslkernels::gather_tokens_fwd`` on a GPU."""
    return _gather(x, ids, num_prefix, math.nan)


def _gather(x, ids, num_prefix, fill):
    """Chosen tokens; ids out of range give rows of fill."""
    x = _readable(x)
    samples, tokens, columns = x.shape
    kept = ids.shape[1]
    out = x.new_empty(samples, num_prefix + kept, columns)
    if out.numel():
        grid, tile = _tiles(*out.shape, x.dtype)
        with torch.cuda.device_of(x):
            _gather_tokens_fwd_kernel[grid](
                x_ptr=x, ids_ptr=ids.contiguous(), out_ptr=out, K=kept, L=tokens - num_prefix, P=num_prefix,
                D=columns, stride_xn=x.stride(0), stride_xl=x.stride(1), fill=fill, **tile,
            )  # fmt: skip
    return out


def gather_tokens_bwd(grad, ids, tokens, num_prefix):
    """``sslkernels::gather_tokens_bwd`` on a GPU: each token sums the run of its id in the sorted ids, in order."""
    grad = _readable(grad)
    samples, _, columns = grad.shape
    out = grad.new_empty(samples, num_prefix + tokens, columns)
    if out.numel():
        grid, tile = _tiles(*out.shape, grad.dtype)
        with torch.cuda.device_of(grad):
            ascending, order = ids.contiguous().sort(dim=1, stable=True)
            _gather_tokens_bwd_kernel[grid](
                grad_ptr=grad, ascending_ptr=ascending, order_ptr=order, out_ptr=out, K=ids.shape[1],
                L=tokens, P=num_prefix, D=columns, stride_gn=grad.stride(0), stride_gl=grad.stride(1),
                COMPUTE=COMPUTE[grad.dtype], **tile,
            )  # fmt: skip
    return out


def restore_tokens_fwd(x, ids_restore, mask_token, pos_embed, num_prefix):
    """``sslkernels::restore_tokens_fwd`` on a GPU."""
    x = _readable(x)
    samples, kept, columns = x.shape
    tokens = ids_restore.shape[1]
    out = x.new_empty(samples, num_prefix + tokens, columns)
    if out.numel():
        grid, tile = _tiles(*out.shape, x.dtype)
        with torch.cuda.device_of(x):
            _restore_tokens_fwd_kernel[grid](
                x_ptr=x, ids_restore_ptr=ids_restore.contiguous(),
                mask_token_ptr=x if mask_token is None else mask_token.contiguous(),
                pos_ptr=x if pos_embed is None else pos_embed.contiguous(), out_ptr=out, K=kept - num_prefix,
                L=tokens, P=num_prefix, D=columns, POS=0 if pos_embed is None else pos_embed.shape[0],
                stride_xn=x.stride(0), stride_xl=x.stride(1), HAS_MASK_TOKEN=mask_token is not None,
                HAS_POS=pos_embed is not None, COMPUTE=COMPUTE[x.dtype], **tile,
            )  # fmt: skip
    return out


def restore_tokens_bwd(grad, ids_restore, num_keep, num_prefix, pos_tokens, need_x, need_mask_token):
    """``sslkernels::restore_tokens_bwd`` on a GPU; sums are over parts of the samples, then over the parts."""
    grad = _readable(grad)
    grad_x, grad_mask_token, grad_pos = (grad.new_empty(0) for _ in range(3))  # an operator's results share no memory
    if need_x:
        with torch.cuda.device_of(grad):
            ids_keep = _inverse(ids_restore, num_keep)
        grad_x = _gather(grad, ids_keep, num_prefix, 0.0)
    if need_mask_token or pos_tokens:
        mask_token_sums, pos_sums = _partial_sums(grad, ids_restore, num_keep, need_mask_token, pos_tokens > 0)
        if need_mask_token:
            grad_mask_token = mask_token_sums.sum(dim=(0, 1)).to(grad.dtype)
        if pos_tokens:
            grad_pos = pos_sums[:, pos_sums.shape[1] - pos_tokens :].sum(dim=0).to(grad.dtype)
    return grad_x, grad_mask_token, grad_pos


def _partial_sums(grad, ids_restore, num_keep, need_mask_token, need_pos):
    """(parts, blocks of tokens, D) of the removed tokens, and (parts, P + L, D) of every token."""
    samples, length, columns = grad.shape
    tokens = ids_restore.shape[1]
    blocks = triton.cdiv(length, CONFIG.sum_rows)
    tiles = blocks * triton.cdiv(columns, CONFIG.sum_columns)
    parts = triton.cdiv(CONFIG.sum_programs, max(tiles, 1))
    part = max(CONFIG.sum_samples, triton.cdiv(samples, parts))
    parts = triton.cdiv(samples, part)
    compute = torch.promote_types(grad.dtype, torch.float32)
    mask_token_sums = grad.new_empty(parts, blocks, columns, dtype=compute)
    pos_sums = grad.new_empty(parts, length if need_pos else 0, columns, dtype=compute)

    def grid(meta):
        return parts * blocks, triton.cdiv(columns, meta["COLS"])

    if grad.numel():
        with torch.cuda.device_of(grad):
            _restore_tokens_bwd_kernel[grid](
                grad_ptr=grad, ids_restore_ptr=ids_restore.contiguous(), mask_token_sums_ptr=mask_token_sums,
                pos_sums_ptr=pos_sums, N=samples, K=num_keep, L=tokens, P=length - tokens, D=columns, SAMPLES=part,
                stride_gn=grad.stride(0), stride_gl=grad.stride(1), HAS_MASK_TOKEN=need_mask_token, HAS_POS=need_pos,
                COMPUTE=COMPUTE[grad.dtype], ROWS=CONFIG.sum_rows, COLS=CONFIG.sum_columns,
            )  # fmt: skip
    return mask_token_sums, pos_sums


# ---- rows of patches


def _geometry(images, patch_size) -> tuple[int, dict[str, int]]:
    """Patches of an image, and what a kernel has to know of it; a still image is a film of one frame."""
    still = images.dim() == 4
    frames, *sizes = [1] * still + list(images.shape[2:])
    patch_t, *patch = [1] * still + list(patch_size)
    grid = [frames // patch_t, sizes[0] // patch[0], sizes[1] // patch[1]]
    n, c, *strides = images.stride()
    t, h, w = [0] * still + strides
    return math.prod(grid), {
        "GRID_H": grid[1], "GRID_W": grid[2], "stride_n": n, "stride_c": c, "stride_t": t, "stride_h": h,
        "stride_w": w, "PATCH_T": patch_t, "PATCH_H": patch[0], "PATCH_W": patch[1],
    }  # fmt: skip


def gather_patches_fwd(images, ids, patch_size):
    """``sslkernels::gather_patches_fwd`` on a GPU."""
    samples, kept = ids.shape
    patches, geometry = _geometry(images, patch_size)
    columns = images.shape[1] * math.prod(patch_size)
    out = images.new_empty(samples, kept, columns)
    if out.numel():
        grid, tile = _tiles(*out.shape, images.dtype)
        with torch.cuda.device_of(images):
            _gather_patches_fwd_kernel[grid](
                images_ptr=images, ids_ptr=ids.contiguous(), out_ptr=out, K=kept, L=patches, D=columns,
                **geometry, **tile,
            )  # fmt: skip
    return out


def gather_patches_bwd(grad, ids, image_shape, patch_size):
    """``sslkernels::gather_patches_bwd`` on a GPU."""
    grad = _readable(grad)
    samples, kept, columns = grad.shape
    images = grad.new_empty(image_shape)
    patches, geometry = _geometry(images, patch_size)
    if images.numel():
        grid, tile = _tiles(samples, patches, columns, grad.dtype)
        with torch.cuda.device_of(grad):
            ascending, order = ids.contiguous().sort(dim=1, stable=True)
            _gather_patches_bwd_kernel[grid](
                grad_ptr=grad, ascending_ptr=ascending, order_ptr=order, images_ptr=images, K=kept, L=patches,
                D=columns, stride_gn=grad.stride(0), stride_gl=grad.stride(1), **geometry,
                COMPUTE=COMPUTE[grad.dtype], **tile,
            )  # fmt: skip
    return images

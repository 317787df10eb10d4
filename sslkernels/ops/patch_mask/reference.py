"""Patch masking in pure PyTorch: the definition that every kernel is checked against, and the operators' default.

Tokens are counted without the prefix: ids, masks and keys are of the L tokens that follow the P first.
"""

from __future__ import annotations

import torch

from sslkernels.philox import PATCH_MASK_STREAM, WORD, philox, split


def draw_seed(device):
    """A seed from the device's default generator, left on the device."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


# ---- which tokens stay


def token_keys(seed, sample_ids, samples: int, tokens: int):
    """(N, L) random 32-bit keys: token t of sample s has word t % 4 of the counter (t // 4, s, stream)."""
    if sample_ids is None:
        sample_ids = torch.arange(samples, device=seed.device)
    low, high = split(sample_ids[:, None])
    block = torch.arange((tokens + 3) // 4, device=seed.device)
    words = philox((block & WORD, low, high, PATCH_MASK_STREAM), split(seed))
    return torch.stack(words, dim=2).flatten(1)[:, :tokens]


def score_keys(scores):
    """Integers in the order of float32 scores: zeros of both signs are equal, and so are all NaN, the largest."""
    bits = scores.resolve_neg().view(torch.int32).long()
    magnitude = bits & 0x7FFFFFFF
    return torch.where(magnitude > 0x7F800000, WORD, torch.where(bits < 0, -magnitude, magnitude))


def patch_mask_fwd(seed, sample_ids, scores, samples: int, tokens: int, num_keep: int, ordered: bool):
    """The num_keep smallest keys of each sample, ties by index."""
    keys = token_keys(seed, sample_ids, samples, tokens) if scores is None else score_keys(scores)
    ids_keep = keys.argsort(dim=1, stable=True)[:, :num_keep].contiguous()
    if ordered:
        ids_keep = ids_keep.sort(dim=1).values
    return ids_keep, *_inverted(ids_keep, tokens)


def invert_ids(ids_keep, tokens: int):
    ids, _ = _checked("random_masking", "ids_keep", ids_keep, tokens)
    ids_restore, mask = _inverted(ids, tokens)
    if _raises(ids):
        _refuse_repeated("random_masking", "ids_keep must not repeat an id", (~mask).sum(dim=1) != ids.shape[1])
    return ids_restore, mask


def _inverted(ids_keep, tokens: int):
    """The place of each token in its row: in ids_keep, or after it in order of index; and which ones are removed."""
    samples, kept = ids_keep.shape
    mask = torch.ones(samples, tokens + 1, dtype=torch.bool, device=ids_keep.device)  # ids out of range end up beyond
    mask = mask.scatter(1, ids_keep, False)
    places = mask.cumsum(dim=1) + (kept - 1)
    ranks = torch.arange(kept, device=ids_keep.device).expand(samples, kept)
    return places.scatter(1, ids_keep, ranks)[:, :tokens].contiguous(), mask[:, :tokens].contiguous()


# ---- rows of tokens


def random_masking_fwd(x, seed, sample_ids, scores, num_keep: int, num_prefix: int, ordered: bool):
    tokens = x.shape[1] - num_prefix
    ids_keep, ids_restore, mask = patch_mask_fwd(seed, sample_ids, scores, x.shape[0], tokens, num_keep, ordered)
    kept = torch.cat([x[:, :num_prefix], _rows(x[:, num_prefix:], ids_keep)], dim=1)
    return kept, ids_keep, ids_restore, mask


def gather_tokens_fwd(x, ids, num_prefix: int):
    kept = _gathered("gather_tokens", "ids", x[:, num_prefix:], ids)
    return torch.cat([x[:, :num_prefix], kept], dim=1)


def gather_tokens_bwd(grad, ids, tokens: int, num_prefix: int):
    """Sums the gradients of equal ids, in fp32 for 16-bit types."""
    safe, _ = _checked("gather_tokens", "ids", ids, tokens)
    return torch.cat([grad[:, :num_prefix], _scattered(grad[:, num_prefix:], safe, tokens)], dim=1)


def restore_tokens_fwd(x, ids_restore, mask_token, pos_embed, num_prefix: int):
    tokens, kept = ids_restore.shape[1], x.shape[1] - num_prefix
    places, wrong = _checked_places(ids_restore, kept)
    fill = x.new_zeros(x.shape[2]) if mask_token is None else mask_token
    rows = torch.cat([x[:, num_prefix:], fill.expand(x.shape[0], 1, -1)], dim=1)
    out = _rows(rows, places)
    if wrong is not None:
        out = out.masked_fill(wrong[..., None], torch.nan)
    prefix = x[:, :num_prefix]
    if pos_embed is not None:
        out = out + pos_embed[pos_embed.shape[0] - tokens :]
        prefix = prefix + pos_embed[:num_prefix] if pos_embed.shape[0] == num_prefix + tokens else prefix
    return torch.cat([prefix, out], dim=1)


def restore_tokens_bwd(
    grad, ids_restore, num_keep: int, num_prefix: int, pos_tokens: int, need_x: bool, need_mask_token: bool
):
    places, _ = _checked_places(ids_restore, num_keep)
    rows = grad[:, num_prefix:]
    grad_x, grad_mask_token, grad_pos = (grad.new_empty(0) for _ in range(3))  # an operator's results share no memory
    if need_x:
        kept = _scattered(rows, places, num_keep)
        grad_x = torch.cat([grad[:, :num_prefix], kept], dim=1)
    compute = torch.promote_types(grad.dtype, torch.float32)
    if need_mask_token:
        removed = torch.where((places == num_keep)[..., None], rows, 0)
        grad_mask_token = removed.sum(dim=(0, 1), dtype=compute).to(grad.dtype)
    if pos_tokens:
        grad_pos = grad[:, grad.shape[1] - pos_tokens :].sum(dim=0, dtype=compute).to(grad.dtype)
    return grad_x, grad_mask_token, grad_pos


# ---- rows of patches


def gather_patches_fwd(images, ids, patch_size):
    return _gathered("masked_patch_embed", "ids_keep", patches(images, patch_size), ids)


def gather_patches_bwd(grad, ids, image_shape, patch_size):
    count = 1
    for size, patch in zip(image_shape[2:], patch_size, strict=True):
        count *= size // patch
    safe, _ = _checked("masked_patch_embed", "ids_keep", ids, count)
    return unpatched(_scattered(grad, safe, count), image_shape, patch_size)


def patches(images, patch_size):
    """(N, L, C * prod(patch_size)): every patch as a row, in the order of a convolution's weight."""
    grid = [size // patch for size, patch in zip(images.shape[2:], patch_size, strict=True)]
    dims = len(grid)
    split_sizes = [size for pair in zip(grid, patch_size, strict=True) for size in pair]
    tiles = images.reshape(*images.shape[:2], *split_sizes)
    tiles = tiles.permute(0, *range(2, 2 + 2 * dims, 2), 1, *range(3, 3 + 2 * dims, 2))
    return tiles.flatten(1 + dims).flatten(1, dims)


def unpatched(rows, image_shape, patch_size):
    """The images of such rows."""
    samples, channels, *sizes = image_shape
    grid = [size // patch for size, patch in zip(sizes, patch_size, strict=True)]
    dims = len(grid)
    tiles = rows.reshape(samples, *grid, channels, *patch_size)
    order = [axis for d in range(dims) for axis in (1 + d, 2 + dims + d)]
    return tiles.permute(0, 1 + dims, *order).reshape(image_shape)


# ---- ids


def _rows(x, ids):
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[2]))


def _gathered(op: str, argument: str, x, ids):
    """Rows of x; NaN where an id is out of range on a device that does not wait for the answer."""
    tokens = x.shape[1]
    safe, wrong = _checked(op, argument, ids, tokens)
    if wrong is None:
        return _rows(x, safe)
    return _rows(x, safe.clamp(max=tokens - 1)).masked_fill(wrong[..., None], torch.nan)


def _scattered(grad, ids, tokens: int):
    """(N, tokens, D): the sum of the rows of each id, in order; the id ``tokens`` is dropped."""
    samples, _, columns = grad.shape
    compute = torch.promote_types(grad.dtype, torch.float32)
    out = torch.zeros(samples * (tokens + 1), columns, dtype=compute, device=grad.device)
    rows = (ids + (tokens + 1) * torch.arange(samples, device=ids.device)[:, None]).flatten()
    source = grad.to(compute).flatten(0, 1)
    # of the two, one is deterministic on a CPU and one on a GPU
    out = out.index_add(0, rows, source) if grad.device.type == "cpu" else out.index_put((rows,), source, True)
    return out.view(samples, tokens + 1, columns)[:, :tokens].to(grad.dtype)


def _checked_places(ids_restore, kept: int):
    """ids_restore with ``kept`` for every token that was removed."""
    wrong = ids_restore < 0
    places = ids_restore.clamp(max=kept)
    if _raises(ids_restore):
        _refuse("restore_tokens", "ids_restore", ids_restore, wrong, "0 or more")
        wrong = None
        counts = torch.zeros(places.shape[0], kept + 1, dtype=torch.int64)
        counts = counts.scatter_add(1, places, torch.ones_like(places))
        _refuse_repeated("restore_tokens", f"ids_restore must not repeat a place below {kept}", counts[:, :kept] > 1)
    if wrong is not None:
        places = torch.where(wrong, kept, places)
    return places, wrong


def _checked(op: str, argument: str, ids, tokens: int):
    """ids with ``tokens`` in place of those out of range; and which ones were, or None where that is an error."""
    wrong = (ids < 0) | (ids >= tokens)
    if _raises(ids):
        _refuse(op, argument, ids, wrong, f"in [0, {tokens})")
        return ids, None
    return torch.where(wrong, tokens, ids), wrong


def _raises(ids) -> bool:
    """Whether ids are at hand: a GPU is not waited for, and what the compiler traces has no values."""
    return ids.device.type == "cpu" and not torch.compiler.is_compiling()


def _refuse(op: str, argument: str, ids, wrong, expected: str) -> None:
    if wrong.any():
        row, place = wrong.nonzero()[0].tolist()
        raise RuntimeError(f"{op}: {argument} must be {expected}, got {ids[row, place].item()} in row {row}")


def _refuse_repeated(op: str, expected: str, repeated) -> None:
    if repeated.any():
        raise RuntimeError(f"{op}: {expected}, row {int(repeated.nonzero()[0, 0])} does")

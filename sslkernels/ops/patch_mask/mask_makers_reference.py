"""The mask makers in pure PyTorch: their definition, and the default kernels of their operators.

Integers throughout, so that every backend gives the same bits, and no loop over samples: a step of the algorithm is
taken for all of them at once. ``csrc/block_mask.h``, ``multi_block_mask.h`` and ``span_mask.h`` are the same for one
sample.
"""

from __future__ import annotations

import functools

import torch

from sslkernels.philox import BLOCK_MASK_STREAM, MULTI_BLOCK_MASK_STREAM, SPAN_MASK_STREAM, WORD, philox, split

PATIENCE = 10  # attempts in a row that add nothing before the rest of a block mask is drawn patch by patch
CONTEXT_ATTEMPTS = 20  # at a context block that leaves enough patches beside the targets
KEY_DRAWS = 1 << 31  # draws from here on are keys of tokens, four each; those below belong to steps of an algorithm
CHUNK = 128  # attempts whose numbers are drawn at once


class _Draws:
    """The random numbers of N samples."""

    def __init__(self, seed, sample_ids, samples: int, stream: int):
        if sample_ids is None:
            sample_ids = torch.arange(samples, device=seed.device)
        self.low, self.high = split(sample_ids[:, None])
        self.key, self.stream, self.device = split(seed), stream, seed.device

    def words(self, first: int, count: int):
        """(N, count, 4): the words of the draws from ``first`` on."""
        draws = torch.arange(first, first + count, device=self.device)
        return torch.stack(philox((draws, self.low, self.high, self.stream), self.key), dim=2)

    def order(self, members):
        """(N, L) token indices: the members first, in the order of their keys, ties by index."""
        tokens = members.shape[1]
        keys = self.words(KEY_DRAWS, (tokens + 3) // 4).flatten(1)[:, :tokens]
        return torch.where(members, keys, WORD + 1).argsort(dim=1, stable=True)

    def choose(self, members, wanted):
        """(N, L) bool: as many of the members as ``wanted`` (N,) says, those with the smallest keys."""
        tokens = members.shape[1]
        chosen = torch.arange(tokens, device=self.device) < wanted[:, None]
        return torch.zeros_like(members).scatter(1, self.order(members), chosen)


def below(n, word):
    """A random word as a number in [0, n)."""
    return word * n >> 32


def integer_sqrt(n):
    """floor(sqrt(n)) for n < 2^30."""
    root = n.double().sqrt().long()
    root = root - (root * root > n).long()
    return root + ((root + 1) * (root + 1) <= n).long()


def _is_at_hand(x) -> bool:
    """Whether Python may look at values: a GPU is not waited for, and what the compiler traces has none."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _check(op: str, argument: str, x, most: int | None = None) -> None:
    """An error for what is out of range, where that is known."""
    if not _is_at_hand(x):
        return
    wrong = (x < 0) if most is None else (x < 0) | (x > most)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        expected = "at least 0" if most is None else f"in [0, {most}]"
        raise RuntimeError(f"{op}: {argument} must be {expected}, got {int(x[row])} in row {row}")


def _inside(first, size, count: int, device):
    """Which of `count` rows or columns lie in [first, first + size); first and size (...,)."""
    index = torch.arange(count, device=device)
    return (index >= first[..., None]) & (index < (first + size)[..., None])


def _rectangles(top, left, height, width, rows: int, columns: int):
    """(..., rows, columns) bool."""
    inside_rows = _inside(top, height, rows, top.device)
    return inside_rows[..., None] & _inside(left, width, columns, top.device)[..., None, :]


# ---- rectangles


def block_mask_fwd(
    seed, sample_ids, num_masked, height: int, width: int, min_patches: int, max_patches: int, aspects, attempts: int
):
    """Default kernel of ``sslkernels::block_mask_fwd``."""
    samples, patches = num_masked.shape[0], height * width
    _check("block_mask", "num_masked", num_masked, patches)
    wanted = num_masked.clamp(0, patches)
    draws = _Draws(seed, sample_ids, samples, BLOCK_MASK_STREAM)
    factors = _factors(tuple(aspects), seed.device)
    mask = torch.zeros(samples, height, width, dtype=torch.bool, device=seed.device)
    masked, failures = torch.zeros_like(wanted), torch.zeros_like(wanted)
    for first in range(0, attempts, CHUNK):
        words = draws.words(first, min(CHUNK, attempts - first))
        for attempt in range(words.shape[1]):
            active = (masked < wanted) & (failures < PATIENCE)
            if _is_at_hand(active) and not active.any():
                break
            limit = (wanted - masked).clamp(max=max_patches)
            rectangle, fits = _draw_rectangle(words[:, attempt], limit, factors, height, width, min_patches)
            new = rectangle & ~mask
            added = new.sum(dim=(1, 2))
            added = torch.where(active & fits & (added <= limit), added, 0)
            mask = mask | (new & (added > 0)[:, None, None])
            masked, failures = masked + added, torch.where(added > 0, 0, failures + 1)
    rest = draws.choose(~mask.flatten(1), wanted - masked)
    return mask | rest.view_as(mask)


@functools.lru_cache(maxsize=16)
def _factors(aspects: tuple[int, ...], device):
    """(A, 2) on the device: copied there once, as a copy from the host waits for a GPU."""
    return torch.tensor(aspects, device=device).view(-1, 2)


def _draw_rectangle(words, limit, factors, height: int, width: int, min_patches: int):
    """(N, H, W) bool from four words a sample, and whether it fits into the grid."""
    low, high = limit.clamp(max=min_patches), limit.clamp(min=min_patches)
    area = 256 * low + below(256 * (high - low) + 1, words[:, 0])
    factor = factors[below(factors.shape[0], words[:, 1])]
    sides = (integer_sqrt(area[:, None] * factor >> 22) + 1) // 2  # sqrt(area * factor) to nearest
    h, w = sides.unbind(1)
    fits = (h > 0) & (w > 0) & (h <= height) & (w <= width)
    top, left = below(height - h + 1, words[:, 2]), below(width - w + 1, words[:, 3])
    return _rectangles(top, left, h, w, height, width), fits


# ---- context and targets


def multi_block_mask_fwd(
    seed, sample_ids, samples: int, height: int, width: int, target_height: int, target_width: int,
    context_height: int, context_width: int, num_targets: int, min_context: int, allow_overlap: bool,
):  # fmt: skip
    """Default kernel of ``sslkernels::multi_block_mask_fwd``."""
    draws = _Draws(seed, sample_ids, samples, MULTI_BLOCK_MASK_STREAM)
    words = draws.words(0, num_targets + CONTEXT_ATTEMPTS)
    top, left = _corners(words[:, :num_targets], height - target_height, width - target_width)
    size = torch.full_like(top, target_height), torch.full_like(top, target_width)
    target_mask = _rectangles(top, left, *size, height, width)
    row, column = (torch.arange(n, device=seed.device) for n in (target_height, target_width))
    target_ids = (top[..., None] + row)[..., None] * width + (left[..., None] + column)[..., None, :]

    taken = target_mask[:, :0] if allow_overlap else target_mask
    allowed = ~taken.any(dim=1)
    top, left = _corners(words[:, num_targets:], height - context_height, width - context_width)
    best = _first_enough(_counts(allowed, top, left, context_height, context_width), min_context)
    top, left = (corner.gather(1, best[:, None])[:, 0] for corner in (top, left))
    size = torch.full_like(top, context_height), torch.full_like(top, context_width)
    context_mask = _rectangles(top, left, *size, height, width) & allowed

    counts = context_mask.sum(dim=(1, 2))
    order = draws.order(context_mask.flatten(1))[:, : context_height * context_width]
    place = torch.arange(order.shape[1], device=seed.device)
    padding = torch.where(counts > 0, order[:, 0], 0)[:, None]
    context_ids = torch.where(place < counts[:, None], order, padding)
    return context_ids, counts, target_ids.flatten(2), context_mask, target_mask


def _corners(words, free_rows: int, free_columns: int):
    return below(free_rows + 1, words[..., 0]), below(free_columns + 1, words[..., 1])


def _counts(allowed, top, left, height: int, width: int):
    """(N, A): how much is allowed in each of A blocks, by sums over all rectangles that begin in the corner."""
    sums = torch.nn.functional.pad(allowed.long().cumsum(1).cumsum(2), (1, 0, 1, 0)).flatten(1)
    columns = allowed.shape[2] + 1

    def at(row, column):
        return sums.gather(1, row * columns + column)

    bottom, right = top + height, left + width
    return at(bottom, right) - at(top, right) - at(bottom, left) + at(top, left)


def _first_enough(counts, least: int):
    """(N,): the first of the columns that holds ``least`` or more, or else the first of the largest."""
    index = torch.arange(counts.shape[1], 0, -1, device=counts.device)
    enough = counts >= least
    score = torch.where(enough.any(dim=1, keepdim=True), enough.long(), counts)
    return (score * (counts.shape[1] + 1) + index).argmax(dim=1)


# ---- spans


def span_mask_fwd(
    seed, sample_ids, lengths, num_spans, tokens: int, span_length: int, share: int, min_spans: int, overlap: bool
):
    """Default kernel of ``sslkernels::span_mask_fwd``."""
    samples = lengths.shape[0]
    _check("span_mask", "lengths", lengths, tokens)
    lengths = lengths.clamp(0, tokens)
    draws = _Draws(seed, sample_ids, samples, SPAN_MASK_STREAM)
    if num_spans is None:
        # up or down at random, so that the mean is the share of the tokens
        parts = lengths * share + draws.words(0, 1)[:, 0, 0] * span_length
        spans = (parts // (span_length << 32)).clamp(min=min_spans)
    else:
        _check("span_mask", "num_spans", num_spans)
        spans = num_spans.clamp(min=0)
    room = (lengths - span_length + 1).clamp(min=0) if overlap else lengths // span_length
    spans = torch.minimum(spans, room)
    # without overlap: shrunk to one token each, spans are any tokens of a shorter sample, each equally often
    growth = 0 if overlap else span_length - 1
    places = room if overlap else lengths - spans * growth
    index = torch.arange(tokens, device=seed.device)
    chosen = draws.choose(index < places[:, None], spans)
    # the place of a span's first token is beyond its slot by what the spans before it have grown
    start = index + growth * (chosen.cumsum(dim=1) - 1)
    start = torch.where(chosen, start, tokens)
    started = torch.zeros(samples, tokens + 1, dtype=torch.int64, device=seed.device)
    begun = started.scatter(1, start, 1)[:, :tokens].cumsum(dim=1)
    return begun > torch.nn.functional.pad(begun, (span_length, 0))[:, :tokens]

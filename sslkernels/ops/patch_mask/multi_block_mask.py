"""Context and target blocks."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sslkernels.ops.patch_mask import arguments, grids, mask_makers_op, randomness
from sslkernels.philox import MULTI_BLOCK_MASK_STREAM, philox, split

NAME = "multi_block_mask"
SIZE_DRAW = 1 << 30  # of a batch's sizes: no sample draws so many blocks

Size = tuple[int, int]


class BlockSizes(NamedTuple):
    """What `multi_block_sizes` returns: height and width in patches."""

    target_size: Size
    context_size: Size


class MultiBlockMasks(NamedTuple):
    """What `multi_block_mask` returns, for T targets of h x w patches."""

    context_ids: torch.Tensor  # (N, K) int64, K the area of the context's block: so many are there, then repeats
    context_counts: torch.Tensor  # (N,) int64
    target_ids: torch.Tensor  # (N, T, h w) int64
    context_mask: torch.Tensor  # (N, H, W) bool, True = in the context
    target_mask: torch.Tensor  # (N, T, H, W) bool, True = in the target

    def truncated(self, num_context: int | None = None) -> torch.Tensor:
        """(N, num_context) ids of context patches, in ascending order: of each sample a random part of its context.

        Samples that have fewer repeat one. None takes the smallest count of the batch, as I-JEPA does, so that nothing
        is repeated; that number has to come to the host, which waits for a GPU.
        """
        if num_context is None:
            num_context = int(self.context_counts.min()) if len(self.context_counts) else 0
        arguments.count(NAME, "num_context", num_context, self.context_ids.shape[1])
        return self.context_ids[:, :num_context].sort(dim=1).values


def multi_block_sizes(
    grid_size: int | Size,
    *,
    seed: int,
    target_scale: tuple[float, float] = (0.15, 0.2),
    target_aspect: tuple[float, float] = (0.75, 1.5),
    context_scale: tuple[float, float] = (0.85, 1.0),
) -> BlockSizes:
    r"""Draws the sizes that the blocks of one batch have in common.

    .. math:: h = \lfloor \sqrt{s H W \rho} \rceil, \quad w = \lfloor \sqrt{s H W / \rho} \rceil

    with the scale s uniform and the logarithm of the aspect :math:`\rho` uniform over their intervals; :math:`\rho = 1`
    for the context. Equivalent Python, up to the random numbers::

        area, aspect = H * W * uniform(*target_scale), exp(uniform(log(low), log(high)))
        target_size = min(round(sqrt(area * aspect)), H), min(round(sqrt(area / aspect)), W)
        context_size = min(side := round(sqrt(H * W * uniform(*context_scale))), H), min(side, W)

    Args:
        grid_size: (H, W) in patches, or an int for a square; at most 65,536 patches.
        seed: a 64-bit integer. The same sizes for the same seed.
        target_scale, context_scale: the area of a block over that of the grid, in [0, 1]; at least a patch.
        target_aspect: height over width of a target, before rounding, in [1/256, 256].

    Returns:
        ``BlockSizes(target_size, context_size)``, each height and width in patches.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Source: Assran et al., Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture (2023),
    section 4. Their code draws scale and aspect from one number, and the aspect uniformly.

    Cost: a few microseconds on the host; nothing on a device, so that tensors have their sizes before it is asked.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"multi_block_sizes: seed must be an int, got {type(seed).__name__}")
    randomness.check_range("multi_block_sizes", seed)
    return _sizes("multi_block_sizes", grid_size, seed, target_scale, target_aspect, context_scale)


def _sizes(op: str, grid_size, seed: int, target_scale, target_aspect, context_scale) -> BlockSizes:
    height, width = grids.grid(op, grid_size)
    target = grids.interval(op, "target_scale", target_scale, 0, 1)
    context = grids.interval(op, "context_scale", context_scale, 0, 1)
    low, high = grids.interval(op, "target_aspect", target_aspect, 1 / grids.ASPECT_LIMIT, grids.ASPECT_LIMIT)
    words = philox((SIZE_DRAW, 0, 0, MULTI_BLOCK_MASK_STREAM), split(seed))
    factors = grids.aspects(low, high)
    aspect = 2 * (words[1] * grids.ASPECTS >> 32)

    def block(scale, word: int, tall: int, wide: int) -> Size:
        first, last = (round(256 * height * width * bound) for bound in scale)
        area = first + (word * (last - first + 1) >> 32)
        return max(1, min(grids.side(area, tall), height)), max(1, min(grids.side(area, wide), width))

    target_size = block(target, words[0], factors[aspect], factors[aspect + 1])
    return BlockSizes(target_size, block(context, words[2], grids.UNIT, grids.UNIT))


def multi_block_mask(
    batch_size: int,
    grid_size: int | Size,
    *,
    num_targets: int = 4,
    target_size: Size | None = None,
    context_size: Size | None = None,
    target_scale: tuple[float, float] = (0.15, 0.2),
    target_aspect: tuple[float, float] = (0.75, 1.5),
    context_scale: tuple[float, float] = (0.85, 1.0),
    min_context: int = 10,
    allow_overlap: bool = False,
    seed: int | torch.Tensor | None = None,
    sample_ids: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> MultiBlockMasks:
    r"""Places target blocks and a context block on each sample, as I-JEPA does.

    All blocks of a kind have one size. Each is put in any place of the grid, the last row and column included, every
    place equally often. The context is its block without the targets:

    .. math:: C_n = B_n \setminus (T_{n1} \cup \dots \cup T_{nT})

    Of up to 20 context blocks the first that leaves ``min_context`` patches is taken, or else the one that leaves most.

    Equivalent Python, for one sample and up to the random numbers::

        targets, taken = [], np.zeros((H, W), bool)
        for _ in range(num_targets):
            top, left = randint(0, H - h), randint(0, W - w)
            targets.append([row * W + column for row in range(top, top + h) for column in range(left, left + w)])
            taken.flat[targets[-1]] = not allow_overlap
        contexts = []
        for _ in range(20):
            top, left = randint(0, H - context_h), randint(0, W - context_w)
            context = np.zeros((H, W), bool)
            context[top : top + context_h, left : left + context_w] = True
            contexts.append(np.flatnonzero(context & ~taken))
            if len(contexts[-1]) >= min_context:
                break
        context_ids = permutation(max(contexts, key=len))

    Samples have contexts of different sizes. ``context_ids`` has one shape all the same, which no host needs to know
    beforehand: the patches that are there come first, in random order, and then repeats of the first one. So
    ``context_ids[:, :k]`` is a random part of every context that has k patches, drawn evenly from all of its rows;
    ``masks.truncated(k)`` is the same in ascending order, and ``masks.truncated()`` cuts to the smallest context of the
    batch, as I-JEPA does, whose own code drops the lowest rows for that.

    A sample's blocks are a pure function of the seed, its id and the arguments: the same, bit for bit, eager and
    compiled, on every backend and device, however samples are batched and spread over processes.

    Args:
        batch_size: N.
        grid_size: (H, W) in patches, or an int for a square; at most 65,536 patches.
        num_targets: T.
        target_size, context_size: (h, w) of the blocks, in patches. None: drawn from the seed by `multi_block_sizes`,
            on the host, for the shapes of what is returned depend on them. The seed must not be a tensor then, and is
            drawn from the CPU's default generator unless one is given; `torch.compile` needs both sizes.
        target_scale, target_aspect, context_scale: as for `multi_block_sizes`.
        min_context: how many patches of its block the context should keep.
        allow_overlap: whether the context keeps what is also in a target.
        seed: a 64-bit integer, as an int or as a tensor of one element on the device of the masks, which is read there.
            None draws one from ``generator``, exactly once.
        sample_ids: (N,) integers, the samples' numbers in the data set or in the global batch. None: 0 ... N - 1.
        generator: what to draw the seed from; None: the device's default generator, which `torch.manual_seed` sets. Not
            under `torch.compile`.
        device: where to draw and return them; None: that of ``sample_ids`` or ``seed``, whichever is a tensor, else
            PyTorch's default device.
        backend: None for the fastest one (see `sslkernels.backends`), or "cpp", "cuda", "reference".

    Returns:
        ``MultiBlockMasks(context_ids, context_counts, target_ids, context_mask, target_mask)``: (N, K) int64 with K the
        area of the context's block, (N,) int64, (N, T, h w) int64 in row-major order, (N, H, W) and (N, T, H, W) bool.
        A context that the targets cover wherever its block is put has no patch: a count of 0, and ids of 0.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        RuntimeError: ``backend`` is not available here.

    Source: Assran et al., Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture (2023),
    section 4. Their code never reaches the last row and column, and lets a context that is too small overlap targets.
    Random numbers are those of Philox4x32-10.

    Cost: about five microseconds a sample on one core for a grid of 16 x 16. Extra memory on a GPU: at most 17 bytes a
    patch.
    """
    samples = arguments.count(NAME, "batch_size", batch_size)
    height, width = grids.grid(NAME, grid_size)
    targets = arguments.count(NAME, "num_targets", num_targets, grids.MAX_TOKENS)
    least = arguments.count(NAME, "min_context", min_context, grids.MAX_TOKENS)
    arguments.check_flags(NAME, allow_overlap=allow_overlap)
    where = randomness.device_of(NAME, device, sample_ids, seed)
    if target_size is None or context_size is None:
        seed, generator = _host_seed(seed, generator), None
        sizes = _sizes(NAME, (height, width), seed, target_scale, target_aspect, context_scale)
        target_size = sizes.target_size if target_size is None else target_size
        context_size = sizes.context_size if context_size is None else context_size
    target_size = grids.rectangle(NAME, "target_size", target_size, (height, width))
    context_size = grids.rectangle(NAME, "context_size", context_size, (height, width))
    arguments.check_backend(NAME, backend, where.type)
    ids = randomness.samples(NAME, sample_ids, samples, where)
    seed = randomness.seed_tensor(NAME, seed, generator, where)
    ops = mask_makers_op.family(backend)
    out = ops.multi_block_mask_fwd(
        seed, ids, samples, height, width, *target_size, *context_size, targets, least, allow_overlap
    )
    return MultiBlockMasks(*out)


def _host_seed(seed, generator) -> int:
    """The seed as a number on the host, which sizes are drawn from; drawn there itself where it is None."""
    if torch.compiler.is_compiling() or isinstance(seed, torch.Tensor):
        where = "under torch.compile" if torch.compiler.is_compiling() else "where seed is a tensor"
        raise ValueError(f"{NAME}: target_size and context_size must be given {where}, got None")
    if seed is None:
        return int(randomness.seed_tensor(NAME, None, generator, torch.device("cpu")))
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{NAME}: seed must be an int or a tensor of one integer, got {type(seed).__name__}")
    if generator is not None:
        raise ValueError(f"{NAME}: seed and generator must not both be given")
    randomness.check_range(NAME, seed)
    return seed

"""Masks of rectangles."""

from __future__ import annotations

import torch

from sslkernels.ops.patch_mask import arguments, grids, mask_makers_op, randomness

NAME = "block_mask"
SPARE_ATTEMPTS = 100  # at rectangles, besides what covering the grid with average ones takes four times over


def block_mask(
    batch_size: int,
    grid_size: int | tuple[int, int],
    num_masked: int | torch.Tensor | None = None,
    *,
    mask_ratio: float = 0.5,
    min_patches: int = 4,
    max_patches: int | None = None,
    min_aspect: float = 0.3,
    max_aspect: float | None = None,
    seed: int | torch.Tensor | None = None,
    sample_ids: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    r"""Masks rectangles of patches, as BEiT and DINOv2 do, but always exactly as many patches as asked for.

    With :math:`r` patches to go, a rectangle of h x w patches is drawn:

    .. math:: a \sim U(\mathrm{min\_patches}, \min(r, \mathrm{max\_patches})), \quad
        \log \rho \sim U(\log \mathrm{min\_aspect}, \log \mathrm{max\_aspect}), \quad
        h = \lfloor \sqrt{a \rho} \rceil, \quad w = \lfloor \sqrt{a / \rho} \rceil

    It is put in any place of the grid, each equally often, and masked if what it adds is at least one patch and at most
    that many; after ten in a row that were not, the patches to go are drawn one by one among those that are free.

    Equivalent Python, for one sample and up to the random numbers::

        mask, misses = np.zeros((H, W), bool), 0
        while (limit := min(num_masked - mask.sum(), max_patches)) > 0 and misses < 10:
            area = uniform(min_patches, limit)
            aspect = exp(uniform(log(min_aspect), log(max_aspect)))
            h, w = round(sqrt(area * aspect)), round(sqrt(area / aspect))
            misses += 1
            if 1 <= h <= H and 1 <= w <= W:
                top, left = randint(0, H - h), randint(0, W - w)
                block = mask[top : top + h, left : left + w]
                if 0 < h * w - block.sum() <= limit:
                    block[:], misses = True, 0
        free = np.flatnonzero(~mask)
        mask.flat[sample(list(free), num_masked - mask.sum())] = True

    A sample's mask is a pure function of the seed, its id and the arguments: the same, bit for bit, eager and compiled,
    on every backend and device, however samples are batched and spread over processes.

    Args:
        batch_size: N.
        grid_size: (H, W) in patches, or an int for a square; at most 65,536 patches.
        num_masked: how many patches to mask, in [0, H W]: an int, or (N,) integers, one for each sample. In a tensor, a
            number out of range is an error on a CPU; a GPU, which is not waited for, takes the nearest one in range.
        mask_ratio: in place of ``num_masked``, the share of the patches to mask, in [0, 1]: H W - floor(H W
            (1 - mask_ratio)) of them, as `patch_mask` does.
        min_patches: the area of the smallest rectangle, in patches; where fewer are to go, an area between the two.
        max_patches: the area of the largest; None: H W.
        min_aspect, max_aspect: height over width of rectangles, before rounding, in [1/256, 256]; the latter None: the
            inverse of the former.
        seed: a 64-bit integer, as an int or as a tensor of one element on the device of the mask, which is read there.
            None draws one from ``generator``, exactly once.
        sample_ids: (N,) integers, the samples' numbers in the data set or in the global batch. None: 0 ... N - 1.
        generator: what to draw the seed from; None: the device's default generator, which `torch.manual_seed` sets. Not
            under `torch.compile`.
        device: where to draw and return it; None: that of ``num_masked``, ``sample_ids`` or ``seed``, whichever is a
            tensor, else PyTorch's default device.
        backend: None for the fastest one (see `sslkernels.backends`), or "cpp", "cuda", "reference".

    Returns:
        (N, H, W) bool, True where a patch is masked.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        RuntimeError: ``backend`` is not available here; or, on a CPU, ``num_masked`` has a number out of range.

    Source: Bao et al., BEiT: BERT Pre-Training of Image Transformers (2022), algorithm 1, with the bounds of Oquab et
    al., DINOv2 (2023). Both leave a count that no rectangle fits unreached, and neither lets a rectangle be as high or
    as wide as the grid. Random numbers are those of Philox4x32-10.

    Cost: about a microsecond a sample on one core for a grid of 16 x 16. Extra memory on a GPU: at most 17 bytes a
    patch.
    """
    samples = arguments.count(NAME, "batch_size", batch_size)
    height, width = grids.grid(NAME, grid_size)
    patches = height * width
    least = _area("min_patches", min_patches, 1)
    most = patches if max_patches is None else _area("max_patches", max_patches, least)
    aspects = _aspects(min_aspect, max_aspect)
    where = randomness.device_of(NAME, device, num_masked, sample_ids, seed)
    wanted = _wanted(num_masked, mask_ratio, samples, patches, where)
    arguments.check_backend(NAME, backend, where.type)
    ids = randomness.samples(NAME, sample_ids, samples, where)
    seed = randomness.seed_tensor(NAME, seed, generator, where)
    attempts = SPARE_ATTEMPTS + 8 * patches // (least + most)
    ops = mask_makers_op.family(backend)
    return ops.block_mask_fwd(seed, ids, wanted, height, width, least, most, aspects, attempts)


def _area(argument: str, value, least: int) -> int:
    arguments.count(NAME, argument, value, grids.MAX_TOKENS)
    if value < least:
        raise ValueError(f"{NAME}: {argument} must be at least {least}, got {value}")
    return value


def _aspects(min_aspect, max_aspect) -> list[int]:
    limit = grids.ASPECT_LIMIT
    for argument, value in (("min_aspect", min_aspect), ("max_aspect", max_aspect)):
        if argument == "max_aspect" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{NAME}: {argument} must be a number, got {type(value).__name__}")
        if not 1 / limit <= value <= limit:
            raise ValueError(f"{NAME}: {argument} must be in [1/{limit}, {limit}], got {value}")
    high = 1 / min_aspect if max_aspect is None else max_aspect
    if high < min_aspect:
        raise ValueError(f"{NAME}: max_aspect must be at least min_aspect, {min_aspect:g}, got {high:g}")
    return grids.aspects(min_aspect, high)


def _wanted(num_masked, mask_ratio, samples: int, patches: int, device: torch.device) -> torch.Tensor:
    """(N,) int64: how many patches of each sample to mask."""
    arguments.check_ratio(NAME, "mask_ratio", mask_ratio)
    if isinstance(num_masked, torch.Tensor):
        return arguments.integers(NAME, "num_masked", num_masked, (samples,), device)
    if num_masked is None:
        count = patches - arguments.num_kept(NAME, patches, mask_ratio, None)
    else:
        count = arguments.count(NAME, "num_masked", num_masked, patches)
    return torch.full((samples,), count, dtype=torch.int64, device=device)

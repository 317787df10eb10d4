"""Masks of video that are the same in every frame."""

from __future__ import annotations

import torch

from sslkernels.ops.patch_mask import arguments, grids, op, randomness
from sslkernels.ops.patch_mask.masking import MaskIndices

NAME = "tube_mask"


def tube_mask(
    batch_size: int,
    grid_size: tuple[int, int, int],
    mask_ratio: float = 0.9,
    *,
    num_keep: int | None = None,
    ordered: bool = False,
    seed: int | torch.Tensor | None = None,
    sample_ids: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> MaskIndices:
    r"""Masks tubes: one random subset of the places in a frame, in all frames, as VideoMAE does.

    .. math:: \mathrm{mask}_{n, t, p} = \mathrm{mask}_{n, p} \text{ of } \mathtt{patch\_mask(N, H W)}

    Equivalent PyTorch::

        frame = patch_mask(N, H * W, mask_ratio, seed=seed)
        mask = frame.mask[:, None].expand(N, T, H * W).flatten(1)
        ids_keep = (frame.ids_keep[:, None] + H * W * torch.arange(T)[:, None]).flatten(1)
        ids_restore = torch.cat([ids_keep, mask.nonzero()[:, 1].view(N, -1)], dim=1).argsort(dim=1)

    Args:
        batch_size: N.
        grid_size: (T, H, W): frames (tubelets, where a token spans several), and patches of each.
        mask_ratio: the share of the places to remove, in [0, 1]; taken as the decimal that it prints as.
        num_keep: how many places of a frame to keep, in [0, H W], in place of ``mask_ratio``.
        ordered, seed, sample_ids, generator, backend: as for `patch_mask`; the place p has the random numbers that the
            token p has there.
        device: where to draw and return it; None: that of ``sample_ids`` or ``seed``, whichever is a tensor, else
            PyTorch's default device.

    Returns:
        ``MaskIndices(mask, ids_keep, ids_restore)`` over the T H W tokens in row-major order, for `gather_tokens`,
        `restore_tokens` and `random_masking`: (N, T H W) bool, True where a token is removed; (N, T K) int64, frame by
        frame; (N, T H W) int64, the place of each kept token in ``ids_keep``, while removed tokens have T K, T K + 1,
        ... in order of index.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        RuntimeError: ``backend`` is not available here.

    Source: Tong et al., VideoMAE: Masked Autoencoders are Data-Efficient Learners for Self-Supervised Video
    Pre-Training (2022), section 3.3.

    Cost: that of `patch_mask` for a frame, and 8 T K + 9 T H W bytes a sample.
    """
    samples = arguments.count(NAME, "batch_size", batch_size)
    if not isinstance(grid_size, (tuple, list)) or len(grid_size) != 3:
        raise TypeError(f"{NAME}: grid_size must be three ints, frames, height and width, got {grid_size!r}")
    frames = arguments.count(NAME, "the frames of grid_size", grid_size[0])
    height, width = grids.rectangle(NAME, "the frame of grid_size", grid_size[1:])
    places = height * width
    kept = arguments.num_kept(NAME, places, mask_ratio, num_keep)
    arguments.check_flags(NAME, ordered=ordered)
    where = randomness.device_of(NAME, device, sample_ids, seed)
    arguments.check_backend(NAME, backend, where.type)
    ids = randomness.samples(NAME, sample_ids, samples, where)
    seed = randomness.seed_tensor(NAME, seed, generator, where)
    ids_keep, ids_restore, mask = op.family(backend).patch_mask_fwd(seed, ids, None, samples, places, kept, ordered)
    return _repeated(ids_keep[:, None], ids_restore[:, None], mask[:, None], frames)


def _repeated(ids_keep, ids_restore, mask, frames: int) -> MaskIndices:
    """The masks of a frame, (N, 1, ...), as those of a video."""
    kept, places = ids_keep.shape[2], mask.shape[2]
    index = torch.arange(frames, device=mask.device)[:, None]
    # of a frame, kept tokens have places below `kept`, and removed ones those from there on
    removed = frames * kept + (places - kept) * index + ids_restore - kept
    ids_restore = torch.where(mask, removed, kept * index + ids_restore)
    return MaskIndices(
        mask.repeat(1, frames, 1).flatten(1), (places * index + ids_keep).flatten(1), ids_restore.flatten(1)
    )

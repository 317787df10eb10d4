"""DINOv2's masking (facebookresearch/dinov2, ``dinov2.data.masking`` and ``dinov2.data.collate``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sslkernels.ops import block_mask

__all__ = ["MaskingGenerator", "collate_data_and_cast", "collate_masks"]


class MaskingGenerator:
    """In place of the class of that name: rectangles by `sslkernels.block_mask`, for a sample or for a batch.

    Args:
        input_size: (H, W) of the grid of patches, or an int for a square.
        num_masking_patches: the most patches of a rectangle where ``max_num_patches`` is None.
        min_num_patches, max_num_patches: of a rectangle, before it is cut to what is missing.
        min_aspect, max_aspect: of a rectangle, height by width; None: the inverse of ``min_aspect``.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int],
        num_masking_patches: int | None = None,
        min_num_patches: int = 4,
        max_num_patches: float | None = None,
        min_aspect: float = 0.3,
        max_aspect: float | None = None,
    ):
        self.height, self.width = (input_size, input_size) if isinstance(input_size, int) else input_size
        self.num_patches = self.height * self.width
        self.num_masking_patches = num_masking_patches
        most = num_masking_patches if max_num_patches is None else max_num_patches
        self.rectangles: dict[str, Any] = {
            "min_patches": min_num_patches,
            "max_patches": None if most is None else int(most),
            "min_aspect": min_aspect,
            "max_aspect": max_aspect,
        }

    def get_shape(self) -> tuple[int, int]:
        return self.height, self.width

    def __call__(self, num_masking_patches: int = 0) -> np.ndarray:
        """One mask (H, W) of exactly so many patches."""
        return self.masks(torch.tensor([num_masking_patches]))[0].numpy()

    def masks(
        self,
        num_masked: torch.Tensor,
        seed: int | None = None,
        sample_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(N, H, W) bool masks of (N,) numbers of patches, on their device."""
        return block_mask(
            len(num_masked), self.get_shape(), num_masked, seed=seed, sample_ids=sample_ids, device=num_masked.device,
            **self.rectangles,
        )  # fmt: skip


def collate_masks(
    batch_size: int,
    mask_ratio_tuple: tuple[float, float],
    mask_probability: float,
    mask_generator: MaskingGenerator,
    *,
    seed: int | None = None,
    sample_ids: torch.Tensor | None = None,
    device: torch.device | str | None = None,
) -> dict[str, torch.Tensor | int]:
    """The masks of a batch, as DINOv2's ``collate_data_and_cast`` makes them, without the crops.

    ``int(batch_size * mask_probability)`` samples in random places of the batch are masked, the i-th of them by a share
    of patches from the i-th of as many equal parts of ``mask_ratio_tuple``.

    Args:
        batch_size: N.
        mask_ratio_tuple: the smallest and the largest share.
        mask_probability: the share of samples that are masked.
        mask_generator: the grid, and what the rectangles may be.
        seed: of everything. How many patches a sample loses depends on the batch; which ones, given that, on the seed
            and the sample's id alone. None: drawn from PyTorch's default generator.
        sample_ids: (N,) integers; None: 0 ... N - 1.
        device: where the masks are made; None: PyTorch's default device. Nothing is read back from it.

    Returns:
        ``collated_masks`` (N, L) bool; ``mask_indices_list`` (M,), the masked places in the flattened masks;
        ``masks_weight`` (M,), one over the masked patches of the sample that each is in; ``upperbound``, the most that
        M can be; ``n_masked_patches``, M as a tensor of one element.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    _checked("collate_masks", mask_generator)
    patches = mask_generator.num_patches
    if seed is None:
        seed = int(torch.randint(2**63 - 1, (), device="cpu"))
    # on the host, for the number of masked patches is the size of two results
    generator = torch.Generator().manual_seed(seed)
    masked = int(batch_size * mask_probability)
    edges = torch.linspace(*mask_ratio_tuple, masked + 1, device="cpu")
    low, high = edges[:-1], edges[1:]
    shares = low + (high - low) * torch.rand(masked, generator=generator, device="cpu")
    counts = (patches * shares.minimum(high)).long()  # rounding may have left the share above
    numbers = torch.zeros(batch_size, dtype=torch.int64, device="cpu")
    numbers[torch.randperm(batch_size, generator=generator, device="cpu")[:masked]] = counts
    total = int(numbers.sum())

    numbers = numbers.to(torch.get_default_device() if device is None else device)
    masks = mask_generator.masks(numbers, seed, sample_ids).flatten(1)
    indices = torch.nonzero_static(masks.flatten(), size=total).flatten()
    weights = 1 / numbers.clamp(min=1).float()
    return {
        "collated_masks": masks,
        "mask_indices_list": indices,
        "masks_weight": weights.repeat_interleave(numbers, output_size=total),
        "upperbound": int((patches * high).long().sum()),
        "n_masked_patches": torch.full((1,), total, dtype=torch.int64, device=masks.device),
    }


def collate_data_and_cast(
    samples_list: Sequence,
    mask_ratio_tuple: tuple[float, float],
    mask_probability: float,
    dtype: torch.dtype,
    n_tokens: int | None = None,
    mask_generator: MaskingGenerator | None = None,
    *,
    seed: int | None = None,
    sample_ids: torch.Tensor | None = None,
) -> dict[str, torch.Tensor | int]:
    """In place of the function of that name: the crops of a batch, in ``dtype``, and what `collate_masks` gives.

    Args:
        samples_list: samples whose first element has ``global_crops`` and ``local_crops``, lists of (C, H, W).
        n_tokens: the patches of a global crop; None: those of ``mask_generator``.
        mask_ratio_tuple, mask_probability, mask_generator, seed, sample_ids: as for `collate_masks`. The batch is that
            of the global crops: first that of every sample, then the second of every sample.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Where it differs from DINOv2: docs/migration-masking.md.
    """
    mask_generator = _checked("collate_data_and_cast", mask_generator, n_tokens)
    crops = [sample[0] for sample in samples_list]
    collated = {
        f"collated_{kind}": torch.stack(
            [crop for several in zip(*(c[kind] for c in crops), strict=True) for crop in several]
        )
        for kind in ("global_crops", "local_crops")
    }
    masks = collate_masks(
        len(collated["collated_global_crops"]), mask_ratio_tuple, mask_probability, mask_generator, seed=seed,
        sample_ids=sample_ids, device="cpu",
    )  # fmt: skip
    return {**{name: crop.to(dtype) for name, crop in collated.items()}, **masks}


def _checked(op: str, mask_generator: object, n_tokens: int | None = None) -> MaskingGenerator:
    if not isinstance(mask_generator, MaskingGenerator):
        raise TypeError(
            f"{op}: mask_generator must be a sslkernels.compat.dinov2.MaskingGenerator, "
            f"got {type(mask_generator).__name__}"
        )
    patches = mask_generator.num_patches
    if n_tokens is not None and n_tokens != patches:
        raise ValueError(f"{op}: n_tokens must be {patches}, those of the grid of mask_generator, got {n_tokens}")
    return mask_generator

"""lightly's masking function (lightly 1.6, ``lightly.models.utils.random_token_mask``)."""

from __future__ import annotations

import torch

import sslkernels

__all__ = ["random_token_mask"]


def random_token_mask(
    size: tuple[int, int],
    mask_ratio: float = 0.6,
    mask_class_token: bool = False,
    device: torch.device | str | None = None,
    *,
    seed: int | torch.Tensor | None = None,
    sample_ids: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of the function of that name: `sslkernels.patch_mask` with lightly's returns.

    Args:
        size: (N, L), the class token counted.
        mask_ratio: the share to remove, in [0, 1]; of the L - 1 other tokens where the class token always stays.
        mask_class_token: whether the class token, the first one, may be removed.
        device: where to draw.
        seed, sample_ids: as for `sslkernels.patch_mask`.
        scores: (N, L), as for `sslkernels.patch_mask`; that of a class token that stays is not looked at.

    Returns:
        (N, K) ids of the tokens that stay, a class token that stays first; (N, L - K) ids of the others, ascending.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Where it differs from lightly: docs/migration-masking.md.
    """
    samples, length = size
    first = 0 if mask_class_token or length == 0 else 1  # tokens that stay in any case
    if scores is not None:
        scores = scores[:, first:]
    out = sslkernels.patch_mask(
        samples, length - first, mask_ratio, seed=seed, sample_ids=sample_ids, scores=scores, device=device
    )
    tokens = torch.arange(first, length, device=out.ids_restore.device).expand(samples, -1)
    shuffled = torch.empty_like(out.ids_restore).scatter_(1, out.ids_restore, tokens)
    keep, removed = shuffled.tensor_split([out.ids_keep.shape[1]], dim=1)
    return torch.cat([keep.new_zeros(samples, first), keep], dim=1), removed

"""MAE's masking function (facebookresearch/mae, ``MaskedAutoencoderViT.random_masking``)."""

from __future__ import annotations

import torch

import sslkernels

__all__ = ["random_masking"]


def random_masking(
    x: torch.Tensor,
    mask_ratio: float,
    *,
    seed: int | torch.Tensor | None = None,
    sample_ids: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """In place of the method of that name: `sslkernels.random_masking` with MAE's returns.

    Args:
        x: (N, L, D) patch tokens, without the class token.
        mask_ratio: the share to remove, in [0, 1].
        seed, sample_ids, scores: as for `sslkernels.random_masking`; ``scores`` take the place of MAE's noise.

    Returns:
        The kept tokens (N, K, D); the mask (N, L) in float32, 1 where a token is removed; ids_restore (N, L).

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Where it differs from MAE: docs/migration-masking.md.
    """
    out = sslkernels.random_masking(x, mask_ratio, seed=seed, sample_ids=sample_ids, scores=scores)
    return out.x_kept, out.mask.float(), out.ids_restore

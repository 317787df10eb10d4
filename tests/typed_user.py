"""What a typed program gets from the public names: `make lint` checks it, tests/test_public_api.py runs it.

A wrong use carries the mistake that must be found in it: an ``ignore`` for which there is no cause is an error.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.distributed import ProcessGroup
from typing_extensions import assert_type

import sslkernels
from sslkernels import nn as ssl
from sslkernels.compat.dinov2 import MaskingGenerator
from sslkernels.distributed import gather, world


def masks(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens (N, L, D), masked and restored."""
    masked = sslkernels.random_masking(tokens, 0.5, num_prefix_tokens=1, seed=7)
    assert_type(masked, sslkernels.MaskedTokens)
    assert_type(masked.ids_restore, torch.Tensor)
    assert_type(sslkernels.patch_mask(4, 9, num_keep=3), sslkernels.MaskIndices)
    assert_type(sslkernels.block_mask(4, (3, 3), 2), torch.Tensor)
    assert_type(MaskingGenerator(3)(2), np.ndarray)
    x_kept, *_ = ssl.PatchMask(0.5, return_indices=True)(tokens)
    token = torch.zeros(x_kept.shape[-1])
    return sslkernels.restore_tokens(masked.x_kept, masked.ids_restore, token, num_prefix_tokens=1)


def losses(z0: torch.Tensor, z1: torch.Tensor, statistics: bool = True) -> torch.Tensor:
    """Only ``return_stats`` says what comes back."""
    assert_type(sslkernels.nt_xent(z0, z1, 0.1, reduction="none"), torch.Tensor)
    loss, stats = sslkernels.info_nce(z0, z1, temperature=0.1, label_smoothing=0.1, return_stats=True)
    assert_type(loss, torch.Tensor)
    assert_type(stats, sslkernels.ContrastiveStats)
    clip = sslkernels.clip_loss(z0, z1, 5.0, exclude_ids=(torch.arange(len(z0)), torch.arange(len(z1))))
    assert_type(clip, torch.Tensor)
    assert_type(sslkernels.clip_loss(z0, z1, 5.0, return_stats=True), tuple[torch.Tensor, sslkernels.ClipStats])
    either = sslkernels.decoupled_nt_xent(z0, z1, return_stats=statistics)
    assert_type(either, torch.Tensor | tuple[torch.Tensor, sslkernels.ContrastiveStats])
    assert_type(world(), ProcessGroup | None)
    return loss + clip + gather(z0, world()).sum()


def teacher(student: nn.Module) -> ssl.EMATeacher:
    followed = ssl.EMATeacher(student, ssl.CosineMomentum(total_steps=10))
    assert_type(followed.update(student), None)
    assert_type(followed.get_decay(), float | torch.Tensor)
    assert_type(sslkernels.backends()["nt_xent"]["cpu"].active, str)
    return followed


def mistakes(z0: torch.Tensor, z1: torch.Tensor) -> None:
    """Never called."""
    sslkernels.nt_xent(z0)  # type: ignore[call-overload]
    sslkernels.nt_xent(z0, z1, normalise=True)  # type: ignore[call-overload]
    sslkernels.nt_xent(z0, z1, return_stats=True).backward()  # type: ignore[attr-defined]
    assert_type(sslkernels.nt_xent(z0, z1, return_stats=True), torch.Tensor)  # type: ignore[assert-type]
    sslkernels.random_masking(z0, "0.75")  # type: ignore[arg-type]
    sslkernels.random_masking(z0).ids_kept  # type: ignore[attr-defined]  # noqa: B018
    sslkernels.ema_update_(z0, z1, momentum=None)  # type: ignore[arg-type]
    ssl.NTXentLoss(temperature="low")  # type: ignore[arg-type]

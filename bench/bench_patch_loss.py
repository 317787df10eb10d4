"""The masked patch loss: MAE's own code, the definition, torch.compile of it, and ours."""

from __future__ import annotations

from collections.abc import Callable

import measure
import pytest
import torch
from runs import runs

from sslkernels.registry import ops

SPEC = next(spec for spec in ops() if spec.name == "masked_patch_loss")
SPECS = {SPEC.name: SPEC}
RUNS = runs(SPECS)


def peers(op: str = SPEC.name) -> dict[str, Callable]:
    """What users have now."""
    return {"mae": mae}


def mae(pred, images, mask, patch_size, norm_pix=True):
    """The loss as masked autoencoders compute it: every patch's target, masked or not, by an einsum."""
    samples, channels, *sizes = images.shape
    sides = (patch_size,) * len(sizes) if isinstance(patch_size, int) else patch_size
    split = [part for size, side in zip(sizes, sides, strict=True) for part in (size // side, side)]
    pattern = "nchpwq->nhwpqc" if len(sizes) == 2 else "ncathpwq->nahwtpqc"
    target = torch.einsum(pattern, images.reshape(samples, channels, *split)).reshape(pred.shape)
    if norm_pix:
        mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
        target = (target - mean) / (var + 1e-6) ** 0.5
    loss = ((pred - target) ** 2).mean(dim=-1)
    return (loss * mask).sum() / mask.sum()


def entrants(run, device):
    return measure.entrants(SPEC, measure.of_run(SPEC, peers(), run, device), run, device)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_masked_patch_loss(run, race):
    race(run, SPEC, peers())

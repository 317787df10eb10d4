"""The optimisers by name, and the schedule of their learning rate."""

from __future__ import annotations

import math

import torch
from timm.optim import create_optimizer_v2
from torch import nn

LEARNING_RATES = {"adamw": 3e-3, "lars": 1.0}


def build_optimizer(
    model: nn.Module, name: str, weight_decay: float, betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.Optimizer:
    """timm's optimiser; biases and the scales of norms are not decayed. ``betas`` are AdamW's."""
    options = {"betas": betas} if name == "adamw" else {}
    return create_optimizer_v2(model, opt=name, lr=LEARNING_RATES[name], weight_decay=weight_decay, **options)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """The share of the peak learning rate at a step: a linear rise over ``warmup`` steps, then half a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))) / 2

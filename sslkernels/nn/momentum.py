"""Schedules of a teacher's momentum: small frozen objects that are called with the number of updates made before.

An int gives a float. An int64 tensor of one element gives a float64 tensor on its device, so that nothing has to be
read back to the host.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Step = int | torch.Tensor
Momentum = float | torch.Tensor


@dataclass(frozen=True)
class ConstantMomentum:
    """One momentum throughout, after ``copies`` updates that copy the student.

    Source: `torch.optim.swa_utils.AveragedModel` with an exponential average: ``copies=1``.
    """

    momentum: float = 0.996
    copies: int = 0

    def __post_init__(self) -> None:
        _check_momentum(self, "momentum", self.momentum)

    def __call__(self, step: Step) -> Momentum:
        step = _number(step)
        return _where(step < self.copies, 0.0, self.momentum)


@dataclass(frozen=True)
class CosineMomentum:
    r"""From ``base`` to ``final`` in ``total_steps`` updates, as in BYOL and DINO; ``final`` from then on.

    .. math:: m_k = f - (f - b) \frac{\cos(\pi k / K) + 1}{2}

    lightly's ``cosine_schedule(k, max_steps, b, f)`` reaches ``f`` one update earlier: ``total_steps=max_steps - 1``.

    Source: Grill et al., Bootstrap Your Own Latent (2020).
    """

    total_steps: int
    base: float = 0.996
    final: float = 1.0

    def __post_init__(self) -> None:
        _check_momentum(self, "base", self.base)
        _check_momentum(self, "final", self.final)
        _check_positive(self, "total_steps", self.total_steps)

    def __call__(self, step: Step) -> Momentum:
        progress = _least(_number(step) / self.total_steps, 1.0)
        cosine = torch.cos(math.pi * progress) if isinstance(progress, torch.Tensor) else math.cos(math.pi * progress)
        return self.final - (self.final - self.base) * (cosine + 1) / 2


@dataclass(frozen=True)
class WarmupMomentum:
    r"""Rises towards ``decay``: the first update copies the student.

    .. math:: m_k = \min(d, 1 - (1 + k / \gamma)^{-p})

    timm counts the updates from 1: this is its ``get_decay(k + 1)`` with ``use_warmup``. Power 2/3 reaches 0.999 after
    31.6 thousand updates, power 3/4 after 10 thousand.
    """

    decay: float = 0.9999
    gamma: float = 1.0
    power: float = 2 / 3

    def __post_init__(self) -> None:
        _check_momentum(self, "decay", self.decay)
        _check_positive(self, "gamma", self.gamma)

    def __call__(self, step: Step) -> Momentum:
        return _least(1 - (1 + _number(step) / self.gamma) ** -self.power, self.decay)


@dataclass(frozen=True)
class PowerMomentum:
    r"""The power-function average, whose width is a fixed share of the training behind it.

    .. math:: m_k = (1 - 1 / t)^{\gamma + 1}, \quad t = k + 1

    Source: Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models (2024), section 3.1.
    """

    gamma: float

    def __post_init__(self) -> None:
        if not self.gamma > -1:
            raise ValueError(f"PowerMomentum: gamma must be more than -1, got {self.gamma}")

    @classmethod
    def from_sigma_rel(cls, sigma_rel: float) -> PowerMomentum:
        r"""The average of relative width :math:`\sigma = \sqrt{(\gamma + 1) / ((\gamma + 2)^2 (\gamma + 3))}`."""
        if not 0 < sigma_rel < 12**-0.5:
            raise ValueError(f"PowerMomentum: sigma_rel must lie between 0 and 12 ** -0.5, got {sigma_rel}")
        inverse = sigma_rel**-2
        return cls(float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()))

    def __call__(self, step: Step) -> Momentum:
        return (1 - 1 / (_number(step) + 1)) ** (self.gamma + 1)


@dataclass(frozen=True)
class EqualMomentum:
    """The plain mean of every student so far, as in stochastic weight averaging: momentum k / (k + 1)."""

    def __call__(self, step: Step) -> Momentum:
        step = _number(step)
        return 1 - 1 / (step + 1)


@dataclass(frozen=True)
class TimmDecay:
    """The decay of timm's ``ModelEmaV3``, which counts updates from 1 and copies the student in the first of them."""

    decay: float = 0.9999
    min_decay: float = 0.0
    update_after_step: int = 0
    use_warmup: bool = False
    warmup_gamma: float = 1.0
    warmup_power: float = 2 / 3

    def __post_init__(self) -> None:
        _check_momentum(self, "decay", self.decay)
        _check_momentum(self, "min_decay", self.min_decay)
        _check_positive(self, "warmup_gamma", self.warmup_gamma)

    @property
    def first_step(self) -> int:
        """What the first update counts as when no step is given.

        As in timm, nothing is copied then where neither a warm-up nor a delay is asked for.
        """
        return 1 if self.use_warmup or self.update_after_step > 0 else 2

    def __call__(self, step: Step) -> Momentum:
        warm = _most(_number(step) - self.update_after_step - 1, 0)
        decay: Momentum = self.decay
        if self.use_warmup:
            decay = 1 - (1 + warm / self.warmup_gamma) ** -self.warmup_power
            decay = _most(_least(decay, self.decay), self.min_decay)
        return _where(warm <= 0, 0.0, decay)


SCHEDULES = {
    schedule.__name__: schedule
    for schedule in (ConstantMomentum, CosineMomentum, WarmupMomentum, PowerMomentum, EqualMomentum, TimmDecay)
}


def encode(momentum: Any) -> dict | Momentum | None:
    """What a checkpoint holds of a momentum, of plain types and tensors only; None for a callable of the user's."""
    if isinstance(momentum, torch.Tensor):
        return momentum.detach().clone()
    if type(momentum) in SCHEDULES.values():
        return {"schedule": type(momentum).__name__, **dataclasses.asdict(momentum)}
    return None if callable(momentum) else float(momentum)


def decode(encoded: dict | Momentum | None) -> Momentum | Callable | None:
    if not isinstance(encoded, dict):
        return encoded
    fields = dict(encoded)
    return SCHEDULES[fields.pop("schedule")](**fields)


def _number(step: Step) -> int | torch.Tensor:
    return step.double() if isinstance(step, torch.Tensor) else step


def _least(value: Momentum, bound: float) -> Momentum:
    return value.clamp(max=bound) if isinstance(value, torch.Tensor) else min(value, bound)


def _most(value: Momentum, bound: float) -> Momentum:
    return value.clamp(min=bound) if isinstance(value, torch.Tensor) else max(value, bound)


def _where(condition: bool | torch.Tensor, value: Momentum, other: Momentum) -> Momentum:
    if isinstance(condition, torch.Tensor):
        zero = torch.zeros_like(condition, dtype=torch.float64)  # two Python numbers would make a float32 tensor
        return torch.where(condition, zero + value, zero + other)
    return value if condition else other


def _check_momentum(schedule: object, argument: str, momentum: float) -> None:
    if not 0 <= momentum <= 1:
        raise ValueError(f"{type(schedule).__name__}: {argument} must lie in [0, 1], got {momentum}")


def _check_positive(schedule: object, argument: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{type(schedule).__name__}: {argument} must be positive, got {value}")

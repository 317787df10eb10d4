"""NT-Xent: the definition, torch.compile of it, lightly's NTXentLoss, and ours."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec

import pytest

from sslkernels.registry import ops

SPEC = next(spec for spec in ops() if spec.name == "nt_xent")
SPECS = {"nt_xent": SPEC}


def peers(op: str = "nt_xent") -> dict[str, Callable]:
    """What users pick instead, where it is installed."""
    return {"lightly": lightly} if find_spec("lightly") else {}


def lightly(z0, z1, temperature):
    return _lightly_loss(temperature)(z0, z1)


@functools.cache
def _lightly_loss(temperature: float):
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature)


@pytest.mark.parametrize("direction", ("forward", "forward+backward"))
@pytest.mark.parametrize("case", SPEC.tagged("bench"), ids=lambda case: case.name)
def test_nt_xent(case, direction, race):
    race(SPEC, case, direction, peers())

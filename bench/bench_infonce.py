"""NT-Xent: the definition, torch.compile of it, lightly's NTXentLoss, and ours."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec

import measure
import pytest
from runs import runs

from sslkernels.registry import ops

SPEC = next(spec for spec in ops() if spec.name == "nt_xent")
SPECS = {"nt_xent": SPEC}
RUNS = runs(SPECS)


def peers(op: str = "nt_xent") -> dict[str, Callable]:
    """What users pick instead, where it is installed."""
    return {"lightly": lightly} if find_spec("lightly") else {}


def lightly(z0, z1, temperature):
    return _lightly_loss(temperature)(z0, z1)


@functools.cache
def _lightly_loss(temperature: float):
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature)


def entrants(run, device):
    return measure.entrants(SPEC, measure.of_run(SPEC, peers(), run, device), run, device)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_nt_xent(run, race):
    race(run, SPEC, peers())

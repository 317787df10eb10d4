"""Broken kernels: `verify` fails on every one and so do the tests, while both pass on the same build unbroken."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import require_or_skip
from mutations import KINDS, MUTATIONS, NORM, PROBES

from sslkernels import _library

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("cpp", "triton", "cuda", "reference")
QUICK = {backend: [m for m in MUTATIONS if m.backend == backend and m.quick] for backend in BACKENDS}


def missing(backend: str) -> str:
    """Why kernels of a backend cannot be broken here, or an empty string."""
    if backend in ("cpp", "cuda") and not shutil.which("g++"):
        return "g++ is not installed"
    return _library.extension_error if backend == "cpp" else ""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What became of the mutations of every backend that is here."""
    file = tmp_path_factory.mktemp("mutants") / "outcomes.json"
    backends = [f"--backend={backend}" for backend in BACKENDS if not missing(backend)]
    command = [sys.executable, "tests/mutants.py", "--quick", *backends, "--json", str(file)]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return (json.loads(file.read_text()) if file.exists() else []), result.stdout


@pytest.mark.parametrize("backend", BACKENDS)
def test_verify_and_the_tests_catch_every_broken_kernel(backend, outcomes):
    require_or_skip(not missing(backend), missing(backend))
    found, text = [outcome for outcome in outcomes[0] if outcome["backend"] == backend], outcomes[1]
    broken = {MUTATIONS[outcome["mutation"] - 1]: outcome for outcome in found if outcome["mutation"]}
    unchanged = {outcome["op"]: outcome for outcome in found if not outcome["mutation"]}
    assert set(broken) == set(QUICK[backend]), text
    assert set(unchanged) == {mutation.op for mutation in broken}
    assert not any(outcome["error"] for outcome in found), text
    assert all(outcome["failed_checks"] and outcome["failed_tests"] for outcome in broken.values()), text
    assert not any(outcome["failed_checks"] or outcome["failed_tests"] for outcome in unchanged.values()), text
    assert all(outcome["checks"] and outcome["tests"] for outcome in found), text


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_the_place_of_a_mutation_is_there_once(mutation):
    assert (ROOT / mutation.file).read_text().count(mutation.before) == 1
    assert mutation.before != mutation.after


def test_every_kind_is_tried_on_every_backend_and_op():
    tried = {(m.backend, m.op, m.kind) for m in MUTATIONS}
    slices = {
        "cpp": ("nt_xent", "info_nce", "ema_update_", "restore_tokens", "masked_patch_loss"),
        "triton": ("nt_xent", "info_nce", "ema_update_", "restore_tokens", "masked_patch_loss"),
        "cuda": ("info_nce", "ema_update_", "restore_tokens", "masked_patch_loss"),  # Triton alone has nt_xent
    }
    for backend, ops in slices.items():
        assert {m.kind for m in QUICK[backend]} == set(KINDS)
        for op, kind in itertools.product(ops, KINDS):
            normalizes = op not in ("ema_update_", "restore_tokens")
            assert ((backend, op, kind) in tried) == (normalizes or kind != NORM), (backend, op, kind)
    assert {m.kind for m in QUICK["reference"]} == set(KINDS)
    assert {(m.backend, m.op) for m in MUTATIONS} == set(PROBES)

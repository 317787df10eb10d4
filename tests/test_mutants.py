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


@pytest.mark.parametrize("backend", BACKENDS)
def test_verify_and_the_tests_catch_every_broken_kernel(backend, tmp_path):
    if backend in ("cpp", "cuda"):
        require_or_skip(shutil.which("g++"), "g++ is not installed")
    if backend == "cpp":
        require_or_skip(_library.extension, _library.extension_error)
    file = tmp_path / "outcomes.json"
    command = [sys.executable, "tests/mutants.py", "--quick", "--backend", backend, "--json", str(file)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    outcomes = json.loads(file.read_text())
    broken = {MUTATIONS[outcome["mutation"] - 1] for outcome in outcomes if outcome["mutation"]}
    assert broken == set(QUICK[backend])
    assert all(outcome["failed_checks"] and outcome["failed_tests"] for outcome in outcomes if outcome["mutation"])
    unchanged = [outcome for outcome in outcomes if not outcome["mutation"]]
    assert {outcome["op"] for outcome in unchanged} == {mutation.op for mutation in broken}
    assert not any(outcome["failed_checks"] or outcome["failed_tests"] for outcome in unchanged)


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

"""`sslkernels verify`: passes where the ops are right, and fails, naming the culprit, where one is broken."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json

import pytest
import torch

from sslkernels import Backend, registry, verify

NT_XENT = next(spec for spec in registry.ops() if spec.name == "nt_xent")
CASES = tuple(case for case in NT_XENT.cases if case.name in ("odd", "rows", "zero_rows", "one_pair", "strided"))


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs the command on a spec, by default without what takes seconds; returns status, text and JSON."""

    def run(spec, *argv, plain_cases=0):
        monkeypatch.setattr(registry, "ops", lambda: iter([spec]))
        monkeypatch.setattr(verify, "PLAIN_CASES", plain_cases)
        parser = argparse.ArgumentParser()
        verify.add_arguments(parser)
        file = tmp_path / "verify.json"
        status = verify.main(parser.parse_args([*argv, "--device", "cpu", "--json", str(file)]))
        return status, capsys.readouterr().out, json.loads(file.read_text())

    return run


def spec_with(function=NT_XENT.function, cases=CASES, **changes):
    return dataclasses.replace(NT_XENT, function=function, cases=cases, **changes)


def test_passes(run):
    status, text, result = run(spec_with(cases=CASES[:3]))
    assert status == 0, text
    checks = result["checks"]
    assert all(check["passed"] for check in checks)
    seen = {(check["target"]["dtype"], check["name"]) for check in checks}
    assert seen == set(
        itertools.product(
            ("float32", "bfloat16", "float16", "float64"),
            ("value", "grad_z0", "grad_z1", "grad_temperature", "deterministic"),
        )
    )
    errors = {check["comparison"]["error"] for check in checks if check["comparison"]}
    assert len(errors) > 20  # measured, not assumed
    assert "FAIL" not in text and "none failed" in text


def test_checks_the_torch_integration(run):
    status, text, result = run(spec_with(cases=CASES[:1], dtypes=(torch.float32,)), plain_cases=1)
    assert status == 0, text
    assert {"opcheck", "compiled"} <= {check["name"] for check in result["checks"]}


def flip_sign(*args, **kwargs):
    return -NT_XENT.function(*args, **kwargs)


def drop_last_row(z0, z1, *args, **kwargs):
    """The last pair is never computed, as by a kernel that forgets its remainder."""
    loss = NT_XENT.function(z0, z1, *args, **{**kwargs, "reduction": "none"}).clone()
    loss[-1] = 0
    return loss if kwargs.get("reduction") == "none" else loss.mean()


def round_to_bf16(z0, z1, *args, **kwargs):
    return NT_XENT.function(z0.bfloat16().to(z0.dtype), z1.bfloat16().to(z1.dtype), *args, **kwargs)


def without_gradient(z0, z1, temperature=0.5, **kwargs):
    """One argument's gradient is lost, though not its value."""
    return NT_XENT.function(z0, z1.detach() + 0 * z1, temperature, **kwargs)


def crash(*args, **kwargs):
    raise RuntimeError("no kernel for this shape")


@pytest.mark.parametrize(
    ("broken", "culprit"),
    (
        (flip_sign, "value"),
        (drop_last_row, "value"),
        (round_to_bf16, "value"),
        (without_gradient, "grad_z1"),
        (crash, "no kernel for this shape"),
    ),
)
def test_fails_on_a_broken_kernel(run, broken, culprit):
    status, text, result = run(spec_with(broken, CASES[:3]), "--dtype", "float32")
    assert status == 1
    failures = [line for line in text.splitlines() if line.startswith("FAIL")]
    assert any(culprit in line and "nt_xent, cpu" in line for line in failures), text
    assert f"{sum(not check['passed'] for check in result['checks'])} failed" in text


def test_fails_when_two_runs_differ(run):
    noise = itertools.count(1)

    def wandering(*args, **kwargs):
        return NT_XENT.function(*args, **kwargs) * (1 + 1e-7 * next(noise))

    status, text, _ = run(spec_with(wandering, CASES[:1]), "--dtype", "float32")
    assert status == 1
    assert "deterministic: AssertionError: value differs between two runs" in text


def test_fails_when_an_operator_goes_unchecked(run):
    spec = spec_with(cases=CASES[:1], dtypes=(torch.float32,), torch_ops=("nt_xent_fwd",))
    status, text, _ = run(spec, plain_cases=1)
    assert status == 1
    assert "called the operators ['nt_xent_bwd', 'nt_xent_fwd'], registered are ['nt_xent_fwd']" in text


def test_fails_on_a_graph_break(run):
    def breaking(z0, *args, **kwargs):
        torch._dynamo.graph_break()
        return NT_XENT.function(z0, *args, **kwargs)

    status, text, _ = run(spec_with(breaking, CASES[:1], dtypes=(torch.float32,)), plain_cases=1)
    assert status == 1
    assert any("compiled: " in line for line in text.splitlines() if line.startswith("FAIL"))


def test_checks_what_stands_beside_the_active_backend(run, monkeypatch):
    asked = set()

    def recorded(*args, backend=None, **kwargs):
        asked.add(backend)
        return NT_XENT.function(*args, backend=None if backend == "cuda" else backend, **kwargs)

    beside = Backend("cpp", besides=("cuda",))
    monkeypatch.setattr(verify, "backends", lambda: {"nt_xent": {"cpu": beside}})
    status, text, result = run(spec_with(recorded, CASES[:1], dtypes=(torch.float32,)))
    assert status == 0, text
    assert asked == {None, "cuda", "reference"}
    assert len({check["target"]["label"] for check in result["checks"]}) == 3


def test_says_what_did_not_run(run, monkeypatch):
    status, text, result = run(spec_with(cases=CASES[:1]), "--dtype", "float32", "--backend", "triton")
    assert status == 1  # nothing checked is nothing proven
    assert any("triton" in line for line in result["not_run"])
    assert "not run: nt_xent on cpu: triton: not among" in text
    assert "0 checks of nothing" in text


def test_a_missing_device_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    checks, absent = verify.verify(devices=["cuda"])
    assert checks == []
    assert absent == ["cuda: torch sees no CUDA device, so no CUDA kernel ran"]


def test_plain_text_without_rich(run, monkeypatch):
    for module in ("rich", "rich.box", "rich.console", "rich.table", "rich.text"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    status, text, _ = run(spec_with(cases=CASES[:1]), "--dtype", "float64")
    assert status == 0
    header = next(line for line in text.splitlines() if line.startswith("op "))
    assert header.split()[:4] == ["op", "on", "dtype", "check"]

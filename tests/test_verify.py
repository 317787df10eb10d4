"""`sslkernels verify`: passes where the ops are right, and fails, naming the culprit, where one is broken."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import xml.etree.ElementTree as ET

import pytest
import torch

from sslkernels import Backend, cli, numerics, registry, verify
from sslkernels.verify import checks, progress, properties

SPECS = {spec.name: spec for spec in registry.ops()}
NT_XENT, PATCH_MASK = SPECS["nt_xent"], SPECS["patch_mask"]
CASES = tuple(case for case in NT_XENT.cases if case.name in ("odd", "rows", "zero_rows", "one_pair", "strided"))


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs the command on a spec, by default without what takes seconds; returns status, text and JSON."""

    def run(spec, *argv, integration=False, device="cpu"):
        monkeypatch.setattr(registry, "ops", lambda: iter([spec]))
        if not integration:
            monkeypatch.setattr(checks.Group, "integrated", False)
        file = tmp_path / "verify.json"
        status = cli.main(["verify", *argv, "--device", device, "--json", str(file)])
        captured = capsys.readouterr()
        assert captured.err == ""  # progress is for a terminal
        return status, captured.out, json.loads(file.read_text())

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
    status, text, result = run(spec_with(cases=CASES[:1], dtypes=(torch.float32,)), integration=True)
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
    status, text, _ = run(spec, integration=True)
    assert status == 1
    assert "called nt_xent_bwd, which the registry does not know" in text


def test_fails_when_no_case_calls_an_operator(run):
    spec = spec_with(cases=CASES[:1], dtypes=(torch.float32,), torch_ops=(*NT_XENT.torch_ops, "ema_update_"))
    status, text, _ = run(spec, integration=True)
    assert status == 1
    assert "all cases: opcheck: no case calls ema_update_" in text


def mask_spec(function, cases=1):
    return dataclasses.replace(PATCH_MASK, function=function, cases=PATCH_MASK.cases[:cases])


def forgets_high_bits(*args, seed, **kwargs):
    return PATCH_MASK.function(*args, seed=seed % 2**32, **kwargs)


def forgets_the_samples(*args, sample_ids=None, **kwargs):
    return PATCH_MASK.function(*args, **kwargs)


@pytest.mark.parametrize("broken", (forgets_high_bits, forgets_the_samples))
def test_fails_where_a_mask_has_other_bits(run, broken):
    status, text, result = run(mask_spec(broken, cases=2))
    assert status == 1
    assert {check["name"] for check in result["checks"] if not check["passed"]} == {"mask bits"}
    assert "patch_mask, cpu, cpp, float64: odd: mask bits: AssertionError: seed 18446744073709551615" in text
    assert "elements are not those of the definition" in text


def test_passes_where_masks_have_the_bits_of_the_definition(run):
    status, text, result = run(dataclasses.replace(PATCH_MASK, cases=tuple(PATCH_MASK.tagged("verify"))))
    assert status == 0, text
    bits = [check["case"] for check in result["checks"] if check["name"] == "mask bits"]
    assert bits.count("scores") == 2 and len(bits) == 2 * len(PATCH_MASK.tagged("verify"))


def test_fails_where_compiled_code_makes_another_mask(run):
    def changing(*args, **kwargs):
        mask = PATCH_MASK.function(*args, **kwargs)
        return mask * (1 + 2.0**-40) if torch.compiler.is_compiling() else mask

    status, text, _ = run(mask_spec(changing), integration=True)
    assert status == 1
    assert "compiled: AssertionError: value: other bits than in eager mode" in text


def test_a_crash_of_the_definition_or_of_the_inputs_is_told(run):
    def no_inputs(device, dtype):
        raise RuntimeError("no room for the inputs")

    cases = (dataclasses.replace(CASES[0], make=no_inputs), CASES[1])
    status, text, _ = run(spec_with(cases=cases, reference=crash), "--dtype", "float32")
    assert status == 1
    assert f"{CASES[0].name}: inputs: RuntimeError: no room for the inputs" in text
    assert f"{CASES[1].name}: definition: RuntimeError: no kernel for this shape" in text


def test_every_case_lies_on_the_device_that_it_is_made_for():
    elsewhere = []
    for spec in registry.ops():
        for case in spec.cases:
            found = torch.utils._pytree.tree_leaves(case.make("meta", spec.dtypes[0]))
            devices = {leaf.device.type for leaf in found if isinstance(leaf, torch.Tensor)}
            elsewhere += [f"{spec.name}, {case.name}"] * bool(devices - {"meta"})
    assert elsewhere == []


@pytest.mark.parametrize("spec", registry.ops(), ids=lambda spec: spec.name)
def test_the_registry_knows_every_operator_that_an_op_calls(spec):
    called = set()
    for case in spec.tagged("verify"):
        called |= set(properties.operators(spec, case.make("cpu", spec.dtypes[0])))
    assert called >= set(spec.torch_ops)
    assert called <= {name for op in registry.ops() for name in op.torch_ops + op.other_ops}


def test_a_call_is_moved_to_where_its_definition_is_exact():
    x, ids = torch.ones(2, dtype=torch.bfloat16), torch.arange(3)
    moved = numerics.on_cpu_in_double({"x": x, "pairs": (ids, None), "device": torch.device("cuda"), "ratio": 0.5})
    assert moved["x"].dtype == torch.float64 and moved["pairs"][0].dtype == torch.int64 and moved["pairs"][1] is None
    assert (moved["device"], moved["ratio"]) == ("cpu", 0.5)


def test_runs_are_compared_in_the_deterministic_mode():
    assert not torch.are_deterministic_algorithms_enabled()
    with properties.deterministic():
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_interrupted_run_reports_what_it_has(run):
    calls = itertools.count()

    def interrupted(*args, **kwargs):
        if next(calls) > 20:
            raise KeyboardInterrupt
        return NT_XENT.function(*args, **kwargs)

    status, text, result = run(spec_with(interrupted), "--dtype", "float32")
    assert status == 130 and result["interrupted"] and not result["passed"]
    assert "interrupted, the rest did not run" in text
    assert 0 < len(result["checks"]) < 100


def test_fails_on_a_graph_break(run):
    def breaking(z0, *args, **kwargs):
        torch._dynamo.graph_break()
        return NT_XENT.function(z0, *args, **kwargs)

    status, text, _ = run(spec_with(breaking, CASES[:1], dtypes=(torch.float32,)), integration=True)
    assert status == 1
    assert any("compiled: " in line for line in text.splitlines() if line.startswith("FAIL"))


def test_checks_what_stands_beside_the_active_backend(run, monkeypatch):
    asked = set()

    def recorded(*args, backend=None, **kwargs):
        asked.add(backend)
        return NT_XENT.function(*args, backend=None if backend == "cuda" else backend, **kwargs)

    beside = Backend("cpp", besides=("cuda",))
    monkeypatch.setattr(checks, "backends", lambda: {"nt_xent": {"cpu": beside}})
    status, text, result = run(spec_with(recorded, CASES[:1], dtypes=(torch.float32,)))
    assert status == 0, text
    assert asked == {None, "cuda", "reference"}
    assert len({check["target"]["label"] for check in result["checks"]}) == 3


def test_says_what_did_not_run(run):
    status, text, result = run(spec_with(cases=CASES[:1]), "--dtype", "float32", "--backend", "triton")
    assert status == 1  # nothing checked is nothing proven
    assert [line["what"] for line in result["not_run"]] == ["triton on cpu"]
    assert "not run: triton on cpu: " in text and "tests/test_*_triton.py" in text
    assert "ran: nothing\n" in text and "\n0 checks in" in text


def test_says_what_ran(run):
    status, text, result = run(spec_with(cases=CASES[:1]), "--dtype", "float32", "--dtype", "float64")
    assert status == 0, text
    here = len(result["checks"]) // 2
    for label in ("cpp", "reference"):
        assert f"ran: cpu {label}: {here} checks of 1 op in float32, float64\n" in text
    environment = result["environment"]
    assert environment["torch"] == torch.__version__
    for name in ("sslkernels", "torch", "isa", "cuda"):  # the head of the report
        assert f"{name:12}{environment[name]}\n" in text


def test_a_dtype_that_an_op_is_not_checked_in_is_named(run):
    status, text, _ = run(PATCH_MASK, "--dtype", "float64")
    assert status == 0 and "not run" not in text
    groups, not_run = checks.plan(["patch_mask"], [torch.bfloat16], ["cpu"])
    assert groups == []
    assert [(line.what, line.reason) for line in not_run] == [("bfloat16 on cpu", "the op is checked in float64 alone")]


def test_a_missing_device_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    groups, not_run = checks.plan(devices=["cuda"])
    assert groups == []
    assert [(line.what, line.reason) for line in not_run] == [
        ("everything on cuda", "torch sees no CUDA device, so no kernel for GPUs ran")
    ]


def test_reasons_are_told_once_with_the_ops_that_they_hold_for(monkeypatch):
    lacking = Backend("reference", {"cpp": "no compiler"})
    reports = {name: {"cpu": Backend("cpp")} for name in SPECS} | {
        "nt_xent": {"cpu": lacking},
        "clip_loss": {"cpu": lacking},
    }
    monkeypatch.setattr(checks, "backends", lambda: reports)
    groups, (line,) = checks.plan(devices=["cpu"])
    assert (line.what, line.reason, line.ops) == ("cpp on cpu", "no compiler", ("nt_xent", "clip_loss"))
    labels = {group.spec.name: group.targets[0].label for group in groups}
    assert labels["nt_xent"] == "fallback" and labels["info_nce"] == "cpp"


def test_every_op_has_a_plan():
    """Without running it: every op, dtype and case, by the active backend and the definition."""
    groups, _ = checks.plan(devices=["cpu"])
    assert {(group.spec.name, group.targets[0].dtype) for group in groups} == {
        (spec.name, dtype) for spec in SPECS.values() for dtype in spec.dtypes
    }
    assert all(len(group.targets) >= 2 and group.cases for group in groups)


def test_rows_are_lines_where_no_terminal_is(run):
    status, text, result = run(spec_with(cases=CASES[:2]))
    lines = text.splitlines()
    (row,) = [line for line in lines if line.startswith("nt_xent  cpu cpp")]
    assert row.split()[-1] == "ok" and status == 0
    assert row.split()[3] == str(sum(check["target"]["label"] == "cpp" for check in result["checks"]))
    _, detailed, _ = run(spec_with(cases=CASES[:2]), "--details")
    rows = [line.split() for line in detailed.splitlines() if line.startswith("nt_xent  cpu cpp")]
    assert {(row[3], row[4]) for row in rows} == {
        (check["target"]["dtype"], check["name"]) for check in result["checks"]
    }


@pytest.mark.parametrize("rich", (True, False))
def test_a_terminal_has_a_table_and_progress(monkeypatch, capsys, rich):
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.progress", None)
        monkeypatch.setitem(sys.modules, "rich.table", None)
    monkeypatch.setattr(registry, "ops", lambda: iter([spec_with(cases=CASES[:1])]))
    monkeypatch.setattr(checks.Group, "integrated", False)
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    assert cli.main(["verify", "--device", "cpu", "--dtype", "float64"]) == 0
    captured = capsys.readouterr()
    assert ("\u2500" in captured.out) == rich
    assert "nt_xent float64 on cpu" in captured.err and "1/1" in captured.err
    assert "1/1" not in captured.out


def test_progress_counts_failures(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with progress.open_progress(2) as line:
        line.advance("one", 0)
        line.advance("two", 3)
    assert "1/2  one" in capsys.readouterr().err.split("\r")[1]


def test_junit(run, tmp_path):
    path = tmp_path / "verify.xml"

    def crash_now_and_then(*args, reduction="mean", **kwargs):
        if reduction == "none":
            raise RuntimeError("\x1b[31mred\x00 & <wrong>")
        return NT_XENT.function(*args, reduction=reduction, **kwargs)

    cases = [case for case in CASES if case.name in ("odd", "rows")]
    given = ("--dtype", "float32", "--junit", str(path))
    status, _, result = run(spec_with(crash_now_and_then, tuple(cases)), *given)
    assert status == 1
    root = ET.parse(path).getroot()
    assert {suite.get("name") for suite in root} >= {"nt_xent on cpu cpp", "nt_xent on cpu reference"}
    found = {(case.get("classname"), case.get("name")) for case in root.iter("testcase")}
    assert ("nt_xent.cpu.cpp.float32", "grad_z0") in found
    failures = list(root.iter("failure"))
    assert int(root.get("failures")) == len(failures) == 2  # of value, by both backends
    assert "rows: value: RuntimeError: ?[31mred? & <wrong>" in failures[0].text
    assert int(root.get("tests")) == len(list(root.iter("testcase")))
    properties = {entry.get("name"): entry.get("value") for entry in root.iter("property")}
    assert properties["torch"] == torch.__version__
    assert len(result["checks"]) > len(found)


def test_junit_counts_what_did_not_run_as_skipped(run, tmp_path):
    path = tmp_path / "verify.xml"
    status, _, _ = run(spec_with(cases=CASES[:1]), "--backend", "triton", "--junit", str(path))
    (skipped,) = ET.parse(path).getroot().iter("skipped")
    assert status == 1 and "Triton" in skipped.get("message")


def test_json_holds_numbers_that_json_has(run):
    status, _, result = run(spec_with(lambda *a, **k: NT_XENT.function(*a, **k) * torch.nan, CASES[:1]))
    assert status == 1
    errors = [check["comparison"]["error"] for check in result["checks"] if check["name"] == "value"]
    assert "inf" in errors
    assert verify.files._finite({"a": [float("nan"), 1.0]}) == {"a": ["nan", 1.0]}

"""`sslkernels verify`: every op of the registry against its definition, on this machine with what is installed."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sslkernels import numerics, registry
from sslkernels._library import backends
from sslkernels._table import print_table
from sslkernels.numerics import Comparison, Evaluation, Expected
from sslkernels.registry import OpSpec

PLAIN_CASES = 2  # so many of an op's first cases go through opcheck and torch.compile, which take seconds each


@dataclass(frozen=True)
class Target:
    """Where an op is checked: ``backend`` is None for the one that is active, whose name is ``label``."""

    op: str
    device: str
    label: str
    backend: str | None
    dtype: torch.dtype


@dataclass(frozen=True)
class Check:
    """One verdict: a comparison of numbers, or a property with the reason why it does not hold."""

    target: Target
    name: str
    case: str
    passed: bool
    comparison: Comparison | None = None
    reason: str = ""

    def __str__(self) -> str:
        target = self.target
        place = f"{target.op}, {target.device}, {target.label}, {dtype_name(target.dtype)}"
        return f"{place}: {self.comparison or f'{self.case}: {self.name}: {self.reason}'}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def verify(
    ops: list[str] | None = None,
    dtypes: list[torch.dtype] | None = None,
    devices: list[str] | None = None,
    backend: str | None = None,
) -> tuple[list[Check], list[str]]:
    """All checks of the chosen ops (None: every one), and what could not run here, with the reason."""
    checks, absent = [], []
    specs = [spec for spec in registry.ops() if ops is None or spec.name in ops]
    for device in devices or ["cpu", "cuda"]:
        if device == "cuda" and not torch.cuda.is_available():
            absent.append("cuda: torch sees no CUDA device, so no CUDA kernel ran")
            continue
        for spec in specs:
            report = backends()[spec.name][device]
            absent += [f"{spec.name} on {device}: {missing}: {why}" for missing, why in report.absent.items()]
            # the active one is called as users call it, without a name; without kernels that is the operators' fallback
            available: dict[str, str | None] = {"fallback" if report.active == "reference" else report.active: None}
            available |= {name: name for name in (*report.besides, "reference")}
            chosen = {label: key for label, key in available.items() if backend in (None, label)}
            if not chosen:
                absent.append(f"{spec.name} on {device}: {backend}: not among {', '.join(available)}")
            for dtype in spec.dtypes:
                if dtypes is None or dtype in dtypes:
                    targets = [Target(spec.name, device, label, key, dtype) for label, key in chosen.items()]
                    checks += check_targets(spec, targets)
    return checks, absent


def check_targets(spec: OpSpec, targets: list[Target]) -> list[Check]:
    """Every check of one op in one dtype on one device, for several backends."""
    checks = []
    for index, case in enumerate(spec.tagged("verify") if targets else ()):
        dtype, device = targets[0].dtype, targets[0].device
        for label, arguments in numerics.calls(spec, case, dtype, device):
            expected = numerics.expect(spec, arguments)
            for target in targets:
                checks += _check_numbers(spec, target, label, arguments, expected)
                if index < PLAIN_CASES and dtype == spec.dtypes[0] and target.backend is None:
                    checks.append(_check("opcheck", target, label, _torch_ops_hold, spec, arguments))
                    checks.append(_check("compiled", target, label, _compiled_agrees, spec, arguments))
    return checks


def _check_numbers(spec: OpSpec, target: Target, label: str, arguments: dict, expected: Expected) -> list[Check]:
    function = numerics.with_backend(spec.function, target.backend)
    try:
        first, second = (numerics.evaluate(function, arguments, spec.grad_args) for _ in range(2))
        comparisons = numerics.compare_call(label, first, expected, target.dtype)
    except Exception as error:  # a crash is a finding, to be reported beside the others
        return [Check(target, "value", label, False, reason=_describe(error))]
    checks = [Check(target, c.name, label, c.passed, c) for c in comparisons]
    return [*checks, _check("deterministic", target, label, _bitwise_equal, first, second)]


def _check(name: str, target: Target, label: str, holds: Callable, *args) -> Check:
    """The verdict of ``holds``, which raises unless the property holds."""
    try:
        holds(*args)
    except Exception as error:
        return Check(target, name, label, False, reason=_describe(error))
    return Check(target, name, label, True)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def _bitwise_equal(first: Evaluation, second: Evaluation) -> None:
    pairs = {"value": (first.value, second.value)}
    pairs |= {f"grad_{name}": (grad, second.grads[name]) for name, grad in first.grads.items()}
    for name, tensors in pairs.items():
        one, two = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in tensors)
        if not torch.equal(one, two):
            raise AssertionError(f"{name} differs between two runs")


class _Recorder(TorchDispatchMode):
    """Keeps the first call of every operator of ours."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "sslkernels":
            self.seen.setdefault(func, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _torch_ops_hold(spec: OpSpec, arguments: dict) -> None:
    with _Recorder() as recorder:
        numerics.evaluate(spec.function, arguments, spec.grad_args)
    called = {func._schema.name.removeprefix("sslkernels::"): func for func in recorder.seen}
    if set(called) != set(spec.torch_ops):
        raise AssertionError(f"called the operators {sorted(called)}, registered are {sorted(spec.torch_ops)}")
    for name, func in called.items():
        args, kwargs = recorder.seen[func]
        if name != spec.torch_ops[0]:  # backward operators cannot be differentiated again
            args = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]
        torch.library.opcheck(func, tuple(args), kwargs)


def _compiled_agrees(spec: OpSpec, arguments: dict) -> None:
    torch._dynamo.reset()
    # aot_eager captures and functionalises as inductor does, and needs no compiler on the machine
    compiled = torch.compile(spec.function, fullgraph=True, dynamic=True, backend="aot_eager")
    actual = numerics.evaluate(compiled, arguments, spec.grad_args)
    expected = numerics.evaluate(spec.function, arguments, spec.grad_args)
    torch.testing.assert_close(actual.value, expected.value)
    torch.testing.assert_close(actual.grads, expected.grads)


def summary(checks: list[Check]) -> list[list[str]]:
    """A row for each check of each target: its worst case."""
    groups: dict[Target, dict[str, list[Check]]] = {}
    for check in checks:
        groups.setdefault(check.target, {}).setdefault(check.name, []).append(check)
    return [_row(target, name, members) for target, names in groups.items() for name, members in names.items()]


def _row(target: Target, name: str, checks: list[Check]) -> list[str]:
    worst = min(checks, key=lambda check: (check.passed, -_share_of_limit(check)))
    numbers = worst.comparison
    return [
        target.op,
        f"{target.device} {target.label}",
        dtype_name(target.dtype),
        name,
        str(len(checks)),
        f"{numbers.error:.1e}" if numbers else "",
        f"{numbers.eager_error:.1e}" if numbers else "",
        worst.case if numbers or not worst.passed else "",
        "ok" if worst.passed else "FAIL",
    ]


def _share_of_limit(check: Check) -> float:
    numbers = check.comparison
    return numbers.error / (numbers.eager_error + numbers.tolerance) if numbers else 0.0


COLUMNS = ("op", "on", "dtype", "check", "cases", "error", "eager", "nearest to its limit", "verdict")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Check every op against its definition: values, gradients, determinism, torch integration."
    names = [spec.name for spec in registry.ops()]
    dtypes = sorted({dtype_name(dtype) for spec in registry.ops() for dtype in spec.dtypes})
    parser.add_argument("--op", action="append", choices=names, help="only this op (repeatable)")
    parser.add_argument("--dtype", action="append", choices=dtypes, help="only this dtype (repeatable)")
    parser.add_argument("--device", action="append", choices=("cpu", "cuda"), help="only this device (repeatable)")
    parser.add_argument("--backend", choices=("cpp", "triton", "cuda", "fallback", "reference"), help="only this one")
    parser.add_argument("--json", metavar="FILE", help="also write every check to FILE")


def main(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    dtypes = args.dtype and [getattr(torch, name) for name in args.dtype]
    checks, absent = verify(args.op, dtypes, args.device, args.backend)
    seconds = time.perf_counter() - start
    failed = [check for check in checks if not check.passed]
    if checks:
        print_table("Error against fp64, relative to each row's scale", COLUMNS, summary(checks))
    for check in failed:
        print(f"FAIL  {check}")
    for line in absent:
        print(f"not run: {line}")
    ran = ", ".join(dict.fromkeys(f"{c.target.label} on {c.target.device}" for c in checks)) or "nothing"
    print(f"{len(checks)} checks of {ran} in {seconds:.0f} s: {len(failed) or 'none'} failed")
    if args.json:
        _write_json(args.json, checks, absent, seconds)
    return 1 if failed or not checks else 0


def _write_json(path: str, checks: list[Check], absent: list[str], seconds: float) -> None:
    rows = [asdict(check) for check in checks]
    for row in rows:
        row["target"]["dtype"] = dtype_name(row["target"]["dtype"])
    report = {"torch": torch.__version__, "seconds": seconds, "checks": rows, "not_run": absent}
    with open(path, "w", encoding="utf-8") as file:
        json.dump(report, file, indent=1)
        file.write("\n")

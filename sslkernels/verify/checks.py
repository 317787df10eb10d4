"""What `sslkernels verify` checks: a plan of what can run here, and the checks of one op in one dtype."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from sslkernels import numerics, registry
from sslkernels._library import backends
from sslkernels.numerics import Comparison, Evaluation, Expected
from sslkernels.registry import Case, OpSpec
from sslkernels.verify import properties

ELSEWHERE = {
    ("cpu", "triton"): (
        "Triton's kernels are for GPUs; in a source checkout tests/test_*_triton.py interpret them on the CPU"
    ),
    ("cpu", "cuda"): (
        "CUDA kernels are for GPUs; in a source checkout tests/test_*_cuda.py and test_*_gpu.py run them on the CPU"
    ),
    ("cuda", "cpp"): "the C++ kernels are for CPUs",
}
FALLBACK = "fallback"  # what the operators do on a device without kernels; "reference" does without operators


@dataclass(frozen=True)
class Target:
    """Where an op is checked: ``backend`` is None for the one that is active, whose name is ``label``."""

    op: str
    device: str
    label: str
    backend: str | None
    dtype: torch.dtype

    @property
    def place(self) -> str:
        return f"{self.device} {self.label}"

    def __str__(self) -> str:
        return f"{self.op}, {self.device}, {self.label}, {dtype_name(self.dtype)}"


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
        return f"{self.target}: {self.comparison or f'{self.case}: {self.name}: {self.reason}'}"


@dataclass(frozen=True)
class NotRun:
    """What could not be checked of some ops, and why."""

    what: str
    reason: str
    ops: tuple[str, ...] = ()  # empty: all that were asked for


@dataclass(frozen=True)
class Group:
    """One op in one dtype on one device, by all of its backends there."""

    spec: OpSpec
    targets: tuple[Target, ...]
    cases: tuple[Case, ...]

    @property
    def integrated(self) -> Target | None:
        """Where the operators themselves are checked: in one dtype, as the active backend."""
        found = (t for t in self.targets if t.backend is None and t.dtype == self.spec.dtypes[0])
        return next(found, None)

    def __str__(self) -> str:
        return f"{self.spec.name} {dtype_name(self.targets[0].dtype)} on {self.targets[0].device}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def plan(
    ops: list[str] | None = None,
    dtypes: list[torch.dtype] | None = None,
    devices: list[str] | None = None,
    backend: str | None = None,
) -> tuple[list[Group], list[NotRun]]:
    """What to check of the chosen ops (None: every one), and what cannot run here, with the reason."""
    groups: list[Group] = []
    missing: dict[tuple[str, str], list[str]] = {}
    specs = [spec for spec in registry.ops() if ops is None or spec.name in ops]
    for device in devices or ["cpu", "cuda"]:
        if device == "cuda" and not torch.cuda.is_available():
            missing["everything on cuda", "torch sees no CUDA device, so no kernel for GPUs ran"] = []
            continue
        for spec in specs:
            available, absent = _available(spec, device, backend)
            if dtypes is not None and not set(dtypes) & set(spec.dtypes):
                names = ", ".join(map(dtype_name, spec.dtypes))
                absent = {f"{', '.join(map(dtype_name, dtypes))} on {device}": f"the op is checked in {names} alone"}
            for what, reason in absent.items():
                missing.setdefault((what, reason), []).append(spec.name)
            for dtype in spec.dtypes if available else ():
                if dtypes is None or dtype in dtypes:
                    targets = [Target(spec.name, device, label, key, dtype) for label, key in available.items()]
                    groups.append(Group(spec, tuple(targets), tuple(spec.tagged("verify"))))
    not_run = [
        NotRun(what, reason, () if len(names) == len(specs) else tuple(names))
        for (what, reason), names in missing.items()
    ]
    return groups, not_run


def _available(spec: OpSpec, device: str, backend: str | None) -> tuple[dict[str, str | None], dict[str, str]]:
    """The backends to check by their labels, with what to ask for; and the absent ones with the reasons."""
    report = backends()[spec.name][device]
    # the active one is called as users call it, without a name; without kernels that is the operators' fallback
    found: dict[str, str | None] = {FALLBACK if report.active == "reference" else report.active: None}
    found |= {name: name for name in (*report.besides, "reference")}
    absent = {name: why for name, why in report.absent.items() if backend in (None, name)}
    if backend is not None and backend not in (*found, *absent):
        absent[backend] = ELSEWHERE.get((device, backend), f"on {device} there are {', '.join(found)}")
    chosen = {label: key for label, key in found.items() if backend in (None, label)}
    return chosen, {f"{name} on {device}": why for name, why in absent.items()}


def check_group(group: Group) -> Iterator[list[Check]]:
    """Every check of a group, case by case."""
    unseen, integrated = set(group.spec.torch_ops), group.integrated
    for index, case in enumerate(group.cases):
        try:
            calls = numerics.calls(group.spec, case, group.targets[0].dtype, group.targets[0].device)
        except Exception as error:  # a crash is a finding, to be reported beside the others
            yield [Check(target, "inputs", case.name, False, reason=_describe(error)) for target in group.targets]
            continue
        checks = []
        for label, arguments in calls:
            checks += _check_numbers(group, label, arguments)
            if integrated:
                checks += _check_operators(group.spec, integrated, label, arguments, unseen, always=index == 0)
        if integrated and index == 0:  # once: it takes seconds. The last call has the most that may require grad
            label, arguments = calls[-1]
            checks.append(_check("compiled", integrated, label, properties.compiled_agrees, group.spec, arguments))
        yield checks + (_check_bits(group, case) if group.spec.is_mask else [])
    if integrated and unseen:
        reason = f"no case calls {', '.join(sorted(unseen))}"
        yield [Check(integrated, "opcheck", "all cases", False, reason=reason)]


def _check_numbers(group: Group, label: str, arguments: dict) -> list[Check]:
    """Values, gradients and determinism of one call by every backend."""
    try:
        expected = numerics.expect(group.spec, arguments)
    except Exception as error:
        return [Check(target, "definition", label, False, reason=_describe(error)) for target in group.targets]
    checks = []
    for target in group.targets:
        checks += _compare(group.spec, target, label, arguments, expected)
    return checks


def _compare(spec: OpSpec, target: Target, label: str, arguments: dict, expected: Expected) -> list[Check]:
    function = numerics.with_backend(spec.function, target.backend)
    try:
        first = numerics.evaluate(function, arguments, spec.grad_args)
        comparisons = numerics.compare_call(label, first, expected, target.dtype)
        # on a GPU the deterministic mode alone promises the same bits
        with contextlib.nullcontext() if target.device == "cpu" else properties.deterministic():
            if target.device != "cpu":
                first = numerics.evaluate(function, arguments, spec.grad_args)
            second = numerics.evaluate(function, arguments, spec.grad_args)
    except Exception as error:
        return [Check(target, "value", label, False, reason=_describe(error))]
    checks = [Check(target, c.name, label, c.passed, c) for c in comparisons]
    return [*checks, _check("deterministic", target, label, _same_twice, first, second)]


def _check_operators(
    spec: OpSpec, target: Target, label: str, arguments: dict, unseen: set[str], always: bool
) -> list[Check]:
    """opcheck of the operators that the active backend calls, always or where some are new; they leave ``unseen``."""
    try:
        called = properties.operators(spec, arguments)
    except Exception:  # the crash is reported as the value's
        return []
    if not (always or unseen & set(called)):
        return []
    unseen -= set(called)
    return [_check("opcheck", target, label, properties.operators_hold, spec, called)]


def _check_bits(group: Group, case: Case) -> list[Check]:
    checks = []
    for target in group.targets:
        function = numerics.with_backend(group.spec.function, target.backend)
        given = (function, group.spec.reference, case, target.device, target.dtype)
        checks.append(_check("mask bits", target, case.name, properties.same_bits, *given))
    return checks


def _same_twice(first: Evaluation, second: Evaluation) -> None:
    pairs = {"value": (first.value, second.value)}
    pairs |= {f"grad_{name}": (grad, second.grads[name]) for name, grad in first.grads.items()}
    for name, (one, two) in pairs.items():
        if not properties.bitwise_equal(one, two):
            raise AssertionError(f"{name} differs between two runs")


def _check(name: str, target: Target, label: str, holds: Callable, *args) -> Check:
    """The verdict of ``holds``, which raises unless the property holds."""
    try:
        holds(*args)
    except Exception as error:
        return Check(target, name, label, False, reason=_describe(error))
    return Check(target, name, label, True)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]

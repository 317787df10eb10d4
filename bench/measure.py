"""Who races: the definition of an op, the same compiled, the peers, and ours, all held to be right beforehand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from runs import Run

from sslkernels import _library, numerics
from sslkernels.registry import Case, OpSpec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SMALL = 3e9  # flops up to which bfloat16 is raced on a processor that has to emulate it

Call = Callable[[], object]


@dataclass(frozen=True)
class Contender:
    """One way to compute an op, and the dtype it is given."""

    name: str
    function: Callable
    dtype: str

    @property
    def label(self) -> str:
        return f"{self.name} {self.dtype}"


def contenders(spec: OpSpec, peers: dict[str, Callable], compiled: bool = True, narrow: bool = True) -> list[Contender]:
    """Everything that races: the peers, the definition, the same compiled, and ours; in bfloat16 too if ``narrow``."""
    # every shape is compiled for itself, which gives the compiler its best case
    static = functools.partial(torch.compile, spec.reference, dynamic=False)
    return [
        *(Contender(name, peer, "fp32") for name, peer in peers.items()),
        Contender("eager", spec.reference, "fp32"),
        *([Contender("compile", static(), "fp32")] if compiled else []),
        Contender("ours", spec.function, "fp32"),
        *([Contender("eager", spec.reference, "bf16"), Contender("ours", spec.function, "bf16")] if narrow else []),
    ]


def of_run(spec: OpSpec, peers: dict[str, Callable], run: Run, device: str, compiled: bool = True) -> list[Contender]:
    """The contenders of a run: a curve, which has to be cheap, is one of fp32 and of what need not be compiled."""
    emulated = device == "cpu" and not has_bf16()
    narrow = run.curve is None and not (emulated and run.case.cost.flops > SMALL)
    return contenders(spec, peers, compiled and run.curve is None, narrow)


def has_bf16() -> bool:
    """Whether this processor multiplies bfloat16 numbers itself: it takes minutes for large inputs otherwise."""
    return _library.extension is not None and _library.extension.has_bf16()


def call(spec: OpSpec, contender: Contender, case: Case, direction: str, device: str) -> Call:
    """What is timed: the value without gradient, or the value and its gradients."""
    arguments = case.make(device, DTYPES[contender.dtype])
    if direction == "forward":
        return torch.no_grad()(functools.partial(contender.function, **arguments))
    leaves = {
        name: arguments[name].detach().requires_grad_()
        for name in spec.grad_args
        if isinstance(arguments[name], torch.Tensor)
    }
    run = functools.partial(contender.function, **{**arguments, **leaves})
    output = run()
    grad = torch.randn_like(output) if output.dim() else None
    return lambda: torch.autograd.grad(run(), list(leaves.values()), grad)


def assert_correct(spec: OpSpec, racers: list[Contender], case: Case, device: str) -> None:
    """Ours obeys the numerics rule in its dtype, and every peer computes the same function."""
    for dtype in {racer.dtype for racer in racers}:
        arguments = case.make(device, DTYPES[dtype])
        exact = numerics.evaluate(spec.reference, numerics.on_cpu_in_double(arguments), spec.grad_args)
        eager = numerics.evaluate(spec.reference, arguments, spec.grad_args)
        expected = numerics.Expected(eager, exact, exact, dict.fromkeys(spec.grad_args, 0.0))
        for racer in racers:
            if racer.dtype != dtype or racer.function is spec.reference:
                continue
            actual = numerics.evaluate(racer.function, arguments, spec.grad_args)
            if racer.name == "ours":
                faults = _faults(case.name, actual, expected, DTYPES[dtype])
                if faults:  # what the input's conditioning allows takes another evaluation in float64
                    faults = _faults(case.name, actual, numerics.expect(spec, arguments), DTYPES[dtype])
                assert not faults, f"{racer.label}: {faults[0]}"
            else:
                close = functools.partial(torch.testing.assert_close, rtol=1e-3, check_dtype=False, check_device=False)
                close(actual.value, exact.value, atol=1e-5)
                for name, grad in actual.grads.items():
                    close(grad, exact.grads[name], atol=1e-3 * exact.grads[name].abs().max().item())


def _faults(label: str, actual, expected: numerics.Expected, dtype: torch.dtype) -> list[numerics.Comparison]:
    return [found for found in numerics.compare_call(label, actual, expected, dtype) if not found.passed]


def entrants(spec: OpSpec, racers: list[Contender], run: Run, device: str) -> dict[str, Callable[[], Call]]:
    """By label, what makes the inputs of a contender and returns what is timed."""
    return {racer.label: functools.partial(call, spec, racer, run.case, run.direction, device) for racer in racers}

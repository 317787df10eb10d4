"""What each op is: its public function, its definition, its named inputs and what they cost.

A slice describes its ops once, in ``ops/<slice>/cases.py``; the tests, ``verify``, the benchmarks and the
ahead-of-time proofs all read that description, so an op joins all of them by adding its slice to `SLICES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

SLICES = ("infonce", "ema", "patch_mask", "patch_loss")


@dataclass(frozen=True)
class Cost:
    """What the algorithm must do at the least, forward and backward: the numerators of every roofline."""

    forward_flops: float
    backward_flops: float
    forward_exps: float
    backward_exps: float
    bytes: float
    forward_bytes: float = 0.0

    @property
    def flops(self) -> float:
        return self.forward_flops + self.backward_flops

    @property
    def exps(self) -> float:
        return self.forward_exps + self.backward_exps


@dataclass(frozen=True)
class Case:
    """One named input of an op.

    ``make(device, dtype)`` returns the keyword arguments of the public function; every call returns the same values.
    ``tags``: "verify" (a numerics check), "edge" (a corner of the contract), "bench" (worth timing), "aot" (what the
    Triton kernels are compiled for ahead of time), "aot_bf16" (the same without fp16, which bf16 stands for).
    """

    name: str
    make: Callable[[torch.device | str, torch.dtype], dict]
    cost: Cost
    tags: frozenset[str] = frozenset({"verify"})


@dataclass(frozen=True)
class Curve:
    """Inputs that differ in one size: how time and memory grow with it. The first curve of an op is its main one.

    ``size`` is the letter that docstrings use for it, N, D, K or L (P and T: the parameters and tensors of a model),
    and ``points`` are its values in ascending order, each with its input. ``rest`` says what the other sizes are.
    """

    size: str
    rest: str
    points: tuple[tuple[int, Case], ...]


def curve(size: str, rest: str, values: Iterable[int], make: Callable[[str, int], Case]) -> Curve:
    """The curve of the inputs ``make(name, value)``."""
    return Curve(size, rest, tuple((value, make(f"{size}{value}", value)) for value in values))


@dataclass(frozen=True)
class OpSpec:
    """One public op. ``reference`` takes the same arguments as ``function`` and computes in the dtype it is given.

    ``is_mask``: what it returns follows from a seed and the numbers of the samples, bit for bit on every device.
    """

    name: str
    function: Callable
    reference: Callable
    torch_ops: tuple[str, ...]  # names under torch.ops.sslkernels, forward first
    grad_args: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    cases: tuple[Case, ...]
    has_cuda: bool = False  # csrc/cuda has kernels for it
    is_mask: bool = False
    other_ops: tuple[str, ...] = ()  # operators that it may call besides, on a GPU perhaps alone

    def tagged(self, tag: str) -> list[Case]:
        return [case for case in self.cases if tag in case.tags]


def ops() -> Iterator[OpSpec]:
    """Every op of every slice."""
    for name in SLICES:
        yield from importlib.import_module(f"sslkernels.ops.{name}.cases").OPS


def by_name() -> dict[str, list[OpSpec]]:
    """What a command line calls ops by, slices first: an op named as its slice means itself."""
    specs = {name: list(importlib.import_module(f"sslkernels.ops.{name}.cases").OPS) for name in SLICES}
    return specs | {spec.name: [spec] for spec in ops()}


def curves(op: str) -> tuple[Curve, ...]:
    """The scaling curves of an op, which its slice has in ``ops/<slice>/curves.py``."""
    for name in SLICES:
        found = importlib.import_module(f"sslkernels.ops.{name}.curves").CURVES
        if op in found:
            return found[op]
    return ()

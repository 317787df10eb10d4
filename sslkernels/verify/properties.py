"""Properties of an op beside its numbers: each function here raises unless its property holds."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sslkernels import numerics, registry
from sslkernels.registry import Case, OpSpec

SEEDS = (2**64 - 1, -(2**63), 5 << 40)  # of both signs, and of more than 32 bits


class _Recorder(TorchDispatchMode):
    """Keeps the first call of every operator of ours."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "sslkernels":
            self.seen.setdefault(func, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def operators(spec: OpSpec, arguments: dict) -> dict[str, tuple]:
    """The operators of ours that a call runs, by name: the operator, its arguments, its keyword arguments."""
    with _Recorder() as recorder:
        numerics.evaluate(spec.function, arguments, spec.grad_args)
    return {func._schema.name.removeprefix("sslkernels::"): (func, *given) for func, given in recorder.seen.items()}


def operators_hold(spec: OpSpec, called: dict[str, tuple]) -> None:
    """Every operator that was called is one of an op's of the registry, and passes `torch.library.opcheck`."""
    unknown = set(called) - {name for op in registry.ops() for name in (*op.torch_ops, *op.gpu_ops)}
    if unknown:
        raise AssertionError(f"called {', '.join(sorted(unknown))}, which the registry does not know")
    for name, (func, args, kwargs) in called.items():
        if name != spec.torch_ops[0]:  # backward operators cannot be differentiated again
            args = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]
        torch.library.opcheck(func, tuple(args), kwargs)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """torch's deterministic mode, in which it fills new memory with NaN too; what it warns of is not ours."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def compiled_agrees(spec: OpSpec, arguments: dict) -> None:
    """The op compiles as one graph, which computes what eager mode does: the same bits of a mask."""
    torch._dynamo.reset()
    # aot_eager captures and functionalises as inductor does, and needs no compiler on the machine
    compiled = torch.compile(spec.function, fullgraph=True, dynamic=True, backend="aot_eager")
    actual = numerics.evaluate(compiled, arguments, spec.grad_args)
    expected = numerics.evaluate(spec.function, arguments, spec.grad_args)
    if spec.is_mask and not bitwise_equal(actual.value, expected.value):
        raise AssertionError("value: other bits than in eager mode")
    torch.testing.assert_close(actual.value, expected.value)
    torch.testing.assert_close(actual.grads, expected.grads)


def same_bits(function: Callable, reference: Callable, case: Case, device: str, dtype: torch.dtype) -> None:
    """A mask is the definition's on the CPU, bit for bit: as the case has it, and for other seeds and samples."""
    draws = zip(_draws(case, device, dtype), _draws(case, "cpu", dtype), strict=True)
    for (drawn, there), (_, here) in draws:
        actual, expected = function(**there).detach().cpu(), reference(**here).detach()
        if actual.shape != expected.shape:
            raise AssertionError(f"{drawn}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
        if not bitwise_equal(actual, expected):
            wrong = (actual != expected).flatten()
            raise AssertionError(f"{drawn}: {wrong.sum()} of {wrong.numel()} elements are not those of the definition")


def _draws(case: Case, device: str, dtype: torch.dtype) -> Iterator[tuple[str, dict]]:
    """The arguments of a case, and the same with other seeds and sample ids where it draws at all."""
    given = case.make(device, dtype)
    yield "as the case has it", given
    if given.get("seed") is None:
        return
    samples = given["batch_size"] if "batch_size" in given else len(given["x"])
    ids = 7 - (torch.arange(samples, device=device) << 33)
    for seed in SEEDS:
        yield f"seed {seed}, sample ids 7 - (i << 33)", {**given, "seed": seed, "sample_ids": ids}


def bitwise_equal(one: torch.Tensor, two: torch.Tensor) -> bool:
    one, two = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, two))
    return torch.equal(one, two)

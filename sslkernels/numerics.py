"""The numerics rule, and the one implementation of it: as exact as PyTorch itself, or it fails.

The rule: the error against the fp64 reference is at most the error of the same reference run in the dtype of the
inputs ("eager"), plus a stated tolerance.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from sslkernels.registry import Case, OpSpec

# Of an error relative to the scale that `compare` describes. fp32: 16 roundings. 16 bits: one rounding, since gradients
# are returned in the dtype of the inputs. fp64: eager is itself the exact result, so this is the whole allowance.
TOLERANCE = {
    torch.float64: 2.0**-40,
    torch.float32: 2.0**-20,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
NUDGE = 2.0**-24  # relative size of the input changes that show how well conditioned a result is


@dataclass(frozen=True)
class Comparison:
    """How far one tensor is from the exact result, and how far eager PyTorch is."""

    name: str
    case: str
    error: float  # the largest of the tensor, relative to the scale of its row
    eager_error: float
    rms: float
    eager_rms: float
    tolerance: float  # of the error
    rms_tolerance: float
    worst: tuple[int, ...]  # index of the largest error
    actual: float  # the two values there
    exact: float
    failing: float  # share of the elements beyond the limit

    @property
    def passed(self) -> bool:
        return self.error <= self.eager_error + self.tolerance and self.rms <= self.eager_rms + self.rms_tolerance

    def __str__(self) -> str:
        return (
            f"{self.case}: {self.name}: error {self.error:.2e} (eager {self.eager_error:.2e} + {self.tolerance:.1e}), "
            f"rms {self.rms:.2e} (eager {self.eager_rms:.2e} + {self.rms_tolerance:.1e}); "
            f"worst at {list(self.worst)}: {self.actual:.9g}, exact {self.exact:.9g}; "
            f"{self.failing:.2%} beyond the limit"
        )


def compare(
    name: str,
    actual: torch.Tensor,
    eager: torch.Tensor,
    exact: torch.Tensor,
    dtype: torch.dtype,
    *,
    case: str = "",
    nudged: torch.Tensor | None = None,
    floor: float = 0.0,
) -> Comparison:
    """Measure ``actual`` and ``eager`` against ``exact``, for inputs of ``dtype``.

    An error is relative to the magnitude of its row (the last dimension; of itself in a vector or a scalar) or of the
    median row, whichever is larger: no huge row hides the others, and no row that happens to be tiny is held to an
    accuracy that nobody needs. A magnitude is the largest ``|exact|``, or ``floor``, or what the row gains when all
    inputs change by 100 %, extrapolated from ``nudged``, the exact result for inputs changed by `NUDGE`: where a
    result is ill-conditioned, or is zero because large terms cancel, its own size says nothing about rounding.

    What overflows the dtype of ``actual`` counts as its largest number on both sides, so an infinity of the right sign
    is right. A NaN is an infinite error. Where eager is not finite it grants no allowance.

    The root mean square of the errors obeys the rule too, with a quarter of the tolerance: a bias of every element can
    hide below the worst one of eager's.
    """
    if actual.shape != exact.shape:
        raise ValueError(f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}")
    tolerance = TOLERANCE[dtype]
    if not exact.numel():
        return Comparison(name, case, 0.0, 0.0, 0.0, 0.0, tolerance, tolerance, (), 0.0, 0.0, 0.0)
    output = actual.dtype
    largest = torch.finfo(output).max
    actual, eager, exact, nudged = (
        tensor.detach().cpu().double() for tensor in (actual, eager, exact, exact if nudged is None else nudged)
    )
    lost = ~eager.isfinite()
    exact, nudged = exact.clamp(-largest, largest), nudged.clamp(-largest, largest)
    smallest = max(torch.finfo(dtype).tiny for dtype in (output, torch.float32))
    scale = _scale(exact, nudged, floor, smallest)
    error = ((actual.clamp(-largest, largest) - exact).abs() / scale).nan_to_num(nan=torch.inf)
    eager_error = ((eager.clamp(-largest, largest) - exact).abs() / scale).masked_fill(lost, 0)
    worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    limit = eager_error.max() + tolerance
    return Comparison(
        name,
        case,
        error.max().item(),
        eager_error.max().item(),
        error.square().mean().sqrt().item(),
        eager_error.square().mean().sqrt().item(),
        tolerance,
        tolerance / min(4, error.numel() ** 0.5),
        worst,
        actual[worst].item(),
        exact[worst].item(),
        (error > limit).double().mean().item(),
    )


def _scale(exact: torch.Tensor, nudged: torch.Tensor, floor: float, smallest: float) -> torch.Tensor:
    magnitude = torch.maximum(exact.abs(), (nudged - exact).abs() / NUDGE).clamp_min(floor)
    if exact.dim() > 1:
        magnitude = magnitude.amax(dim=-1, keepdim=True)
    scale = magnitude.clamp_min(magnitude.median())
    # no relative accuracy below the smallest normal number; where all is exactly zero the error is absolute
    return scale.clamp_min(smallest).masked_fill(scale == 0, 1)


class Evaluation(NamedTuple):
    value: torch.Tensor
    grads: dict[str, torch.Tensor]
    size: float  # sum of |value * weight|


def evaluate(function: Callable, arguments: dict, grad_args: tuple[str, ...]) -> Evaluation:
    """Value of ``function``, and the gradients of its tensor arguments in ``grad_args``.

    The output is weighted with fixed random numbers, so that every row takes part with a gradient of its own.
    """
    leaves = {
        name: arguments[name].detach().requires_grad_()
        for name in grad_args
        if isinstance(arguments[name], torch.Tensor)
    }
    value = function(**{**arguments, **leaves})
    generator = torch.Generator().manual_seed(value.numel())
    # bf16 numbers, so that they are the same in every dtype
    weight = torch.randn(value.shape, generator=generator).bfloat16().to(value)
    weighted = value * weight
    grads = torch.autograd.grad(weighted.sum(), list(leaves.values())) if leaves else ()
    return Evaluation(value.detach(), dict(zip(leaves, grads, strict=True)), weighted.abs().sum().item())


def compare_case(
    spec: OpSpec, case: Case, dtype: torch.dtype, device: str = "cpu", backend: str | None = None
) -> list[Comparison]:
    """Value and gradients of one case, with its arguments as they are and with differentiable numbers as tensors."""
    function = with_backend(spec.function, backend)
    comparisons = []
    for label, arguments in calls(spec, case, dtype, device):
        actual = evaluate(function, arguments, spec.grad_args)
        comparisons += compare_call(label, actual, expect(spec, arguments), dtype)
    return comparisons


def calls(spec: OpSpec, case: Case, dtype: torch.dtype, device: str) -> list[tuple[str, dict]]:
    """The ways to call ``case``, named: as it is, and with the numbers that may require grad as tensors."""
    given = case.make(device, dtype)
    compute = torch.promote_types(dtype, torch.float32)
    numbers = {
        name: torch.tensor(given[name], dtype=compute, device=device)
        for name in spec.grad_args
        if isinstance(given[name], float)
    }
    if not numbers:
        return [(case.name, given)]
    return [(case.name, given), (f"{case.name} (tensor)", {**given, **numbers})]


def with_backend(function, backend: str | None):
    """The public function, asked for a backend by name unless that is None."""
    return function if backend is None else functools.partial(function, backend=backend)


class Expected(NamedTuple):
    """What a call is measured against: the same in its own dtype, in fp64, and in fp64 with nudged inputs."""

    eager: Evaluation
    exact: Evaluation
    nudged: Evaluation
    extent: dict[str, float]  # sum of |argument|


def expect(spec: OpSpec, arguments: dict) -> Expected:
    doubles = on_cpu_in_double(arguments)
    return Expected(
        evaluate(spec.reference, arguments, spec.grad_args),
        evaluate(spec.reference, doubles, spec.grad_args),
        evaluate(spec.reference, _map_tensors(doubles, _nudge), spec.grad_args),
        {name: doubles[name].abs().sum().item() for name in spec.grad_args if isinstance(doubles[name], torch.Tensor)},
    )


def compare_call(label: str, actual: Evaluation, expected: Expected, dtype: torch.dtype) -> list[Comparison]:
    """Value and gradients of one call."""
    eager, exact, nudged, extent = expected
    comparisons = [compare("value", actual.value, eager.value, exact.value, dtype, case=label, nudged=nudged.value)]
    for name, grad in actual.grads.items():
        # a gradient of this size would change the result in proportion to the argument
        floor = exact.size / extent[name] if extent[name] else 0.0
        tensors = (grad, eager.grads[name], exact.grads[name])
        comparisons.append(compare(f"grad_{name}", *tensors, dtype, case=label, nudged=nudged.grads[name], floor=floor))
    return comparisons


def on_cpu_in_double(arguments: dict) -> dict:
    """The same call where and as exactly as its definition is computed, wherever and in whatever dtype it was made."""

    def moved(_: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.cpu().double() if tensor.is_floating_point() else tensor.cpu()

    return _map_tensors(arguments, moved) | ({"device": "cpu"} if "device" in arguments else {})


def _map_tensors(arguments: dict, change) -> dict:
    def mapped(name: str, value):
        if isinstance(value, (list, tuple)):
            return type(value)(mapped(f"{name}[{index}]", item) for index, item in enumerate(value))
        return change(name, value) if isinstance(value, torch.Tensor) else value

    return {name: mapped(name, value) for name, value in arguments.items()}


def _nudge(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    signs = torch.randint(0, 2, tensor.shape, generator=generator, dtype=tensor.dtype) * 2 - 1
    return tensor * (1 + NUDGE * signs)

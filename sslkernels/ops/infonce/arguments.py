"""What a user can get wrong in the arguments of a contrastive loss: checked before any work, one clear error each."""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import torch

from sslkernels._library import check_backend, check_flags, check_strided  # noqa: F401  for the losses too
from sslkernels._operators import is_eager

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

REDUCTIONS = ("mean", "sum", "none")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
INTEGER_NAMES = tuple(str(dtype).removeprefix("torch.") for dtype in INTEGERS)
# exp(s * scale - |scale|) spans exp(-2 |scale|) to 1 when |s| <= 1: up to here it stays a normal fp32 number
MAX_BOUNDED_SPAN = 80.0


class Options(TypedDict, total=False):
    """What every contrastive loss takes by name, apart from ``return_stats``, which decides the type of the result."""

    normalize: bool
    reduction: str
    backend: str | None
    group: ProcessGroup | None
    exchange: str


def check_matrix(op: str, argument: str, x, like: str = "(N, D)", dims: int = 2) -> None:
    """A floating-point tensor of so many dimensions, the last not empty."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: {argument} must be a tensor, got {type(x).__name__}")
    check_strided(op, argument, x)
    if x.dtype not in DTYPES:
        raise TypeError(f"{op}: {argument} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.dim() != dims:
        raise ValueError(f"{op}: {argument} must be {like}, got {tuple(x.shape)}")
    if x.shape[-1] == 0:
        raise ValueError(f"{op}: {argument} must have at least one column, got {tuple(x.shape)}")


def check_like(op: str, argument: str, x: torch.Tensor, other: str, y: torch.Tensor, dtype: bool = False) -> None:
    """The device of another argument and, if asked, its dtype. Otherwise float64 does not mix with the rest."""
    if x.device != y.device:
        raise ValueError(f"{op}: {argument} must be on the device of {other}, {y.device}, got {x.device}")
    mixed = (x.dtype == torch.float64) != (y.dtype == torch.float64)
    if (dtype and x.dtype != y.dtype) or mixed:
        raise TypeError(f"{op}: {argument} must have the dtype of {other}, {y.dtype}, got {x.dtype}")


def check_pair(op: str, first: str, z0, second: str, z1, dtype: bool = True) -> None:
    """Two (N, D) tensors of one shape and device."""
    check_matrix(op, first, z0)
    check_matrix(op, second, z1)
    if z1.shape != z0.shape:
        raise ValueError(f"{op}: {second} must be (N, D) like {first} {tuple(z0.shape)}, got {tuple(z1.shape)}")
    check_like(op, second, z1, first, z0, dtype)


def check_columns(op: str, argument: str, x, other: str, y: torch.Tensor) -> None:
    """A matrix with as many columns as another."""
    check_matrix(op, argument, x, f"(K, {y.shape[1]})")
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"{op}: {argument} must be (K, {y.shape[1]}) like {other} {tuple(y.shape)}, got {tuple(x.shape)}"
        )
    check_like(op, argument, x, other, y)


def check_integers(op: str, argument: str, x, rows: int, device: torch.device) -> torch.Tensor:
    """(rows,) integers, as int64."""
    if not isinstance(x, torch.Tensor) or x.dtype not in INTEGERS:
        given = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"{op}: {argument} must be a tensor of integers ({', '.join(INTEGER_NAMES)}), got {given}")
    check_strided(op, argument, x)
    if x.shape != (rows,):
        raise ValueError(f"{op}: {argument} must be ({rows},), got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{op}: {argument} must be on the device of the embeddings, {device}, got {x.device}")
    return x.to(torch.int64)


def check_reduction(op: str, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")


def check_fraction(op: str, argument: str, value, below: float = 1.0) -> None:
    """A number in [0, below)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {argument} must be a number, got {type(value).__name__}")
    if not 0 <= value < below:
        raise ValueError(f"{op}: {argument} must be in [0, {below:g}), got {value}")


class Scalar(NamedTuple):
    """A number as a 0-dim tensor in the accumulation dtype, and its value where that is known without a device."""

    tensor: torch.Tensor
    value: float | None


def scalar(op: str, argument: str, value, like: torch.Tensor, nonzero: bool = False) -> Scalar:
    """A float, or a tensor of one element that may require grad, on the device of ``like``."""
    compute = accumulation_dtype(like)
    if isinstance(value, torch.Tensor):
        check_strided(op, argument, value)
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(
                f"{op}: {argument} must be a float or a floating-point tensor of one element, "
                f"got {value.dtype} of shape {tuple(value.shape)}"
            )
        if value.device != like.device:
            raise ValueError(
                f"{op}: {argument} must be on the device of the embeddings, {like.device}, got {value.device}"
            )
        if _can_be_read(value):
            _check_range(op, argument, value.item(), compute, nonzero)
        return Scalar((value.reshape(()) if value.dim() else value).to(compute), None)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {argument} must be a float or a tensor, got {type(value).__name__}")
    _check_range(op, argument, value, compute, nonzero)
    return Scalar(torch.full((), value, dtype=compute, device=like.device), value)


def _can_be_read(x: torch.Tensor) -> bool:
    """Whether a value is at hand: on no device to wait for, in no program that is compiled, traced or transformed."""
    return x.device.type == "cpu" and is_eager(x)


def _check_range(op: str, argument: str, value: float, compute: torch.dtype, nonzero: bool) -> None:
    limits = torch.finfo(compute)
    smallest = limits.tiny if nonzero else 0.0  # of a smaller one the reciprocal may be infinite
    if not smallest <= abs(value) <= limits.max:  # math.isfinite breaks the graph
        expected = "finite and not zero" if nonzero else "finite"
        raise ValueError(f"{op}: {argument} must be {expected} in {compute}, got {reprlib.repr(value)}")


def temperature(op: str, value, like: torch.Tensor) -> Scalar:
    """As `scalar`; a number that is known may not be zero."""
    return scalar(op, "temperature", value, like, nonzero=True)


def accumulation_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.compiler.assume_constant_result  # the compiler cannot trace a function that returns a string
def medium_precision() -> bool:
    return torch.get_float32_matmul_precision() == "medium"

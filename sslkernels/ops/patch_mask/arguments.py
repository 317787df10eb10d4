"""What a user can get wrong in the arguments of masking: checked before any work, one clear error each."""

from __future__ import annotations

from fractions import Fraction

import torch

from sslkernels._library import check_backend, check_flags, check_strided  # noqa: F401  for the public functions too

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
INT = (int, torch.SymInt)  # what the sizes of a tensor are; SymInt where a compiler or exporter traces


def check_floating(op: str, argument: str, x) -> None:
    """A tensor in a dtype that there are kernels for."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: {argument} must be a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{op}: {argument} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    check_strided(op, argument, x)


def check_tokens(op: str, argument: str, x) -> None:
    """(N, L, D) floating-point numbers."""
    check_floating(op, argument, x)
    if x.dim() != 3:
        raise ValueError(f"{op}: {argument} must be (N, L, D), got {tuple(x.shape)}")


def check_device(op: str, argument: str, x: torch.Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{op}: {argument} must be on the device of the data, {device}, got {x.device}")


def count(op: str, argument: str, value, most=None) -> int:
    """An integer in [0, most], or in what 64 bits with a sign hold."""
    if isinstance(value, bool) or not isinstance(value, INT):
        raise TypeError(f"{op}: {argument} must be an int, got {type(value).__name__}")
    if value < 0 or (most is not None and value > most):
        expected = "at least 0" if most is None else f"in [0, {most}]"
        raise ValueError(f"{op}: {argument} must be {expected}, got {value}")
    if most is None and isinstance(value, int) and value >= 2**63:
        raise ValueError(f"{op}: {argument} must be less than 2**63, got {value}")
    return value  # type: ignore[return-value]  # a SymInt acts as an int


def prefix(op: str, value, x: torch.Tensor) -> int:
    """How many of the first tokens of x stay."""
    return count(op, "num_prefix_tokens", value, x.shape[1])


def num_kept(op: str, tokens: int, mask_ratio, num_keep) -> int:
    """num_keep where it is given, else floor(tokens * (1 - mask_ratio)), exactly."""
    if num_keep is not None:
        check_ratio(op, "mask_ratio", mask_ratio)
        return count(op, "num_keep", num_keep, tokens)
    numerator, denominator = ratio(op, "mask_ratio", mask_ratio)
    return tokens * (denominator - numerator) // denominator


def check_ratio(op: str, argument: str, value) -> None:
    """A number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {argument} must be a number, got {type(value).__name__}")
    if not 0 <= value <= 1:
        raise ValueError(f"{op}: {argument} must be in [0, 1], got {value}")


def ratio(op: str, argument: str, value) -> tuple[int, int]:
    """A number in [0, 1] as the fraction that its shortest decimal is: 0.9 is 9/10, not the double nearest to it."""
    check_ratio(op, argument, value)
    (value,) = {value}  # the compiler takes an element of a set at its value, as a size must be
    return _fraction(value)


@torch.compiler.assume_constant_result  # it cannot trace repr
def _fraction(value: float) -> tuple[int, int]:
    return Fraction(repr(float(value))).as_integer_ratio()


def integers(op: str, argument: str, x, shape: tuple, device: torch.device) -> torch.Tensor:
    """Integers of a shape, where None stands for any size, as int64."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: {argument} must be a tensor of integers, got {type(x).__name__}")
    if x.dtype not in INTEGERS:
        raise TypeError(f"{op}: {argument} must be a tensor of integers, got {x.dtype}")
    check_strided(op, argument, x)
    check_shape(op, argument, x, shape)
    check_device(op, argument, x, device)
    return x.to(torch.int64)


def check_shape(op: str, argument: str, x: torch.Tensor, shape: tuple) -> None:
    """Sizes, where None stands for any."""
    if x.dim() != len(shape) or any(
        wanted is not None and size != wanted for size, wanted in zip(x.shape, shape, strict=True)
    ):
        expected = ", ".join("*" if size is None else str(size) for size in shape)
        expected += "," if len(shape) == 1 else ""
        raise ValueError(f"{op}: {argument} must be ({expected}), got {tuple(x.shape)}")


def kept_ids(op: str, argument: str, ids, samples: int, tokens: int, device: torch.device) -> torch.Tensor:
    """(N, K) ids of tokens, of which there must be some for K to be more than 0."""
    ids = integers(op, argument, ids, (samples, None), device)
    if tokens == 0 and ids.shape[1] != 0:
        raise ValueError(f"{op}: {argument} must be ({samples}, 0) where there are no tokens, got {tuple(ids.shape)}")
    return ids


def vector(op: str, argument: str, x, columns: int, device: torch.device) -> torch.Tensor:
    """(D,) from (D,) or (1, 1, D)."""
    check_floating(op, argument, x)
    if x.dim() not in (1, 3) or x.shape[-1] != columns or any(size != 1 for size in x.shape[:-1]):
        raise ValueError(f"{op}: {argument} must be ({columns},) or (1, 1, {columns}), got {tuple(x.shape)}")
    check_device(op, argument, x, device)
    return x.reshape(columns)


def embedding(op: str, x, rows: tuple[int, ...], columns: int, device: torch.device) -> torch.Tensor:
    """pos_embed as (L, D), from (L, D) or (1, L, D), for any L that is in ``rows``."""
    check_floating(op, "pos_embed", x)
    whole = x[0] if x.dim() == 3 and x.shape[0] == 1 else x
    if whole.dim() != 2 or whole.shape[1] != columns or not any(whole.shape[0] == count for count in rows):
        counts = " or ".join(map(str, dict.fromkeys(rows)))
        raise ValueError(
            f"{op}: pos_embed must be (L, {columns}) or (1, L, {columns}) with L = {counts}, got {tuple(x.shape)}"
        )
    check_device(op, "pos_embed", x, device)
    return whole

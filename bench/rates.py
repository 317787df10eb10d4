"""What the machine gives in the same run, and the seconds that an op takes at least at these rates."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from measure import DTYPES
from timing import seconds_of

from sslkernels import _library
from sslkernels.registry import Cost

MM_SIZES = {"cpu": (1024, 512), "cuda": (8192, 8192)}  # rows and columns of what is multiplied by its transpose
COPIED = {"cpu": 2**24, "cuda": 2**28}  # elements: far more than the caches hold


def rates(device: str, dtypes: Iterable[str] = DTYPES, product: bool = True) -> dict[str, Callable[[], float]]:
    """By name: GFLOP/s of multiply-adds on registers, exps/s, GFLOP/s of torch.mm (``product``) and GB/s of copies."""
    measured = {}
    if _library.extension is not None and device == "cpu":
        for label in dtypes:
            measured[f"fma {label}"] = functools.partial(_library.extension.fma_peak, label == "bf16")
        measured["exp"] = _library.extension.exp_rate
    if product or device == "cuda":
        for label in dtypes:
            measured[f"mm {label}"] = functools.partial(_mm_rate, *_mm_operands(DTYPES[label], device), device)
    source = torch.zeros(COPIED[device], device=device)
    measured["copy"] = functools.partial(_copy_rate, torch.empty_like(source), source, device)
    return measured


def _mm_operands(dtype: torch.dtype, device: str):
    a = torch.randn(*MM_SIZES[device], device=device).to(dtype)
    return torch.empty(len(a), len(a), dtype=dtype, device=device), a


def _mm_rate(out: torch.Tensor, a: torch.Tensor, device: str) -> float:
    return 2 * out.numel() * a.shape[1] / seconds_of(lambda: torch.mm(a, a.T, out=out), 3, device) / 1e9


def _copy_rate(out: torch.Tensor, source: torch.Tensor, device: str) -> float:
    return 2 * source.numel() * source.element_size() / seconds_of(lambda: out.copy_(source), 1, device) / 1e9


def roofline(cost: Cost, direction: str, dtype: str, measured: dict[str, float], device: str = "cpu") -> float | None:
    """Seconds that the arithmetic takes at the measured peaks, but no less than the traffic takes.

    On a GPU the peak is torch.mm's and exponentials are free; on a CPU whose peaks are unknown it is None.
    """
    peak = measured.get(f"mm {dtype}" if device == "cuda" else f"fma {dtype}")
    if peak is None:
        return None
    flops, exps, moved = cost.flops, cost.exps, cost.bytes
    if direction == "forward":
        flops, exps, moved = cost.forward_flops, cost.forward_exps, cost.forward_bytes
    arithmetic = flops / (peak * 1e9) + (exps / measured["exp"] if "exp" in measured else 0.0)
    traffic = moved * DTYPES[dtype].itemsize / 4 / (measured["copy"] * 1e9)  # a cost counts the bytes of fp32
    return max(arithmetic, traffic)

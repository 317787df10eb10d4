"""Loads the compiled extension, or keeps the reason why it is not there; `backends` reports what runs where."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, field

import torch

try:
    extension = importlib.import_module("sslkernels._C")  # its static initialisers register every C++ kernel
    extension_error = ""
except ImportError as error:
    extension = None
    extension_error = (
        f"the compiled extension did not load ({error}); it is built at installation where a C++17 compiler is found: "
        "install g++ and reinstall sslkernels"
    )


def triton_error() -> str:
    """Why Triton kernels cannot run here, or an empty string."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (it comes with the CUDA and ROCm builds of torch)"
    return ""


@dataclass(frozen=True)
class Backend:
    """What serves one op on one device: the active implementation, and why the others are absent."""

    active: str
    absent: dict[str, str] = field(default_factory=dict)


def _implemented(torch_op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"sslkernels::{torch_op}", key)


def backends() -> dict[str, dict[str, Backend]]:
    """What is active for every op and device type, read from PyTorch's dispatcher.

    Returns ``{op: {"cpu": Backend, "cuda": Backend}}``. ``Backend.active`` is ``"cpp"``, ``"triton"`` or
    ``"reference"``; ``Backend.absent`` gives the reason for every implementation that is missing.
    """
    from sslkernels.registry import ops

    report = {}
    for spec in ops():
        cpu = all(_implemented(name, "CPU") for name in spec.torch_ops)
        cuda = all(_implemented(name, "CUDA") for name in spec.torch_ops)
        report[spec.name] = {
            "cpu": Backend("cpp") if cpu else Backend("reference", {"cpp": extension_error}),
            "cuda": Backend("triton") if cuda else Backend("reference", {"triton": triton_error()}),
        }
    return report

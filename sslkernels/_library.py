"""Loads the compiled extension, or keeps the reason why it is not there; `backends` reports what runs where."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, field
from types import ModuleType

import torch

extension: ModuleType | None
try:
    extension = importlib.import_module("sslkernels._C")  # its static initialisers register every C++ kernel
    extension_error = ""
except ImportError as error:
    extension = None
    extension_error = (
        f"the compiled extension did not load ({error}); it is built at installation where a C++17 compiler is found: "
        "install g++ and reinstall sslkernels"
    )


def empty_cache() -> None:
    """Give the memory that the CPU's kernels keep between calls back to the system.

    What they keep is at most 64 MiB of working memory, and the memory of large results (above 4 MiB) that nobody holds
    any longer, up to 512 MiB: fresh memory takes longer to clear than a result takes to write. The system takes the
    latter by itself when it is short of memory, though it counts as the process's until then. `torch.cuda.empty_cache`
    is its counterpart for GPUs, whose memory is PyTorch's.
    """
    if extension:
        extension.empty_cache()


def triton_error() -> str:
    """Why Triton kernels cannot run here, or an empty string."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (it comes with the CUDA and ROCm builds of torch)"
    return ""


@dataclass(frozen=True)
class Backend:
    """What serves one op on one device: the active implementation, why others are absent, which are there besides."""

    active: str
    absent: dict[str, str] = field(default_factory=dict)
    besides: tuple[str, ...] = ()


def _implemented(torch_op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"sslkernels::{torch_op}", key)


_on_cuda: dict[str, list[str]] = {}  # operator: what there is, "cuda" (C++) and "triton"; the first owns the key
_without_triton: set[str] = set()  # operators for which no Triton kernel is written


def claim_cuda(torch_op: str, compiled_op: str = "", *, has_triton: bool = True) -> str:
    """Which implementation of an operator has the CUDA key: "cuda", "triton", or "reference" where there is neither.

    The compiled one comes first where it is built, unless it is an operator of its own, ``compiled_op``: then Triton's
    does. ``has_triton``: whether there is one of Triton's at all. A slice asks once, after the definition of its
    operators, and registers what the answer is.
    """
    found = ["cuda"] if _implemented(compiled_op or torch_op, "CUDA") else []
    if has_triton and not triton_error():
        found.insert(0 if compiled_op else len(found), "triton")
    if not has_triton:
        _without_triton.add(torch_op)
    _on_cuda[torch_op] = found
    return found[0] if found else "reference"


def backends() -> dict[str, dict[str, Backend]]:
    """What is active for every op and device type, read from PyTorch's dispatcher.

    Returns ``{op: {"cpu": Backend, "cuda": Backend}}``. ``Backend.active`` is ``"cpp"``, ``"cuda"``, ``"triton"`` or
    ``"reference"``; ``Backend.absent`` gives the reason for every implementation that is missing, and
    ``Backend.besides`` those that only ``backend=`` reaches.
    """
    from sslkernels.registry import ops

    report = {}
    for spec in ops():
        cpu = all(_implemented(name, "CPU") for name in spec.torch_ops)
        report[spec.name] = {
            "cpu": Backend("cpp") if cpu else Backend("reference", {"cpp": extension_error}),
            "cuda": _cuda_backend(_on_cuda[spec.torch_ops[0]], spec.has_cuda, spec.torch_ops[0] not in _without_triton),
        }
    return report


def _cuda_backend(found: list[str], has_cuda: bool, has_triton: bool = True) -> Backend:
    absent = {}
    if not has_cuda:
        absent["cuda"] = "this op has no kernel in CUDA C++"
    elif "cuda" not in found:
        absent["cuda"] = extension_error or "the extension was built without nvcc"
    if not has_triton:
        absent["triton"] = "this op has no kernel in Triton"
    elif triton_error():
        absent["triton"] = triton_error()
    active, *besides = found or ["reference"]
    return Backend(active, absent, tuple(besides))


_DEVICES = {"cpp": "cpu", "cuda": "cuda", "triton": "cuda"}


def check_backend(op: str, backend: str | None, device: str) -> None:
    """Refuse a backend that does not serve an op on this type of device, saying why."""
    if backend is None:
        return
    if not isinstance(backend, str):
        raise TypeError(f"{op}: backend must be a string or None, got {type(backend).__name__}")
    if backend == "reference":
        return
    available = backends()[op].get(device)
    if available is None or backend not in (available.active, *available.besides):
        reason = available.absent.get(backend) if available else None
        elsewhere = backend in _DEVICES and f"it is for tensors on {_DEVICES[backend]}"
        raise RuntimeError(
            f"{op}: backend {backend!r} is not available on {device}: "
            f"{reason or elsewhere or 'there is none of that name'}"
        )


def check_flags(op: str, **flags: object) -> None:
    """Bools: a string would count as True."""
    for argument, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{op}: {argument} must be a bool, got {type(value).__name__}")


def check_strided(op: str, argument: str, x: torch.Tensor) -> None:
    """Kernels and definitions read memory by strides."""
    if x.layout != torch.strided or x.is_nested:
        layout = "a nested tensor" if x.is_nested else x.layout
        raise TypeError(f"{op}: {argument} must be a strided tensor, got {layout}")

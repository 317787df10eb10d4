"""The time and memory of the contrastive loss, fused against eager PyTorch, forward and backward."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import torch

import sslkernels
from sslkernels._table import print_table

BACKENDS = {"eager PyTorch": "reference", "fused": None}
SECONDS = 0.5  # of timing for each row
LEAST_CALLS = 5


def compare_ops(shapes: list[tuple[int, int]], temperature: float, device: str) -> None:
    """Print a table over (views, dim)."""
    memory = _peak_memory(shapes, temperature, device)
    rows = []
    for views, dim in shapes:
        seconds = {name: _seconds(_call(views, dim, temperature, device, name), device) for name in BACKENDS}
        for name, spent in seconds.items():
            extra = memory.get((views, dim, name))
            rows.append(
                (
                    f"{views} x {dim}",
                    name,
                    f"{spent * 1e3:.2f} ms",
                    f"{seconds['eager PyTorch'] / spent:.1f} x",
                    "unknown" if extra is None else f"{extra:.1f} MiB",
                )
            )
    print(f"\nNT-Xent fp32, forward and backward, {torch.get_num_threads()} threads; fused runs on {active(device)}")
    print_table("medians", ("views x dim", "", "time", "faster", "peak extra memory"), rows)


def active(device: str) -> str:
    """The implementation that serves nt_xent, and why the fused one does not if so."""
    backend = sslkernels.backends()["nt_xent"][device]
    return backend.active + "".join(f" ({name} is missing: {why})" for name, why in backend.absent.items())


def _call(views: int, dim: int, temperature: float, device: str, name: str) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    z0, z1 = (torch.randn(views // 2, dim, generator=generator).to(device).requires_grad_() for _ in range(2))
    return lambda: torch.autograd.grad(sslkernels.nt_xent(z0, z1, temperature, backend=BACKENDS[name]), (z0, z1))


def _seconds(call: Callable[[], object], device: str) -> float:
    call()
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < LEAST_CALLS or time.perf_counter() - begin < SECONDS:
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        samples.append(time.perf_counter() - start)
    return median(samples)


def _peak_memory(shapes, temperature, device) -> dict[tuple[int, int, str], float]:
    """MiB above what was held before the call, gradients included; empty where the system does not tell."""
    keys = [(views, dim, name) for views, dim in shapes for name in BACKENDS]
    if device == "cuda":
        return {(n, d, name): _cuda_memory(_call(n, d, temperature, device, name)) for n, d, name in keys}
    if not sys.platform.startswith("linux"):
        return {}
    # in a process whose allocator returns freed memory at once: memory kept from an earlier call would hide the next
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = f"from sslkernels.trainers import _compare; _compare.print_memory({shapes!r}, {temperature!r})"
    threads = str(torch.get_num_threads())
    child = subprocess.run(
        [sys.executable, "-c", command],
        env={**os.environ, **malloc, "OMP_NUM_THREADS": threads},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    values = child.stdout.split()
    return dict(zip(keys, map(float, values), strict=True)) if values else {}


def print_memory(shapes: list[tuple[int, int]], temperature: float) -> None:
    for views, dim in shapes:
        for name in BACKENDS:
            _call(64, dim, temperature, "cpu", name)()  # the libraries' own start-up is not the op's
            call = _call(views, dim, temperature, "cpu", name)
            try:
                with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
                    file.write("5")  # resets the peak to what is resident now
            except OSError:
                return
            before = _status("VmRSS")
            gradients = call()
            print((_status("VmHWM") - before) / 1024)
            del gradients


def _status(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))


def _cuda_memory(call: Callable[[], object]) -> float:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20

"""Runs the CUDA kernels of csrc/cuda on CPU tensors, compiled by the C++ compiler from the very source nvcc compiles.

``kernels(schedule)`` builds the module of ``bindings.cpp`` on first use and returns it, set to run threads in one of
the orders that ``SCHEDULES`` numbers. A right kernel gives the same under all of them; what a GPU would leave undefined
(a missing barrier, memory that nothing wrote) shows under one or another. A barrier that not all threads reach, a
misaligned access and a launch that a GPU refuses are a RuntimeError.
"""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from filelock import FileLock  # torch brings it

ROOT = Path(__file__).resolve().parent.parent.parent
NAME = "cuda_on_cpu_kernels"

SCHEDULES = range(8)


def build(sanitizer: str = "") -> Path:
    """The module, or the test program under a sanitizer ("address", "thread"), brought up to date."""
    command = [sys.executable, "setup.py", "-q", "cuda_on_cpu", *([f"--sanitizer={sanitizer}"] if sanitizer else [])]
    (ROOT / "build").mkdir(exist_ok=True)
    with FileLock(ROOT / "build/cuda_on_cpu.lock"):  # tests may run in several processes
        result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        raise RuntimeError(f"building tests/cuda_on_cpu failed:\n{result.stdout}")
    if sanitizer:
        return ROOT / f"build/cuda_on_cpu-{sanitizer}/example_test"
    return ROOT / f"build/cuda_on_cpu/{NAME}.so"


@functools.cache
def _module() -> ModuleType:
    specification = importlib.util.spec_from_file_location(NAME, build())
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert range(module.SCHEDULES) == SCHEDULES
    return module


def kernels(schedule: int = 0) -> ModuleType:
    module = _module()
    module.set_schedule(schedule)
    return module

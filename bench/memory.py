"""Memory that a call adds at its peak: on a GPU by the allocator, on a CPU in a process of its own."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
from collections.abc import Callable, Iterator

import torch

import sslkernels

# freed memory goes back to the system at once, so that what warming up left behind cannot hide anything
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
IMPORTED = ["torch", "sslkernels.nn", "sslkernels.numerics"]


def allocated_memory(call: Callable[[], object]) -> float:
    """MiB that torch's allocator of the GPU holds at most during a call beyond what it held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def peak_memory(module: str, run: str, label: str) -> float | None:
    """MiB that one call of a contender adds on the CPU, what it returns included; None if unknown.

    The process is a copy of one that has imported torch and computed nothing, which takes milliseconds to make.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(sender, module, run, label, torch.get_num_threads()))
    with _environment(MALLOC):
        child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"{label} of {run} did not survive the measurement of its memory") from None
    finally:
        child.join()


@contextlib.contextmanager
def _environment(names: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _measure(sender, module: str, run_id: str, label: str, threads: int) -> None:
    torch.set_num_threads(threads)
    bench = importlib.import_module(module)
    run = next(run for run in bench.RUNS if str(run) == run_id)
    # the libraries' own start-up is not the op's memory; a compiled function must see the shape itself beforehand
    same = [r for r in bench.RUNS if (r.op, r.direction, bool(r.curve)) == (run.op, run.direction, bool(run.curve))]
    small = run if label.startswith("compile") else min(same, key=lambda other: other.size)
    made = bench.entrants(run, "cpu")[label]()
    (made if small is run else bench.entrants(small, "cpu")[label]())()
    sender.send(_extra(made))


def _extra(call: Callable[[], object]) -> float | None:
    sslkernels.empty_cache()  # what was kept would count as resident before the call
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")  # resets VmHWM to what is resident now
    except OSError:
        return None
    before = _resident("VmRSS")
    kept = call()
    extra = max(0, _resident("VmHWM") - before) / 1024  # the kernel counts pages in bunches
    del kept
    return extra


def _resident(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))

"""How the benchmarks measure: contenders in turn, peak memory in a process of its own, rooflines in the same run."""

from __future__ import annotations

import functools
import glob
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

import torch

from sslkernels import _library, numerics
from sslkernels.registry import Case, Cost, OpSpec

BENCH = Path(__file__).resolve().parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SAMPLE_SECONDS = 0.01  # short calls are repeated until one sample lasts about this long
WARM_SECONDS = 0.2  # shorter calls run once before each sample
SLOW_SECONDS = 10.0  # what takes longer is called once
DISTURBED = 0.02  # share of a sample that its threads may spend waiting for a core
RETRIES = 3


@dataclass(frozen=True)
class Contender:
    """One way to compute an op, and the dtype it is given."""

    name: str
    function: Callable
    dtype: str

    @property
    def label(self) -> str:
        return f"{self.name} {self.dtype}"


def contenders(spec: OpSpec, peers: dict[str, Callable], compiled: bool = True) -> list[Contender]:
    """Everything that races: the definition, the same compiled, the peers that are installed, and ours."""
    # every shape is compiled for itself, which gives the compiler its best case
    static = functools.partial(torch.compile, spec.reference, dynamic=False)
    return [
        *(Contender(name, peer, "fp32") for name, peer in peers.items()),
        Contender("eager", spec.reference, "fp32"),
        *([Contender("compile", static(), "fp32")] if compiled else []),
        Contender("ours", spec.function, "fp32"),
        Contender("eager", spec.reference, "bf16"),
        Contender("ours", spec.function, "bf16"),
    ]


def call(spec: OpSpec, contender: Contender, case: Case, direction: str, device: str) -> Callable[[], object]:
    """What is timed: the value without gradient, or the value and its gradients."""
    arguments = case.make(device, DTYPES[contender.dtype])
    if direction == "forward":
        return torch.no_grad()(functools.partial(contender.function, **arguments))
    leaves = {
        name: arguments[name].detach().requires_grad_()
        for name in spec.grad_args
        if isinstance(arguments[name], torch.Tensor)
    }
    run = functools.partial(contender.function, **{**arguments, **leaves})
    return lambda: torch.autograd.grad(run(), list(leaves.values()))


def assert_correct(spec: OpSpec, racers: list[Contender], case: Case, device: str) -> None:
    """Ours obeys the numerics rule in its dtype, and every peer computes the same function."""
    for dtype in {racer.dtype for racer in racers}:
        arguments = case.make(device, DTYPES[dtype])
        exact_arguments = {
            k: v.cpu().double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in arguments.items()
        }
        exact = numerics.evaluate(spec.reference, exact_arguments, spec.grad_args)
        eager = numerics.evaluate(spec.reference, arguments, spec.grad_args)
        expected = numerics.Expected(eager, exact, exact, dict.fromkeys(spec.grad_args, 0.0))
        for racer in racers:
            if racer.dtype != dtype or racer.function is spec.reference:
                continue
            actual = numerics.evaluate(racer.function, arguments, spec.grad_args)
            if racer.name == "ours":
                for comparison in numerics.compare_call(case.name, actual, expected, DTYPES[dtype]):
                    assert comparison.passed, f"{racer.label}: {comparison}"
            else:
                close = functools.partial(torch.testing.assert_close, rtol=1e-3, check_dtype=False, check_device=False)
                close(actual.value, exact.value, atol=1e-5)
                for name, grad in actual.grads.items():
                    close(grad, exact.grads[name], atol=1e-3 * exact.grads[name].abs().max().item())


@dataclass
class Samples:
    """Samples of one contender, in seconds a call, or of one rate; disturbed ones count where there is no other."""

    clean: list[float] = field(default_factory=list)
    disturbed: list[float] = field(default_factory=list)

    def take(self, measure: Callable[[], tuple[float, float]]) -> None:
        """Keep what ``measure`` returns with the share of its time spent waiting, trying again when disturbed."""
        for _ in range(RETRIES):
            value, waited = measure()
            if waited <= DISTURBED:
                self.clean.append(value)
                return
            self.disturbed.append(value)

    def summary(self) -> dict:
        values = self.clean or self.disturbed
        low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return {
            "median": median(values),
            "quartiles": [low, high],
            "samples": len(self.clean),
            "disturbed": len(self.disturbed),
        }


def queue_wait() -> float:
    """Seconds that the threads of this process have been ready to run while something else held the cores."""
    waited = 0
    for path in glob.glob("/proc/self/task/*/schedstat"):
        try:
            with open(path, encoding="ascii") as file:
                waited += int(file.read().split()[1])
        except FileNotFoundError:  # the thread ended between the two calls
            continue
    return waited / 1e9


def watched(function: Callable[[], float]) -> tuple[float, float]:
    """What ``function`` returns, and the share of its time that our threads waited for a core."""
    waited, start = queue_wait(), time.perf_counter()
    value = function()
    return value, (queue_wait() - waited) / (time.perf_counter() - start)


def clock(function: Callable[[], object], calls: int, device: str) -> tuple[float, float]:
    """Seconds a call, and the share of them that our threads waited for a core."""
    return watched(functools.partial(seconds_of, function, calls, device))


def seconds_of(function: Callable[[], object], calls: int, device: str) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


class Race:
    """One sample of every contender and every rate in turn, round after round; slow contenders sit rounds out."""

    def __init__(self, runs: dict[str, Callable], rates: dict[str, Callable], device: str, rounds: int, budget: float):
        self.runs, self.device, self.rounds, self.round = runs, device, rounds, 0
        self.samples = {name: Samples() for name in runs}
        self.rates = {name: (measure, Samples()) for name, measure in rates.items()}
        self.calls, self.turns, self.warm = {}, {}, {}
        for name, run in runs.items():
            seconds, _ = clock(run, 1, device)  # the first call warms up
            if seconds > SLOW_SECONDS:  # and is the only one where it takes so long
                self.samples[name].clean.append(seconds)
                self.calls[name], self.turns[name], self.warm[name] = 1, 0, False
                continue
            seconds, _ = clock(run, 1, device)
            self.calls[name] = max(1, min(100, round(SAMPLE_SECONDS / seconds)))
            self.turns[name] = min(rounds, max(3, int(budget / (seconds * self.calls[name]))))
            self.warm[name] = seconds < WARM_SECONDS

    def run_round(self) -> None:
        for name, run in self.runs.items():
            before, after = (index * self.turns[name] // self.rounds for index in (self.round, self.round + 1))
            if after > before:
                self._sample(name, run)
        for measure, samples in self.rates.values():
            samples.take(lambda measure=measure: watched(measure))
        self.round += 1

    def _sample(self, name: str, run: Callable[[], object]) -> None:
        if self.warm[name]:
            run()  # another library has just used the caches and the threads
        self.samples[name].take(functools.partial(clock, run, self.calls[name], self.device))


def rates(device: str) -> dict[str, Callable[[], float]]:
    """What the machine gives, by name: GFLOP/s of multiply-adds on registers, exps/s, torch.mm and copies."""
    measured = {}
    if _library.extension is not None and device == "cpu":
        measured["fma fp32"] = functools.partial(_library.extension.fma_peak, False)
        measured["fma bf16"] = functools.partial(_library.extension.fma_peak, True)
        measured["exp"] = _library.extension.exp_rate
    for label, dtype in DTYPES.items():
        measured[f"mm {label}"] = functools.partial(_mm_rate, *_mm_operands(dtype, device), device)
    source = torch.zeros(2**24, device=device)
    measured["copy"] = functools.partial(_copy_rate, torch.empty_like(source), source, device)
    return measured


def _mm_operands(dtype: torch.dtype, device: str):
    a = torch.randn(1024, 512, device=device).to(dtype)
    return torch.empty(1024, 1024, dtype=dtype, device=device), a


def _mm_rate(out: torch.Tensor, a: torch.Tensor, device: str) -> float:
    return 2 * out.numel() * a.shape[1] / seconds_of(lambda: torch.mm(a, a.T, out=out), 10, device) / 1e9


def _copy_rate(out: torch.Tensor, source: torch.Tensor, device: str) -> float:
    return 2 * source.numel() * source.element_size() / seconds_of(lambda: out.copy_(source), 1, device) / 1e9


def roofline(cost: Cost, direction: str, dtype: str, measured: dict[str, float]) -> float | None:
    """Seconds that the arithmetic takes at the measured peaks, but no less than the traffic takes."""
    if "exp" not in measured:
        return None
    peak = measured[f"fma {dtype}"] * 1e9
    flops, exps, moved = cost.flops, cost.exps, cost.bytes
    if direction == "forward":
        flops, exps, moved = cost.forward_flops, cost.forward_exps, cost.forward_bytes
    traffic = moved * DTYPES[dtype].itemsize / 4 / (measured["copy"] * 1e9)  # a cost counts the bytes of fp32
    return max(flops / peak + exps / measured["exp"], traffic)


def peak_memory(module: str, op: str, label: str, case: str, device: str) -> float | None:
    """MiB that one forward and backward adds at its peak, gradients included, in a fresh process; None if unknown."""
    command = f"import measure; measure.print_peak_memory({module!r}, {op!r}, {label!r}, {case!r}, {device!r})"
    # freed memory goes back to the system at once, so that what warming up left behind cannot hide anything
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    path = os.pathsep.join(filter(None, [str(BENCH), str(BENCH.parent), os.environ.get("PYTHONPATH")]))
    child = subprocess.run(
        [sys.executable, "-c", command],
        env={**os.environ, **malloc, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    answer = child.stdout.split()[-1]
    return None if answer == "None" else float(answer)


def print_peak_memory(module: str, op: str, label: str, case_name: str, device: str) -> None:
    bench = importlib.import_module(module)
    spec = bench.SPECS[op]
    cases = {case.name: case for case in spec.cases}
    racers = contenders(spec, bench.peers(op), compiled=label.startswith("compile"))
    racer = next(racer for racer in racers if racer.label == label)
    run = call(spec, racer, cases[case_name], "forward+backward", device)
    # the libraries' own start-up is not the op's memory; a compiled function must see the shape itself beforehand
    small = min(spec.tagged("bench"), key=lambda case: case.cost.flops)
    (run if racer.name == "compile" else call(spec, racer, small, "forward+backward", device))()
    print(_extra_cuda(run) if device == "cuda" else _extra_cpu(run))


def _extra_cuda(run: Callable[[], object]) -> float:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _extra_cpu(run: Callable[[], object]) -> float | None:
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")  # resets VmHWM to what is resident now
    except OSError:
        return None
    before = _resident("VmRSS")
    kept = run()
    extra = (_resident("VmHWM") - before) / 1024
    del kept
    return extra


def _resident(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))

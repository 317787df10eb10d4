"""How time is measured: in turn, disturbed samples again; on a GPU by its own clock, its cache cold."""

from __future__ import annotations

import functools
import glob
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median, quantiles

import torch

SAMPLE_SECONDS = 0.01  # short calls are repeated until one sample lasts about this long
WARM_SECONDS = 0.2  # shorter calls run once before each sample
DISTURBED = 0.02  # share of a sample that its threads may spend waiting for a core
RETRIES = 3
RATE_ROUNDS = 5  # of so many rounds the rates are part


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
    """Mean of so many calls."""
    if device == "cuda":
        return _device_seconds(function, calls)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def _device_seconds(function: Callable[[], object], calls: int) -> float:
    """Between two events of the stream, each call after a write that pushes its tensors out of the cache.

    The host runs ahead while the device writes; what it needs beyond that counts, as it does in training.
    """
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(calls)]
    for start, end in events:
        _cache_filler().zero_()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return sum(start.elapsed_time(end) for start, end in events) / calls / 1e3


@functools.cache
def _cache_filler() -> torch.Tensor:
    """Four times the last cache of the device."""
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return torch.empty(4 * size, dtype=torch.uint8, device="cuda")


def graphed(function: Callable[[], object]) -> Callable[[], object] | None:
    """``function`` recorded once and replayed as a CUDA graph, which leaves the host out; None if it cannot be."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is set up by the first calls must not be part of the graph
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            function()
    except RuntimeError:  # a contender that waits for the device or reads from it
        torch.cuda.synchronize()
        return None
    return graph.replay


class Race:
    """One sample of every contender and every rate in turn, round after round; slow contenders sit rounds out.

    ``budget``: seconds for all samples of a contender, of which there are at least ``least``. Of a contender whose
    first call takes longer than ``slow`` seconds that call is the only sample.
    """

    def __init__(
        self,
        runs: dict[str, Callable],
        rates: dict[str, Callable],
        device: str,
        rounds: int,
        budget: float,
        least: int = 3,
        slow: float = 10.0,
    ):
        self.runs, self.device, self.rounds, self.round = runs, device, rounds, 0
        self.samples = {name: Samples() for name in runs}
        self.rates = {name: (measure, Samples()) for name, measure in rates.items()}
        self.calls, self.turns, self.warm = {}, {}, {}
        for name, run in runs.items():
            if device == "cuda":
                run()  # Triton compiles, which is no part of any call
            seconds, _ = clock(run, 1, device)  # the first call warms up
            if seconds > slow:
                self.samples[name].clean.append(seconds)
                self.calls[name], self.turns[name], self.warm[name] = 1, 0, False
                continue
            seconds, _ = clock(run, 1, device)
            self.calls[name] = max(1, min(100, round(SAMPLE_SECONDS / seconds)))
            self.turns[name] = min(rounds, max(least, int(budget / (seconds * self.calls[name]))))
            self.warm[name] = seconds < WARM_SECONDS

    def run_round(self) -> None:
        for name, run in self.runs.items():
            if self._is_due(self.turns[name]):
                self._sample(name, run)
        if self._is_due(min(RATE_ROUNDS, self.rounds)):
            for measure, samples in self.rates.values():
                samples.take(lambda measure=measure: watched(measure))
        self.round += 1

    def _is_due(self, turns: int) -> bool:
        """Whether one of so many turns, spread over all rounds, falls into this round."""
        return (self.round + 1) * turns // self.rounds > self.round * turns // self.rounds

    def _sample(self, name: str, run: Callable[[], object]) -> None:
        if self.warm[name]:
            run()  # another library has just used the caches and the threads
        self.samples[name].take(functools.partial(clock, run, self.calls[name], self.device))

    def times(self) -> dict[str, dict]:
        return {label: samples.summary() for label, samples in self.samples.items()}

    def rate_medians(self) -> dict[str, float]:
        return {name: samples.summary()["median"] for name, (_, samples) in self.rates.items()}

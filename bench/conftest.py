"""``pytest bench``: races contenders and leaves what it measured in pytest-benchmark's JSON; see `measure`."""

from __future__ import annotations

from importlib import metadata

import measure
import pytest
import torch

import sslkernels
from sslkernels import info


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="the smallest case, three rounds, nothing compiled")
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"))


def pytest_configure(config):
    config.addinivalue_line("python_files", "bench_*.py")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--quick"):
        return
    costs = {item: item.callspec.params["case"].cost for item in items}
    sizes = {item: cost.flops + cost.bytes for item, cost in costs.items()}
    smallest = {item.module: min(sizes[other] for other in items if other.module is item.module) for item in items}
    items[:] = [item for item in items if sizes[item] == smallest[item.module]]


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config, machine_info):
    facts = info.collect()
    facts["versions"] = {"sslkernels": sslkernels.__version__, "torch": torch.__version__}
    for package in ("lightly", "open_clip_torch", "pytorch-metric-learning", "info-nce-pytorch", "timm", "triton"):
        try:
            facts["versions"][package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts["versions"][package] = "not installed"
    machine_info["sslkernels"] = facts


@pytest.fixture(scope="session")
def checked():
    """The cases that are known to be right: one check serves both directions."""
    return set()


@pytest.fixture
def race(request, benchmark, checked):
    """Asserts that all contenders are right, races them, and writes times, memory, roofline and ratios."""
    quick, device = request.config.getoption("--quick"), request.config.getoption("--device")

    def run(spec, case, direction, peers, assert_correct=measure.assert_correct):
        racers = measure.contenders(spec, peers, compiled=not quick)
        if (spec.name, case.name) not in checked:
            assert_correct(spec, racers, case, device)
            checked.add((spec.name, case.name))
        runs = {racer.label: measure.call(spec, racer, case, direction, device) for racer in racers}
        rounds = 3 if quick else 15
        started = measure.Race(runs, measure.rates(device), device, rounds, budget=0.2 if quick else 8.0)
        # pytest-benchmark times ours once more in every round, after a sample of each contender
        benchmark.group = case.name
        benchmark.pedantic(runs["ours fp32"], setup=started.run_round, rounds=rounds)
        times = {label: samples.summary() for label, samples in started.samples.items()}
        if direction == "forward+backward":
            for label in times:
                if label == "ours fp32" or not (quick or times[label]["median"] > measure.SLOW_SECONDS):
                    module = request.module.__name__
                    times[label]["extra_mib"] = measure.peak_memory(module, spec.name, label, case.name, device)
        benchmark.extra_info.update(
            op=spec.name,
            case=case.name,
            direction=direction,
            device=device,
            contenders=times,
            **summarise(
                case, direction, times, {name: s.summary()["median"] for name, (_, s) in started.rates.items()}
            ),
        )

    return run


@pytest.fixture
def device(request):
    return request.config.getoption("--device")


@pytest.fixture
def race_calls(request, benchmark, device):
    """Races calls that move memory: times, and the share of a bandwidth that was measured in turn with them."""
    quick = request.config.getoption("--quick")

    def run(spec, case, runs, rates, traffic, peers):
        """``traffic``: bytes that a call must move; ``peers``: names of ratios, and whose times they divide."""
        rounds = 3 if quick else 21
        rates = rates | {"copy": measure.rates(device)["copy"]}
        started = measure.Race(runs, rates, device, rounds, budget=0.2 if quick else 6.0)
        benchmark.group = case.name
        benchmark.pedantic(runs["ours fp32"], setup=started.run_round, rounds=rounds)
        times = {label: samples.summary() for label, samples in started.samples.items()}
        medians = {name: samples.summary()["median"] for name, (_, samples) in started.rates.items()}
        seconds = {label: entry["median"] for label, entry in times.items()}
        ratios = {name: seconds[a] / seconds[b] for name, (a, b) in peers.items() if a in seconds}
        bandwidth = next(iter(medians.values())) * 1e9
        ratios |= {f"bandwidth {label}": count / bandwidth / seconds[label] for label, count in traffic.items()}
        benchmark.extra_info.update(
            op=spec.name, case=case.name, direction="update", device=device, contenders=times, rates=medians,
            roofline={}, ratios=ratios,
        )  # fmt: skip

    return run


def summarise(case, direction, times, rates) -> dict:
    """Rooflines in seconds, and ratios: how many times ours is faster, and the share of the roofline it reaches."""
    seconds = {label: entry["median"] for label, entry in times.items()}
    rooflines = {dtype: measure.roofline(case.cost, direction, dtype, rates) for dtype in measure.DTYPES}
    ratios = {
        f"over {label}": seconds[label] / seconds[f"ours {label.split()[-1]}"]
        for label in seconds
        if not label.startswith("ours")
    }
    ratios["bf16 over fp32"] = seconds["ours fp32"] / seconds["ours bf16"]
    for dtype, bound in rooflines.items():
        if bound is not None:
            ratios[f"share of roofline {dtype}"] = bound / seconds[f"ours {dtype}"]
    return {"rates": rates, "roofline": rooflines, "ratios": ratios}

"""``pytest bench``: races contenders and leaves what it measured in pytest-benchmark's JSON; see `timing`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import measure
import pytest
import torch
from memory import allocated_memory, peak_memory
from pytest_benchmark.utils import safe_dumps
from rates import rates, roofline
from runs import Run, chosen
from settings import Settings
from timing import Race, graphed

import sslkernels
from sslkernels import _library, info
from sslkernels._files import replacing
from sslkernels.bench import PEERS


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="the smallest input of each op, three rounds, no compiler")
    parser.addoption("--curves", action="store_true", help="the scaling curves too")
    parser.addoption("--op", action="append", default=[], help="only this op")
    parser.addoption("--peers", help="only these peers, separated by commas; empty for none")
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"))
    parser.addoption("--no-compile", action="store_true", help="torch.compile takes no part")
    parser.addoption("--cuda-graphs", action="store_true", help="replay every contender as a CUDA graph")
    parser.addoption("--seconds", type=float, default=2.0, help="for the samples of each contender of a race")


def pytest_configure(config):
    config.addinivalue_line("python_files", "bench_*.py")


def pytest_collection_modifyitems(config, items):
    option = config.getoption
    runs = {item: item.callspec.params["run"] for item in items}
    kept = chosen(runs.values(), option("--op"), option("--quick"), option("--curves"))
    config.hook.pytest_deselected(items=[item for item in items if runs[item] not in kept])
    items[:] = [item for item in items if runs[item] in kept]


@pytest.fixture(scope="session")
def save(request):
    """Writes the results so far, as pytest-benchmark does at the end: a run may be stopped at any time."""
    config, session = request.config, request.config._benchmarksession  # which has no public name
    machine = functools.cache(session.get_machine_info)
    commit = functools.cache(functools.partial(config.hook.pytest_benchmark_generate_commit_info, config=config))

    def save() -> None:
        if not session.json or not session.benchmarks:
            return
        found = config.hook.pytest_benchmark_generate_json(
            config=config, benchmarks=session.benchmarks, include_data=True,
            machine_info=machine(), commit_info=commit(),
        )  # fmt: skip
        with replacing(Path(session.json)) as file:
            file.write(safe_dumps(found).encode())

    return save


@pytest.fixture(autouse=True)
def saved(save):
    """Every race leaves its results, whatever becomes of the next."""
    yield
    save()


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config, machine_info):
    facts = info.collect()
    facts["versions"] = {"sslkernels": sslkernels.__version__, "torch": torch.__version__}
    for package in (*filter(None, dict.fromkeys(PEERS.values())), "triton"):
        try:
            facts["versions"][package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts["versions"][package] = "not installed"
    options = ("device", "peers", "quick", "curves", "no-compile", "cuda-graphs")
    facts["supported_isas"] = _library.extension.supported_isas() if _library.extension else []
    facts["has_bf16"] = measure.has_bf16()
    facts["settings"] = {name: config.getoption(f"--{name}") for name in options}
    machine_info["sslkernels"] = facts


@pytest.fixture(scope="session")
def settings(request):
    option = request.config.getoption
    peers = option("--peers")
    return Settings(
        option("--device"),
        option("--quick"),
        not (option("--quick") or option("--no-compile")),
        None if peers is None else peers.split(","),
        option("--cuda-graphs"),
        option("--seconds"),
    )


@pytest.fixture
def device(settings):
    return settings.device


@pytest.fixture
def hold(request, settings, benchmark):
    """Races what entrants make, and writes times and memory; the caller adds what they mean."""

    def hold(run: Run, entrants: dict[str, Callable], measured: dict[str, Callable]) -> tuple[dict, dict]:
        made = {label: make() for label, make in entrants.items() if settings.admits(run, label)}
        replays = {label: graphed(call) for label, call in made.items()} if settings.graphs else {}
        calls = made | {label: replay for label, replay in replays.items() if replay is not None}
        started = Race(calls, measured, settings.device, **settings.pace(run))
        benchmark.group = run.case.name
        # pytest-benchmark times ours once more in every round, after a sample of each contender
        benchmark.pedantic(calls["ours fp32"], setup=started.run_round, rounds=started.rounds)
        times = started.times()
        settings.note_slow(run, times)
        for label, entry in times.items():
            if settings.graphs:
                entry["graph"] = replays[label] is not None
            if run.whole and settings.weighs(label, entry):
                if settings.device == "cuda":
                    entry["extra_mib"] = allocated_memory(made[label])
                else:
                    entry["extra_mib"] = peak_memory(request.module.__name__, str(run), label)
        benchmark.extra_info.update(
            op=run.op, case=run.case.name, direction=run.direction, whole=run.whole, device=settings.device,
            contenders=times, rates=started.rate_medians(),
            curve=run.curve and {"size": run.curve.size, "rest": run.curve.rest, "value": run.value},
        )  # fmt: skip
        return {label: entry["median"] for label, entry in times.items()}, started.rate_medians()

    return hold


@pytest.fixture
def race(settings, benchmark, hold):
    """Asserts that all contenders are right, races them, and writes rooflines and ratios."""

    def run_race(run, spec, peers, assert_correct=measure.assert_correct):
        peers = {name: peer for name, peer in peers.items() if settings.admits(run, f"{name} fp32")}
        racers = measure.of_run(spec, peers, run, settings.device, compiled=settings.compiled)
        # of a curve the smallest point, which comes first
        checked = (spec.name, run.curve.size if run.curve else run.case.name)
        torch._dynamo.reset()  # which compiles eight shapes of a function and runs the ninth uncompiled
        if checked not in settings.checked:
            assert_correct(spec, racers, run.case, settings.device)
            settings.checked.add(checked)
        entrants = measure.entrants(spec, racers, run, settings.device)
        dtypes = ("fp32",) if run.curve else measure.DTYPES
        measured = rates(settings.device, dtypes, product=not (run.curve or settings.quick))
        seconds, found = hold(run, entrants, measured)
        benchmark.extra_info.update(summarise(run, seconds, found, settings.device))

    return run_race


@pytest.fixture
def race_calls(settings, benchmark, hold):
    """Races calls that move memory: the share of a bandwidth that was measured in turn with them."""

    def run_race(run, entrants, measured, traffic, peers):
        """``traffic``: bytes that a call must move; ``peers``: names of ratios, and whose times they divide."""
        measured = measured | {"copy": rates(settings.device, (), product=False)["copy"]}
        seconds, found = hold(run, entrants, measured)
        bandwidth = next(iter(found.values())) * 1e9
        ratios = {name: seconds[a] / seconds[b] for name, (a, b) in peers.items() if a in seconds and b in seconds}
        shares = {label: count / bandwidth for label, count in traffic.items() if label in seconds}
        ratios |= {f"bandwidth {label}": least / seconds[label] for label, least in shares.items()}
        benchmark.extra_info.update(roofline={}, least_seconds=shares["ours fp32"], ratios=ratios)

    return run_race


def summarise(run: Run, seconds: dict[str, float], found: dict[str, float], device: str) -> dict:
    """Rooflines in seconds, and ratios: how many times ours is faster, and the share of the roofline it reaches."""
    dtypes = [dtype for dtype in measure.DTYPES if f"ours {dtype}" in seconds]
    rooflines = {dtype: roofline(run.case.cost, run.direction, dtype, found, device) for dtype in dtypes}
    ratios = {
        f"over {label}": seconds[label] / seconds[f"ours {label.split()[-1]}"]
        for label in seconds
        if not label.startswith("ours")
    }
    if "bf16" in dtypes:
        ratios["bf16 over fp32"] = seconds["ours fp32"] / seconds["ours bf16"]
    for dtype, bound in rooflines.items():
        if bound is not None:
            ratios[f"share of roofline {dtype}"] = bound / seconds[f"ours {dtype}"]
    return {"roofline": rooflines, "least_seconds": rooflines["fp32"], "ratios": ratios}

"""The benchmarks: a race in small, who races, and how time and memory are measured."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import measure
import pytest
import timing
import torch
from rates import roofline
from runs import Run, chosen, runs
from settings import OURS, TOO_SLOW, Settings

from sslkernels import _library, bench, registry
from sslkernels.registry import Cost, ops

ROOT = Path(__file__).parents[1]


QUICK = (
    "--quick",
    "--curves",
    "--op",
    "nt_xent",
    "--op",
    "ema",
    "--peers",
    "foreach",
    "-k",
    "not curve-D and not curve-T",
)
MODULES = [importlib.import_module(path.stem) for path in sorted((ROOT / "bench").glob("bench_*.py"))]
RUNS = [run for module in MODULES for run in module.RUNS]


def own_environment() -> dict[str, str]:
    """Of a process that a person starts: nothing of this pytest, which pytest-benchmark would take for its own."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    return {**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Results of quick races, the page of them and what was printed, from a process of its own as a person runs it."""
    pytest.importorskip("pytest_benchmark")
    pytest.importorskip("matplotlib")
    file = tmp_path_factory.mktemp("bench") / "results.json"
    ran = subprocess.run(
        [sys.executable, "-m", "sslkernels", "bench", *QUICK, "--json", str(file)],
        env=own_environment(),
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return json.loads(file.read_text()), file.with_suffix(".md").read_text(), ran.stdout


def of_op(results, op):
    """The races of an op, those of its curve apart."""
    races = [benchmark["extra_info"] for benchmark in results["benchmarks"] if benchmark["extra_info"]["op"] == op]
    return [race for race in races if not race["curve"]], [race for race in races if race["curve"]]


def test_the_race_leaves_ratios_of_its_own_medians(quick):
    results, _, _ = quick
    races, _ = of_op(results, "nt_xent")
    assert {race["direction"] for race in races} == {"forward", "forward+backward"}
    for race in races:
        seconds = {label: entry["median"] for label, entry in race["contenders"].items()}
        assert {"eager fp32", "ours fp32", "eager bf16", "ours bf16"} <= set(seconds)
        assert race["ratios"]["over eager fp32"] == pytest.approx(seconds["eager fp32"] / seconds["ours fp32"])
        assert race["ratios"]["bf16 over fp32"] == pytest.approx(seconds["ours fp32"] / seconds["ours bf16"])
        assert len(set(seconds.values())) == len(seconds)
        assert all(entry["samples"] + entry["disturbed"] >= 3 for entry in race["contenders"].values())
    both = next(race for race in races if race["direction"] == "forward+backward")
    ours, eager = (both["contenders"][label]["extra_mib"] for label in ("ours fp32", "eager fp32"))
    assert ours is None or ours < 2 < eager < 100  # eager stores matrices of 512 x 512


def test_a_curve_is_raced_without_what_is_slow_to_prepare(quick):
    _, points = of_op(quick[0], "nt_xent")
    assert [race["curve"] for race in points] == [{"size": "N", "rest": "D = 128", "value": n} for n in (64, 256)]
    for race in points:
        assert set(race["contenders"]) == {"eager fp32", "ours fp32"}
        assert race["direction"] == "forward+backward" and race["rates"].keys() <= {"fma fp32", "exp", "copy"}
        assert race["least_seconds"] == race["roofline"]["fp32"]


def test_figures_and_page_lie_beside_the_results(quick):
    _, page, printed = quick
    for line in [line.split() for line in printed.splitlines() if line.startswith(("page ", "figure ", "results "))]:
        assert Path(line[1]).is_file()
    assert printed.count("\nfigure ") == 3
    assert "`sslkernels bench --peers foreach --quick --curves`" in page


def test_stopping_keeps_the_races_that_were_finished(tmp_path):
    file = tmp_path / "b.json"
    command = [sys.executable, "-m", "sslkernels", "bench", "--op=infonce", "--quick", "--peers=none"]
    command += [f"--json={file}"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=own_environment(), **streams) as process:
        printed = ""
        for line in process.stdout:
            printed += line
            if re.search(r"\[ *2/", line):  # the first has left its results
                process.terminate()
                break
        printed += process.stdout.read()
    assert process.returncode == 130 and "stopped; what was finished:" in printed, printed
    assert 1 <= len(json.loads(file.read_text())["benchmarks"]) <= 3
    assert file.with_suffix(".md").is_file()


def test_the_roofline_is_the_cost_at_the_measured_rates(quick):
    results, _, _ = quick
    spec = next(spec for spec in ops() if spec.name == "nt_xent")
    cases = {case.name: case for case in spec.cases}
    for race in of_op(results, "nt_xent")[0]:
        if _library.extension is None:
            assert race["roofline"] == {"fp32": None, "bf16": None}
            continue
        cost, rates = cases[race["case"]].cost, race["rates"]
        flops, exps = (
            (cost.flops, cost.exps) if "backward" in race["direction"] else (cost.forward_flops, cost.exps / 2)
        )
        expected = flops / (rates["fma fp32"] * 1e9) + exps / rates["exp"]
        assert race["roofline"]["fp32"] == pytest.approx(expected)
        share = race["ratios"]["share of roofline fp32"]
        assert share == pytest.approx(expected / race["contenders"]["ours fp32"]["median"])


def test_the_moving_average_is_measured_by_the_bandwidth_of_the_same_run(quick):
    results, _, _ = quick
    [race], points = of_op(results, "ema_update_")
    assert {race["curve"]["size"] for race in points} == {"P"}
    assert all(race["contenders"]["ours fp32"]["extra_mib"] in (None, pytest.approx(0, abs=0.5)) for race in points)
    seconds = {label: entry["median"] for label, entry in race["contenders"].items()}
    assert race["ratios"]["over foreach"] == pytest.approx(seconds["foreach fp32"] / seconds["ours fp32"])
    share = 12 * 64000 / (race["rates"]["lerp"] * 1e9) / seconds["ours fp32"]
    assert race["ratios"]["bandwidth ours fp32"] == pytest.approx(share)
    assert race["least_seconds"] == pytest.approx(share * seconds["ours fp32"])


def test_contenders_take_turns_and_slow_ones_sit_rounds_out():
    order = []
    race = timing.Race({name: lambda name=name: order.append(name) for name in "ab"}, {}, "cpu", 6, budget=1)
    race.calls, race.turns, race.warm = dict.fromkeys("ab", 1), {"a": 6, "b": 3}, dict.fromkeys("ab", False)
    race.samples = {name: timing.Samples() for name in "ab"}
    order.clear()
    for _ in range(6):
        before = {name: len(samples.clean) + len(samples.disturbed) for name, samples in race.samples.items()}
        race.run_round()
        taken = {name: len(s.clean) + len(s.disturbed) - before[name] for name, s in race.samples.items()}
        assert taken["a"] >= 1
        assert bool(taken["b"]) == (race.round % 2 == 0)
    assert "".join(order).find("ab") >= 0


def test_a_disturbed_sample_is_taken_again_and_counted():
    values = iter([(5.0, 0.5), (2.0, 0.0), (4.0, 0.9), (4.0, 0.9), (4.0, 0.9)])
    samples = timing.Samples()
    samples.take(lambda: next(values))
    samples.take(lambda: next(values))
    assert samples.clean == [2.0]
    summary = samples.summary()
    assert (summary["median"], summary["samples"], summary["disturbed"]) == (2.0, 1, 4)


def test_roofline_of_traffic():
    measured = {"fma fp32": 1e3, "fma bf16": 2e3, "exp": 1e12, "copy": 1.0}
    assert roofline(Cost(0, 0, 0, 0, 4e9), "forward+backward", "fp32", measured) == pytest.approx(4.0)
    assert roofline(Cost(0, 0, 0, 0, 4e9), "forward+backward", "bf16", measured) == pytest.approx(2.0)
    assert roofline(Cost(1e12, 3e12, 0, 0, 0), "forward+backward", "fp32", measured) == pytest.approx(4.0)
    assert roofline(Cost(1e12, 3e12, 0, 0, 0), "forward", "fp32", measured) == pytest.approx(1.0)
    assert roofline(Cost(1e12, 0, 0, 0, 0), "forward", "fp32", {"copy": 1.0}) is None
    products = {"mm fp32": 5e2, "copy": 1.0}
    assert roofline(Cost(1e12, 0, 0, 0, 0), "forward", "fp32", products, "cuda") == pytest.approx(2.0)


def test_a_wrong_contender_does_not_race():
    spec = next(spec for spec in ops() if spec.name == "nt_xent")
    case = next(case for case in spec.cases if case.name == "odd")
    racers = measure.contenders(spec, {}, compiled=False)
    measure.assert_correct(spec, racers, case, "cpu")
    wrong = measure.Contender("ours", lambda **arguments: 1.01 * spec.function(**arguments), "fp32")
    with pytest.raises(AssertionError, match="ours fp32: odd: value"):
        measure.assert_correct(spec, [wrong], case, "cpu")
    peer = measure.Contender("peer", lambda **arguments: 1.01 * spec.reference(**arguments), "fp32")
    with pytest.raises(AssertionError, match="Scalars are not close"):
        measure.assert_correct(spec, [peer], case, "cpu")


def test_every_timed_op_races_and_has_curves():
    timed = {spec.name for spec in ops() if spec.tagged("bench")}
    assert {run.op for run in RUNS} == timed == {run.op for run in RUNS if run.curve}
    assert len({str(run) for run in RUNS}) == len(RUNS)


@pytest.mark.parametrize("op", sorted({run.op for run in RUNS}))
def test_a_curve_grows_and_its_smallest_input_can_be_made(op):
    for curve in registry.curves(op):
        values = [value for value, _ in curve.points]
        assert values == sorted(set(values)) and len(values) > 2
        costs = [case.cost.flops + case.cost.bytes for _, case in curve.points]
        assert costs == sorted(set(costs))
        assert curve.points[0][1].make("cpu", torch.float32)


def test_quick_races_are_of_the_smallest_input_and_two_points_of_a_curve():
    spec = next(spec for spec in ops() if spec.name == "nt_xent")
    found = runs({spec.name: spec})
    kept = chosen(found, [], quick=True, curves=True)
    assert {(run.case.name, run.direction) for run in kept if not run.curve} == {
        ("views512_d128", "forward"),
        ("views512_d128", "forward+backward"),
    }
    assert sorted(run.value for run in kept if run.curve) == [32, 64, 128, 256]
    assert chosen(found, ["info_nce"], quick=True, curves=True) == set()
    assert not any(run.curve for run in chosen(found, ["nt_xent"], quick=False, curves=False))
    assert chosen(found, ["nt_xent"], quick=False, curves=True) == set(found)


def test_a_peer_that_keeps_its_queue_gets_that_of_each_input(monkeypatch):
    class Loss:
        """Takes its negatives from its memory bank and then writes into it, as lightly's does."""

        memory_bank = SimpleNamespace(bank=None)

        def __call__(self, query, key):
            negatives, self.memory_bank.bank = self.memory_bank.bank, key
            return negatives

    contrast = next(module for module in MODULES if module.__name__ == "bench_contrast")
    loss = Loss()
    monkeypatch.setattr(contrast, "_made", lambda *args: loss)
    query, key, *queues = torch.nn.functional.normalize(torch.randn(4, 5, 3), dim=2)
    for queue in queues:
        torch.testing.assert_close(contrast.lightly_queue(query, key, queue, 0.1), queue)
        assert contrast.lightly_queue(query, key, queue, 0.1) is key


def test_every_peer_has_a_name_on_the_command_line():
    entrants = {label.split()[0] for module in MODULES for run in module.RUNS for label in module.entrants(run, "cpu")}
    assert {"eager", "compile", "ours"} < entrants <= {*OURS, *bench.PEERS}


def test_a_name_stands_for_a_slice_or_a_function():
    names = bench.timed_ops()
    assert {"nt_xent", "info_nce_queue", "sup_con"} < set(names["infonce"])
    assert names["info_nce"] == ["info_nce", "info_nce_queue"]
    assert names["nt_xent"] == ["nt_xent"] and names["patch_mask"] == ["patch_mask"]
    assert names["ema"] == names["ema_update_"] == ["ema_update_"]


def test_who_is_slow_ends_its_curve_but_ours_goes_on():
    spec = next(spec for spec in ops() if spec.name == "nt_xent")
    first, other = (
        Run("nt_xent", curve.points[0][1], "forward+backward", True, curve) for curve in registry.curves(spec.name)
    )
    settings = Settings("cpu", quick=False, compiled=True, peers=["lightly"], graphs=False, seconds=2.0)
    assert not settings.admits(first, "timm fp32")
    seconds = {"lightly fp32": 2 * TOO_SLOW, "eager fp32": TOO_SLOW / 2, "ours fp32": 2 * TOO_SLOW}
    settings.note_slow(first, {label: {"median": median} for label, median in seconds.items()})
    assert [label for label in seconds if settings.admits(first, label)] == ["eager fp32", "ours fp32"]
    assert settings.admits(other, "lightly fp32")


class Device:
    """In place of ``torch.cuda``: notes what happens, and has a clock that only calls advance."""

    def __init__(self):
        self.log, self.now, self.capturing = [], 0.0, False

    def Event(self, enable_timing):
        event = SimpleNamespace(at=None, elapsed_time=lambda end: 1e3 * (end.at - event.at))
        event.record = lambda: (self.log.append("event"), setattr(event, "at", self.now))
        return event

    def Stream(self):
        return SimpleNamespace(wait_stream=lambda other: self.log.append("wait"))

    current_stream = Stream

    def stream(self, stream):
        return contextlib.nullcontext()

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: self.log.append("replay"))

    @contextlib.contextmanager
    def graph(self, graph):
        self.capturing = True
        yield
        self.capturing = False

    def synchronize(self):
        self.log.append("synchronize")

    def call(self):
        self.now += 0.25
        self.log.append("call")

    def call_that_waits(self):
        if self.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")


@pytest.fixture
def gpu(monkeypatch):
    device = Device()
    monkeypatch.setattr(timing.torch, "cuda", device)
    filler = SimpleNamespace(zero_=lambda: device.log.append("fill"))
    monkeypatch.setattr(timing, "_cache_filler", lambda: filler)
    return device


def test_a_gpu_is_timed_by_its_own_clock_and_with_a_cold_cache(gpu):
    assert timing.seconds_of(gpu.call, 2, "cuda") == pytest.approx(0.25)
    assert gpu.log == ["fill", "event", "call", "event"] * 2 + ["synchronize"]


def test_a_graph_is_recorded_after_warm_calls_on_a_stream_of_their_own(gpu):
    replay = timing.graphed(gpu.call)
    assert gpu.log == ["wait", "call", "call", "call", "wait", "call"]
    replay()
    assert gpu.log[-1] == "replay"


def test_a_contender_that_cannot_be_recorded_races_as_it_is(gpu):
    assert timing.graphed(gpu.call_that_waits) is None
    assert gpu.log[-1] == "synchronize"

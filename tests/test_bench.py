"""The benchmarks: a race in small, and what is made of its figures."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import measure
import pytest
import report

from sslkernels import _library
from sslkernels.registry import Cost, ops

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Results of the quick benchmark and its printed table, from a process of its own as a person runs it."""
    pytest.importorskip("pytest_benchmark")
    file = tmp_path_factory.mktemp("bench") / "results.json"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    ran = subprocess.run(
        [sys.executable, "-m", "sslkernels", "bench", "--quick", "--json", str(file)],
        env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return json.loads(file.read_text()), file.with_suffix(".md").read_text(), ran.stdout


def of_op(results, op):
    races = [benchmark["extra_info"] for benchmark in results["benchmarks"]]
    return [race for race in races if race["op"] == op]


def table(markdown, heading):
    """The rows below a heading, by column."""
    lines = markdown.partition(f"## {heading}")[2].partition("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def test_the_race_leaves_ratios_of_its_own_medians(quick):
    results, _, _ = quick
    races = of_op(results, "nt_xent")
    assert {race["direction"] for race in races} == {"forward", "forward+backward"}
    for race in races:
        seconds = {label: entry["median"] for label, entry in race["contenders"].items()}
        assert {"eager fp32", "ours fp32", "eager bf16", "ours bf16"} <= set(seconds)
        assert race["ratios"]["over eager fp32"] == pytest.approx(seconds["eager fp32"] / seconds["ours fp32"])
        assert race["ratios"]["bf16 over fp32"] == pytest.approx(seconds["ours fp32"] / seconds["ours bf16"])
        assert len(set(seconds.values())) == len(seconds)
        assert all(entry["samples"] + entry["disturbed"] >= 3 for entry in race["contenders"].values())
    both = next(race for race in races if race["direction"] == "forward+backward")
    memory = both["contenders"]["ours fp32"]["extra_mib"]
    assert memory is None or 0 <= memory < 100


def test_the_roofline_is_the_cost_at_the_measured_rates(quick):
    results, _, _ = quick
    spec = next(spec for spec in ops() if spec.name == "nt_xent")
    cases = {case.name: case for case in spec.cases}
    for race in of_op(results, "nt_xent"):
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


def test_the_table_has_what_a_reader_needs(quick):
    results, markdown, printed = quick
    assert markdown in printed
    machine = results["machine_info"]["sslkernels"]
    for fact in (machine["processor"], machine["versions"]["torch"], results["commit_info"].get("id", "unknown")):
        assert fact in markdown
    ratios = table(markdown, "Ratios of nt_xent")
    peers = [title for title in ratios[0] if title.startswith("× ")]
    assert "× eager" in peers
    assert list(ratios[0]) == ["op", "case", "direction", *peers, *report.RATIOS, "extra MiB", "bf16 extra MiB"]
    assert len(ratios) == 2
    contenders = {row["contender"] for row in table(markdown, "Times")}
    assert {"eager fp32", "ours fp32", "ours bf16", "roofline fp32"} <= contenders


def test_the_moving_average_is_measured_by_the_bandwidth_of_the_same_run(quick):
    results, markdown, _ = quick
    [race] = of_op(results, "ema_update_")
    seconds = {label: entry["median"] for label, entry in race["contenders"].items()}
    assert race["ratios"]["over foreach"] == pytest.approx(seconds["foreach fp32"] / seconds["ours fp32"])
    share = 12 * 64000 / (race["rates"]["lerp"] * 1e9) / seconds["ours fp32"]
    assert race["ratios"]["bandwidth ours fp32"] == pytest.approx(share)
    [row] = table(markdown, "Ratios of ema_update_")
    assert row["case"] == "thousand" and row["bandwidth ours fp32"] == f"{share:.0%}"


def test_the_table_follows_the_figures(quick):
    results = copy.deepcopy(quick[0])
    race = of_op(results, "nt_xent")[0]
    race["contenders"]["ours fp32"].update(median=0.0125, quartiles=[0.012, 0.013], samples=5, disturbed=0)
    race["ratios"]["over eager fp32"] = 7.25
    race["ratios"]["share of roofline fp32"] = 0.913
    markdown = report.report(results)
    row = table(markdown, "Ratios of nt_xent")[0]
    assert (row["× eager"], row["of roofline"]) == ("7.25", "91%")
    rows = [row for row in table(markdown, "Times") if row["op"] == "nt_xent"]
    times = {(row["direction"], row["contender"]): row["ms"] for row in rows}
    assert times[race["direction"], "ours fp32"] == "12.5 [12, 13]"


def test_figures_of_a_busy_machine_are_called_so(quick):
    results = copy.deepcopy(quick[0])
    for benchmark in results["benchmarks"]:
        for entry in benchmark["extra_info"]["contenders"].values():
            entry.update(samples=4, disturbed=1)
    assert "do not rely" not in report.report(results)
    of_op(results, "nt_xent")[0]["contenders"]["ours bf16"].update(samples=0, disturbed=9)
    assert "do not rely on the figures of:** views512_d128 forward ours bf16." in report.report(results)


def test_contenders_take_turns_and_slow_ones_sit_rounds_out():
    order = []
    race = measure.Race({name: lambda name=name: order.append(name) for name in "ab"}, {}, "cpu", 6, budget=1)
    race.calls, race.turns, race.warm = dict.fromkeys("ab", 1), {"a": 6, "b": 3}, dict.fromkeys("ab", False)
    race.samples = {name: measure.Samples() for name in "ab"}
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
    samples = measure.Samples()
    samples.take(lambda: next(values))
    samples.take(lambda: next(values))
    assert samples.clean == [2.0]
    summary = samples.summary()
    assert (summary["median"], summary["samples"], summary["disturbed"]) == (2.0, 1, 4)


def test_roofline_of_traffic():
    measured = {"fma fp32": 1e3, "fma bf16": 2e3, "exp": 1e12, "copy": 1.0}
    assert measure.roofline(Cost(0, 0, 0, 0, 4e9), "forward+backward", "fp32", measured) == pytest.approx(4.0)
    assert measure.roofline(Cost(0, 0, 0, 0, 4e9), "forward+backward", "bf16", measured) == pytest.approx(2.0)
    assert measure.roofline(Cost(1e12, 3e12, 0, 0, 0), "forward+backward", "fp32", measured) == pytest.approx(4.0)
    assert measure.roofline(Cost(1e12, 3e12, 0, 0, 0), "forward", "fp32", measured) == pytest.approx(1.0)


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

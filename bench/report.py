"""Markdown of what ``pytest bench --benchmark-json FILE`` measured: ``python bench/report.py FILE``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

RATIOS = {  # after those over each contender in fp32
    "of roofline": "share of roofline fp32",
    "bf16 × fp32": "bf16 over fp32",
    "bf16 × eager": "over eager bf16",
    "bf16 of roofline": "share of roofline bf16",
}
ABSENT = "–"


def report(results: dict) -> str:
    races = [benchmark["extra_info"] for benchmark in results["benchmarks"]]
    return "\n\n".join(
        [
            "# Benchmarks",
            _machine(results),
            "## Times\n\nMilliseconds: median [quartiles]. Extra memory: MiB at the peak of a forward and backward, "
            "gradients included.\n\n" + _table(*_times(races)),
            *(_ratios_of(op, [race for race in races if race["op"] == op]) for op in _ops(races)),
            "## Rates of this machine\n\nMeasured in turn with the times above: GFLOP/s of multiply-adds (fma) and of "
            "torch.mm, billions of exponentials a second, GB/s of a copy and of a lerp_.\n\n" + _table(*_rates(races)),
            _disturbances(races),
        ]
    )


def _machine(results: dict) -> str:
    facts = results["machine_info"]["sslkernels"]
    commit = results["commit_info"]
    versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
    return "\n".join(
        [
            f"- processor: {facts['processor']}, {facts['threads']} threads; instruction set {facts['isa']}",
            f"- CUDA: {facts['cuda']}",
            f"- versions: Python {facts['python']}, {versions}",
            f"- commit: {commit.get('id', 'unknown')}{' with local changes' if commit.get('dirty') else ''}",
            f"- date: {results['datetime'][:10]}",
        ]
    )


def _times(races: list[dict]) -> tuple[list[str], list[list[str]]]:
    columns = ["op", "case", "direction", "contender", "ms", "extra MiB", "samples"]
    rows = []
    for race in races:
        for label, entry in race["contenders"].items():
            low, high = (1e3 * value for value in entry["quartiles"])
            rows.append(
                [
                    race["op"],
                    race["case"],
                    race["direction"],
                    label,
                    f"{_significant(1e3 * entry['median'])} [{_significant(low)}, {_significant(high)}]",
                    _number(entry.get("extra_mib"), "{:.1f}"),
                    str(entry["samples"] or entry["disturbed"]),
                ]
            )
        for dtype, seconds in race["roofline"].items():
            milliseconds = ABSENT if seconds is None else _significant(1e3 * seconds)
            rows.append(
                [race["op"], race["case"], race["direction"], f"roofline {dtype}", milliseconds, ABSENT, ABSENT]
            )
    return columns, rows


def _ops(races: list[dict]) -> list[str]:
    return list(dict.fromkeys(race["op"] for race in races))


def _ratios_of(op: str, races: list[dict]) -> str:
    """Ops of arithmetic have a roofline of flops; those that move memory name their ratios themselves."""
    if any("share of roofline fp32" in race["ratios"] or race["roofline"] for race in races):
        return (
            f"## Ratios of {op}\n\nHow many times faster ours is in fp32, and the share that it reaches of the "
            "roofline: the op's arithmetic at the rate of a multiply-add loop on registers, plus its exponentials, or "
            "the bytes it must move at the rate of a copy, whichever takes longer.\n\n" + _table(*_ratios(races))
        )
    names = list(dict.fromkeys(name for race in races for name in race["ratios"]))
    rows = [
        [
            race["case"],
            *(_number(race["ratios"].get(name), "{:.0%}" if "bandwidth" in name else "{:.2f}") for name in names),
        ]
        for race in races
    ]
    return (
        f"## Ratios of {op}\n\nHow many times faster ours is, and the share that it reaches of the bandwidth: the "
        "bytes it must move at the rate of one large lerp_ of the same run.\n\n" + _table(["case", *names], rows)
    )


def _ratios(races: list[dict]) -> tuple[list[str], list[list[str]]]:
    peers = dict.fromkeys(name for race in races for name in race["ratios"] if name.startswith("over "))
    titles = {f"× {name[5:-5]}": name for name in peers if name.endswith(" fp32")} | RATIOS
    columns = ["op", "case", "direction", *titles, "extra MiB", "bf16 extra MiB"]
    rows = []
    for race in races:
        formats = ("{:.0%}" if "roofline" in title else "{:.2f}" for title in titles)
        ratios = [_number(race["ratios"].get(key), form) for key, form in zip(titles.values(), formats, strict=True)]
        memory = [_number(race["contenders"][f"ours {t}"].get("extra_mib"), "{:.1f}") for t in ("fp32", "bf16")]
        rows.append([race["op"], race["case"], race["direction"], *ratios, *memory])
    return columns, rows


def _rates(races: list[dict]) -> tuple[list[str], list[list[str]]]:
    names = list(dict.fromkeys(name for race in races for name in race["rates"]))
    rows = [
        [
            race["case"],
            race["direction"],
            *(_number(_in_giga(name, race["rates"].get(name)), "{:.1f}") for name in names),
        ]
        for race in races
    ]
    return ["case", "direction", *names], rows


def _in_giga(name: str, rate: float | None) -> float | None:
    return rate and rate / (1e9 if name == "exp" else 1)


def _disturbances(races: list[dict]) -> str:
    """How far other processes were in the way: a median of disturbed samples must not pass for a measurement."""
    entries = [(race, label, entry) for race in races for label, entry in race["contenders"].items()]
    discarded = sum(entry["disturbed"] for _, _, entry in entries)
    kept = sum(entry["samples"] for _, _, entry in entries)
    lines = [f"Of {kept + discarded} samples {discarded} were disturbed: their threads waited for a core."]
    never = [f"{race['case']} {race['direction']} {label}" for race, label, entry in entries if not entry["samples"]]
    if never:
        lines.append(f"**No undisturbed sample, so do not rely on the figures of:** {', '.join(never)}.")
    return " ".join(lines)


def _significant(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _number(value: float | None, form: str) -> str:
    return ABSENT if value is None else form.format(value)


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python bench/report.py FILE")
    print(report(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))

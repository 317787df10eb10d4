"""The tables of the page, in Markdown."""

from __future__ import annotations

import results
from results import significant

LAST = {  # after the ratios over each contender in fp32
    "of roofline": "share of roofline fp32",
    "bf16 × fp32": "bf16 over fp32",
    "bf16 × eager": "over eager bf16",
    "bf16 of roofline": "share of roofline bf16",
}
ABSENT = "–"
HOW_TO_READ = (
    "Contenders take turns with one another and with what gives the rates; only ratios of one run mean something. × is "
    "how many times faster ours is than that one, in float32 unless it says otherwise. The roofline is the op's "
    "arithmetic at the rate of a multiply-add loop on registers plus its exponentials, or the bytes that it must move "
    "at the rate of a copy, whichever takes longer; what stays in the caches can exceed the latter, and what AMX "
    "multiplies in parts of bfloat16 the former. The bandwidth is that of one large lerp_ or copy. Memory is what a "
    "call adds at its peak to its inputs, what it returns included: on a CPU in a process of its own, on a GPU by "
    "torch's allocator."
)


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, form: str) -> str:
    return ABSENT if value is None else form.format(value)


def ratios_table(races: list[dict]) -> str:
    """The inputs of an op and their ratios, which ops that move memory name themselves."""
    columns, rows = ratios(races)
    return table(columns, rows) if rows else ""


def ratios(races: list[dict]) -> tuple[list[str], list[list[str]]]:
    """The columns and rows of `ratios_table`; no rows where only curves were raced."""
    races = results.of_inputs(races)
    if any(race["roofline"] for race in races):
        return _arithmetic(races)
    names = list(dict.fromkeys(name for race in races for name in race["ratios"]))
    rows = []
    for race in races:
        formats = ("{:.0%}" if "bandwidth" in name else "{:.2f}" for name in names)
        ratios = [number(race["ratios"].get(name), form) for name, form in zip(names, formats, strict=True)]
        ours = race["contenders"]["ours fp32"]
        rows.append([race["case"], significant(1e3 * ours["median"]), *ratios, number(ours.get("extra_mib"), "{:.1f}")])
    titles = [name.replace("over ", "× ").replace("bandwidth ", "of bandwidth, ") for name in names]
    return ["case", "ours ms", *titles, "ours MiB"], rows


def _arithmetic(races: list[dict]) -> tuple[list[str], list[list[str]]]:
    peers = dict.fromkeys(name for race in races for name in race["ratios"] if name.startswith("over "))
    titles = {f"× {name[5:-5]}": name for name in peers if name.endswith(" fp32")} | LAST
    titles = {title: name for title, name in titles.items() if any(name in race["ratios"] for race in races)}
    rows = []
    for race in races:
        formats = ("{:.0%}" if "roofline" in title else "{:.2f}" for title in titles)
        ratios = [number(race["ratios"].get(key), form) for key, form in zip(titles.values(), formats, strict=True)]
        ours, eager = (race["contenders"][f"{name} fp32"] for name in ("ours", "eager"))
        memory = [number(entry.get("extra_mib"), "{:.1f}") for entry in (ours, eager)]
        rows.append([race["case"], race["direction"], significant(1e3 * ours["median"]), *ratios, *memory])
    return ["case", "direction", "ours ms", *titles, "ours MiB", "eager MiB"], rows


def curve_table(points: list[dict]) -> str:
    """Milliseconds and MiB of every contender at each point."""
    curve = points[0]["curve"]
    labels = list(dict.fromkeys(label for race in points for label in race["contenders"]))
    weighed = [label for label in labels if any("extra_mib" in r["contenders"].get(label, ()) for r in points)]
    rows = []
    for race in points:
        entries, least = race["contenders"], race["least_seconds"]
        share = None if least is None else least / entries["ours fp32"]["median"]
        times = [significant(1e3 * entries[label]["median"]) if label in entries else ABSENT for label in labels]
        memory = [number(entries.get(label, {}).get("extra_mib"), "{:.1f}") for label in weighed]
        rows.append([str(race["curve"]["value"]), *times, number(share, "{:.0%}"), *memory])
    columns = [curve["size"], *(f"{_short(label)} ms" for label in labels), "of roofline"]
    title = f"Over {curve['size']}, {points[0]['direction']}, {curve['rest']}:"
    return f"{title}\n\n{table(columns + [f'{_short(label)} MiB' for label in weighed], rows)}"


def _short(label: str) -> str:
    return label.removesuffix(" fp32")


def times_table(races: list[dict]) -> str:
    rows = []
    for race in races:
        place = [race["op"], race["case"], race["direction"]]
        for label, entry in race["contenders"].items():
            low, high = (significant(1e3 * value) for value in entry["quartiles"])
            time = f"{significant(1e3 * entry['median'])} [{low}, {high}]"
            samples = str(entry["samples"] or entry["disturbed"])
            rows.append([*place, label, time, number(entry.get("extra_mib"), "{:.1f}"), samples])
        for dtype, seconds in race["roofline"].items():
            rows.append(
                [*place, f"roofline {dtype}", ABSENT if seconds is None else significant(1e3 * seconds), ABSENT, ABSENT]
            )
    return rows and table(["op", "case", "direction", "contender", "ms", "MiB", "samples"], rows)


def disturbances(races: list[dict]) -> str:
    """How far other processes were in the way: a median of disturbed samples must not pass for a measurement."""
    entries = [(race, label, entry) for race in races for label, entry in race["contenders"].items()]
    discarded = sum(entry["disturbed"] for _, _, entry in entries)
    kept = sum(entry["samples"] for _, _, entry in entries)
    lines = [f"Of {kept + discarded} samples {discarded} were disturbed: their threads waited for a core."]
    never = [f"{r['op']} {r['case']} {r['direction']} {label}" for r, label, entry in entries if not entry["samples"]]
    if never:
        lines.append(f"**No undisturbed sample, so do not rely on the figures of:** {', '.join(never)}.")
    return " ".join(lines)

"""A page and figures of what was measured: ``python bench/report.py FILE [--docs DIR]``.

They lie beside FILE, or with ``--docs`` where the documentation has them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import figures
import overview
import results
from tables import HOW_TO_READ, curve_table, disturbances, ratios, ratios_table, table, times_table

from sslkernels._files import replacing
from sslkernels._table import aligned

# by name of the kernels made for them
INSTRUCTIONS = {"avx512": "AVX-512", "avx512_bf16": "AVX-512 with bfloat16", "amx": "AMX"}


def page(found: dict, drawn: dict[str, str]) -> str:
    """Markdown; ``drawn``: by op (and "overview") the address of its figure."""
    races = results.races(found)
    blocks = [
        "# Benchmarks",
        f"What `{_command(found)}` measured.\n\n{_machine(found)}\n\n{HOW_TO_READ}",
        "## What was not measured\n\n" + "\n".join(f"- {line}" for line in unmeasured(found)),
    ]
    if "overview" in drawn:
        blocks.append(f"## At a glance\n\n![Times of others in units of ours, by op]({drawn['overview']})")
    for op, own in results.by_op(races).items():
        blocks.append(f"## {op}")
        if op in drawn:
            blocks.append(f"![Time and memory of {op} as its inputs grow]({drawn[op]})")
        blocks += [ratios_table(own), *(curve_table(points) for points in results.curves(own).values())]
    blocks += [
        "## All times\n\nMilliseconds: median [quartiles]. Memory in MiB.",
        times_table(results.of_inputs(races)),
        "## Rates of this machine\n\nMeasured in turn with the times above, medians over all races: GFLOP/s of "
        "multiply-adds on registers (fma) and of torch.mm, billions of exponentials a second, GB/s of a copy and of a "
        "lerp_, which is as large as the race's input.",
        _rates(races),
        disturbances(races),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _command(found: dict) -> str:
    settings = found["machine_info"]["sslkernels"]["settings"]
    flags = [f"--{name}" for name in ("quick", "curves", "no-compile", "cuda-graphs") if settings.get(name)]
    device = ["--device cuda"] if settings["device"] == "cuda" else []
    peers = [] if settings["peers"] is None else [f"--peers {settings['peers'] or 'none'}"]
    return " ".join(["sslkernels bench", *device, *peers, *flags])


def _machine(found: dict) -> str:
    facts, commit = found["machine_info"]["sslkernels"], found["commit_info"]
    versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
    lines = [
        f"processor: {facts['processor']}, {facts['threads']} threads; instruction set {facts['isa']}",
        f"CUDA: {facts['cuda']}",
        f"versions: Python {facts['python'].split()[0]}, {versions}",
        f"commit: {commit.get('id', 'unknown')}{' with local changes' if commit.get('dirty') else ''}",
        f"date: {found['datetime'][:10]}",
    ]
    return "\n".join(f"- {line}" for line in lines)


def unmeasured(found: dict) -> list[str]:
    """What a reader could take for measured, each with the reason."""
    facts = found["machine_info"]["sslkernels"]
    on_cpu, settings = facts["settings"]["device"] == "cpu", facts["settings"]
    lines = []
    if settings["quick"]:
        lines.append("Anything to rely on: this was a quick run, of three rounds and without torch.compile.")
    if on_cpu:
        lines.append("Any GPU, on which no large input has been timed yet.")
        lacking = [name for isa, name in INSTRUCTIONS.items() if isa not in facts["supported_isas"]]
        lines += [f"The kernels for {name}, which this processor lacks." for name in lacking]
        lines.append("Processors other than this one, aarch64 among them.")
        if not facts.get("has_bf16"):
            lines.append("Large inputs in bfloat16, which this processor has to emulate.")
    else:
        lines.append("The exponentials' share of the roofline: it is torch.mm's rate, or that of a copy.")
    absent = [package for package, version in facts["versions"].items() if version == "not installed"]
    if absent:
        lines.append(f"Against packages that are not installed: {', '.join(absent)}.")
    if settings.get("no-compile"):
        lines.append("torch.compile.")
    if settings["curves"]:
        lines.append("torch.compile and bfloat16 on the scaling curves.")
    entries = [pair for race in results.races(found) for pair in race["contenders"].items()]
    ungraphed = {label for label, entry in entries if entry.get("graph") is False}
    if ungraphed:
        lines.append(f"As CUDA graphs, since they cannot be recorded: {', '.join(sorted(ungraphed))}.")
    return lines


def _rates(races: list[dict]) -> str:
    names = dict.fromkeys(name for race in races for name in race["rates"])
    rows = []
    for name in names:
        values = sorted(race["rates"][name] / (1e9 if name == "exp" else 1) for race in races if name in race["rates"])
        rows.append([name, *(f"{value:.1f}" for value in (values[len(values) // 2], values[0], values[-1]))])
    return table(["rate", "median", "lowest", "highest"], rows)


def write(found: dict, markdown: Path, folder: Path) -> list[Path]:
    """The figures and then the page that shows them; which figures."""
    folder.mkdir(exist_ok=True)
    races, address = results.races(found), folder.relative_to(markdown.parent).as_posix()
    drawn = {}
    if overview.draw(races, folder / "overview.svg"):
        drawn["overview"] = f"{address}/overview.svg"
    for op, own in results.by_op(races).items():
        if figures.draw(op, own, folder / f"{op}.svg"):
            drawn[op] = f"{address}/{op}.svg"
    with replacing(markdown) as file:
        file.write(page(found, drawn).encode())
    return [folder / Path(name).name for name in drawn.values()]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--docs", type=Path, metavar="DIR")
    args = parser.parse_args(arguments)
    try:
        found = results.load(args.file)
    except results.ResultsError as error:
        print(f"sslkernels bench: {error}", file=sys.stderr)
        return 2
    if args.docs:
        markdown, folder = args.docs / "benchmarks.md", args.docs / "figures"
    else:
        markdown, folder = args.file.with_suffix(".md"), args.file.with_name(f"{args.file.stem}-figures")
    drawn = write(found, markdown, folder)
    for op, own in results.by_op(results.races(found)).items():
        columns, rows = ratios(own)
        if rows:
            print(f"\n{op}\n{aligned(columns, rows)}")
    print(f"\n{disturbances(results.races(found))}")
    print(f"\nresults  {args.file}\npage     {markdown}")
    print("\n".join(f"figure   {path}" for path in drawn))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

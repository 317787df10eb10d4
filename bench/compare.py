"""What changed between two results, and how much of it can be noise: ``python bench/compare.py OLD NEW``."""

from __future__ import annotations

import sys
from statistics import median

import results
from results import ResultsError, significant

from sslkernels._table import print_table

COLUMNS = ("op", "case", "direction", "contender", "old ms", "new ms", "new / old", "interval", "verdict", "MiB")
VERDICTS = ("faster", "slower", "within noise")


def entries(found: dict) -> dict[tuple[str, str, str, str], dict]:
    """Every contender of every race by op, input, direction and name."""
    return {
        (race["op"], race["case"], "curve" if race["curve"] else race["direction"], label): entry
        for race in results.races(found)
        for label, entry in race["contenders"].items()
    }


def interval(old: dict, new: dict) -> tuple[float, float]:
    """The least and the most that new / old can be when both are anywhere between their quartiles."""
    return new["quartiles"][0] / old["quartiles"][1], new["quartiles"][1] / old["quartiles"][0]


def verdict(old: dict, new: dict) -> str:
    low, high = interval(old, new)
    if not old["samples"] or not new["samples"]:
        return "disturbed"
    return "faster" if high < 1 else "slower" if low > 1 else "within noise"


def differences(old: dict, new: dict) -> list[str]:
    """What was not the same, besides the code: machine, versions and settings."""
    pair = [found["machine_info"]["sslkernels"] for found in (old, new)]
    flat = [
        {name: facts.get(name) for name in ("processor", "threads", "cuda", "isa", "extension", "python")}
        | facts["versions"]
        | facts["settings"]
        for facts in pair
    ]
    names = dict.fromkeys((*flat[0], *flat[1]))
    return [f"{n}: {flat[0].get(n)} -> {flat[1].get(n)}" for n in names if flat[0].get(n) != flat[1].get(n)]


def drift(before: dict, after: dict) -> str:
    """By how much contenders moved that are not ours, whose code is the same: noise, then."""
    moved = [
        after[key]["median"] / before[key]["median"]
        for key in before
        if key in after and key[3].split()[0] not in ("ours", "EMATeacher")
    ]
    if not moved:
        return "no contender but ours is in both, so the drift of the machine is unknown"
    return (
        f"contenders other than ours took {median(moved):.2f} times as long ({min(moved):.2f} to {max(moved):.2f}); "
        "a change of ours within that may be the machine's"
    )


def rows(before: dict, after: dict) -> list[list[str]]:
    lines = []
    for key in (key for key in before if key in after):
        old, new = before[key], after[key]
        low, high = interval(old, new)
        memory = [f"{entry['extra_mib']:.1f}" for entry in (old, new) if entry.get("extra_mib") is not None]
        lines.append(
            [
                *key,
                significant(1e3 * old["median"]),
                significant(1e3 * new["median"]),
                f"{new['median'] / old['median']:.2f}",
                f"{low:.2f} to {high:.2f}",
                verdict(old, new),
                " -> ".join(memory) if len(memory) == 2 else "",
            ]
        )
    return lines


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("usage: python bench/compare.py OLD.json NEW.json", file=sys.stderr)
        return 2
    try:
        old, new = (results.load(path) for path in arguments)
        before, after = entries(old), entries(new)
        lines = rows(before, after)
        if not lines:
            raise ResultsError(f"{arguments[0]} and {arguments[1]} have no race in common")
    except ResultsError as error:
        print(f"sslkernels bench: {error}", file=sys.stderr)
        return 2
    for line in differences(old, new):
        print(f"differs: {line}")
    for name, one, two in (("old", before, after), ("new", after, before)):
        only = len(set(one) - set(two))
        if only:
            print(f"only in {name}: {only} of {len(one)} times")
    print_table("Time, and what it can be between the quartiles of both", COLUMNS, lines)
    counts = {name: sum(line[8] == name for line in lines) for name in (*VERDICTS, "disturbed")}
    ours = [line for line in lines if line[3].startswith("ours")]
    print(f"noise: {drift(before, after)}")
    print(f"all: {', '.join(f'{count} {name}' for name, count in counts.items() if count)}")
    print(f"ours: {', '.join(f'{sum(line[8] == name for line in ours)} {name}' for name in VERDICTS)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

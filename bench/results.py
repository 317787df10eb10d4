"""Reading what ``pytest bench --benchmark-json FILE`` left."""

from __future__ import annotations

import json
from pathlib import Path

READ = {"op", "case", "direction", "whole", "contenders", "rates", "roofline", "least_seconds", "ratios", "curve"}


class ResultsError(Exception):
    """What is wrong with a file, in one line."""


def load(path: str | Path) -> dict:
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror}") from None
    except ValueError:  # of UTF-8 or of JSON
        raise ResultsError(f"{path} is not JSON") from None
    try:
        facts = results["machine_info"]["sslkernels"]
        complete = facts["versions"] and facts["settings"] and all(race.keys() >= READ for race in races(results))
    except (AttributeError, KeyError, TypeError):
        complete = False
    if not complete:
        raise ResultsError(f"{path} holds no results of sslkernels bench")
    if not results["benchmarks"]:
        raise ResultsError(f"{path} holds no race that was finished")
    return results


def races(results: dict) -> list[dict]:
    return [benchmark["extra_info"] for benchmark in results["benchmarks"]]


def of_inputs(found: list[dict]) -> list[dict]:
    """The races that are no points of curves."""
    return [race for race in found if not race["curve"]]


def curves(found: list[dict]) -> dict[str, list[dict]]:
    """By the size that grows, the points of each curve, small ones first."""
    by_size: dict[str, list[dict]] = {}
    for race in found:
        if race["curve"]:
            by_size.setdefault(race["curve"]["size"], []).append(race)
    return {size: sorted(points, key=lambda race: race["curve"]["value"]) for size, points in by_size.items()}


def by_op(found: list[dict]) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for race in found:
        groups.setdefault(race["op"], []).append(race)
    return groups


def significant(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"

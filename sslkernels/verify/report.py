"""The report of `sslkernels verify` as text: what it ran on, a table, what failed, what ran and what could not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from sslkernels._table import print_table
from sslkernels.verify.checks import Check, NotRun, dtype_name

HEAD = ("sslkernels", "torch", "triton", "processor", "isa", "threads", "cuda")  # of what `sslkernels info` tells
COLUMNS = ("op", "on", "checks", "error", "eager", "of limit", "where", "verdict")
DETAILS = ("op", "on", "dtype", "check", "cases", "error", "eager", "of limit", "where", "verdict")
Key = TypeVar("Key")
SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}


@dataclass
class Outcome:
    """What a run has found so far."""

    checks: list[Check] = field(default_factory=list)
    not_run: list[NotRun] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]

    @property
    def passed(self) -> bool:
        """Nothing failed, and something ran."""
        return bool(self.checks) and not self.failed and not self.interrupted


def print_head(facts: dict) -> None:
    for name in HEAD:
        print(f"{name:12}{facts[name]}")


def print_report(outcome: Outcome, details: bool = False) -> None:
    if outcome.checks:
        title = "The check of each row that is nearest to its limit; errors against fp64, relative to each row's scale"
        columns, row = (DETAILS, _detailed_row) if details else (COLUMNS, _row)
        print_table(title, columns, [row(group) for group in _grouped(outcome.checks, details)])
    for check, others in _failures(outcome.failed):
        print(f"FAIL  {check}{f' (and {others} more cases)' if others else ''}")
    for line in [*ran(outcome.checks), *map(describe_not_run, outcome.not_run)]:
        print(line)
    found = f"{len(outcome.failed) or 'none'} failed" if outcome.checks else "nothing could be checked"
    end = "; interrupted, the rest did not run" if outcome.interrupted else ""
    print(f"{len(outcome.checks)} checks in {outcome.seconds:.0f} s: {found}{end}")


def ran(checks: Iterable[Check]) -> list[str]:
    """A line for each backend on each device: what of it was checked."""
    lines = []
    for place, members in group_by(checks, lambda check: check.target.place).items():
        ops = dict.fromkeys(check.target.op for check in members)
        dtypes = dict.fromkeys(dtype_name(check.target.dtype) for check in members)
        count = f"{len(ops)} op{'s' if len(ops) > 1 else ''}"
        lines.append(f"ran: {place}: {len(members)} checks of {count} in {', '.join(dtypes)}")
    return lines or ["ran: nothing"]


def describe_not_run(line: NotRun) -> str:
    return f"not run: {line.what}: {line.reason}" + (f" ({', '.join(line.ops)})" if line.ops else "")


def group_by(checks: Iterable[Check], key: Callable[[Check], Key]) -> dict[Key, list[Check]]:
    groups: dict[Key, list[Check]] = {}
    for check in checks:
        groups.setdefault(key(check), []).append(check)
    return groups


def _grouped(checks: list[Check], details: bool) -> Iterable[list[Check]]:
    if details:
        return group_by(checks, lambda check: (check.target, check.name)).values()
    return group_by(checks, lambda check: (check.target.op, check.target.place)).values()


def _failures(failed: list[Check]) -> Iterable[tuple[Check, int]]:
    """The worst failure of each check of each target, and how many more there are."""
    for members in group_by(failed, lambda check: (check.target, check.name)).values():
        yield max(members, key=share_of_limit), len(members) - 1


def _row(checks: list[Check]) -> list[str]:
    worst = _worst(checks)
    where = f"{SHORT[dtype_name(worst.target.dtype)]} {worst.name} of {worst.case}"
    return [worst.target.op, worst.target.place, str(len(checks)), *_numbers(worst), where, _verdict(checks)]


def _detailed_row(checks: list[Check]) -> list[str]:
    worst = _worst(checks)
    head = [worst.target.op, worst.target.place, dtype_name(worst.target.dtype), worst.name, str(len(checks))]
    return [*head, *_numbers(worst), worst.case if worst.comparison or not worst.passed else "", _verdict(checks)]


def _worst(checks: list[Check]) -> Check:
    return min(checks, key=lambda check: (check.passed, -share_of_limit(check)))


def _numbers(check: Check) -> list[str]:
    numbers = check.comparison
    if numbers is None:
        return ["", "", ""]
    return [f"{numbers.error:.1e}", f"{numbers.eager_error:.1e}", f"{share_of_limit(check):.0%}"]


def share_of_limit(check: Check) -> float:
    numbers = check.comparison
    return numbers.error / (numbers.eager_error + numbers.tolerance) if numbers else 0.0


def _verdict(checks: list[Check]) -> str:
    failed = sum(not check.passed for check in checks)
    return f"FAIL {failed}" if failed else "ok"

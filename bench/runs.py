"""What is raced: every timed input of an op in each direction, and the points of its scaling curves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sslkernels import registry
from sslkernels.registry import Case, OpSpec

BOTH = "forward+backward"


@dataclass(frozen=True)
class Run:
    """One race. ``curve`` and ``value`` say which point of which scaling curve it is, if it is one."""

    op: str
    case: Case
    direction: str  # "forward", "forward+backward" or "update"
    whole: bool = True  # not the forward of what has a backward
    curve: registry.Curve | None = None
    value: int = 0

    def __str__(self) -> str:
        return f"{self.op}-{self.case.name}-{f'curve-{self.curve.size}' if self.curve else self.direction}"

    @property
    def size(self) -> float:
        """Large where an input costs much."""
        return self.case.cost.flops + self.case.cost.bytes


def runs(specs: dict[str, OpSpec], directions: tuple[str, ...] = ()) -> list[Run]:
    """All runs of these ops, small points of a curve before large ones."""
    found = []
    for spec in specs.values():
        ways = directions or (("forward", BOTH) if spec.grad_args else ("forward",))
        found += [Run(spec.name, case, way, way == ways[-1]) for case in spec.tagged("bench") for way in ways]
        for curve in registry.curves(spec.name):
            found += [Run(spec.name, case, ways[-1], True, curve, value) for value, case in curve.points]
    return found


def chosen(found: Iterable[Run], ops: list[str], quick: bool, curves: bool) -> set[Run]:
    """Those that a command line asks for: of the quick ones the smallest input of each op, and two of a curve."""
    found = [run for run in found if (not ops or run.op in ops) and (curves or run.curve is None)]
    if not quick:
        return set(found)
    smallest = {run.op: min(r.size for r in found if r.op == run.op and not r.curve) for run in found if not run.curve}
    return {
        run
        for run in found
        if (run.value in [value for value, _ in run.curve.points[:2]] if run.curve else run.size == smallest[run.op])
    }

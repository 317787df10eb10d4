"""What the command line asks of every race, and what is known from the races before."""

from __future__ import annotations

from dataclasses import dataclass, field

from runs import Run

OURS = ("ours", "eager", "compile", "EMATeacher")  # who races whichever peers are asked for
TOO_SLOW = 3.0  # seconds: who takes longer at one point of a curve is not tried at the next
MEMORY_SECONDS = 10.0  # nor is the memory of who takes longer measured


@dataclass
class Settings:
    """What the command line asks for, and what is known from earlier races."""

    device: str
    quick: bool
    compiled: bool  # torch.compile takes part
    peers: list[str] | None  # None: all
    graphs: bool
    seconds: float
    checked: set[tuple] = field(default_factory=set)  # what is known to be right: once for both directions
    slow: set[tuple] = field(default_factory=set)  # contenders whose curves have ended

    def admits(self, run: Run, label: str) -> bool:
        """Whether a contender takes part."""
        name, line = label.split()[0], (run.op, run.curve and run.curve.size, label)
        return (name in OURS or self.peers is None or name in self.peers) and line not in self.slow

    def pace(self, run: Run) -> dict:
        """Rounds and seconds of a race: arguments of `timing.Race`."""
        if self.quick:
            return {"rounds": 3, "budget": 0.2}
        if run.curve:
            return {"rounds": 5, "budget": self.seconds / 4, "least": 2, "slow": 2.0}
        return {"rounds": 15, "budget": self.seconds}

    def note_slow(self, run: Run, times: dict[str, dict]) -> None:
        if run.curve:
            names = (label for label, entry in times.items() if entry["median"] > TOO_SLOW and "ours" not in label)
            self.slow |= {(run.op, run.curve.size, label) for label in names}

    def weighs(self, label: str, entry: dict) -> bool:
        """Whether the memory of this contender is worth its time."""
        return label in ("ours fp32", "eager fp32") or not (self.quick or entry["median"] > MEMORY_SECONDS)

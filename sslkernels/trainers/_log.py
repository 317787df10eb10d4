"""What a run writes: log.csv, exact and never doubled; TensorBoard; progress on the terminal or as plain lines."""

from __future__ import annotations

import contextlib
import csv
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from sslkernels.trainers import TrainError

PLAIN_LINES = 20  # of progress in a whole run, where there is no terminal


def open_log(leads: bool, *args, **options) -> RunLog | SilentLog:
    """The log of a run: only its leading process writes one."""
    return RunLog(*args, **options) if leads else SilentLog()


class SilentLog(contextlib.nullcontext):
    """The log of a process that leaves writing to another."""

    def __enter__(self):
        return self

    def write(self, images: int, **values: float) -> None:
        _check_finite(values)


class RunLog(contextlib.AbstractContextManager):
    """One row a step in ``folder/log.csv``, the same scalars and the speed in ``folder/tensorboard``, and progress.

    A run that resumes cuts log.csv back to the ``position`` that its checkpoint remembers: what was written after
    the checkpoint, a torn line too, is written again. TensorBoard only hides such steps, and their speeds differ.
    """

    def __init__(self, folder: Path, columns: Sequence[str], steps: int, start: int = 0, position: int = 0):
        self.path, self.columns, self.steps, self.step = folder / "log.csv", columns, steps, start
        if position:
            _cut(self.path, position)
        self.file = open(self.path, "a" if position else "w", newline="", encoding="utf-8")  # noqa: SIM115
        self.rows = csv.writer(self.file, lineterminator="\n")
        if not position:
            self.rows.writerow(["step", *columns])
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start)
        self.progress = _progress(steps, start)
        self.images, self.clock = 0, time.perf_counter()

    def __exit__(self, *_):
        self.progress.stop()
        self.board.close()
        self.file.close()

    def write(self, images: int, **values: float) -> None:
        """The values of the next step, which saw so many images."""
        _check_finite(values)
        self.rows.writerow([self.step, *(repr(values[column]) for column in self.columns)])
        self.file.flush()  # a killed process loses nothing that the system holds
        for column in self.columns:
            self.board.add_scalar(column, values[column], self.step)
        self.images += images
        self.step += 1
        speed = self.images / (time.perf_counter() - self.clock)
        self.board.add_scalar("images_per_second", speed, self.step - 1)
        self.progress.advance(self.step, " ".join(f"{c} {values[c]:.4g}" for c in self.columns), speed)

    def position(self) -> int:
        """The bytes of log.csv so far, safe on disk: what a checkpoint remembers."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return os.fstat(self.file.fileno()).st_size


def _check_finite(values: dict[str, float]) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise TrainError(f"{name} is {value}: training diverged; try a smaller --lr or a longer --warmup")


def _cut(path: Path, position: int) -> None:
    if not path.exists() or path.stat().st_size < position:
        raise TrainError(f"--resume: {path} is missing or shorter than when the checkpoint was written")
    os.truncate(path, position)


def read_column(path: Path, column: str) -> list[float]:
    with open(path, newline="", encoding="utf-8") as file:
        return [float(row[column]) for row in csv.DictReader(file)]


class _Lines:
    """Progress where there is no terminal: a line now and then."""

    def __init__(self, steps: int):
        self.steps = steps

    def advance(self, step: int, values: str, speed: float) -> None:
        if step == 1 or step == self.steps or step % max(1, self.steps // PLAIN_LINES) == 0:
            print(f"step {step}/{self.steps}  {values}  {speed:.0f} images/s", flush=True)

    def stop(self) -> None:
        """Nothing is held open."""


class _Bar:
    def __init__(self, steps: int, start: int):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[values]}  {task.fields[speed]:.0f} images/s"),
            TimeRemainingColumn(),
        )
        self.task = self.bar.add_task("", total=steps, completed=start, values="", speed=0.0)
        self.bar.start()

    def advance(self, step: int, values: str, speed: float) -> None:
        self.bar.update(self.task, completed=step, values=values, speed=speed)

    def stop(self) -> None:
        self.bar.stop()


def _progress(steps: int, start: int) -> _Bar | _Lines:
    return _Bar(steps, start) if sys.stdout.isatty() else _Lines(steps)

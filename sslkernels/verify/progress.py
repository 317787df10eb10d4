"""A live line on stderr while the checks run, where that is a terminal: results alone go to stdout."""

from __future__ import annotations

import contextlib
import sys


def open_progress(total: int) -> contextlib.AbstractContextManager:
    """Has ``advance(text, failed)``, to be called after each of ``total`` steps."""
    if not sys.stderr.isatty():
        return _Silent()
    try:
        return _Bar(total)
    except ImportError:
        return _Line(total)


class _Silent(contextlib.nullcontext):
    def __enter__(self):
        return self

    def advance(self, text: str, failed: int) -> None:
        """A file or a pipe keeps what it is given: the report says it all."""


class _Line(contextlib.AbstractContextManager):
    """Without rich: one line, written over."""

    def __init__(self, total: int):
        self.total, self.done = total, 0

    def __exit__(self, *_):
        print("\r\033[K", end="", file=sys.stderr, flush=True)

    def advance(self, text: str, failed: int) -> None:
        self.done += 1
        print(f"\r\033[K{self.done}/{self.total}  {_describe(text, failed)}", end="", file=sys.stderr, flush=True)


class _Bar(contextlib.AbstractContextManager):
    def __init__(self, total: int):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = MofNCompleteColumn(), BarColumn(bar_width=24), TimeElapsedColumn(), TextColumn("{task.description}")
        self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self.task = self.bar.add_task("", total=total)

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, *_):
        self.bar.stop()

    def advance(self, text: str, failed: int) -> None:
        self.bar.update(self.task, advance=1, description=_describe(text, failed))


def _describe(text: str, failed: int) -> str:
    return f"{text}, {failed} failed" if failed else text

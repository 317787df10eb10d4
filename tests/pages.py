"""The pages that a person reads, README, CONTRIBUTING and docs, and what runs the code on them."""

from __future__ import annotations

import multiprocessing
import re
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")))
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# a process that has imported this much and computed nothing: each block runs in a copy of it
PRELOADED = ["torch", "sslkernels.nn", "sslkernels.numerics"]


@dataclass(frozen=True)
class Block:
    """A fenced block; ``line`` is that of its first line in the page."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def side(self, sign: str) -> str:
        """A diff's program before (-) or after (+) the change, every line where it is in the page."""
        lines = self.text.splitlines()
        return "\n".join(line[1:] if line[:1] in ("", " ", sign) else "" for line in lines) + "\n"


@dataclass(frozen=True)
class Failure:
    error: str  # type and message
    report: str


def blocks(language: str) -> list[Block]:
    return [
        Block(page, text.count("\n", 0, match.start(2)) + 1, match[1], match[2])
        for page, text in TEXTS.items()
        for match in FENCE.finditer(text)
        if match[1] == language
    ]


def outside_blocks(text: str) -> list[str]:
    return FENCE.sub("", text).splitlines()


def run(block: Block, code: str, **names: object) -> Failure | None:
    """Run ``code`` of a block in a process of its own, with ``names`` defined; what it raised."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_run, args=(block, code, names, sender))
    child.start()
    sender.close()
    try:
        failure = receiver.recv()
    except EOFError:
        failure = Failure("", "the process died")
    child.join()
    return failure


def _run(block: Block, code: str, names: dict, sender) -> None:
    try:
        # at its place in the page, so that a traceback shows the page's lines
        program = compile("\n" * (block.line - 1) + code, str(ROOT / block.page), "exec")
        exec(program, {"__name__": "__main__", **names})
    except Exception as error:
        sender.send(Failure(f"{type(error).__name__}: {error}", traceback.format_exc()))
    else:
        sender.send(None)

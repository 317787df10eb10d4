"""Training in child processes: killed at a chosen moment, or one of several that train together."""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sslkernels.trainers import _log

# children are forked from a server that has imported what takes seconds and has no threads yet
CONTEXT = multiprocessing.get_context("forkserver")
METHODS = ("simclr", "moco", "clip", "mae")
CONTEXT.set_forkserver_preload(
    [
        *(f"sslkernels.trainers.{method}" for method in METHODS),
        "sklearn.datasets",
        "sklearn.neighbors",
        "sklearn.linear_model",
        "pytest",
    ]
)
PATIENCE = 120  # seconds before a child counts as hung
TINY = ["--steps=8", "--batch-size=16", "--checkpoint-every=3", "--warmup=2", "--threads=1", "--workers=0"]


@pytest.fixture(autouse=True, scope="module")
def own_threads():
    """Runs choose a number of threads: give the process back its own."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def trainer(method: str):
    return importlib.import_module(f"sslkernels.trainers.{method}")


def parse(argv: list[str], method: str = "simclr") -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    trainer(method).add_arguments(parser)
    return parser.parse_args(argv)


def train(method: str, argv: list[str], folder: Path) -> dict:
    """Train into the folder; what the trainer returns."""
    return trainer(method).train(parse([*argv, f"--out={folder}"], method))


def logged(folder: Path, name: str = "loss") -> list[float]:
    return _log.read_column(folder / "log.csv", name)


def start(target: Callable, *args) -> multiprocessing.Process:
    process = CONTEXT.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def finish(process: multiprocessing.Process) -> int:
    process.join(PATIENCE)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"a child was still running after {PATIENCE} s")
    return process.exitcode


def train_until(argv: list[str], moment: str | None, output: Path, method: str = "simclr") -> None:
    """Train, and die by SIGKILL at the moment of that name."""
    _redirect(output)
    if moment is not None:
        MOMENTS[moment]()
    os._exit(trainer(method).main(parse(argv, method)))


def train_as_rank(argv: list[str], rank: int, size: int, port: int, output: Path, method: str = "simclr") -> None:
    _redirect(output)
    join_store(rank, size, port)
    raise SystemExit(trainer(method).main(parse(argv, method)))


def train_as_two(argv: list[str], folder: Path, method: str = "simclr") -> None:
    """One run of two processes into ``folder``."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    outputs = [folder.with_name(f"{folder.name}-{rank}.txt") for rank in range(2)]
    argv = [*argv, f"--out={folder}"]
    ranks = [start(train_as_rank, argv, rank, 2, store.port, outputs[rank], method) for rank in range(2)]
    assert [finish(process) for process in ranks] == [0, 0], [output.read_text() for output in outputs]


def join_store(rank: int, size: int, port: int) -> None:
    """What torchrun tells its processes; the store is the parent's."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )


def _redirect(output: Path) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def _die(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _at_call(count: int, owner: object, name: str, action: Callable) -> None:
    """Replace the call of that number of ``owner.name`` by ``action(original, *its arguments)``."""
    original, calls = getattr(owner, name), iter(range(1, count + 1))

    def counted(*args, **kwargs):
        return action(original, *args, **kwargs) if next(calls, None) == count else original(*args, **kwargs)

    setattr(owner, name, counted)


def _half_a_line(_, log: _log.RunLog, images: int, **values: float) -> None:
    log.file.write(f"{log.step},0.12")
    log.file.flush()
    _die()


def _half_a_file(original, state, file) -> None:
    original(state, file)
    file.truncate(file.tell() // 2)
    _die()


def _call_and_die(original, *args, **kwargs) -> None:
    original(*args, **kwargs)
    _die()


MOMENTS = {
    "before the first checkpoint": lambda: _at_call(2, _log.RunLog, "write", _call_and_die),
    "in a log line": lambda: _at_call(2, _log.RunLog, "write", _half_a_line),
    "in the first checkpoint": lambda: _at_call(1, torch, "save", _half_a_file),
    "before a checkpoint has its name": lambda: _at_call(2, os, "replace", _die),
    "when a checkpoint has its name": lambda: _at_call(1, os, "replace", _call_and_die),
    "in a later log line": lambda: _at_call(2, _log.RunLog, "write", _half_a_line),
    "after the log ran ahead": lambda: _at_call(2, _log.RunLog, "write", _call_and_die),
    "in a later checkpoint": lambda: _at_call(1, torch, "save", _half_a_file),
    "before the probe": lambda: _at_call(1, trainer("simclr"), "probes", _die),
}

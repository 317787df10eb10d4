"""What every trainer takes from the command line, and what becomes of a mistake in it."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from sslkernels.trainers import TrainError
from sslkernels.trainers._data import SOURCES
from sslkernels.trainers._distributed import leave_world
from sslkernels.trainers._optim import LEARNING_RATES

# these leave the curve as it is; a run may resume with others. Threads come from the checkpoint.
FREE = {"out", "resume", "overwrite", "stop_after", "checkpoint_every", "workers", "threads", "demo"}


def add_run_arguments(parser: argparse.ArgumentParser, method: str, data_example: str = "folder:PHOTOS") -> None:
    """What is trained on, where, and what is written; with examples of whole commands, one on ``data_example``."""
    command = f"sslkernels train {method}"
    parser.usage = f"{command} [OPTION]..."
    parser.epilog = (
        f"examples:\n  {command}\n  {command} --data {data_example} --steps 5000 --out runs/mine\n"
        f"  {command} --data {data_example} --steps 5000 --out runs/mine --resume\n"
        f"  torchrun --nproc-per-node 2 -m {command}"
    )
    data = parser.add_argument_group("data")
    data.add_argument("--data", default="digits", metavar="SOURCE", help=f"{SOURCES} (default: %(default)s)")
    data.add_argument(
        "--image-size", type=whole(8, 8192), metavar="PIXELS", help="of a side (default: 8, 28 or 64, by the source)"
    )
    data.add_argument(
        "--workers", type=whole(0, 1024), default=1, metavar="N", help="processes that load images (default: 1)"
    )
    run = parser.add_argument_group("run")
    run.add_argument(
        "--steps", type=whole(1), default=300, metavar="N", help="steps of the optimiser (default: %(default)s)"
    )
    run.add_argument(
        "--stop-after", type=whole(1), metavar="STEP", help="end early; the schedule stays that of --steps"
    )
    run.add_argument(
        "--seed", type=whole(0, 2**63 - 1), default=0, metavar="N", help="of all that is random (default: %(default)s)"
    )
    run.add_argument(
        "--out",
        type=Path,
        default=Path("runs") / method,
        metavar="FOLDER",
        help="for log and checkpoint (default: %(default)s)",
    )
    run.add_argument(
        "--checkpoint-every", type=whole(1), default=50, metavar="STEPS", help="and at the end (default: %(default)s)"
    )
    again = run.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    again.add_argument("--overwrite", action="store_true", help="begin anew in a folder that holds a run")
    machine = parser.add_argument_group("machine")
    present = "cuda" if torch.cuda.is_available() else "cpu"
    machine.add_argument(
        "--device", type=device, default=present, metavar="cpu|cuda", help="default: cuda where there is a GPU"
    )
    machine.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        metavar="fp32|bf16",
        help="bf16: by autocast (default: fp32)",
    )
    machine.add_argument(
        "--ops", choices=("fused", "reference"), default="fused", metavar="fused|reference",
        help="reference: their definitions in plain PyTorch (default: fused)",
    )  # fmt: skip
    machine.add_argument(
        "--threads",
        type=whole(1, 4096),
        metavar="N",
        help="default: what --workers leaves; a resumed run keeps its own",
    )


def add_optimizer_arguments(parser: argparse.ArgumentParser, accumulate: bool = True) -> None:
    parser.set_defaults(accumulate=1)
    group = parser.add_argument_group("optimiser")
    group.add_argument(
        "--batch-size",
        type=whole(2),
        default=128,
        metavar="IMAGES",
        help="per step, over all processes (default: %(default)s)",
    )
    if accumulate:
        group.add_argument(
            "--accumulate",
            type=whole(1),
            metavar="K",
            help="embed a batch in K parts: less memory, same loss (default: 1)",
        )
    group.add_argument(
        "--optimizer",
        choices=sorted(LEARNING_RATES),
        default="adamw",
        metavar="NAME",
        help="adamw or lars (default: adamw)",
    )
    rates = ", ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATES.items())
    group.add_argument("--lr", type=positive, metavar="RATE", help=f"at its peak (default: {rates})")
    group.add_argument(
        "--warmup",
        type=whole(0),
        default=20,
        metavar="STEPS",
        help="of a linear rise, before half a cosine (default: %(default)s)",
    )
    group.add_argument(
        "--weight-decay",
        type=nonnegative,
        default=1e-4,
        metavar="RATE",
        help="not of biases and norms (default: %(default)s)",
    )


def add_encoder_arguments(
    parser: argparse.ArgumentParser, method: str, norm: str, temperature: str = "of the softmax"
) -> argparse._ArgumentGroup:
    """The method's own group, to which it may add more. ``norm`` and ``temperature`` say what they mean for it."""
    group = parser.add_argument_group(method)
    group.add_argument(
        "--backbone", default="test_resnet", metavar="NAME", help="a model of timm (default: %(default)s)"
    )
    group.add_argument(
        "--norm", choices=("batch", "group"), default="batch", metavar="batch|group", help=f"{norm} (default: batch)"
    )
    group.add_argument(
        "--dim", type=whole(1, 2**20), default=128, metavar="DIM", help="of the embeddings (default: %(default)s)"
    )
    group.add_argument(
        "--temperature", type=positive, default=0.2, metavar="TAU", help=f"{temperature} (default: %(default)s)"
    )
    return group


def whole(least: int, most: int = 2**48) -> Callable[[str], int]:
    """An argparse type: a whole number in these bounds."""

    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        if value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, got {value}")
        return value

    parse.__name__ = "whole number"  # argparse names it in "invalid whole number value: 'x'"
    return parse


def _number(fits: Callable[[float], bool], bounds: str) -> Callable[[str], float]:
    """An argparse type: a number that fits; ``bounds`` says when it does."""

    def parse(text: str) -> float:
        value = float(text)
        if not fits(value):
            raise argparse.ArgumentTypeError(f"must {bounds}, got {text}")
        return value

    parse.__name__ = "number"
    return parse


positive = _number(lambda value: 0 < value < math.inf, "be a finite number above 0")
nonnegative = _number(lambda value: 0 <= value < math.inf, "be a finite number, 0 or above")
share = _number(lambda value: 0 <= value <= 1, "lie in [0, 1]")


def device(text: str) -> str:
    """An argparse type: a kind of device that this machine has."""
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {text!r}")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch sees no CUDA device; 'sslkernels info' says why")
    return text


def check_batch(args: argparse.Namespace, images: int, processes: int) -> None:
    if args.stop_after is not None and args.stop_after > args.steps:
        raise TrainError(f"--stop-after {args.stop_after} lies beyond the last of --steps {args.steps}")
    if args.batch_size > images:
        raise TrainError(f"--batch-size {args.batch_size} is more than the {images} training images")
    if args.batch_size % (processes * args.accumulate):
        raise TrainError(
            f"--batch-size {args.batch_size} does not divide into {processes} processes "
            f"x --accumulate {args.accumulate}"
        )


def curve_options(args: argparse.Namespace, processes: int) -> dict:
    """The options that shape the curve, as a checkpoint remembers them."""
    options = {name: value for name, value in vars(args).items() if name not in FREE}
    return {**options, "nproc_per_node": processes}


def run_guarded(method: str, run: Callable[[], int | None]) -> int:
    """``run()``, with mistakes told in one line."""
    try:
        return run() or 0
    except TrainError as error:
        # a worker process sends its error wrapped in its traceback, whose last line is the message
        message = str(error).splitlines()[-1].removeprefix(f"{TrainError.__module__}.{TrainError.__name__}: ")
        status = 2
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        status = 2
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        wanted = re.search(r"allocate ([\d.]+ [KMGT]?i?B|\d+ bytes)", str(error))
        message = f"out of memory{f' ({wanted[1]} asked for)' if wanted else ''}: make something smaller"
        status = 2
    except KeyboardInterrupt:
        message, status = "interrupted; --resume goes on from the last checkpoint", 130
    finally:
        leave_world()
    if os.environ.get("RANK", "0") == "0":
        print(f"sslkernels train {method}: {message}", file=sys.stderr)
    return status


def _out_of_memory(error: Exception) -> bool:
    """PyTorch has an exception of its own for GPUs alone."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)

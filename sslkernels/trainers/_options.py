"""What every trainer takes from the command line, and what becomes of a mistake in it."""

from __future__ import annotations

import argparse
import os
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


def add_run_arguments(parser: argparse.ArgumentParser, method: str) -> None:
    run = parser.add_argument_group("run")
    run.add_argument("--data", default="digits", metavar="SOURCE", help=f"{SOURCES} (default: %(default)s)")
    run.add_argument("--image-size", type=whole(8), metavar="PIXELS", help="default: what suits the data")
    run.add_argument("--steps", type=whole(1), default=300, help="default: %(default)s")
    run.add_argument("--stop-after", type=whole(1), metavar="STEP", help="end here; the schedule stays that of --steps")
    run.add_argument("--seed", type=whole(0), default=0, help="of everything that is random (default: %(default)s)")
    run.add_argument("--out", type=Path, default=Path("runs") / method, metavar="FOLDER", help="default: %(default)s")
    run.add_argument("--checkpoint-every", type=whole(1), default=50, metavar="STEPS", help="default: %(default)s")
    run.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out, if there is one")
    run.add_argument("--overwrite", action="store_true", help="begin anew in a folder that holds a run")
    run.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast")
    run.add_argument("--ops", choices=("fused", "reference"), default="fused", help="reference: plain PyTorch")
    run.add_argument("--threads", type=whole(1), help="default: what --workers leaves; a resumed run keeps its own")
    run.add_argument("--workers", type=whole(0), default=1, help="processes that load images (default: %(default)s)")


def add_optimizer_arguments(parser: argparse.ArgumentParser, accumulate: bool = True) -> None:
    parser.set_defaults(accumulate=1)
    group = parser.add_argument_group("optimiser")
    group.add_argument("--batch-size", type=whole(2), default=128, help="images a step, in all (default: %(default)s)")
    if accumulate:
        group.add_argument("--accumulate", type=whole(1), metavar="K", help="embed a step in K parts; same loss")
    group.add_argument("--optimizer", choices=sorted(LEARNING_RATES), default="adamw")
    rates = ", ".join(f"{rate} for {name}" for name, rate in LEARNING_RATES.items())
    group.add_argument("--lr", type=positive, metavar="RATE", help=f"at its peak (default: {rates})")
    group.add_argument("--warmup", type=whole(0), default=20, metavar="STEPS", help="default: %(default)s")
    group.add_argument("--weight-decay", type=float, default=1e-4, help="default: %(default)s")


def add_encoder_arguments(
    parser: argparse.ArgumentParser, method: str, norm: str, temperature: str = "of the softmax"
) -> argparse._ArgumentGroup:
    """The method's own group, to which it may add more. ``norm`` and ``temperature`` say what they mean for it."""
    group = parser.add_argument_group(method)
    group.add_argument("--backbone", default="test_resnet", metavar="NAME", help="of timm (default: %(default)s)")
    group.add_argument("--norm", choices=("batch", "group"), default="batch", help=norm)
    group.add_argument("--dim", type=whole(1), default=128, help="of the embeddings (default: %(default)s)")
    group.add_argument("--temperature", type=positive, default=0.2, help=f"{temperature} (default: %(default)s)")
    return group


def whole(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number, at least so large."""

    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    parse.__name__ = "whole number"  # argparse names it in "invalid whole number value: 'x'"
    return parse


def positive(text: str) -> float:
    """An argparse type: a finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {text}")
    return value


def share(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1], got {text}")
    return value


def check_batch(args: argparse.Namespace, images: int, processes: int) -> None:
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
        message, status = str(error), 2
    except KeyboardInterrupt:
        message, status = "interrupted; --resume goes on from the last checkpoint", 130
    finally:
        leave_world()
    if os.environ.get("RANK", "0") == "0":
        print(f"sslkernels train {method}: {message}", file=sys.stderr)
    return status

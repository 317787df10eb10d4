"""``--demo``: train, then show that the fused op follows the definition and what it saves."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable

import torch

from sslkernels.trainers import TrainError, _compare, _evaluate, _log

AGREEMENT_STEPS = 10
AGREEMENT = 1e-3
LARGE_VIEWS = 2048
BARS = "▁▂▃▄▅▆▇█"


def demo(args: argparse.Namespace, train: Callable[[argparse.Namespace], dict[str, float]]) -> int:
    """0 if the trained encoder beats the untrained one and both ops give the same curve."""
    fused, reference = (
        argparse.Namespace(**{**vars(args), "ops": ops, "out": args.out / ops, "overwrite": not args.resume})
        for ops in ("fused", "reference")
    )
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise TrainError("--demo runs in one process, without torchrun")
    threads = torch.get_num_threads()
    print(f"SimCLR on {args.data}, {args.steps} steps; nt_xent runs on {_compare.active(args.device)}\n", flush=True)
    accuracies = train(fused)
    losses = _log.read_column(fused.out / "log.csv", "loss")
    print(f"\nloss {losses[0]:.3f} {sparkline(losses)} {losses[-1]:.3f}   (every step in {fused.out / 'log.csv'})")
    _evaluate.print_probes(accuracies)

    reference.stop_after, reference.overwrite, reference.resume = min(AGREEMENT_STEPS, args.steps), True, False
    print(f"\nthe first {reference.stop_after} steps again, by the definition in plain PyTorch", flush=True)
    torch.set_num_threads(threads)  # the first run has changed it
    train(reference)
    definition = _log.read_column(reference.out / "log.csv", "loss")
    apart = max(abs(a - b) for a, b in zip(losses, definition, strict=False))
    agrees = apart <= AGREEMENT
    print(f"largest difference of the losses: {apart:.1e}, {'within' if agrees else 'NOT within'} {AGREEMENT:g}")

    torch.set_num_threads(threads)
    shapes = [(2 * args.batch_size, args.dim), (max(LARGE_VIEWS, 4 * args.batch_size), args.dim)]
    _compare.compare_ops(shapes, args.temperature, args.device)
    better = not accuracies or accuracies[_evaluate.TRAINED] > accuracies[_evaluate.UNTRAINED]
    return 0 if agrees and better else 1


def sparkline(values: list[float], width: int = 40) -> str:
    """A curve in one line of text, each character the mean of a stretch of it."""
    width = min(width, len(values))
    edges = [len(values) * i // width for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, span = min(means), (max(means) - min(means)) or 1
    return "".join(BARS[round((mean - low) / span * (len(BARS) - 1))] for mean in means)

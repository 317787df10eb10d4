"""Checkpoints that survive an end at any moment: the file is the old one or the new one, never a part of it."""

from __future__ import annotations

import argparse
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import sslkernels
from sslkernels._files import replacing
from sslkernels.trainers import TrainError
from sslkernels.trainers._distributed import World, same_everywhere
from sslkernels.trainers._log import RunLog
from sslkernels.trainers._options import curve_options

NAME = "checkpoint.pt"
Parts = Mapping[str, Any]  # by name what has a state_dict: modules and optimisers


def begin(args: argparse.Namespace, world: World, parts: Parts) -> dict:
    """Prepare the folder of a run and the threads; returns the checkpoint to go on from, or an empty dict.

    ``parts`` by name: all that changes during training; they are given the state that they had.
    """
    path = args.out / NAME
    saved = load(path) if args.resume and path.exists() else {}
    needed = {"options", "threads", "software", "step", "log"}
    if saved and not needed <= set(saved):
        raise TrainError(f"{path}: not a checkpoint of a trainer's, or of another version's")
    if not same_everywhere(saved.get("step"), world):
        raise TrainError(f"--out {args.out}: the processes see different checkpoints; it must be a folder they share")
    if saved:
        check_same(saved["options"], curve_options(args, world.size))
        if world.leads and saved["software"] != software(args.device):
            print(f"begun with {saved['software']}, goes on with {software(args.device)}: the last bits may differ")
    elif path.exists() and not args.overwrite:
        raise TrainError(f"{args.out} holds a run: --resume goes on with it, --overwrite begins anew")
    # sums are split among threads, so that another number of them would change the last bits
    torch.set_num_threads(saved.get("threads") or args.threads or max(1, torch.get_num_threads() - args.workers))
    if world.leads and not saved:
        args.out.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        shutil.rmtree(args.out / "tensorboard", ignore_errors=True)
    for name, part in parts.items() if saved else ():
        part.load_state_dict(saved[name])
    return saved


def save(args: argparse.Namespace, world: World, step: int, log: RunLog, parts: Parts) -> None:
    """Write what `begin` needs to go on after that many steps."""
    options, threads = curve_options(args, world.size), torch.get_num_threads()
    run = {"options": options, "threads": threads, "software": software(args.device)}
    state = {name: part.state_dict() for name, part in parts.items()}
    write_atomically({**run, "step": step, "log": log.position(), **state}, args.out / NAME)


def software(device: str) -> str:
    """What computes the last bits, as far as this library knows."""
    active = (f"{op} on {found[device].active}" for op, found in sslkernels.backends().items())
    return ", ".join([f"torch {torch.__version__}", *active])


def write_atomically(state: dict, path: Path) -> None:
    with replacing(path) as file:
        torch.save(state, file)


def load(path: Path) -> dict:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        # of a damaged file PyTorch says a lot, most of it how to load files that one should not trust
        raise TrainError(f"{path}: not a readable checkpoint ({str(error).partition('. ')[0]})") from error
    if not isinstance(state, dict):
        raise TrainError(f"{path}: not a readable checkpoint (it holds a {type(state).__name__})")
    return state


def check_same(saved: dict, options: dict) -> None:
    """A curve goes on identically only under the options that it began with."""
    for name, value in options.items():
        if saved.get(name) != value:
            option = f"--{name.replace('_', '-')}"
            began = f"{option} {saved[name]}, not {value}" if name in saved else f"another method, without {option}"
            raise TrainError(f"--resume: the run began with {began}; options that shape the curve must stay")

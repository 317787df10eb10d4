"""`sslkernels bench`: runs the benchmarks of a source checkout, and shows or compares what they left."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from sslkernels import registry

BENCH = Path(__file__).resolve().parents[1] / "bench"
NEEDED = ("pytest", "pytest_benchmark", "matplotlib")
# everyone ours is raced against, and the package that brings it ("" for what torch or the benchmark itself has)
PEERS = {
    "lightly": "lightly",
    "open_clip": "open_clip_torch",
    "pytorch_metric_learning": "pytorch-metric-learning",
    "info_nce_pytorch": "info-nce-pytorch",
    "timm": "timm",
    "ema_pytorch": "ema-pytorch",
    "foreach": "",
    "swa_utils": "",
    "linear_cross_entropy": "",
    "mae": "",
    "dinov2": "",
    "ijepa": "",
    "wav2vec": "",
    "videomae": "",
}
MODULES = {"info_nce_pytorch": "info_nce"}  # where a peer's module has another name


def timed_ops() -> dict[str, list[str]]:
    """What ``--op`` understands, slices and public functions, with the ops of the benchmarks that it stands for."""
    named = registry.by_name().items()
    found = {name: timed for name, specs in named if (timed := [spec.name for spec in specs if spec.tagged("bench")])}
    for name, timed in found.items():
        if f"{name}_queue" in found:  # a function with two ways through the kernels means both
            timed.append(f"{name}_queue")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Race every op against eager PyTorch, torch.compile and the packages people use instead: time, peak memory and "
        "the share of the roofline, with the rates of the same run. Writes JSON, a table and figures."
    )
    names = timed_ops()
    add = parser.add_argument
    add("--op", action="append", choices=names, metavar="NAME", help=f"only this (repeatable): {', '.join(names)}")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    add("--peers", type=_peers, metavar="NAMES", help=f"only these, separated by commas, or none: {', '.join(PEERS)}")
    add("-k", metavar="EXPRESSION", help="only the matching races, as pytest -k")
    add("--quick", action="store_true", help="the smallest input of each op, three rounds: a first impression")
    add("--curves", action="store_true", help="also how time and memory grow with N, D, K and L; alone with -k curve")
    add("--no-compile", action="store_true", help="leave torch.compile out, which spends most of the time compiling")
    add("--cuda-graphs", action="store_true", help="with --device cuda: replay every contender as a CUDA graph")
    add("--seconds", type=_positive, default=2.0, help="for the samples of each contender (default: %(default)s)")
    add("--json", metavar="FILE", default="benchmark.json", help="results, table and figures beside it (%(default)s)")
    add(
        "--docs",
        nargs="?",
        const=str(BENCH.parent / "docs"),
        metavar="DIR",
        help="with the curves, and written to DIR/benchmarks.md and DIR/figures (DIR is docs if not given)",
    )
    add(
        "--compare", nargs=2, metavar=("OLD.json", "NEW.json"), help="measure nothing: what changed between two results"
    )


def _peers(text: str) -> list[str]:
    names = [] if text == "none" else text.split(",")
    for name in names:
        if name not in PEERS:
            raise argparse.ArgumentTypeError(f"no peer {name!r} (choose from none, {', '.join(PEERS)})")
    for name in names:
        if not _is_installed(name):
            raise argparse.ArgumentTypeError(f"{name} is not installed: pip install {PEERS[name]}")
    return names


def _is_installed(peer: str) -> bool:
    return not PEERS[peer] or find_spec(MODULES.get(peer, peer)) is not None


def _positive(text: str) -> float:
    seconds = float(text)
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return seconds


def main(args: argparse.Namespace) -> int:
    problem = _problem(args)
    if problem:
        print(problem, file=sys.stderr)
        return 2
    if args.compare:
        return _script("compare.py", *args.compare)
    absent = [name for name in PEERS if not _is_installed(name)]
    if absent and args.peers is None:
        print(
            f"not raced, since not installed: {', '.join(absent)} (pip install -e '.[bench]' brings them)", flush=True
        )
    json = Path(args.json).resolve()
    before = _written(json)
    status = _run(_command(args, json))
    if status is None:
        if _written(json) == before:
            print("sslkernels bench: stopped before a race was finished", file=sys.stderr)
        else:
            print("sslkernels bench: stopped; what was finished:", file=sys.stderr)
            _report(args, json)
        return 130
    if status == 5:
        print(f"sslkernels bench: no race matches {args.k!r}", file=sys.stderr)
        return 2
    if status:
        print(f"sslkernels bench: not all races passed, so no table was made; {json} has the others", file=sys.stderr)
        return 1
    return _report(args, json)


def _run(command: list[str]) -> int | None:
    """The status of the races, or None if they were stopped: what ends this process ends theirs."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return subprocess.run(command, cwd=BENCH.parent).returncode
    except KeyboardInterrupt:
        return None
    finally:
        signal.signal(signal.SIGTERM, before)


def _written(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def _report(args: argparse.Namespace, json: Path) -> int:
    return _script("report.py", str(json), *(["--docs", args.docs] if args.docs else []))


def _problem(args: argparse.Namespace) -> str | None:
    """Why the benchmarks cannot run here as asked, in one line."""
    if not (BENCH / "conftest.py").exists():
        return f"sslkernels bench: the benchmarks are not installed; run it from a source checkout (no {BENCH})"
    missing = [package for package in NEEDED if find_spec(package) is None]
    if missing:
        return (
            f"sslkernels bench: {', '.join(missing)} not installed: pip install 'sslkernels[bench]' (here: '.[bench]')"
        )
    if args.device == "cuda" and not torch.cuda.is_available():
        return "sslkernels bench: torch sees no CUDA device"
    if args.cuda_graphs and args.device != "cuda":
        return "sslkernels bench: --cuda-graphs needs --device cuda"
    if args.docs and not Path(args.docs).is_dir():
        return f"sslkernels bench: --docs: no directory {args.docs}"
    return None


def _command(args: argparse.Namespace, json: Path) -> list[str]:
    names = timed_ops()
    command = [sys.executable, "-m", "pytest", str(BENCH), "-vv", "--no-header", "--benchmark-json", str(json)]
    command += ["-o", "console_output_style=count"]
    command += ["--benchmark-quiet", f"--device={args.device}", f"--seconds={args.seconds}"]
    command += [f"--op={op}" for name in args.op or () for op in names[name]]
    flags = {
        "--quick": args.quick,
        "--curves": args.curves or args.docs,
        "--no-compile": args.no_compile,
        "--cuda-graphs": args.cuda_graphs,
    }
    command += [flag for flag, given in flags.items() if given]
    if args.peers is not None:
        command.append(f"--peers={','.join(args.peers)}")
    return command + (["-k", args.k] if args.k else [])


def _script(name: str, *arguments: str) -> int:
    return subprocess.run([sys.executable, str(BENCH / name), *arguments]).returncode

"""The command line: ``sslkernels info | verify | bench | train METHOD``, also ``python -m sslkernels``."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import torch

import sslkernels
from sslkernels import info, verify

BENCH = Path(sslkernels.__file__).parents[1] / "bench"


class Parser(argparse.ArgumentParser):
    """Ends on a mistake with one line instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help lists the arguments)\n")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"] and argv[1:2] and not argv[1].startswith("-"):
        return _train(argv[1], argv[2:])
    args = _parser().parse_args(argv)
    return args.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="sslkernels", description=sslkernels.__doc__)
    parser.add_argument("--version", action="version", version=f"sslkernels {sslkernels.__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for name, summary, module in (
        ("info", "what is installed here and what serves every op", info),
        ("verify", "check every op against its definition on this machine", verify),
    ):
        command = commands.add_parser(name, help=summary)
        module.add_arguments(command)
        command.set_defaults(run=module.main)
    bench = commands.add_parser("bench", help="measure against eager, torch.compile and peers (source checkout only)")
    bench.add_argument("--quick", action="store_true", help="small inputs and few rounds: seconds, not minutes")
    bench.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    bench.add_argument("--json", metavar="FILE", default="benchmark.json", help="results (default: %(default)s)")
    bench.add_argument("-k", metavar="EXPRESSION", help="only the matching benchmarks, as pytest -k")
    bench.set_defaults(run=_bench)
    train = commands.add_parser("train", help="train a method with the fused ops")
    train.add_argument("method", metavar="METHOD", choices=_methods(), help=f"one of: {', '.join(_methods())}")
    return parser


def _bench(args: argparse.Namespace) -> int:
    if not (BENCH / "conftest.py").exists():
        return _fail("bench", f"the benchmarks are not installed; run it from a source checkout (no {BENCH})")
    for package in ("pytest", "pytest_benchmark"):
        if find_spec(package) is None:
            return _fail("bench", f"the package {package} is missing: pip install 'sslkernels[bench]'")
    if args.device == "cuda" and not torch.cuda.is_available():
        return _fail("bench", "torch sees no CUDA device")
    json = Path(args.json).resolve()
    table = json.with_suffix(".md")
    command = [sys.executable, "-m", "pytest", str(BENCH), "-q", "--benchmark-json", str(json), "--benchmark-quiet"]
    command += [f"--device={args.device}"] + ["--quick"] * args.quick + (["-k", args.k] if args.k else [])
    status = subprocess.run(command, cwd=BENCH.parent).returncode
    if status == 0:
        report = subprocess.run(
            [sys.executable, str(BENCH / "report.py"), str(json)], stdout=subprocess.PIPE, text=True
        )
        status = report.returncode
        table.write_text(report.stdout, encoding="utf-8")
        print(f"{report.stdout}\nwritten to {json} and {table}")
    return status


def _methods() -> list[str]:
    package = importlib.import_module("sslkernels.trainers")
    return [module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_")]


def _train(method: str, argv: list[str]) -> int:
    if method not in _methods():
        return _fail("train", f"no method {method!r}; there is {', '.join(_methods())}")
    try:
        trainer = importlib.import_module(f"sslkernels.trainers.{method}")
        parser = Parser(prog=f"sslkernels train {method}", description=trainer.__doc__)
        trainer.add_arguments(parser)
        return trainer.main(parser.parse_args(argv))
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("sslkernels"):
            raise
        return _fail(f"train {method}", f"the package {error.name} is missing: pip install 'sslkernels[train]'")


def _fail(command: str, message: str) -> int:
    print(f"sslkernels {command}: {message}", file=sys.stderr)
    return 2

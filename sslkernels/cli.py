"""The command line: ``sslkernels info | verify | bench | train METHOD``, also ``python -m sslkernels``."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from typing import Any, NoReturn

import sslkernels
from sslkernels import bench, info, verify


class Formatter(argparse.HelpFormatter):
    """Keeps paragraphs apart, and lines as they are where some are indented."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(
            p if "\n  " in p else super(Formatter, self)._fill_text(p, width, indent) for p in paragraphs
        )


class Parser(argparse.ArgumentParser):
    """Ends on a mistake with one line instead of the whole usage; takes options by their full names alone."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{"formatter_class": Formatter, "allow_abbrev": False, **options})

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
        ("bench", "measure against eager, torch.compile and peers (source checkout only)", bench),
    ):
        command = commands.add_parser(name, help=summary)
        module.add_arguments(command)
        command.set_defaults(run=module.main)
    train = commands.add_parser("train", help="train a method with the fused ops")
    train.add_argument("method", metavar="METHOD", choices=_methods(), help=f"one of: {', '.join(_methods())}")
    return parser


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

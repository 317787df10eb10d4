"""`sslkernels verify`: every op of the registry against its definition, on this machine with what is installed."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable

import torch

from sslkernels import info, registry
from sslkernels._files import output_file
from sslkernels.verify.checks import Group, check_group, dtype_name, plan
from sslkernels.verify.files import write_json, write_junit
from sslkernels.verify.progress import open_progress
from sslkernels.verify.report import Outcome, print_head, print_report

BACKENDS = ("cpp", "triton", "cuda", "fallback", "reference")
EPILOG = """\
examples:
  sslkernels verify                                   everything that can run here
  sslkernels verify --device cuda                     after installing on a machine with a GPU
  sslkernels verify --op nt_xent --dtype bfloat16     one op in one dtype
  sslkernels verify --junit verify.xml                for a build server

The exit status is 0 if every check passed, 1 if one failed or nothing could run, 2 for a mistake in the arguments.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Check every op against its definition in float64: values and gradients, the same bits in every run, the bits "
        "of masks, the rules of torch.library, and that compiled code computes what eager code does."
    )
    parser.epilog = EPILOG
    dtypes = sorted({dtype_name(dtype) for spec in registry.ops() for dtype in spec.dtypes})
    what = parser.add_argument_group(
        "what to check (each of --op, --dtype and --device repeatable; default: everything)"
    )
    what.add_argument(
        "--op", action="append", choices=registry.by_name(), metavar="OP", help="a slice or an op of it: %(choices)s"
    )
    what.add_argument("--dtype", action="append", choices=dtypes, metavar="DTYPE", help="one of: %(choices)s")
    what.add_argument("--device", action="append", choices=("cpu", "cuda"), metavar="DEVICE", help="cpu or cuda")
    what.add_argument(
        "--backend",
        choices=BACKENDS,
        metavar="BACKEND",
        help="one of: %(choices)s; fallback is what the operators do on a device without kernels",
    )
    output = parser.add_argument_group("what to write")
    output.add_argument("--details", action="store_true", help="a row for each check in each dtype, not for each op")
    output.add_argument(
        "--json", type=output_file, metavar="FILE", help="write every check and the environment to FILE"
    )
    output.add_argument("--junit", type=output_file, metavar="FILE", help="write JUnit's XML to FILE")


def main(args: argparse.Namespace) -> int:
    facts = info.collect()
    print_head(facts)
    dtypes = args.dtype and [getattr(torch, name) for name in args.dtype]
    names = registry.by_name()
    chosen = args.op and [spec.name for name in args.op for spec in names[name]]
    groups, not_run = plan(chosen, dtypes, args.device, args.backend)
    outcome = Outcome(not_run=not_run)
    run(groups, outcome)
    print_report(outcome, args.details)
    if args.json:
        write_json(args.json, outcome, facts)
    if args.junit:
        write_junit(args.junit, outcome, facts)
    return 130 if outcome.interrupted else 0 if outcome.passed else 1


def run(groups: Iterable[Group], outcome: Outcome) -> None:
    """Check the groups one after another, as far as nobody interrupts it."""
    start, failed = time.perf_counter(), 0
    try:
        with open_progress(sum(len(group.cases) for group in groups)) as progress:
            for group in groups:
                for checks in check_group(group):
                    outcome.checks += checks
                    failed += sum(not check.passed for check in checks)
                    progress.advance(str(group), failed)
    except KeyboardInterrupt:
        outcome.interrupted = True
    outcome.seconds = time.perf_counter() - start

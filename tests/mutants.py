"""Breaks kernels in the ways of `mutations.py` and reports whether `sslkernels verify` and the tests notice.

    python tests/mutants.py [--quick] [--backend cpp|triton|cuda|reference] [--json FILE]

No source is touched. C++ is compiled once for all mutations of a backend, without optimisation: every place becomes a
choice, ``(chosen ? after : before)``, which SSLKERNELS_MUTANT makes. The loops of all CPU operators are compiled for
the baseline instruction set and linked with the other objects of the built extension; the CUDA kernels are compiled for
the CPU, as the tests do. A Python module is loaded from a changed copy. Every mutation is examined in a process of its
own, and so is, for every backend and op, what nothing was changed in: that must pass.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.abc
import importlib.util
import io
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

# what an examination needs and takes seconds to load, but nothing of ours, which each loads with its change
import cuda_on_cpu
import hypothesis  # noqa: F401
import pytest
import torch
import torch._dynamo.testing
import triton.runtime.interpreter  # noqa: F401
from mutations import MUTATIONS, PROBES, Mutation

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("cpp", "triton", "cuda", "reference")
EXTENSION = ROOT / f"build/ext-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
CPU_LOOPS = "csrc/cpu/isa/baseline.cpp"
CUDA_BINDINGS = {
    "info_nce": "contrast",
    "info_nce_queue": "contrast",
    "ema_update_": "ema",
    "restore_tokens": "patch_mask",
    "masked_patch_loss": "patch_loss",
}


@dataclass
class Outcome:
    """What became of a mutation, or where there is none of an op as it is."""

    backend: str
    op: str
    mutation: int  # 1 for the first of MUTATIONS; 0 is none
    checks: int = 0  # of verify
    failed_checks: list[str] = field(default_factory=list)
    tests: int = 0
    failed_tests: list[str] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0

    @property
    def as_expected(self) -> bool:
        failures = [bool(self.failed_checks), bool(self.failed_tests)]
        return not self.error and self.checks > 0 and self.tests > 0 and failures == 2 * [self.mutation > 0]

    def __str__(self) -> str:
        name = str(MUTATIONS[self.mutation - 1]) if self.mutation else f"{self.backend}, {self.op}: unchanged"
        verdict = "survived" if self.mutation else "fails"
        if self.as_expected:
            verdict = "caught" if self.mutation else "passes"
        found = f"{len(self.failed_checks)} of {self.checks} checks and {len(self.failed_tests)} of {self.tests} tests"
        return f"{verdict:9}{name} ({found} failed, {self.seconds:.1f} s) {self.error}"


# ---- breaking


def number(mutation: Mutation) -> int:
    return MUTATIONS.index(mutation) + 1


def broken(mutation: Mutation, text: str, replacement: str) -> str:
    """The text of the mutation's file with its place replaced, which must be there exactly once."""
    found = text.count(mutation.before)
    if found != 1:
        raise ValueError(f"{mutation}: {mutation.before!r} occurs {found} times in {mutation.file}")
    return text.replace(mutation.before, replacement)


def with_choices(file: str, text: str, mutations: Sequence[Mutation]) -> str:
    """C++ with a choice in the place of each mutation of this file."""
    for mutation in (m for m in mutations if m.file == file):
        broken(mutation, (ROOT / file).read_text(), "")  # choices made so far may repeat the text
        choice = f"(::mutant::kChosen == {number(mutation)} ? ({mutation.after}) : ({mutation.before}))"
        text = text.replace(mutation.before, choice, 1)
    return text


def build(directory: Path, sources: set[str], mutations: Sequence[Mutation], work: Path) -> Path:
    """The library of a ninja build with these sources compiled from a copy that holds the mutations."""
    command = [sys.executable, "-m", "ninja", "-f", str(directory / "build.ninja"), "-t", "compdb", "cxx", "link"]
    edges = {edge["output"]: edge for edge in json.loads(subprocess.check_output(command, cwd=ROOT))}
    copy = work / directory.name
    for folder in ("csrc", "tests/cuda_on_cpu"):
        shutil.copytree(ROOT / folder, copy / folder)
    for file in {mutation.file for mutation in mutations}:
        (copy / file).write_text(with_choices(file, (ROOT / file).read_text(), mutations))
    replaced = {}
    for source in sorted(sources):
        (output,) = (output for output, edge in edges.items() if edge["file"] == source)
        replaced[output] = str(copy / f"{Path(source).stem}.o")
        words = shlex.split(edges[output]["command"])
        words = words[: words.index("-MD")]  # what follows names files of the real build
        cheap = ["-O0", "-g0", "-w", "-fno-sanitize=all", "-include", str(ROOT / "tests/cpp/mutant.h")]
        subprocess.run([*words, *cheap, "-c", source, "-o", replaced[output]], cwd=copy, check=True)
    (library,) = (output for output in edges if output.endswith(".so"))
    replaced[library] = str(copy / Path(library).name)
    words = [replaced.get(word, word) for word in shlex.split(edges[library]["command"])]
    subprocess.run(words, cwd=ROOT, check=True)
    return Path(replaced[library])


class Instead(importlib.abc.MetaPathFinder):
    """Loads modules from other files, or without a file not at all."""

    def __init__(self, files: dict[str, Path | None]):
        self.files = files

    def find_spec(self, name, path=None, target=None):
        if name not in self.files:
            return None
        if self.files[name] is None:
            raise ImportError(f"{name} is left out")
        return importlib.util.spec_from_file_location(name, self.files[name])


@dataclass
class Libraries:
    """What was compiled, with all its mutations."""

    work: Path
    extension: Path | None = None
    cuda: Path | None = None

    def put_in_place(self, backend: str, chosen: int) -> None:
        """Make this process one in which the mutation is in force."""
        files = {}
        os.environ["SSLKERNELS_MUTANT"] = str(chosen)
        if backend == "cpp":
            os.environ["SSLKERNELS_ISA"] = "baseline"
            files["sslkernels._C"] = self.extension
        elif backend == "cuda":
            cuda_on_cpu.build = lambda: self.cuda
        if backend == "reference":
            files["sslkernels._C"] = None  # the default kernels run where there are no others
        if chosen and backend in ("triton", "reference"):
            mutation = MUTATIONS[chosen - 1]
            copy = self.work / f"{chosen}.py"
            copy.write_text(broken(mutation, (ROOT / mutation.file).read_text(), mutation.after))
            files[mutation.file.removesuffix(".py").replace("/", ".")] = copy
        sys.meta_path.insert(0, Instead(files))
        sys.path.insert(0, str(ROOT))


def libraries(mutations: Sequence[Mutation], work: Path) -> Libraries:
    made = Libraries(work)
    of = {backend: [m for m in mutations if m.backend == backend] for backend in BACKENDS}
    if of["cpp"]:
        made.extension = build(EXTENSION, {CPU_LOOPS}, of["cpp"], work)
    if of["cuda"]:
        directory = cuda_on_cpu.build().parent
        sources = {f"tests/cuda_on_cpu/{CUDA_BINDINGS[m.op]}_bindings.cpp" for m in of["cuda"]}
        made.cuda = build(directory, sources, of["cuda"], work)
    return made


# ---- looking, in a process of its own


class Record:
    """Counts pytest's tests and keeps those that fail."""

    def __init__(self):
        self.ran, self.failed = 0, []

    def pytest_runtest_logreport(self, report):
        self.ran += report.when == "call"
        if report.failed:
            self.failed.append(report.nodeid)


def run_tests(file: str, tests: str, outcome: Outcome) -> None:
    record, text = Record(), io.StringIO()
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    options = [
        "-x",
        "-k",
        tests,
        f"--rootdir={ROOT}",
        "--assert=plain",
        "-pno:cacheprovider",
        "-pno:unraisableexception",
    ]
    with contextlib.redirect_stdout(text):
        status = pytest.main([str(ROOT / "tests" / file), *options], [record])
    outcome.tests, outcome.failed_tests = record.ran, record.failed
    if status != bool(record.failed):
        outcome.error = f"pytest ended with {status!r}: {text.getvalue()}"


@contextlib.contextmanager
def on_cuda(spec) -> Iterator[Callable]:
    """The public function with its CUDA kernels on the CPU."""
    name = CUDA_BINDINGS[spec.name]
    if name == "contrast":
        from contrast_cuda import registered

        from sslkernels.numerics import with_backend
        from sslkernels.ops.infonce import arguments

        with registered(), mock.patch.object(arguments, "check_backend", lambda *_: None):
            yield with_backend(spec.function, "cuda")
    elif name == "ema":
        import test_ema_gpu

        yield functools.partial(spec.function, function=test_ema_gpu.on_cuda())
    elif name == "patch_mask":
        from patch_mask_cuda import registered

        with registered():
            yield spec.function
    else:
        from test_patch_loss_gpu import OnCuda

        with OnCuda():
            yield spec.function


@contextlib.contextmanager
def on_backend(backend: str, spec) -> Iterator[Callable]:
    from triton_on_cpu import interpret

    if backend == "cuda":
        with on_cuda(spec) as function:
            yield function
    else:
        with interpret(order_seed=0) if backend == "triton" else contextlib.nullcontext():
            yield spec.function


def run_verify(backend: str, op: str, cases: Sequence[str], work: Path, outcome: Outcome) -> None:
    """The command `sslkernels verify` on these cases in fp32, but for what it asks of torch's compiler."""
    from sslkernels import backends, registry, verify

    (spec,) = (spec for spec in registry.ops() if spec.name == op)
    by_name = {case.name: case for case in spec.tagged("verify")}
    label = "fallback" if backend == "reference" else backends()[op]["cpu"].active
    file, text, parser = work / "verify.json", io.StringIO(), argparse.ArgumentParser()
    with on_backend(backend, spec) as function, contextlib.redirect_stdout(text):
        # opcheck and torch.compile, which take seconds, are for an op's first dtype
        chosen = {"cases": tuple(by_name[name] for name in cases), "dtypes": (torch.bfloat16, torch.float32)}
        spec = dataclasses.replace(spec, function=function, **chosen)
        with mock.patch.object(registry, "ops", lambda: iter([spec])):
            verify.add_arguments(parser)
            asked = f"--op={op} --dtype=float32 --device=cpu --backend={label} --json={file}"
            status = verify.main(parser.parse_args(asked.split()))
    checks = json.loads(file.read_text())["checks"]
    failed = [f"{check['case']}: {check['name']}" for check in checks if not check["passed"]]
    outcome.checks, outcome.failed_checks = len(checks), failed
    if status != bool(failed):
        outcome.error = f"verify ended with {status}: {text.getvalue()}"


def examine(outcome: Outcome, made: Libraries) -> None:
    torch.set_num_threads(1)
    made.put_in_place(outcome.backend, outcome.mutation)
    probe = PROBES[outcome.backend, outcome.op]
    run_tests(probe.test_file, probe.tests, outcome)
    run_verify(outcome.backend, outcome.op, probe.cases, made.work, outcome)


def examined(outcome: Outcome, made: Libraries) -> Outcome:
    """The same in a child, which may crash."""
    start = time.perf_counter()
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            examine(outcome, made)
        except BaseException:
            outcome.error = traceback.format_exc()
        with os.fdopen(writable, "w") as pipe:
            json.dump(dataclasses.asdict(outcome), pipe)
        os._exit(0)
    os.close(writable)
    with os.fdopen(readable) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    result = Outcome(**json.loads(answer)) if answer else outcome
    result.error = result.error or (f"died with status {status}" if status else "")
    result.seconds = time.perf_counter() - start
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only the mutations that `make test` looks at")
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="only this one (repeatable)")
    parser.add_argument("--json", metavar="FILE", help="also write all outcomes to FILE")
    args = parser.parse_args()
    chosen = [m for m in MUTATIONS if (m.quick or not args.quick) and m.backend in (args.backend or BACKENDS)]
    outcomes = []
    with tempfile.TemporaryDirectory() as work:
        start = time.perf_counter()
        made = libraries(chosen, Path(work))
        print(f"built in {time.perf_counter() - start:.0f} s", flush=True)
        for (backend, op), members in itertools.groupby(chosen, lambda m: (m.backend, m.op)):
            for mutation in (0, *map(number, members)):
                outcomes.append(examined(Outcome(backend, op, mutation), made))
                print(outcomes[-1], flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps([dataclasses.asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    wrong = sum(not outcome.as_expected for outcome in outcomes)
    print(f"{len(chosen)} mutations, {wrong or 'none'} not as expected, {time.perf_counter() - start:.0f} s")
    return 1 if wrong or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())

"""Compiles every Triton kernel for GPUs that need not be here and reads what it costs from the machine code.

``python tests/triton_aot.py`` rewrites tests/triton_resources.md. An op's cases tagged "aot" or "aot_bf16" are what is
compiled: the public function forward and backward, with the specialisation and the configuration that a launch on the
target has.

A row of the table names what it was compiled from: a digest of the Triton release, the target, the kernel's source and
its specialisation. What the table has by that digest is not compiled again, which takes minutes, but for a sample.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import triton
import triton.compiler
from triton_on_cpu import TARGETS, Launch, capture

from sslkernels import numerics, registry

TABLE = Path(__file__).with_name("triton_resources.md")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# bytes a program may have; sm_80's configuration also runs on sm_86, sm_89 and sm_120, which have 99 KiB
SHARED_LIMIT = {"sm_80": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
TENSOR_CORE_OPS = r"\b(?:HMMA|HGMMA|UTC\w*MMA|v_mfma)"
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes."""

    target: str
    kernel: str
    inputs: str
    constants: str
    warps: int
    registers: int  # a thread; on AMD the vector registers, with the accumulation registers
    spills: int  # instructions that spill, or spilled registers on AMD
    stack: int  # bytes of local memory a thread
    shared: int
    tensor_core_ops: int
    multiplies_16_bits: bool
    source: str  # a digest of what was compiled

    def faults(self) -> list[str]:
        """What must not be, whatever the version of Triton."""
        limit = SHARED_LIMIT[self.target]
        found = []
        if self.spills or self.stack:
            found.append(f"spills: {self.spills}, stack: {self.stack} bytes")
        if self.shared > limit:
            found.append(f"shared memory: {self.shared} bytes, limit {limit}")
        if self.multiplies_16_bits and not self.tensor_core_ops:
            found.append("no tensor-core instruction in a kernel that multiplies matrices of 16-bit numbers")
        return [f"{self.target} {self.kernel} {self.inputs} ({self.constants}): {fault}" for fault in found]


def report(everything: bool = False) -> list[Resources]:
    """All kernels, in the order of the table; those that the committed table has are read from it, but for a sample."""
    known = (
        {} if everything else {row.source: row for row in parse(TABLE.read_text()) if not row.source.startswith("0")}
    )
    tasks = [(target, dtype, known) for target, dtype in product(TARGETS, DTYPES)]
    with tempfile.TemporaryDirectory() as cache:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(2, context, initializer=_start_process, initargs=(cache,)) as pool:
            found = [row for rows in pool.map(_compile, *zip(*tasks, strict=True)) for row in rows]
    return sorted(_merged(found), key=lambda r: (list(TARGETS).index(r.target), r.kernel, r.constants, r.inputs))


def _start_process(cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache
    torch.set_num_threads(1)


def _merged(rows: Iterable[Resources]) -> list[Resources]:
    """One row for each machine code, with all the dtypes that lead to it."""
    unique: dict[tuple[str, str], Resources] = {}
    for row in rows:
        known = unique.setdefault((row.target, row.source), row)
        if row.inputs not in known.inputs.split(", "):
            unique[row.target, row.source] = replace(known, inputs=f"{known.inputs}, {row.inputs}")
    return list(unique.values())


def _compile(target: str, dtype: torch.dtype, known: dict[str, Resources]) -> list[Resources]:
    with capture(target) as launches, compiled_once(target, known):
        for spec in registry.ops():
            for case in spec.tagged("aot") + spec.tagged("aot_bf16") * (dtype != torch.float16):
                for _, arguments in numerics.calls(spec, case, dtype, "cpu"):
                    numerics.evaluate(spec.function, arguments, spec.grad_args)
    unique = {launch.compiled.source: launch for launch in launches}
    return [
        replace(known[source], inputs=_name(dtype)) if source in known else measure(target, dtype, launch)
        for source, launch in unique.items()
    ]


@contextlib.contextmanager
def compiled_once(target: str, known: Iterable[str] = ()) -> Iterator[None]:
    """Gives whatever Triton compiles a ``source``, and does not compile what is known by it."""
    compile_kernel = triton.compiler.compile

    def compile_unless_known(src, options, **kwargs):
        settings = sorted((key, value) for key, value in options.items() if key != "extern_libs")  # those are paths
        source = hashlib.sha256(repr((triton.__version__, target, src.hash(), settings)).encode()).hexdigest()[:12]
        compiled = SimpleNamespace() if source in known else compile_kernel(src, options=options, **kwargs)
        compiled.source = source
        return compiled

    with mock.patch.object(triton.compiler, "compile", compile_unless_known):
        yield


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def measure(target: str, dtype: torch.dtype, launch: Launch) -> Resources:
    """Read the machine code of a captured launch whose inputs are of ``dtype``."""
    read = _read_amd if TARGETS[target].backend == "hip" else _read_nvidia
    names = [param.name for param in launch.kernel.params if param.is_constexpr]
    products = re.findall(r"tt\.dot .*: tensor<\d+x\d+x(\w+)>", launch.compiled.asm["ttir"])
    return Resources(
        target=target,
        kernel=launch.kernel.__name__,
        inputs=_name(dtype),
        constants=", ".join(f"{name}={launch.arguments[name]}" for name in names),
        warps=launch.compiled.metadata.num_warps,
        shared=launch.compiled.metadata.shared,
        multiplies_16_bits=any(element in ("bf16", "f16") for element in products),
        source=launch.compiled.source,
        **read(launch.compiled),
    )


def _read_nvidia(compiled) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run(NVIDIA_TOOLS / "cuobjdump", "-res-usage", file.name)
        code = _run(NVIDIA_TOOLS / "nvdisasm", "-c", file.name)
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups()
    return {
        "registers": int(registers),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "stack": int(stack) + int(local),
        "tensor_core_ops": len(re.findall(TENSOR_CORE_OPS, code)),
    }


def _read_amd(compiled) -> dict:
    code = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", code)[1])

    return {
        "registers": field("vgpr_count"),
        "spills": field("vgpr_spill_count") + field("sgpr_spill_count"),
        "stack": field("private_segment_fixed_size"),
        "tensor_core_ops": len(re.findall(TENSOR_CORE_OPS, code)),
    }


def _run(*command) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


NUMBERS = ("warps", "registers", "spills", "stack", "shared", "tensor_core_ops")
COLUMNS = (
    "| kernel | inputs | constants | warps | registers | spills | stack | shared | tensor-core ops | 16-bit products |"
    " source |"
)


def render(rows: list[Resources]) -> str:
    """The table, as Markdown."""
    lines = [
        "# Resources of the Triton kernels",
        "",
        f"Compiled by Triton {triton.__version__}, without a GPU; `make triton-report` rewrites this file.",
        "Registers and bytes of stack are those of a thread, bytes of shared memory those of a program. Asserted:",
        "no spills, no stack, shared memory within the limit, tensor-core instructions wherever matrices of 16-bit",
        "numbers are multiplied. `source` is a digest of what was compiled.",
    ]
    for target in TARGETS:
        lines += ["", f"## {target}", "", f"Shared memory: at most {SHARED_LIMIT[target]} bytes.", "", COLUMNS]
        lines.append("|" + " --- |" * 3 + " ---: |" * 6 + " --- |" * 2)
        for r in rows:
            if r.target == target:
                numbers = " | ".join(str(getattr(r, name)) for name in NUMBERS)
                products = "yes" if r.multiplies_16_bits else "no"
                lines.append(f"| `{r.kernel}` | {r.inputs} | {r.constants} | {numbers} | {products} | `{r.source}` |")
    return "\n".join(lines) + "\n"


def parse(table: str) -> Iterator[Resources]:
    """The rows of a rendered table."""
    target = ""
    for line in table.splitlines():
        if line.startswith("## "):
            target = line.removeprefix("## ")
        elif line.startswith("| `"):
            kernel, inputs, constants, *numbers, products, source = (cell.strip("` ") for cell in line[1:-1].split("|"))
            yield Resources(
                target=target, kernel=kernel, inputs=inputs, constants=constants, multiplies_16_bits=products == "yes",
                source=source, **dict(zip(NUMBERS, map(int, numbers), strict=True)),
            )  # fmt: skip


def main() -> int:
    rows = report(everything="--all" in sys.argv[1:])
    TABLE.write_text(render(rows))
    faults = [fault for row in rows for fault in row.faults()]
    print("\n".join([*faults, f"{len(rows)} kernels, {len(faults)} faults: {TABLE}"]))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

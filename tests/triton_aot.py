"""Compiles every Triton kernel for GPUs that need not be here and reads what it costs from the machine code.

``python tests/triton_aot.py`` rewrites tests/triton_resources.md; followed by names of slices, only the rows of their
kernels, which takes a fraction of the time. An op's cases tagged "aot" or "aot_bf16" are what is
compiled: the public function forward and backward, with the specialisation and the configuration that a launch on the
target has.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
import triton
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
    hash: str

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


def report(slices: tuple[str, ...] = registry.SLICES) -> list[Resources]:
    """All kernels of these slices."""
    tasks = list(product(TARGETS, DTYPES, [slices]))
    with tempfile.TemporaryDirectory() as cache:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(2, context, initializer=_start_process, initargs=(cache,)) as pool:
            found = [row for rows in pool.map(_compile, *zip(*tasks, strict=True)) for row in rows]
    return _merged(found)


def _start_process(cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache
    torch.set_num_threads(1)


def _merged(rows: Iterable[Resources]) -> list[Resources]:
    """One row for each machine code, with all the dtypes that lead to it."""
    unique: dict[tuple[str, str], Resources] = {}
    for row in rows:
        known = unique.setdefault((row.target, row.hash), row)
        if row.inputs not in known.inputs.split(", "):
            unique[row.target, row.hash] = replace(known, inputs=f"{known.inputs}, {row.inputs}")
    return list(unique.values())


def _compile(target: str, dtype: torch.dtype, slices: tuple[str, ...]) -> list[Resources]:
    with capture(target) as launches:
        for spec in registry.ops(slices):
            for case in spec.tagged("aot") + spec.tagged("aot_bf16") * (dtype != torch.float16):
                for _, arguments in numerics.calls(spec, case, dtype, "cpu"):
                    numerics.evaluate(spec.function, arguments, spec.grad_args)
    unique = {launch.compiled.hash: launch for launch in launches}
    return [measure(target, dtype, launch) for launch in unique.values()]


def measure(target: str, dtype: torch.dtype, launch: Launch) -> Resources:
    """Read the machine code of a captured launch whose inputs are of ``dtype``."""
    read = _read_amd if TARGETS[target].backend == "hip" else _read_nvidia
    names = [param.name for param in launch.kernel.params if param.is_constexpr]
    products = re.findall(r"tt\.dot .*: tensor<\d+x\d+x(\w+)>", launch.compiled.asm["ttir"])
    return Resources(
        target=target,
        kernel=launch.kernel.__name__,
        inputs=str(dtype).removeprefix("torch."),
        constants=", ".join(f"{name}={launch.arguments[name]}" for name in names),
        warps=launch.compiled.metadata.num_warps,
        shared=launch.compiled.metadata.shared,
        multiplies_16_bits=any(element in ("bf16", "f16") for element in products),
        hash=launch.compiled.hash,
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


COLUMNS = "| kernel | inputs | constants | warps | registers | spills | stack | shared | tensor-core ops |"


def render(rows: list[Resources], others: dict[str, list[str]] | None = None) -> str:
    """The table, as Markdown; ``others`` are lines of each target that it has besides."""
    lines = [
        "# Resources of the Triton kernels",
        "",
        f"Compiled by Triton {triton.__version__}, without a GPU; `make triton-report` rewrites this file.",
        "Registers and bytes of stack are those of a thread, bytes of shared memory those of a program. Asserted:",
        "no spills, no stack, shared memory within the limit, tensor-core instructions wherever matrices of 16-bit",
        "numbers are multiplied.",
    ]
    for target in TARGETS:
        lines += ["", f"## {target}", "", f"Shared memory: at most {SHARED_LIMIT[target]} bytes.", "", COLUMNS]
        lines.append("|" + " --- |" * 3 + " ---: |" * 6)
        own = [_line(r) for r in rows if r.target == target]
        lines += sorted(own + (others or {}).get(target, []), key=_order)
    return "\n".join(lines) + "\n"


def _line(r: Resources) -> str:
    numbers = (r.warps, r.registers, r.spills, r.stack, r.shared, r.tensor_core_ops)
    return f"| `{r.kernel}` | {r.inputs} | {r.constants} | {' | '.join(map(str, numbers))} |"


def _order(line: str) -> tuple[str, str, str]:
    kernel, inputs, constants, *_ = line.split(" | ")
    return kernel, constants, inputs


def _lines_without(table: str, kernels: set[str]) -> dict[str, list[str]]:
    """The lines of a table by target, but for those of ``kernels``."""
    sections = {section.split("\n", 1)[0]: section for section in table.split("## ")[1:]}
    return {
        target: [line for line in section.splitlines() if line.startswith("| `") and line.split("`")[1] not in kernels]
        for target, section in sections.items()
    }


def main() -> int:
    slices = tuple(sys.argv[1:])
    rows = report(slices or registry.SLICES)
    others = _lines_without(TABLE.read_text(), {row.kernel for row in rows}) if slices else None
    TABLE.write_text(render(rows, others))
    faults = [fault for row in rows for fault in row.faults()]
    print("\n".join([*faults, f"{len(rows)} kernels, {len(faults)} faults: {TABLE}"]))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

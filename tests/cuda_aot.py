"""Reads what every CUDA kernel costs from the machine code that nvcc made of csrc/cuda, for GPUs that need not be here.

``python tests/cuda_aot.py`` rewrites tests/cuda_resources.md from the objects of the last build.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import triton

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_name("cuda_resources.md")
TARGETS = ("sm_80", "sm_90", "sm_100")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"  # they read nvcc's output too
# what reads or writes no more than a number or two for each row or column, where 16 bytes at a time would gain nothing
FEW_LOADS = ("contrast_terms_kernel", "contrast_factors_kernel", "contrast_totals_kernel", "contrast_merge_kernel")
FEW_STORES = (*FEW_LOADS[1:], "contrast_sigmoid_rows_kernel")
# or what goes from bit to bit or from index to index, or folds a few partial sums
NARROW = r"(block|multi_block|span)_mask_kernel|patch_mask::patch_(select|places|invert|lists|total)_kernel\b.*"
NARROW += r"|patch_loss::patch_loss_(count|total)_kernel\b.*"
# or what serves rows of narrower alignment: its variant for uint4 is the wide one
NARROW += r"|patch_mask::patch_\w+_kernel<(\w+, )?(uint2|unsigned int|unsigned short|float)\b.*"
WIDE_LOAD, WIDE_STORE = r"\bLDG\.E\S*\.128\b", r"\bSTG\.E\S*\.128\b"


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one target."""

    target: str
    kernel: str
    registers: int  # a thread
    stack: int  # bytes of local memory a thread, where registers are spilled
    spills: int  # instructions
    shared: int  # bytes a block, beside dynamic shared memory
    wide_loads: int  # instructions that load or store 16 bytes of global memory
    wide_stores: int

    def faults(self) -> list[str]:
        found = []
        if self.stack or self.spills:
            found.append(f"spills: {self.spills}, stack: {self.stack} bytes")
        # eight elements at a time are 16 bytes or more, but for float64, which goes one by one
        lacks_loads = not self.wide_loads and self.kernel not in FEW_LOADS
        lacks_stores = not self.wide_stores and self.kernel not in FEW_STORES
        wide = "Fp64" not in self.kernel and not re.fullmatch(NARROW, self.kernel)
        if wide and (lacks_loads or lacks_stores):
            found.append("no 16-byte loads or stores")
        return [f"{self.target} {self.kernel}: {fault}" for fault in found]


def objects() -> list[Path]:
    """What nvcc made of csrc/cuda in the last build of this tree."""
    return sorted(ROOT.glob("build/ext-*/csrc/cuda/*.cu.o"))


def report() -> list[Resources]:
    rows = [row for path in objects() for target in TARGETS for row in _read(path, target)]
    return sorted(rows, key=lambda row: (TARGETS.index(row.target), row.kernel))


def _read(path: Path, target: str) -> list[Resources]:
    usage = _run(TOOLS / "cuobjdump", "-res-usage", "-arch", target, path)
    code = _run(TOOLS / "cuobjdump", "-sass", "-arch", target, path)
    bodies = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", code, re.DOTALL))
    pattern = r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    return [
        Resources(
            target=target,
            kernel=_readable(name),
            registers=int(registers),
            stack=int(stack) + int(local),
            spills=len(re.findall(r"\b(?:STL|LDL)\b", bodies[name])),
            shared=int(shared),
            wide_loads=len(re.findall(WIDE_LOAD, bodies[name])),
            wide_stores=len(re.findall(WIDE_STORE, bodies[name])),
        )
        for name, registers, stack, shared, local in re.findall(pattern, usage)
    ]


def _readable(symbol: str) -> str:
    """ema_update_kernel<Fp32, Bf16> of a mangled name."""
    name = _run("c++filt", symbol).strip().removeprefix("void ")
    return re.sub(r"\(.*|(sslkernels|ema|contrast|masks)::", "", name)


def _run(*command) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def nvcc_version() -> str:
    return re.search(r"V([\d.]+)", _run(shutil.which("nvcc") or "nvcc", "--version"))[1]


def render(rows: list[Resources]) -> str:
    lines = [
        "# Resources of the CUDA kernels",
        "",
        f"Compiled by nvcc {nvcc_version()}, without a GPU; `make cuda-report` rewrites this file.",
        "Registers and bytes of stack are those of a thread, bytes of shared memory those of a block; the last columns",
        "count instructions that load and store 16 bytes. Asserted: no spills, no stack, and 16-byte accesses wherever",
        "there is no float64, but for kernels that touch only a number or two for each row or column, or single bits.",
    ]
    columns = "| kernel | registers | spills | stack | shared | 16-byte loads | 16-byte stores |"
    for target in TARGETS:
        lines += ["", f"## {target}", "", columns, "|" + " --- |" + " ---: |" * 6]
        for r in rows:
            if r.target == target:
                numbers = (r.registers, r.spills, r.stack, r.shared, r.wide_loads, r.wide_stores)
                lines.append(f"| `{r.kernel}` | {' | '.join(map(str, numbers))} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    rows = report()
    faults = [fault for row in rows for fault in row.faults()]
    if rows:
        TABLE.write_text(render(rows))
    print("\n".join([*faults, f"{len(rows)} kernels, {len(faults)} faults: {TABLE}"]))
    return 1 if faults or not rows else 0


if __name__ == "__main__":
    sys.exit(main())

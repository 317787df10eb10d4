"""Every CUDA kernel compiles for three targets without a spill, with wide accesses, as its committed table says."""

from __future__ import annotations

import difflib
import re
import shutil
from dataclasses import replace

import pytest
from conftest import require_or_skip

cuda_aot = pytest.importorskip("cuda_aot", reason="triton, whose tools read nvcc's output, is not installed")

HINT = "`make cuda-report` rewrites the table"


@pytest.fixture(scope="module")
def rows():
    tools = shutil.which("nvcc") and shutil.which("c++filt")
    require_or_skip(tools and cuda_aot.objects(), "nvcc is not installed, or the extension is not built in this tree")
    return cuda_aot.report()


def test_no_kernel_spills_or_lacks_wide_accesses(rows):
    faults = [fault for row in rows for fault in row.faults()]
    assert not faults, "\n".join(faults)


def test_every_kernel_is_compiled_for_every_target(rows):
    sources = [(cuda_aot.ROOT / "csrc/cuda").glob("*.cuh")]
    written = {
        name for paths in sources for path in paths for name in re.findall(r"\b(\w+_kernel)\(", path.read_text())
    }
    for target in cuda_aot.TARGETS:
        compiled = {re.sub("<.*", "", row.kernel).split("::")[-1] for row in rows if row.target == target}
        assert compiled == written
    counts = [sum(row.target == target for row in rows) for target in cuda_aot.TARGETS]
    assert len(set(counts)) == 1


def test_the_table_is_up_to_date(rows):
    committed = cuda_aot.TABLE.read_text()
    if f"nvcc {cuda_aot.nvcc_version()}," not in committed:
        assert "Compiled by nvcc" in committed, HINT
        return  # another version allots other registers; the limits hold all the same
    changed = "\n".join(
        difflib.unified_diff(committed.splitlines(), cuda_aot.render(rows).splitlines(), lineterm="", n=0)
    )
    assert not changed, f"{HINT}:\n{changed}"


def test_faults_are_found(rows):
    row = next(row for row in rows if row.wide_loads and row.wide_stores)
    assert not row.faults()
    assert len(replace(row, spills=1).faults()) == 1
    assert len(replace(row, stack=8, wide_loads=0).faults()) == 2
    assert len(replace(row, wide_stores=0).faults()) == 1

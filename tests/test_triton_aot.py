"""Every Triton kernel compiles for every target without a spill, as its committed table says."""

from __future__ import annotations

import difflib
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
import triton_aot
from triton_aot import DTYPES, SHARED_LIMIT, TABLE
from triton_on_cpu import TARGETS, capture, kernels

HINT = "`make triton-report` rewrites the table"


@pytest.fixture(scope="module")
def rows():
    return triton_aot.report()


def test_no_kernel_spills_or_lacks_tensor_cores(rows):
    faults = [fault for row in rows for fault in row.faults()]
    assert not faults, "\n".join(faults)


def test_every_kernel_is_compiled_for_every_target_and_dtype(rows):
    entries = {name for name in kernels() if name.endswith("_kernel")}
    for target in TARGETS:
        assert {row.kernel for row in rows if row.target == target} == entries
        dtypes = {name for row in rows if row.target == target for name in row.inputs.split(", ")}
        assert dtypes == {str(dtype).removeprefix("torch.") for dtype in DTYPES}


def test_matrices_of_16_bits_are_multiplied_by_tensor_cores(rows):
    # every 16-bit kernel that has a product is recognised as such: the rule above is not empty
    products = [row for row in rows if row.multiplies_16_bits]
    assert {row.target for row in products} == set(TARGETS)
    assert all(row.tensor_core_ops for row in products)


def test_the_table_is_up_to_date(rows):
    committed = TABLE.read_text() if TABLE.exists() else ""
    if f"Triton {triton.__version__}," not in committed:
        assert "Compiled by Triton" in committed, HINT
        return  # another version allots other registers; the limits hold all the same
    difference = difflib.unified_diff(committed.splitlines(), triton_aot.render(rows).splitlines(), lineterm="", n=0)
    changed = "\n".join(difference)
    assert not changed, f"{HINT}:\n{changed}"


@triton.jit
def _hungry_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    x = tl.load(x_ptr + rows * SIZE + columns)
    y = tl.load(x_ptr + columns * SIZE + rows)
    tl.store(out_ptr + rows * SIZE + columns, tl.dot(x, y))


def test_faults_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x = torch.zeros(128, 128, dtype=torch.bfloat16)
    with capture("sm_80") as launches, triton_aot.compiled_once("sm_80"):
        _hungry_kernel[(1,)](x_ptr=x, out_ptr=x.float(), SIZE=128, num_warps=1)
    measured = triton_aot.measure("sm_80", x.dtype, launches[0])
    assert measured.spills > 0 and measured.stack > 0 and measured.multiplies_16_bits and measured.tensor_core_ops > 0
    [fault] = measured.faults()
    assert fault.startswith("sm_80 _hungry_kernel bfloat16 (SIZE=128): spills: ")
    worse = replace(measured, shared=SHARED_LIMIT["sm_80"] + 1, tensor_core_ops=0)
    assert len(worse.faults()) == 3


def test_the_table_is_read_as_it_is_written():
    assert triton_aot.render(list(triton_aot.parse(TABLE.read_text()))) == TABLE.read_text()

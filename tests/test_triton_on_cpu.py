"""The interpreter harness finds what it is there to find, and gets bfloat16 right."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton_on_cpu import bf16_to_fp32, capture, fp32_to_bf16, interpret


@triton.jit
def _scale_kernel(x_ptr, out_ptr, N, FACTOR: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < N if MASKED else offsets >= 0
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    tl.store(out_ptr + offsets, x * FACTOR, mask=mask)


@triton.jit
def _last_program_kernel(out_ptr):
    tl.store(out_ptr, tl.program_id(0))


@triton.jit
def _sum_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.atomic_add(out_ptr, tl.sum(x * x - x, 0).to(tl.float32))


@triton.jit
def _fma_kernel(x_ptr, out_ptr):
    x = tl.load(x_ptr)
    tl.store(out_ptr, tl.fma(x, x, -(x * x)))


@triton.jit
def _matmul_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    a = tl.load(a_ptr + rows * SIZE + columns)
    b = tl.load(b_ptr + rows * SIZE + columns)
    tl.store(out_ptr + rows * SIZE + columns, tl.dot(a, b).to(out_ptr.dtype.element_ty))


def scale(x, out=None, *, block=8, masked=True, grid=None):
    out = torch.empty_like(x) if out is None else out
    grid = grid or (triton.cdiv(x.numel(), block),)
    _scale_kernel[grid](x_ptr=x, out_ptr=out, N=x.numel(), FACTOR=3, BLOCK=block, MASKED=masked)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_right_kernel_runs(dtype):
    x = torch.randn(29, generator=torch.Generator().manual_seed(0)).to(dtype)
    with interpret() as launches:
        out = scale(x)
    torch.testing.assert_close(out, x * 3, rtol=0, atol=0)
    assert [(launch.kernel.__name__, launch.grid) for launch in launches] == [("_scale_kernel", (4, 1, 1))]


@pytest.mark.parametrize("size", [29, 31])
def test_a_pointer_out_of_bounds_is_caught(size):
    with interpret(), pytest.raises(IndexError, match=r"load out of bounds in program \(3, 0, 0\)"):
        scale(torch.zeros(size), out=torch.zeros(32), masked=False)
    with interpret(), pytest.raises(IndexError, match="store out of bounds"):
        scale(torch.zeros(32), out=torch.zeros(size), masked=False)


def test_bounds_are_those_of_the_view_not_of_its_storage():
    storage = torch.zeros(64)
    with interpret(), pytest.raises(IndexError, match="out of bounds"):
        scale(storage[:29], masked=False)


def test_an_unwritten_output_shows():
    with interpret():
        out = scale(torch.ones(29), grid=(3,))
    assert out[:24].eq(3).all() and out[24:].isnan().all()


def test_order_dependence_shows():
    def last(seed):
        out = torch.zeros((), dtype=torch.int32)
        with interpret(order_seed=seed):
            _last_program_kernel[(9,)](out)
        return out.item()

    assert last(None) == 8
    assert len({last(seed) for seed in range(4)}) > 1
    assert last(1) == last(1)


def test_bfloat16_rounds_to_nearest_even_and_keeps_nan():
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(1), dtype=torch.int64)
    values = bits.int().view(torch.float32)
    values[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.4e38])
    expected = values.bfloat16().float()
    actual = torch.from_numpy(bf16_to_fp32(fp32_to_bf16(values.numpy())))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_bfloat16_rounds_after_every_operation():
    x = torch.randn(64, generator=torch.Generator().manual_seed(2)).bfloat16()
    out = torch.zeros(())
    with interpret():
        _sum_kernel[(1,)](x_ptr=x, out_ptr=out, BLOCK=64)
    expected = (x * x - x).float().sum()  # the elements rounded to bfloat16, as is their sum
    assert out == expected.bfloat16() != (x.float() * x.float() - x.float()).sum().bfloat16()


def test_fma_rounds_once():
    x, out = torch.tensor(1 + 2.0**-20), torch.zeros(())
    with interpret():
        _fma_kernel[(1,)](x_ptr=x, out_ptr=out)
    assert out == x.double() ** 2 - (x * x).double() != 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dot_accumulates_in_fp32(dtype):
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(16, 16, generator=generator).to(dtype) for _ in range(2))
    out = torch.zeros(16, 16)
    with interpret():
        _matmul_kernel[(1,)](a_ptr=a, b_ptr=b, out_ptr=out, SIZE=16)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-6)


def test_nothing_stays_patched(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x = torch.ones(29)
    with interpret():
        scale(x)
    with pytest.raises(RuntimeError):  # no driver: the JIT is itself again
        scale(x)
    with capture("sm_90") as launches:
        scale(x)
    assert "ptx" in launches[0].compiled.asm
    with pytest.raises(IndexError), interpret():
        scale(x, masked=False)
    assert not torch.empty(1000).isnan().all()

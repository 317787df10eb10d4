"""The moving average's GPU kernels without a GPU: Triton's interpreted, CUDA's run on the CPU, the same bits in all."""

from __future__ import annotations

import shutil

import cuda_on_cpu
import pytest
import torch
from conftest import require_or_skip
from cuda_on_cpu import SCHEDULES
from triton_on_cpu import interpret

from sslkernels import _library, ema_update_
from sslkernels.ops.ema import _plain_lists
from sslkernels.ops.ema.cases import OPS, updated

SPEC = OPS[0]
CASES = SPEC.tagged("verify")
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS = {"stochastic_rounding_seed": 2**63 + 17, "step": 2**31 + 3}
SHAPES = ((4096 + 8,), (3, 5, 7), (), (16, 8, 3, 3), (2, 9000))


def on_cuda(schedule=0):
    """`ema_update_` by the CUDA kernel on the CPU, under one schedule."""
    require_or_skip(shutil.which("g++"), "g++ is not installed")
    module = cuda_on_cpu.kernels(schedule)

    def update(
        teacher, student, momentum, *, stochastic_rounding_seed=None, step=0, first_elements=None, found_inf=None,
        bf16_copy=None,
    ):  # fmt: skip
        firsts = first_elements or [0] * len(teacher)
        keys = [key for index, first in enumerate(firsts) for key in (index, first)]
        found = None if found_inf is None else float(found_inf)
        module.ema_update(teacher, student, momentum, bf16_copy, found, stochastic_rounding_seed, step, keys)

    return update


def tensors(dtype, seed, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in made]


def by_all(teacher_dtype, student_dtype, momentum=0.9, misaligned=False, triton=True, **options):
    """The teachers, and the copies if any, after one update by each implementation that there is."""

    def run(update):
        teacher, student = tensors(teacher_dtype, 0), tensors(student_dtype, 1)
        if misaligned:
            teacher = [torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in teacher]
        copies = [torch.full_like(t, 7, dtype=torch.bfloat16) for t in teacher] if options.get("copy") else None
        rest = {name: value for name, value in options.items() if name != "copy"}
        update(teacher, student, momentum, bf16_copy=copies, **rest)
        return teacher + (copies or [])

    results = {"default": run(ema_update_), "cuda": run(on_cuda())}
    if triton:
        with interpret(order_seed=1) as launches:
            results["triton"] = run(ema_update_)
        assert launches or momentum == 1
    return results


def assert_all_equal(results):
    for name, tensors in results.items():
        for index, (actual, expected) in enumerate(zip(tensors, results["default"], strict=True)):
            assert torch.equal(actual, expected), f"{name} differs from the default backend in tensor {index}"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", SPEC.dtypes, ids=str)
def test_cuda_gives_the_bits_of_the_cpu_under_every_schedule(schedule, dtype):
    for case in CASES:
        arguments = case.make("cpu", dtype)
        for options in ({}, OPTIONS):
            expected = updated(**arguments, **options)
            actual = updated(**arguments, **options, function=on_cuda(schedule))
            assert torch.equal(actual, expected), f"{case.name}, {options}"


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
def test_triton_gives_the_bits_of_the_cpu(dtype):
    for case in CASES:
        arguments = case.make("cpu", dtype)
        for options in ({}, OPTIONS):
            expected = updated(**arguments, **options)
            with interpret():
                actual = updated(**arguments, **options)
            assert torch.equal(actual, expected), f"{case.name}, {options}"


@pytest.mark.parametrize("student", GPU_DTYPES, ids=str)
@pytest.mark.parametrize("teacher", GPU_DTYPES, ids=str)
def test_every_pair_of_dtypes(teacher, student):
    assert_all_equal(by_all(teacher, student))


@pytest.mark.parametrize("teacher", SPEC.dtypes, ids=str)
def test_float64(teacher):
    assert_all_equal(by_all(teacher, torch.float64, triton=False, **OPTIONS))


@pytest.mark.parametrize("momentum", [0.9, 0.25, 0.0])
@pytest.mark.parametrize("dtype", GPU_DTYPES[1:], ids=str)
def test_the_same_seed_gives_the_same_bits(dtype, momentum):
    results = by_all(dtype, torch.float32, momentum, **OPTIONS)
    assert_all_equal(results)
    nearest = by_all(dtype, torch.float32, momentum)["default"]
    assert momentum == 0.0 or not torch.equal(results["default"][0], nearest[0])


@pytest.mark.parametrize("first", [8, 5])
def test_shards_draw_what_the_whole_draws(first):
    firsts = [first * (index + 1) for index in range(len(SHAPES))]
    assert_all_equal(by_all(torch.bfloat16, torch.bfloat16, first_elements=firsts, **OPTIONS))


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
def test_tensors_that_are_not_aligned(dtype, options):
    assert_all_equal(by_all(dtype, dtype, misaligned=True, **options))


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_copy_and_found_inf(found):
    assert_all_equal(by_all(torch.float32, torch.bfloat16, copy=True, found_inf=torch.tensor(found)))


def test_the_compiled_cuda_kernel_owns_the_key():
    require_or_skip(shutil.which("nvcc") and _library.extension, "nvcc is not installed, or the extension is not built")
    backend = _library.backends()["ema_update_"]["cuda"]
    assert (backend.active, backend.besides) == ("cuda", ("triton",))


def test_no_call_site_outlives_its_table():
    """Tables are kept for as many lists as a program has, not for every list there ever was."""
    from sslkernels.ops.ema import kernels

    with interpret():
        for size in range(8, 8 * (kernels.TABLES_KEPT + 4), 8):
            ema_update_([torch.zeros(size)], [torch.ones(size)], 0.5)
    assert len(kernels._tables) == kernels.TABLES_KEPT


def test_the_way_past_the_dispatcher_declines_what_is_not_on_the_gpu():
    require_or_skip(shutil.which("nvcc") and _library.extension, "nvcc is not installed, or the extension is not built")
    direct, (teacher,), momentum = _plain_lists(), tensors(torch.float32, 0, ((5,),)), torch.tensor(0.5).double()
    before = teacher.clone()
    assert direct.update_on_gpu(0, [teacher], [teacher + 1], momentum, None, None, None, None) is False
    assert torch.equal(teacher, before)

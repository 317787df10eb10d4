"""The moving average on the CPU: values, bits, every layout and dtype, torch integration, and every error."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from conftest import ISAS, require_or_skip
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_op_close

import sslkernels
from sslkernels import _library, ema_update_
from sslkernels.ops.ema import reference
from sslkernels.ops.ema.cases import OPS

SPEC = OPS[0]
VERIFY = SPEC.tagged("verify")
DTYPES = SPEC.dtypes
NARROW = (torch.bfloat16, torch.float16)


def tensors(*shapes, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def test_the_compiled_kernel_is_there():
    require_or_skip(_library.extension, _library.extension_error)
    assert sslkernels.backends()["ema_update_"]["cpu"] == sslkernels.Backend("cpp")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", VERIFY, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_as_exact_as_lerp(case, dtype, backend):
    assert_op_close(SPEC, case, dtype, backend=backend)


@pytest.mark.parametrize("teacher, student", list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_every_pair_of_dtypes(teacher, student):
    shapes = ((3, 40, 5), (1,), (4099,))
    targets, sources = tensors(*shapes, dtype=teacher), tensors(*shapes, seed=1, dtype=student)
    compute = torch.promote_types(torch.promote_types(teacher, student), torch.float32)
    expected = [
        reference.lerp(t.to(compute), s.to(compute), torch.tensor(0.25)).to(teacher)
        for t, s in zip(targets, sources, strict=True)
    ]
    ema_update_(targets, sources, 0.75)
    torch.testing.assert_close(targets, expected, rtol=1e-15 if compute == torch.float64 else 0, atol=1e-17)


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.complex32], ids=str)
def test_complex(dtype):
    real = {torch.complex64: torch.float32, torch.complex128: torch.float64, torch.complex32: torch.float16}[dtype]
    parts, others = tensors((5, 7, 2), dtype=real), tensors((5, 7, 2), seed=1, dtype=real)
    teacher, student = torch.view_as_complex(parts[0]).clone(), torch.view_as_complex(others[0])
    ema_update_([teacher, teacher.T], [student, student.T], 0.5) if False else ema_update_(
        [teacher], [student.conj()], 0.5
    )
    mirrored = others[0] * torch.tensor([1, -1], dtype=real)
    expected = parts[0].lerp(mirrored, 0.5)
    torch.testing.assert_close(torch.view_as_real(teacher), expected)
    strided = torch.view_as_complex(parts[0]).clone()[:, ::2]
    ema_update_([strided], [student[:, ::2]], 0.5)
    torch.testing.assert_close(torch.view_as_real(strided.contiguous()), parts[0][:, ::2].lerp(others[0][:, ::2], 0.5))


def test_a_negated_view_is_read_with_its_sign():
    z = torch.randn(4, dtype=torch.complex64)
    for student in (z.conj().imag, z.conj().imag[:1]):
        teacher = torch.zeros(student.shape)
        ema_update_([teacher], [student], 0.0)
        assert torch.equal(teacher, student)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_layout(data):
    """Tensors behind random permutations, steps and offsets, against the same values laid out plainly."""
    shape = data.draw(st.lists(st.integers(0, 5), max_size=5))
    dtype = data.draw(st.sampled_from(DTYPES))

    def laid_out(seed):
        order = data.draw(st.permutations(range(len(shape))))
        steps = [data.draw(st.integers(1, 3)) for _ in shape]
        wide = torch.randn([shape[d] * steps[d] for d in order], generator=torch.Generator().manual_seed(seed)).to(
            dtype
        )
        picked = wide[tuple(slice(None, None, steps[d]) for d in order)]
        return picked.permute([order.index(d) for d in range(len(shape))]), wide

    (teacher, whole), (student, _) = laid_out(1), laid_out(2)
    seed = data.draw(st.none() | st.integers(0, 2**64 - 1))
    plain, untouched = teacher.contiguous().clone(), whole.clone()
    ema_update_([plain], [student.contiguous()], 0.9, stochastic_rounding_seed=seed)
    ema_update_([teacher], [student], 0.9, stochastic_rounding_seed=seed)
    assert torch.equal(teacher, plain)
    teacher.zero_()  # what lies between the elements was not touched
    reached = torch.zeros(whole.shape, dtype=torch.bool).as_strided(teacher.shape, teacher.stride()).fill_(True)._base
    assert torch.equal(whole[~reached], untouched[~reached])


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.5, 0.996])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_equal_student_is_a_fixed_point(dtype, momentum):
    student = tensors((1000,), (3, 5), dtype=dtype)
    limits = torch.finfo(dtype)
    edges = [0.0, -0.0, torch.inf, -torch.inf, limits.max, limits.smallest_normal / 4]
    student[0][:6] = torch.tensor(edges, dtype=dtype)
    for seed in (None, 7):
        teacher = [s.clone() for s in student]
        for step in range(1000):
            ema_update_(teacher, student, momentum, stochastic_rounding_seed=seed, step=step)
        for t, s in zip(teacher, student, strict=True):
            assert torch.equal(t.view(torch.uint8), s.view(torch.uint8))  # the sign of zero too


@pytest.mark.parametrize("as_tensor", [False, True])
def test_momentum_1_leaves_the_teacher_alone(as_tensor):
    teacher, student = tensors((70,)), [torch.full((70,), torch.nan)]
    before, version = teacher[0].clone(), teacher[0]._version
    ema_update_(teacher, student, torch.tensor(1.0) if as_tensor else 1.0)
    assert torch.equal(teacher[0], before)
    if not as_tensor:  # a tensor's value is not known when the version is raised
        assert teacher[0]._version == version


def test_momentum_0_copies_even_where_the_teacher_is_not_finite():
    teacher, student = [torch.tensor([torch.nan, torch.inf, 1.0])], [torch.tensor([1.0, torch.inf, -torch.inf])]
    ema_update_(teacher, student, 0)
    assert torch.equal(teacher[0], student[0])


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_found_inf_skips_the_update_but_not_the_copy(found):
    teacher, student = tensors((70, 3), (5,)), tensors((70, 3), (5,), seed=1)
    expected = [t.clone() if found else t.lerp(s, 0.25) for t, s in zip(teacher, student, strict=True)]
    copies = [torch.full(t.shape, torch.nan, dtype=torch.bfloat16) for t in teacher]
    ema_update_(teacher, student, 0.75, found_inf=torch.tensor([found]), bf16_copy=copies)
    torch.testing.assert_close(teacher, expected, rtol=0, atol=0)
    assert all(torch.equal(c, t.bfloat16()) for c, t in zip(copies, teacher, strict=True))


@pytest.mark.parametrize("student_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("momentum", [0.9, 1.0])
def test_bf16_copy(momentum, student_dtype):
    teacher, student = tensors((70, 3), (4, 6)), tensors((70, 3), (4, 6), seed=1, dtype=student_dtype)
    copies = [torch.zeros(3, 70, dtype=torch.bfloat16).T, torch.zeros(4, 6, dtype=torch.bfloat16)]
    ema_update_(teacher, student, momentum, bf16_copy=copies)
    assert all(torch.equal(c, t.bfloat16()) for c, t in zip(copies, teacher, strict=True))


# ---- stochastic rounding


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_random_bits_are_those_of_the_definition(dtype):
    """Everything that a kernel may get wrong about the counter: index, step, seed, position, order in memory."""
    shapes = ((300,), (2, 8, 3, 3), (7, 11), (1,), (4099,))
    for seed, step, first in ((0, 0, 0), (2**63 + 12345, 2**31 + 5, 8), (-1, 2**32 - 1, 3)):
        results = []
        for backend in (None, "cpp", "reference"):
            teacher, student = tensors(*shapes, dtype=dtype), tensors(*shapes, seed=1, dtype=dtype)
            teacher[1] = teacher[1].to(memory_format=torch.channels_last)
            student[1] = student[1].to(memory_format=torch.channels_last)
            teacher[2] = teacher[2].T.contiguous().T
            firsts = [first * index for index in range(len(shapes))] if first else None
            if backend == "cpp" and not _library.extension:
                continue
            options = {"stochastic_rounding_seed": seed, "step": step, "first_elements": firsts, "backend": backend}
            ema_update_(teacher, student, 0.99, **options)
            results.append(teacher)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_rounds_to_a_neighbour_whose_mean_is_the_value(dtype):
    values = torch.tensor([1.0013, -3.3e-5, 0.7, -0.1234, 2.0**-14 * 0.99, 3.1e-7, 2.0**-24 * 0.3, -65000.0, 0.0])
    count = 20000
    teacher, student = [torch.zeros(len(values), count, dtype=dtype)], [values[:, None].expand(-1, count)]
    ema_update_(teacher, student, 0.0, stochastic_rounding_seed=3)
    rounded = teacher[0].double()
    nearest = values.to(dtype)
    spacing = (torch.nextafter(nearest.abs(), torch.tensor(torch.inf, dtype=dtype)) - nearest.abs()).double()
    assert ((rounded - values.double()[:, None]).abs() < spacing[:, None]).all()
    # the standard deviation of the mean is at most half the distance of neighbours / sqrt(count)
    assert ((rounded.mean(1) - values.double()).abs() <= 2.5 * spacing / count**0.5).all()


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_keeps_what_is_not_finite_and_overflows_to_infinity(dtype):
    student = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38]).repeat(50)
    teacher = torch.zeros(250, dtype=dtype)
    ema_update_([teacher], [student], 0.0, stochastic_rounding_seed=1)
    expected = student.to(dtype)
    largest = torch.finfo(dtype).max
    finite = student.isfinite()
    assert torch.equal(teacher[~finite].nan_to_num(7), expected[~finite].nan_to_num(7))
    assert (teacher[finite].abs().double() >= largest).all() and torch.equal(
        teacher[finite].sign(), student[finite].sign().to(dtype)
    )


def test_follows_the_fp32_teacher_where_rounding_to_nearest_stands_still():
    # from 1 towards 2 at momentum 0.999: a step is a thousandth, an eighth of what bf16 can tell apart
    count, steps = 4096, 5000
    student = [torch.full((count,), 2.0)]
    exact, stochastic, nearest = ([torch.ones(count, dtype=d)] for d in (torch.float32, torch.bfloat16, torch.bfloat16))
    for step in range(steps):
        ema_update_(exact, student, 0.999)
        ema_update_(stochastic, student, 0.999, stochastic_rounding_seed=11, step=step)
        ema_update_(nearest, student, 0.999)
        if step in (50, 500, 2000, steps - 1):
            moved = exact[0].mean().item() - 1
            assert stochastic[0].float().mean().item() - 1 == pytest.approx(moved, rel=0.01 if step > 50 else 0.1)
    assert torch.equal(nearest[0], torch.ones(count, dtype=torch.bfloat16))


def test_resumes_and_differs_by_step_seed_and_tensor():
    teacher, student = tensors((999,), (999,), dtype=torch.bfloat16), tensors((999,), (999,), seed=1)
    teacher[1], student[1] = teacher[0].clone(), student[0].clone()

    def after(seed, step):
        result = [t.clone() for t in teacher]
        ema_update_(result, student, 0.99, stochastic_rounding_seed=seed, step=step)
        return result

    first = after(1, 1)
    assert torch.equal(first[0], after(1, torch.tensor(1))[0])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], after(1, 2)[0])
    assert not torch.equal(first[0], after(2, 1)[0])


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "baseline"])
def test_every_instruction_set_gives_the_same_bits(isa):
    program = (
        "import torch, sys; from sslkernels import ema_update_; g = torch.Generator().manual_seed(0)\n"
        "r = lambda: [torch.randn(s, generator=g) for s in ((4099,), (7, 5), (2, 3, 4, 5))]\n"
        "t, s = r(), r(); b, h = [x.bfloat16() for x in t], [x.half() for x in t]\n"
        "for m in (0.3, 0.999):\n"
        "  for x in (t, b, h): ema_update_(x, s, m); ema_update_(x, s, m, stochastic_rounding_seed=5, step=2)\n"
        "torch.save((t, b, h), sys.argv[1])"
    )

    def result(isa):
        path = f"{os.environ.get('TMPDIR', '/tmp')}/ema_{os.getpid()}_{isa}.pt"
        subprocess.run([sys.executable, "-c", program, path], check=True, env={**os.environ, "SSLKERNELS_ISA": isa})
        loaded = torch.load(path)
        os.remove(path)
        return [tensor for group in loaded for tensor in group]

    assert all(torch.equal(a, b) for a, b in zip(result(isa), result("baseline"), strict=True))

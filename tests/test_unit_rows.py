"""Rows at unit length and the products of pairs: the operator's definition, its C++, and its Triton kernels."""

from __future__ import annotations

import contextlib

import pytest
import torch
from triton_on_cpu import TARGETS, interpret

from sslkernels.ops.infonce import unit_rows_op
from sslkernels.ops.infonce.reference import NORMALIZE_EPS

GIVEN = [(True, True, True), (False, True, False), (False, False, True), (True, False, True), (True, False, False)]
KERNELS = [*TARGETS, "cpp"]  # on a machine without the extension the definition takes the place of C++
SHAPES = [(5, 3), (33, 130), (1, 1), (17, 64)]


def rows(count, dim, dtype=torch.float32, *, seed=0):
    """Of many lengths: 0, one below the least that counts, and a large one among them."""
    x = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
    for index, factor in enumerate((0, NORMALIZE_EPS / 10 / dim, 1e18)[: count - 1]):
        x[index] *= factor
    return x.to(dtype)


def kernels(target):
    """Triton's, interpreted for a target, or those of the CPU."""
    return contextlib.nullcontext() if target == "cpp" else interpret(target, order_seed=1)


def gradients(given, count, dim):
    generator = torch.Generator().manual_seed(2)
    made = [torch.randn(shape, generator=generator) for shape in ((count, dim), (count, dim), (count,))]
    return [grad if wanted else None for grad, wanted in zip(made, given, strict=True)]


def doubled(*tensors):
    return [None if x is None else x.double() for x in tensors]


def assert_close(actual, exact):
    """Row by row, since the lengths of the clamped rows have many magnitudes."""
    assert actual.shape == exact.shape
    if exact.numel():
        error = (actual.double() - exact).abs().amax(dim=1)
        assert (error <= 8 * torch.finfo(torch.float32).eps * exact.abs().amax(dim=1)).all()


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("target", KERNELS)
def test_kernels_agree_with_the_definition(target, shape, paired):
    x, y = rows(*shape), rows(*shape, seed=1).T.contiguous().T if paired else None
    with kernels(target):
        actual = torch.ops.sslkernels.unit_rows_fwd(x, y)
    for one, exact in zip(actual[:2], unit_rows_op.definition_fwd(*doubled(x, y))[:2], strict=True):
        assert_close(one, exact)
    if paired:
        exact = unit_rows_op.definition_fwd(*doubled(x, y))[2]
        torch.testing.assert_close(actual[2].double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", [KERNELS[0], "cpp"])
def test_gradients_of_the_kernels(target, dtype, shape, given):
    x, y, grads = rows(*shape, dtype), rows(*shape, seed=1).T.contiguous().T, gradients(given, *shape)
    with kernels(target):
        actual = torch.ops.sslkernels.unit_rows_bwd(*grads, x, y)
    exact = unit_rows_op.definition_bwd(*doubled(*grads, x, y))
    for side, (one, two) in enumerate(zip(actual, exact, strict=True)):
        rounding = torch.finfo((x, y)[side].dtype).eps
        # what is left of a gradient along its row is the rounding of what was there
        scale = doubled(x, y)[side].norm(dim=1, keepdim=True).clamp_min(NORMALIZE_EPS)
        assert ((one.double() - two).abs() * scale).max() <= 32 * rounding


@pytest.mark.parametrize("given", GIVEN)
def test_the_written_out_gradient_is_that_of_autograd(given):
    x, y = (rows(9, 5, torch.float64, seed=seed).requires_grad_() for seed in range(2))
    grads = doubled(*gradients(given, 9, 5))
    outputs = unit_rows_op.definition_fwd(x, y)
    total = sum((out * grad).sum() for out, grad in zip(outputs, grads, strict=True) if grad is not None)
    expected = torch.autograd.grad(total, (x, y), allow_unused=True, materialize_grads=True)
    actual = torch.autograd.grad(
        sum((out * grad).sum() for out, grad in zip(torch.ops.sslkernels.unit_rows_fwd(x, y), grads, strict=True)
            if grad is not None), (x, y),
    )  # fmt: skip
    for one, two in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, two)


def test_opcheck():
    x, y = rows(6, 5, torch.float64), rows(5, 6, torch.float64, seed=1).T
    for other in (y, None):
        leaves = [z if z is None else z.clone().requires_grad_() for z in (x, other)]
        torch.library.opcheck(torch.ops.sslkernels.unit_rows_fwd.default, leaves)
        torch.library.opcheck(torch.ops.sslkernels.unit_rows_bwd.default, (x, None, None, x, other))


def test_what_is_empty_takes_the_definition():
    empty = torch.zeros(0, 5)
    with interpret() as launches:
        outputs = torch.ops.sslkernels.unit_rows_fwd(empty, empty)
        grads = torch.ops.sslkernels.unit_rows_bwd(empty, empty, torch.zeros(0), empty, empty)
    assert not launches
    assert [x.shape for x in (*outputs, *grads)] == [(0, 5), (0, 5), (0,), (0, 5), (0, 5)]


def test_double_backward_is_an_error():
    x = rows(4, 3, torch.float64).requires_grad_()
    found = torch.ops.sslkernels.unit_rows_fwd(x, None)[0]
    (grad,) = torch.autograd.grad(found.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()

"""The Triton kernels of NT-Xent, interpreted on the CPU: as exact as eager, in any order of programs."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch
from numerics import assert_op_close
from triton_on_cpu import TARGETS, interpret, kernels

from sslkernels.ops.infonce import kernels as triton_ops
from sslkernels.ops.infonce import nt_xent, reference
from sslkernels.ops.infonce.cases import OPS

SPEC, DECOUPLED, HARD = OPS[:3]
# the interpreter takes a second or two for each; the large ones are left to other tests here
CASES = {case.name: case for case in SPEC.tagged("verify") if case.name not in ("views512_d128", "thousand_columns")}
IN_16_BITS = ("odd", "three_columns", "tau_0.001", "not_normalized", "zero_rows", "strided")
SCHEDULES = {"triangle": {"bounded": True}, "rows": {"bounded": False, "top1": True}}


def views(pairs, dim, dtype=torch.float32, noise=1.0):
    generator = torch.Generator().manual_seed(pairs + dim)
    points = torch.randn(pairs, dim, generator=generator)
    return [(points + noise * torch.randn(pairs, dim, generator=generator)).to(dtype) for _ in range(2)]


def run(
    ops, z0, z1, tau, *, normalize=True, bounded=True, top1=False, bf16_matmul=False, weight=None, positive_weight=None
):
    """Everything that both operators return, by name."""
    decoupling = None if positive_weight is None else positive_weight.to(tau)
    loss, logsumexp, positive, hits = ops.nt_xent_fwd(z0, z1, tau, decoupling, normalize, bounded, top1, bf16_matmul)
    grad_loss = (loss.new_ones(()) / max(len(loss), 1)).expand(len(loss)) if weight is None else weight.to(loss)
    grads = ops.nt_xent_bwd(grad_loss, z0, z1, tau, decoupling, loss, logsumexp, normalize, bounded, bf16_matmul)
    names = ("loss", "logsumexp", "positive", "top1", "grad_z0", "grad_z1", "grad_temperature")
    return dict(zip(names, (loss, logsumexp, positive, hits, *grads), strict=True))


def interpreted(z0, z1, tau, target="sm_90", seed=1, **options):
    """What the kernels return, and the names of those that were launched."""
    with interpret(target, seed) as launches:
        results = run(triton_ops, z0, z1, torch.tensor(tau), **options)
    return results, [launch.kernel.__name__ for launch in launches]


def check(z0, z1, tau, *, roundings=8, **options):
    """Compare with the definition in fp64; an error is relative to the largest element, in roundings."""
    actual, launched = interpreted(z0, z1, tau, **options)
    options = {name: value for name, value in options.items() if name not in ("target", "seed")}
    exact = run(reference, z0.double(), z1.double(), torch.tensor(tau).double(), **options)
    for name, value in exact.items():
        if name == "top1":
            assert torch.equal(actual[name], value), name
            continue
        rounding = torch.finfo(z0.dtype if name.startswith("grad") else torch.float32).eps
        # gradients may cancel, through the normalisation or in the sum: their terms set the scale
        largest = value.abs().max().item()
        if name.startswith("grad"):
            weight = options.get("weight", torch.full((2 * len(z0),), 1 / len(z0)))
            largest = max(
                largest, (weight.abs().sum() / abs(tau) if name.endswith("ature") else weight.abs().max()).item()
            )
        error = (actual[name].double() - value).abs().max().item()
        assert error <= roundings * rounding * largest, f"{name}: error {error:.1e} of {largest:.1e}"
    return actual, launched


@pytest.mark.parametrize("name, target", list(zip(CASES, cycle(TARGETS), strict=False)))
def test_fp32_is_as_exact_as_eager(name, target):
    with interpret(target, order_seed=0):
        assert_op_close(SPEC, CASES[name], torch.float32)


@pytest.mark.parametrize("positive_weight", [None, torch.ones(12)], ids=["plain", "decoupled"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_nan_shows_in_every_row_that_meets_it(schedule, positive_weight):
    z0, z1 = views(6, 16)
    z0[2, 5] = torch.nan
    options = SCHEDULES[schedule] | {"positive_weight": positive_weight}
    actual, _ = interpreted(z0, z1, 0.5, **options)
    expected = run(reference, z0, z1, torch.tensor(0.5), **options)
    assert actual["loss"].isnan().all()
    for name in ("logsumexp", "grad_z0", "grad_z1", "grad_temperature"):
        assert torch.equal(actual[name].isnan(), expected[name].isnan()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name, target", list(zip(IN_16_BITS, cycle(TARGETS), strict=False)))
def test_16_bits_are_as_exact_as_eager(name, target, dtype):
    with interpret(target, order_seed=0):
        assert_op_close(SPEC, CASES[name], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", [DECOUPLED, HARD], ids=lambda spec: spec.name)
def test_decoupled_and_hard_negatives_are_as_exact_as_eager(spec, dtype):
    edges = spec.tagged("edge")
    if dtype != torch.float32:  # whose tiles those of nt_xent itself try on every edge
        edges = edges[::3]
    for case, target in zip(edges, cycle(TARGETS), strict=False):
        with interpret(target, order_seed=0):
            assert_op_close(spec, case, dtype)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pairs", [1, 2, 70])
def test_decoupled_rows_have_weights_of_their_own(pairs, schedule):
    positive_weight = torch.linspace(-1, 3, 2 * pairs)
    check(*views(pairs, 20), 0.3, positive_weight=positive_weight, **SCHEDULES[schedule])


def test_without_negatives_the_decoupled_loss_is_that_of_the_positive():
    for options in SCHEDULES.values():
        actual, _ = interpreted(*views(1, 20), 0.3, positive_weight=torch.tensor([1.0, 2.0]), **options)
        assert torch.equal(actual["logsumexp"], torch.zeros(2, dtype=torch.float64))
        torch.testing.assert_close(actual["loss"], -actual["positive"] * torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pairs, dim", [(1, 1), (2, 16), (63, 17), (64, 5), (65, 3), (129, 33), (200, 8), (3, 530)])
def test_ragged_shapes(pairs, dim, schedule):
    check(*views(pairs, dim), 0.3, target="gfx942", **SCHEDULES[schedule])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_more_columns_than_a_program_accumulates(dtype):
    z0, z1 = views(20, 600, dtype)
    check(z0, z1, 0.2, **SCHEDULES["triangle"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_row_has_its_own_weight(schedule, dtype):
    weight = torch.randn(140, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 2, 140)
    check(*views(70, 20, dtype), 0.4, weight=weight, **SCHEDULES[schedule])


def test_without_weight_there_is_no_gradient():
    actual, _ = interpreted(*views(20, 8), 0.4, weight=torch.zeros(40))
    assert not any(actual[name].any() for name in ("grad_z0", "grad_z1", "grad_temperature"))


@pytest.mark.parametrize("tau", [0.001, 0.025, 100.0, -0.025, -3.0])
def test_temperatures(tau):
    bounded = 2 / abs(tau) <= 80
    check(*views(70, 24, torch.float16), tau, bounded=bounded, top1=not bounded)


@pytest.mark.parametrize(
    "dtype, size", [(torch.float32, 1e15), (torch.float32, 1e30), (torch.bfloat16, 1e25), (torch.float16, 2e3)]
)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_long_rows_give_the_same_loss(schedule, dtype, size):
    z0, z1 = views(33, 24, dtype)
    expected, _ = interpreted(z0, z1, 0.1, **SCHEDULES[schedule])
    factor = 2.0 ** torch.tensor(size).log2().floor()
    actual, _ = interpreted(z0 * factor, z1 * factor, 0.1, **SCHEDULES[schedule])
    assert torch.equal(actual["positive"], expected["positive"])
    torch.testing.assert_close(actual["loss"], expected["loss"], rtol=1e-6, atol=0)
    # the gradient shrinks as the rows grow
    torch.testing.assert_close(actual["grad_z0"].double() * factor, expected["grad_z0"].double(), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("size", [1e-6, 1e-11, 1e-13, 1e-20, 0.0])
def test_short_rows(size):
    z0, z1 = views(20, 8)
    z0[::2] *= size
    actual, _ = interpreted(z0, z1, 0.5)
    exact = run(reference, z0.double(), z1.double(), torch.tensor(0.5).double())
    for name in ("loss", "positive", "grad_temperature"):
        torch.testing.assert_close(actual[name].double(), exact[name], rtol=1e-5, atol=1e-6)
    for name in ("grad_z0", "grad_z1"):
        scale = exact[name].abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
        assert ((actual[name].double() - exact[name]).abs() / scale).max() < 1e-5


def test_small_losses_keep_their_digits():
    z0, _ = views(40, 64)
    z1 = z0 + 1e-3 * torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    tau = torch.tensor(0.05)
    exact = reference.nt_xent_fwd(z0.double(), z1.double(), tau.double(), None, True, True, False, False)[0]
    assert exact.min() < 1e-6
    for options in SCHEDULES.values():
        loss = interpreted(z0, z1, 0.05, **options)[0]["loss"]
        torch.testing.assert_close(loss.double(), exact, rtol=2e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_equal_rows_tie(target, dtype):
    z = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)).expand(70, 40).to(dtype)
    actual, _ = interpreted(z, z, 0.001, target=target, **SCHEDULES["rows"])
    assert not actual["top1"].any()
    torch.testing.assert_close(actual["loss"], torch.tensor(139.0).log().expand(140), rtol=1e-6, atol=0)


def test_the_schedule_follows_the_bound_the_stats_and_determinism():
    z0, z1 = views(20, 8)
    triangle = "_nt_xent_fwd_triangle_kernel"
    assert triangle in interpreted(z0, z1, 0.5)[1]
    assert triangle not in interpreted(z0, z1, 0.5, bounded=False)[1]
    assert triangle not in interpreted(z0, z1, 0.5, top1=True)[1]
    torch.use_deterministic_algorithms(True)
    try:
        assert triangle not in interpreted(z0, z1, 0.5)[1]
    finally:
        torch.use_deterministic_algorithms(False)
    launched = {name for bounded in (True, False) for name in interpreted(z0, z1, 0.5, bounded=bounded)[1]}
    assert launched == {name for name in kernels() if name.startswith("_nt_xent_") and name.endswith("_kernel")}


def test_the_order_of_programs_matters_to_atomic_sums_alone():
    z0, z1 = views(130, 12)
    for options in SCHEDULES.values():
        results = [interpreted(z0, z1, 0.3, seed=seed, **options)[0] for seed in (None, 1)]
        for other in results[1:]:
            for name, value in results[0].items():
                if options["bounded"]:
                    torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-7)
                else:
                    assert torch.equal(other[name], value), name


def test_fp32_may_be_multiplied_as_bf16():
    z0, z1 = views(70, 40)
    rounded, _ = interpreted(z0, z1, 0.3, bf16_matmul=True)
    exact = run(reference, z0.double(), z1.double(), torch.tensor(0.3).double())
    error = (rounded["loss"].double() - exact["loss"]).abs().max()
    assert 1e-5 < error < 1e-2
    # positives are not rounded
    torch.testing.assert_close(rounded["positive"].double(), exact["positive"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rounded["grad_z0"].double(), exact["grad_z0"], rtol=0.02, atol=2e-5)


def test_no_pairs_and_fp64_take_the_definition():
    for z0, z1 in (views(0, 8), views(5, 8, torch.float64)):
        actual, launched = interpreted(z0, z1, 0.5)
        assert launched == []
        expected = run(reference, z0, z1, torch.tensor(0.5))
        assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_memory_is_linear_in_the_batch():
    z0, z1 = views(300, 16)
    with interpret() as launches:
        nt_xent(z0.requires_grad_(), z1, 0.5).backward()
    tensors = [value for launch in launches for value in launch.arguments.values() if isinstance(value, torch.Tensor)]
    assert max(tensor.numel() for tensor in tensors) <= 2 * 384 * 16

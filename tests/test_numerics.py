"""The numerics rule itself: it must catch what it is for, and not stumble over what is no error."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_as_exact_as_eager

from sslkernels.numerics import TOLERANCE, compare


@pytest.fixture
def exact():
    return torch.randn(40, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def rounded(tensor, dtype=torch.float32):
    return tensor.to(dtype)


def test_reports_where_and_how_far(exact):
    actual = rounded(exact)
    actual[7, 3] += 1
    actual[9, 0] += 0.5
    result = compare("loss", actual, rounded(exact), exact, torch.float32)
    assert not result.passed
    assert result.worst == (7, 3)
    assert result.actual == pytest.approx(exact[7, 3].item() + 1, rel=1e-6)
    assert result.exact == exact[7, 3].item()
    assert result.failing == 2 / exact.numel()
    for part in ("loss", "[7, 3]", f"{result.actual:.9g}", f"{result.exact:.9g}", "0.31%"):
        assert part in str(result)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_correctly_rounded_result_passes_without_help_from_eager(exact, dtype):
    nothing = torch.full_like(exact, torch.nan)
    assert compare("", rounded(exact, dtype), nothing, exact, dtype).passed


@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
def test_nothing_that_is_not_finite_passes(exact, value):
    actual = rounded(exact)
    actual[39, 15] = value
    result = compare("", actual, actual, exact, torch.float32)  # not even where eager fails alike
    assert not result.passed
    assert result.worst == (39, 15)


def test_overflow_of_the_dtype_is_right_with_the_right_sign(exact):
    exact[0], exact[1] = 1e6, -1e6
    actual = rounded(exact, torch.float16)
    assert actual[0].isposinf().all()
    assert_as_exact_as_eager("", actual, actual, exact, torch.float16)
    actual[1] = torch.inf
    assert not compare("", actual, rounded(exact, torch.float16), exact, torch.float16).passed


def test_a_huge_row_does_not_hide_the_others(exact):
    exact[0] *= 1e12
    actual = rounded(exact)
    actual[20, 5] *= 1.001
    assert compare("", actual, rounded(exact), exact, torch.float32).worst == (20, 5)
    with pytest.raises(AssertionError, match=r"dropped: error .* worst at \[20, 5\]"):
        assert_as_exact_as_eager("dropped", actual, rounded(exact), exact)


def test_a_tiny_row_is_held_to_the_accuracy_of_the_median_row(exact):
    exact[0] *= 1e-9
    actual = rounded(exact)
    actual[0] = 0
    assert_as_exact_as_eager("", actual, rounded(exact), exact)


def test_a_bias_below_the_worst_error_of_eager_is_caught(exact):
    eager, actual = rounded(exact), rounded(exact)
    eager[3, 3] += 1e-2
    actual += 5e-4 * exact.abs().amax(dim=1, keepdim=True).float()
    result = compare("", actual, eager, exact, torch.float32)
    assert result.error <= result.eager_error
    assert not result.passed


def test_cancelled_results_are_measured_by_what_cancelled(exact):
    """1 - 1 in fp32 is exact or off by a rounding of 1, whatever its own size is."""
    zero, actual = torch.zeros_like(exact), torch.full(exact.shape, 1e-7)
    moved = zero + 2.0**-24
    assert not compare("", actual, zero, zero + 1e-18, torch.float32).passed
    assert compare("", actual, zero, zero + 1e-18, torch.float32, nudged=moved).passed
    assert compare("", actual, zero, zero + 1e-18, torch.float32, floor=1.0).passed


def test_shapes_must_agree(exact):
    with pytest.raises(ValueError, match=r"rows: shape \(16, 40\), expected \(40, 16\)"):
        compare("rows", exact.T, exact, exact, torch.float64)


def test_no_elements_are_right():
    empty = torch.empty(0, 8)
    assert compare("", empty, empty, empty, torch.float32).passed

"""The contrastive core's CUDA kernels, run on the CPU in the order in which the launcher runs them."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import require_or_skip
from contrast_cuda import Operators, registered
from cuda_on_cpu import SCHEDULES
from numerics import assert_as_exact_as_eager, assert_op_close
from torch._subclasses.fake_tensor import FakeTensorMode

import sslkernels
from sslkernels import _library, numerics
from sslkernels.ops.infonce import arguments, contrast_op
from sslkernels.ops.infonce import contrast_reference as reference
from sslkernels.ops.infonce.cases import OPS

SPECS = {spec.name: spec for spec in OPS if spec.has_cuda}
LARGE = 2e7  # multiply-adds of a product: what plain loops do in a fraction of a second
CASES = [
    pytest.param(spec, case, id=f"{spec.name}-{case.name}")
    for spec in SPECS.values()
    for case in spec.cases
    if case.tags != {"bench"} and case.cost.forward_flops / 2 < 4 * LARGE
]
SHAPES = [(1, 1, 1), (7, 13, 3), (65, 130, 20), (130, 65, 33), (97, 1100, 8), (5, 0, 4), (0, 5, 4)]
MATMUL = {0: torch.float32, 1: torch.bfloat16, 2: torch.float16}
OUTPUTS = ("lse_rows", "lse_columns", "peak_rows", "peak_columns", "skipped", "attraction")
TOLERANCE = 2e-6  # of sums of fp32 numbers


@pytest.fixture(autouse=True)
def compiler():
    require_or_skip(shutil.which("g++"), "g++ is not installed")


def embeddings(rows, columns, dim, matmul=0, seed=0):
    """Query and key that the operands' dtype holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, dim, generator=generator).to(MATMUL[matmul]).float() for count in (rows, columns)]


def options(rows, columns, kind):
    """skip, query_ids and key_ids of a kind."""
    index = torch.arange(rows)
    if kind == "skip":  # the pair, one before it, and some that do not exist
        return torch.stack([index, index - 1, index * 0 + 2**62, index * 0 - 2**63], dim=1), None, None
    if kind == "ids":
        return None, index % 5 - 2, torch.arange(columns) % 3 - 2
    if kind == "all":  # nothing is left
        return None, torch.full((rows,), 4), torch.full((columns,), 4)
    return None, None, None


def assert_close(name, actual, exact, tolerance=TOLERANCE, size=1.0):
    """Relative to the largest of the finite numbers, or to ``size``; infinities where they belong."""
    assert actual.shape == exact.shape, name
    finite = exact.isfinite()
    assert torch.equal(actual.double()[~finite], exact[~finite].double()), name
    scale = exact[finite].abs().amax().clamp_min(size) if finite.any() else 1
    error = (actual.double() - exact)[finite].abs().max() / scale if finite.any() else 0
    assert error <= tolerance, f"{name}: {error:.1e}"


def assert_gradients_close(
    actual, exact, grads, products, tolerance=TOLERANCE, tolerance_of_scalars=TOLERANCE, label=""
):
    """Those of the scalars are sums over all pairs, in which large terms may cancel."""
    terms = sum(grad.abs().sum().item() for grad in grads if grad is not None)
    largest = max(1.0, products.abs().max().item() if products.numel() else 1.0)
    for name, *tensors in zip(("query", "key", "scale", "bias"), actual, exact, strict=False):
        if name in ("scale", "bias"):
            assert_close(f"grad_{name}{label}", *tensors, tolerance_of_scalars, size=max(1.0, terms * largest))
        else:
            assert_close(f"grad_{name}{label}", *tensors, tolerance)


def forward(operators, query, key, scale, special, flags, matmul):
    normalize_key, columns, attract, peaks = flags
    arguments = (query, key, scale, *special, normalize_key, False, False, columns, attract, peaks, matmul)
    exact = [None if x is None else x.double() if x.is_floating_point() else x for x in arguments[:6]]
    return operators.contrast_cuda_fwd(*arguments), reference.contrast_fwd(*exact, *arguments[6:])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_under_every_schedule(shape, schedule):
    rows, columns, _ = shape
    query, key = embeddings(*shape)
    for kind in ("", "skip", "ids", "all"):
        special = options(rows, columns, kind)
        for flags in ((False, True, False, True), (True, False, True, True)):
            actual, exact = forward(Operators(schedule), query, key, torch.tensor(1.7), special, flags, 0)
            for name, *tensors in zip(OUTPUTS, actual, exact, strict=True):
                assert_close(f"{name}, {kind or 'nothing'} set apart", *tensors)


def backward_inputs(query, key, scale, special, seed=1):
    """The operands in fp64, and log-sum-exps and gradients of both directions."""
    generator = torch.Generator().manual_seed(seed)
    exact = [None if x is None else x.double() if x.is_floating_point() else x for x in (query, key, scale, *special)]
    lse_rows, lse_columns, *_ = reference.contrast(*exact, False, True, False)
    grads = [torch.randn(len(lse), generator=generator, dtype=torch.float64) for lse in (lse_rows, lse_columns)]
    return exact, (*grads, lse_rows, lse_columns)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_under_every_schedule(shape, schedule):
    rows, columns, _ = shape
    query, key = embeddings(*shape)
    scale, operators = torch.tensor(-0.8), Operators(schedule)
    for kind in ("", "skip", "ids", "all"):
        special = options(rows, columns, kind)
        exact, given = backward_inputs(query, key, scale, special)
        for grads in (given, (given[0], None, given[2], None)):
            actual = operators.contrast_cuda_bwd(*grads, query, key, scale, *special, True, True, 0)
            expected = reference.contrast_bwd(*grads, *exact, True, True, 0)
            label = f", {kind or 'nothing'} set apart"
            assert_gradients_close(actual, expected, grads[:2], query @ key.T, label=label)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sigmoid_under_every_schedule(shape, schedule):
    rows, columns, _ = shape
    query, key = embeddings(*shape)
    scale, bias, operators = torch.tensor(1.3), torch.tensor(-2.0), Operators(schedule)
    grad = torch.randn(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for kind in ("", "skip", "ids", "all"):
        inputs = (query, key, scale, bias, *options(rows, columns, kind))
        exact = [None if x is None else x.double() if x.is_floating_point() else x for x in inputs]
        loss = operators.sigmoid_contrast_cuda_fwd(*inputs, 0)
        assert_close(f"loss, {kind}", loss, reference.sigmoid_contrast_fwd(*exact, 0))
        actual = operators.sigmoid_contrast_cuda_bwd(grad, *inputs, 0)
        expected = reference.sigmoid_contrast_bwd(grad, *exact, 0)
        assert_gradients_close(actual, expected, (grad,), query @ key.T, label=f", {kind or 'nothing'} set apart")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_tensor_without_its_diagonal(schedule):
    (query, _), operators, scale = embeddings(130, 0, 20), Operators(schedule), torch.tensor(0.9)
    special = (None, torch.arange(130) % 7, torch.arange(130) % 7)
    actual, exact = forward(operators, query, None, scale, special, (False, True, False, True), 0)
    for name, *tensors in zip(OUTPUTS, actual, exact, strict=True):
        assert_close(name, *tensors)
    inputs, grads = backward_inputs(query, None, scale, special)
    actual = operators.contrast_cuda_bwd(*grads, query, None, scale, *special, True, True, 0)
    expected = reference.contrast_bwd(*grads, *inputs, True, True, 0)
    assert_gradients_close(actual, expected, grads[:2], query @ query.T)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, -1.0, 1e3, -1e5])
def test_extreme_scales(scale):
    """Log-sum-exps to a rounding of the products, and softmaxes that are sharp or flat without a NaN."""
    shape = (70, 90, 16)
    query, key = (torch.nn.functional.normalize(x, dim=1) for x in embeddings(*shape))
    special, operators, scale = options(70, 90, "skip"), Operators(), torch.tensor(scale)
    exact, grads = backward_inputs(query, key, scale, special)
    products = reference.similarities(query, key, False)[0].double()  # fp32 ones set the error that is allowed
    slack = (products - exact[0] @ exact[1].T).abs().max().item() * scale.abs().item()
    for flags in ((False, True, False, True), (False, False, True, True)):
        results, expected = forward(operators, query, key, scale, special, flags, 0)
        for name, *tensors in zip(OUTPUTS, results, expected, strict=True):
            assert_close(name, *tensors, tolerance=TOLERANCE + 4 * slack)
    actual = operators.contrast_cuda_bwd(*grads, query, key, scale, *special, True, True, 0)
    expected = reference.contrast_bwd(*grads, *exact, True, True, 0)
    assert_gradients_close(actual, expected, grads[:2], products, *[TOLERANCE + 4 * slack] * 2)


@pytest.mark.parametrize("gradient", [1.0, 1e-9, 1e9])
@pytest.mark.parametrize("matmul", [1, 2])
def test_operands_of_16_bits(matmul, gradient):
    """The weights are rounded once, whatever the gradient's size: fp16 would lose those of a large batch."""
    rounding = {1: 2.0**-8, 2: 2.0**-11}[matmul]
    (query, key), scale, operators = embeddings(97, 130, 24, matmul), torch.tensor(0.7), Operators()
    special = options(97, 130, "skip")
    results, expected = forward(operators, query, key, scale, special, (False, False, True, False), matmul)
    assert_close("lse_rows", results[0], expected[0])
    assert_close("attraction", results[5], expected[5], tolerance=rounding)
    exact, grads = backward_inputs(query, key, scale, special)
    grads = (grads[0] * gradient, grads[1] * gradient, *grads[2:])
    actual = operators.contrast_cuda_bwd(*grads, query, key, scale, *special, True, True, matmul)
    expected = reference.contrast_bwd(*grads, *exact, True, True, 0)
    actual, expected = ([tensor.double() / gradient for tensor in tensors] for tensors in (actual, expected))
    assert_gradients_close(actual, expected, [grad / gradient for grad in grads[:2]], query @ key.T, rounding)


@pytest.mark.parametrize("dtype", MATMUL.values(), ids=str)
@pytest.mark.parametrize("dim", [3, 24, 300])
def test_keys_of_another_dtype_are_normalised(dim, dtype):
    query, _ = embeddings(40, 0, dim)
    key = (embeddings(0, 50, dim)[1] * 3).to(dtype)
    key[::7] = 0
    special = (None, None, None)
    actual, exact = forward(Operators(), query, key, torch.tensor(2.0), special, (True, True, True, True), 0)
    for name, *tensors in zip(OUTPUTS, actual, exact, strict=True):
        assert_close(name, *tensors)


def test_the_chunks_change_no_bit_of_the_rows():
    (query, key), special = embeddings(300, 70, 12), options(300, 70, "skip")
    flags = (False, True, False, True)
    runs = [forward(Operators(0, size), query, key, torch.tensor(3.0), special, flags, 0)[0] for size in (1, 1 << 25)]
    for name, one, other in zip(OUTPUTS, *runs, strict=True):
        if name != "lse_columns":
            assert torch.equal(one, other), name
        assert_close(name, one, other)


# ---- the public functions on these operators


@pytest.fixture
def on_cpu(monkeypatch):
    """backend="cuda" is let through on CPU tensors."""
    monkeypatch.setattr(arguments, "check_backend", lambda *_: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("spec", "case"), CASES)
def test_as_exact_as_eager(spec, case, dtype, on_cpu):
    with registered() as called:
        assert_op_close(spec, case, dtype, backend="cuda")
    assert {name.replace("_cuda", "") for name in called} <= set(spec.torch_ops)
    assert called or not case.tags & {"verify"}


@pytest.mark.parametrize("name", SPECS)
def test_backward_runs_the_same_backend(name, on_cpu):
    spec = SPECS[name]
    case = next(case for case in spec.cases if case.name == "odd" or case.name == "rectangular")
    with registered() as called:
        numerics.evaluate(numerics.with_backend(spec.function, "cuda"), case.make("cpu", torch.float32), spec.grad_args)
    assert called == [contrast_op.COMPILED[operator] for operator in spec.torch_ops]


def test_stats_from_the_same_pass(on_cpu):
    generator = torch.Generator().manual_seed(5)
    query, key = (torch.randn(80, 24, generator=generator) for _ in range(2))
    with registered():
        for function, given in (
            (sslkernels.info_nce, {"temperature": 0.1}),
            (sslkernels.clip_loss, {"logit_scale": 10.0}),
        ):
            given |= {"normalize": True, "return_stats": True}
            _, stats = function(query, key, **given, backend="cuda")
            _, expected = function(query, key, **given, backend="reference")
            torch.testing.assert_close(stats, expected)


def test_deterministic(on_cpu):
    case = next(case for case in SPECS["clip_loss"].cases if case.name == "tall")
    results = []
    for schedule in SCHEDULES:
        with registered(schedule):
            results.append(
                numerics.evaluate(
                    numerics.with_backend(sslkernels.clip_loss, "cuda"),
                    case.make("cpu", torch.float32),
                    ("image_features", "text_features"),
                )
            )
    for other in results[1:]:
        assert torch.equal(results[0].value, other.value)
        assert all(torch.equal(results[0].grads[name], other.grads[name]) for name in other.grads)


def test_opcheck(on_cpu):
    query, key = (tensor.requires_grad_() for tensor in embeddings(9, 7, 5))
    scale, bias = torch.tensor(2.0, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
    ops = torch.ops.sslkernels
    with registered():
        flags = (False, False, False, True, False, True, 0)
        torch.library.opcheck(ops.contrast_cuda_fwd.default, (query, key, scale, None, None, None, *flags))
        torch.library.opcheck(ops.sigmoid_contrast_cuda_fwd.default, (query, key, scale, bias, None, None, None, 0))
        plain = [tensor.detach() for tensor in (query, key, scale)]
        lse = torch.randn(9, dtype=torch.float64)
        saved = (lse, None, lse, None, *plain, None, None, None, False, False, 0)
        torch.library.opcheck(ops.contrast_cuda_bwd.default, saved)
        saved = (lse, *plain, bias.detach(), None, None, None, 0)
        torch.library.opcheck(ops.sigmoid_contrast_cuda_bwd.default, saved)


def test_no_second_derivative(on_cpu):
    query, key = (tensor.requires_grad_() for tensor in embeddings(9, 9, 5))
    with registered():
        (grad,) = torch.autograd.grad(sslkernels.info_nce(query, key, backend="cuda"), query, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward is not supported"):
            grad.sum().backward()


# ---- the launcher, as far as it goes without a GPU


def test_the_compiled_operators_stand_beside_tritons():
    require_or_skip(shutil.which("nvcc") and _library.extension, "nvcc is not installed, or the extension is not built")
    for name in SPECS:
        backend = sslkernels.backends()[name]["cuda"]
        assert {backend.active, *backend.besides} >= {"cuda"}
        assert backend.active == ("cuda" if _library.triton_error() else "triton")
        assert "cuda" not in backend.absent


def test_the_launcher_finds_torchs_streams():
    require_or_skip(shutil.which("nvcc") and _library.extension, "nvcc is not installed, or the extension is not built")
    assert _library.extension.finds_cuda_stream() == (torch.version.cuda is not None)


def test_who_owns_the_key(monkeypatch):
    built = {"contrast_cuda_fwd"}
    monkeypatch.setattr(_library, "_on_cuda", {})
    monkeypatch.setattr(_library, "_implemented", lambda operator, key: operator in built)
    for error, present, owner, backend in (
        ("", built, "triton", _library.Backend("triton", {}, ("cuda",))),
        ("none", built, "cuda", _library.Backend("cuda", {"triton": "none"})),
        ("", (), "triton", _library.Backend("triton", {"cuda": "no nvcc"})),
        ("none", (), "reference", _library.Backend("reference", {"cuda": "no nvcc", "triton": "none"})),
    ):
        monkeypatch.setattr(_library, "triton_error", lambda error=error: error)
        monkeypatch.setattr(_library, "extension_error", "no nvcc")
        built = set(present)
        assert _library.claim_cuda("contrast_fwd", "contrast_cuda_fwd") == owner
        assert _library._cuda_backend(_library._on_cuda["contrast_fwd"], True) == backend


def test_an_absent_backend_is_an_error_with_its_reason():
    query, key = embeddings(4, 4, 3)
    with pytest.raises(RuntimeError, match="info_nce: backend 'cuda' is not available on cpu"):
        sslkernels.info_nce(query, key, backend="cuda")


@pytest.mark.parametrize("columns", [False, True])
def test_shapes_on_the_device(columns):
    with FakeTensorMode():
        query, key = torch.empty(12, 5, device="cuda"), torch.empty(20, 5, device="cuda")
        scale = torch.empty((), device="cuda")
        flags = (False, False, False, columns, not columns, True, 0)
        results = torch.ops.sslkernels.contrast_cuda_fwd(query, key, scale, None, None, None, *flags)
        width = 20 if columns else 0
        shapes = [(12,), (width,), (12,), (width,), (12,), (0, 0) if columns else (12, 5)]
        assert [tuple(result.shape) for result in results] == shapes
        assert {result.device.type for result in results} == {"cuda"}
        loss = sslkernels.clip_loss(query, key, scale, backend="cuda")
        assert (loss.shape, loss.device.type, loss.dtype) == ((), "cuda", torch.float32)


def test_the_rule_of_numerics_sees_a_wrong_gradient():
    """The comparison that these tests lean on fails where one weight in a hundred is missing."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(100, 8, generator=generator, dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_as_exact_as_eager("grad", (exact * 0.99).float(), exact.float(), exact, torch.float32)

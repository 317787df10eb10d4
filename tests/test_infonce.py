"""NT-Xent: values, gradients, torch integration, laws, every shape and every error."""

import contextlib
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ISAS, OTHER_ISAS, require_or_skip
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_as_exact_as_eager, assert_op_close

import sslkernels
from sslkernels import _library
from sslkernels.ops.infonce import reference
from sslkernels.ops.infonce.cases import NT_XENT_CASES, OPS

SPEC = OPS[0]
VERIFY = [case for case in NT_XENT_CASES if "verify" in case.tags]


def views(pairs, dim, dtype=torch.float32, seed=0, noise=1.0, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(pairs, dim, generator=generator)
    return [
        (points + noise * torch.randn(pairs, dim, generator=generator)).to(dtype).requires_grad_(requires_grad)
        for _ in range(2)
    ]


def gradients(function, *tensors):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    value = function(*leaves)
    value.sum().backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]


def test_the_compiled_kernel_is_there():
    require_or_skip(_library.extension, _library.extension_error)
    assert sslkernels.backends()["nt_xent"]["cpu"] == sslkernels.Backend("cpp")


@pytest.mark.parametrize("dtype", SPEC.dtypes, ids=str)
@pytest.mark.parametrize("case", VERIFY, ids=lambda case: case.name)
def test_as_exact_as_eager(case, dtype):
    assert_op_close(SPEC, case, dtype)


@pytest.mark.parametrize("case", VERIFY[:3], ids=lambda case: case.name)
def test_the_reference_backend(case):
    assert_op_close(SPEC, case, torch.bfloat16, backend="reference")


@pytest.mark.parametrize("name", ["nt_xent", "decoupled_nt_xent", "hard_nt_xent"])
def test_autocast_does_not_change_the_reference_backend(name):
    z0, z1 = views(9, 16)
    expected = getattr(sslkernels, name)(z0, z1, 0.2, backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        loss = getattr(sslkernels, name)(z0, z1, 0.2, backend="reference")
    assert torch.equal(loss, expected)


@pytest.mark.parametrize("dim", [1, 3, 100, 123, 128, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_shape(dim, dtype):
    for pairs in (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 127, 128):
        inputs = [*views(pairs, dim, dtype), torch.tensor(0.3)]
        actual = gradients(sslkernels.nt_xent, *inputs)
        eager = gradients(reference.nt_xent, *inputs)
        exact = gradients(reference.nt_xent, *(tensor.double() for tensor in inputs))
        # with few columns the gradients cancel through the normalisation: their terms set the scale
        floors = {"grad_z0": 1 / pairs, "grad_z1": 1 / pairs, "grad_temperature": 1.0}
        for name, *tensors in zip(["loss", *floors], actual, eager, exact, strict=True):
            name = f"{name} of ({pairs}, {dim})"
            assert_as_exact_as_eager(name, *tensors, dtype=dtype, floor=floors.get(name.split()[0], 0))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tau", [0.5, -0.7])
def test_gradcheck(normalize, reduction, tau):
    inputs = [*views(6, 5, torch.float64, requires_grad=True), torch.tensor(tau, dtype=torch.float64).requires_grad_()]
    options = {"normalize": normalize, "reduction": reduction}
    assert torch.autograd.gradcheck(lambda *args: sslkernels.nt_xent(*args, **options), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(dtype):
    z0, z1 = views(9, 7, dtype, requires_grad=True)
    tau = torch.tensor(0.3, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    torch.library.opcheck(torch.ops.sslkernels.nt_xent_fwd.default, (z0, z1, tau, None, True, True, True, False))
    loss, logsumexp, *_ = torch.ops.sslkernels.nt_xent_fwd(
        z0.detach(), z1.detach(), tau.detach(), None, True, True, False, False
    )
    saved = (z0.detach(), z1.detach(), tau.detach(), None, loss, logsumexp, True, True, False)
    torch.library.opcheck(torch.ops.sslkernels.nt_xent_bwd.default, (torch.ones_like(loss), *saved))


def test_compiles_whole_and_once_for_every_batch():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda z0, z1: sslkernels.nt_xent(z0, z1, 0.3), fullgraph=True, dynamic=True, backend=counter)
    for pairs in (64, 96, 33):
        z0, z1 = views(pairs, 16, requires_grad=True)
        loss = step(z0, z1)
        loss.backward()
        expected = gradients(lambda a, b: sslkernels.nt_xent(a, b, 0.3), z0, z1)
        for tensor, value in zip((loss.detach(), z0.grad, z1.grad), expected, strict=True):
            torch.testing.assert_close(tensor, value)
    assert counter.frame_count <= 2


def test_compiled_by_inductor_with_stats():
    torch._dynamo.reset()
    z0, z1 = views(40, 16, requires_grad=True)
    compiled = torch.compile(sslkernels.nt_xent, fullgraph=True)
    loss, stats = compiled(z0, z1, torch.tensor(0.3), return_stats=True)
    expected, expected_stats = sslkernels.nt_xent(z0, z1, torch.tensor(0.3), return_stats=True)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(tuple(stats), tuple(expected_stats))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tau", [0.1, 0.01])
def test_bits_do_not_depend_on_the_run_or_the_threads(dtype, tau):
    z0, z1 = views(700, 40, dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5, 2):
            torch.set_num_threads(threads)
            results.append(gradients(lambda a, b: sslkernels.nt_xent(a, b, tau, reduction="none"), z0, z1))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@pytest.mark.parametrize("isa", OTHER_ISAS)
def test_every_instruction_set(isa):
    cases = "case.name in ('views512_d128', 'odd', 'tau_0.01', 'strided')"
    program = (
        "import torch, numerics\n"
        "from sslkernels._library import extension\n"
        "from sslkernels.ops.infonce.cases import OPS\n"
        f"assert extension.isa() == {isa!r}\n"
        f"for case in [case for case in OPS[0].cases if {cases}]:\n"
        "    for dtype in (torch.float32, torch.bfloat16): numerics.assert_op_close(OPS[0], case, dtype)\n"
    )
    run_python(program, SSLKERNELS_ISA=isa)


def test_an_unknown_instruction_set_is_an_error():
    require_or_skip(ISAS, "no compiled extension")
    result = run_python("from sslkernels._library import extension as e; e.isa()", check=False, SSLKERNELS_ISA="mmx")
    assert result.returncode != 0
    assert f"SSLKERNELS_ISA must be one of {', '.join(ISAS)} on this machine, got 'mmx'" in result.stderr


def run_python(program, check=True, **environment):
    paths = [os.path.dirname(__file__), *sys.path]
    environment = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert not check or result.returncode == 0, result.stderr
    return result


def test_memory_is_linear_in_the_batch():
    require_or_skip(_library.extension, _library.extension_error)
    run_python(
        "import torch, sslkernels\n"
        "def extra(pairs):\n"
        "    z = [torch.randn(pairs, 16, requires_grad=True) for _ in range(2)]\n"
        "    open('/proc/self/clear_refs', 'w').write('5')\n"
        "    status = lambda key: int(open('/proc/self/status').read().split(key)[1].split()[0]) / 1024\n"
        "    before = status('VmRSS:')\n"
        "    sslkernels.nt_xent(*z, 0.1).backward()\n"
        "    return status('VmHWM:') - before\n"
        "extra(64)\n"
        "assert extra(4096) < 30, 'MiB; the matrix alone is 256'\n"
    )


def test_stats():
    z0, z1 = views(50, 8, noise=0.6)
    loss, stats = sslkernels.nt_xent(z0, z1, 0.2, reduction="none", return_stats=True)
    _, logsumexp, positive, top1 = reference.nt_xent_rows(z0.double(), z1.double(), 0.2, True)
    torch.testing.assert_close(stats.logsumexp.double(), logsumexp, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats.positive_logit.double(), positive, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss, stats.logsumexp - stats.positive_logit, rtol=1e-5, atol=1e-5)
    assert torch.equal(stats.top1, top1)
    assert 0 < top1.float().mean() < 1
    assert not any(stat.requires_grad for stat in stats)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_collapsed_encoder_scores_no_hit(dtype):
    z = torch.randn(1, 24).expand(40, 24).to(dtype)
    _, stats = sslkernels.nt_xent(z, z, 0.1, return_stats=True)
    assert not stats.top1.any()


@contextlib.contextmanager
def medium_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def test_medium_precision_multiplies_in_bf16():
    z0, z1 = views(64, 256)
    plain = sslkernels.nt_xent(z0, z1, 0.05)
    with medium_precision():
        medium = sslkernels.nt_xent(z0, z1, 0.05)
    torch.testing.assert_close(plain, medium, rtol=2e-2, atol=0)
    if _library.extension and _library.extension.has_bf16():
        assert plain != medium


@pytest.mark.parametrize("scale", [1e-20, 1e15, 3e37])
def test_length_does_not_matter(scale):
    z0, z1 = views(20, 8)
    for dtype in (torch.float32, torch.bfloat16):
        one = sslkernels.nt_xent(z0.to(dtype), z1.to(dtype), 0.2)
        if scale > 1e-12:  # shorter rows are divided by 1e-12, as F.normalize does
            other = sslkernels.nt_xent((z0.double() * scale).to(dtype), (z1.double() * scale).to(dtype), 0.2)
            torch.testing.assert_close(one, other, rtol=2e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)
        else:
            tiny = sslkernels.nt_xent(z0.to(dtype) * scale, z1.to(dtype) * scale, 0.2)
            torch.testing.assert_close(tiny, torch.tensor(39.0).log())


def test_a_nan_shows():
    z0, z1 = views(20, 8, requires_grad=True)
    with torch.no_grad():
        z0[3, 2] = torch.nan
    loss = sslkernels.nt_xent(z0, z1)
    loss.backward()
    assert loss.isnan()
    assert z0.grad[3].isnan().all()


def test_no_pairs_and_one_pair():
    for pairs in (0, 1):
        z0, z1 = views(pairs, 4, requires_grad=True)
        for reduction in ("mean", "sum"):
            loss = sslkernels.nt_xent(z0, z1, reduction=reduction)
            loss.backward()
            assert loss == 0
            assert not z0.grad.any()
        assert sslkernels.nt_xent(z0, z1, reduction="none").shape == (2 * pairs,)


def test_double_backward_is_an_error():
    z0, z1 = views(5, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(sslkernels.nt_xent(z0, z1), z0, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


def bad_calls():
    z = torch.randn(4, 3)
    return {
        "z0 must be a tensor, got list": (TypeError, ([1.0], z), {}),
        "z1 must be float32, bfloat16, float16 or float64, got torch.int64": (TypeError, (z, z.long()), {}),
        r"z0 must be \(N, D\), got \(4,\)": (ValueError, (z[:, 0], z), {}),
        r"z1 must be \(N, D\) like z0 \(4, 3\), got \(4, 2\)": (ValueError, (z, z[:, :2]), {}),
        "z1 must have the dtype of z0, torch.float32, got torch.float64": (TypeError, (z, z.double()), {}),
        "z1 must be on the device of z0, cpu, got meta": (ValueError, (z, z.to("meta")), {}),
        r"z0 must have at least one column, got \(4, 0\)": (ValueError, (z[:, :0], z[:, :0]), {}),
        "reduction must be one of 'mean', 'sum', 'none', got 'max'": (ValueError, (z, z), {"reduction": "max"}),
        "temperature must be finite and not zero in torch.float32, got 0": (ValueError, (z, z, 0), {}),
        "temperature must be finite and not zero in torch.float32, got nan": (ValueError, (z, z, float("nan")), {}),
        "temperature must be finite and not zero in torch.float32, got inf": (ValueError, (z, z, float("inf")), {}),
        "in torch.float32, got 1e-46": (ValueError, (z, z, 1e-46), {}),
        r"in torch.float32, got 1e\+39": (ValueError, (z, z, 1e39), {}),
        r"in torch.float32, got 10+\.\.\.0+": (ValueError, (z, z, 10**400), {}),
        "in torch.float64, got 1e-320": (ValueError, (z.double(), z.double(), 1e-320), {}),
        "normalize must be a bool, got str": (TypeError, (z, z), {"normalize": "no"}),
        "return_stats must be a bool, got str": (TypeError, (z, z), {"return_stats": "y"}),
        "z0 must be a strided tensor, got torch.sparse_coo": (TypeError, (z.to_sparse(), z), {}),
        "temperature must be a strided tensor, got torch.sparse_coo": (TypeError, (z, z, z[0, 0].to_sparse()), {}),
        "temperature must be a float or a tensor, got str": (TypeError, (z, z, "0.5"), {}),
        r"one element, got torch.float32 of shape \(2,\)": (ValueError, (z, z, torch.ones(2)), {}),
        "temperature must be on the device of the embeddings, cpu, got meta": (
            ValueError,
            (z, z, torch.ones((), device="meta")),
            {},
        ),
        "z1 must be a strided tensor, got torch.sparse_coo": (TypeError, (z, z.to_sparse()), {}),
        "backend 'cuda' is not available on cpu: it is for tensors on cuda": (
            RuntimeError,
            (z, z),
            {"backend": "cuda"},
        ),
    }


@pytest.mark.parametrize("message", bad_calls())
def test_bad_input_is_one_clear_error(message):
    error, args, options = bad_calls()[message]
    with pytest.raises(error, match=f"^nt_xent: .*{message}") as raised:
        sslkernels.nt_xent(*args, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, 1e-39])
@pytest.mark.parametrize("op", ["nt_xent", "decoupled_nt_xent", "hard_nt_xent", "info_nce", "sup_con"])
def test_a_temperature_tensor_is_read_on_the_cpu(op, value):
    other = torch.zeros(4, dtype=torch.int64) if op == "sup_con" else torch.randn(4, 3)
    with pytest.raises(ValueError, match=f"^{op}: temperature must be finite and not zero in torch.float32, got"):
        getattr(sslkernels, op)(torch.randn(4, 3), other, temperature=torch.tensor(value, requires_grad=True))


def test_a_zero_temperature_is_an_error_of_the_operator_too():
    require_or_skip(_library.extension, _library.extension_error)
    z = torch.randn(4, 3)
    with pytest.raises(RuntimeError, match="nt_xent: temperature must not be zero"):
        torch.ops.sslkernels.nt_xent_fwd(z, z, torch.tensor(0.0), None, True, False, False, False)


def test_shapes_on_a_device_that_is_not_here():
    ops = torch.ops.sslkernels
    with torch._subclasses.fake_tensor.FakeTensorMode():
        z, tau = torch.empty(6, 4, device="cuda", dtype=torch.bfloat16), torch.empty((), device="cuda")
        loss, logsumexp, _, top1 = ops.nt_xent_fwd(z, z, tau, None, True, True, True, False)
        grads = ops.nt_xent_bwd(loss, z, z, tau, None, loss, logsumexp, True, True, False)
    assert {tensor.device.type for tensor in (loss, logsumexp, top1, *grads)} == {"cuda"}
    assert [grad.shape for grad in grads] == [z.shape, z.shape, tau.shape]
    assert (loss.shape, top1.shape, grads[0].dtype) == ((12,), (12,), torch.bfloat16)


# ---- laws

SHAPES = st.tuples(st.integers(1, 70), st.integers(1, 40), st.integers(0, 1000))
LAW = settings(max_examples=25, deadline=None)


def rows_and_gradients(z0, z1, tau=0.3):
    rows = sslkernels.nt_xent(z0, z1, tau, reduction="none")
    return [rows, *gradients(lambda a, b: sslkernels.nt_xent(a, b, tau), z0, z1)[1:]]


@LAW
@given(SHAPES)
def test_swapping_the_views_swaps_the_rows(shape):
    z0, z1 = views(*shape[:2], seed=shape[2])
    rows, grad0, grad1 = rows_and_gradients(z0, z1)
    swapped, swapped1, swapped0 = rows_and_gradients(z1, z0)
    torch.testing.assert_close(rows.roll(len(z0)), swapped, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close((grad0, grad1), (swapped0, swapped1), rtol=1e-4, atol=1e-5)


@LAW
@given(SHAPES)
def test_permuting_the_pairs_permutes_the_rows(shape):
    z0, z1 = views(*shape[:2], seed=shape[2])
    order = torch.randperm(len(z0), generator=torch.Generator().manual_seed(shape[2]))
    rows, grad0, _ = rows_and_gradients(z0, z1)
    permuted, permuted0, _ = rows_and_gradients(z0[order], z1[order])
    torch.testing.assert_close(rows.view(2, -1)[:, order].flatten(), permuted, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(grad0[order], permuted0, rtol=1e-4, atol=1e-5)


@LAW
@given(SHAPES)
def test_appending_a_duplicate_pair_adds_its_two_logits(shape):
    z0, z1 = views(*shape[:2], seed=shape[2])
    z = torch.nn.functional.normalize(torch.cat([z0, z1]).double(), dim=1)
    _, stats = sslkernels.nt_xent(z0, z1, 0.3, return_stats=True)
    _, longer = sslkernels.nt_xent(torch.cat([z0, z0[:1]]), torch.cat([z1, z1[:1]]), 0.3, return_stats=True)
    added = z @ z[[0, len(z0)]].T / 0.3  # every row meets the copies of z0[0] and z1[0], itself included for those two
    expected = torch.logsumexp(torch.cat([stats.logsumexp.double()[:, None], added], 1), 1)
    kept = longer.logsumexp.view(2, -1)[:, :-1].flatten().double()
    torch.testing.assert_close(kept, expected, rtol=1e-6, atol=2e-6)

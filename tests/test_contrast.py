"""The contrastive family on the CPU: values, gradients, torch integration, shapes, threads, ids, errors."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from conftest import OTHER_ISAS, require_or_skip
from numerics import assert_as_exact_as_eager, assert_op_close
from test_infonce import gradients, medium_precision, run_python

import sslkernels
from sslkernels import _library
from sslkernels.ops.infonce import contrast_reference, reference
from sslkernels.ops.infonce.cases import OPS

SPECS = {spec.name: spec for spec in OPS if spec.name != "nt_xent"}
CASES = [
    (spec, case) for spec in SPECS.values() for case in spec.cases if {"verify", "edge"} & case.tags
]  # those of "bench" alone are large
IDS = [f"{spec.name}-{case.name}" for spec, case in CASES]
SMALL = [next(pair for pair in CASES if pair[0] is spec) for spec in SPECS.values()]
SMALL_IDS = [spec.name for spec, _ in SMALL]


def rows(count, dim, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, dim, generator=generator), dim=1).to(dtype)


@pytest.mark.parametrize("name", SPECS)
def test_the_compiled_kernel_is_there(name):
    require_or_skip(_library.extension, _library.extension_error)
    assert sslkernels.backends()[name]["cpu"].active == "cpp"


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("spec, case", CASES, ids=IDS)
def test_as_exact_as_eager(spec, case, dtype):
    assert_op_close(spec, case, dtype)


@pytest.mark.parametrize("spec, case", CASES, ids=IDS)
def test_float64_and_the_reference_backend_follow_the_definition(spec, case):
    assert_op_close(spec, case, torch.float64)
    assert_op_close(spec, case, torch.float32, backend="reference")


@pytest.mark.parametrize("spec, case", SMALL, ids=SMALL_IDS)
def test_compiles_whole(spec, case):
    torch._dynamo.reset()
    arguments = case.make("cpu", torch.float32)
    compiled = torch.compile(spec.function, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**arguments), spec.function(**arguments))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("normalize", (True, False))
def test_a_queue_traced_without_gradients_has_them_afterwards(normalize, dtype):
    key, queue = rows(6, 10, 1), 3 * rows(9, 10, 2, dtype)

    class Model(torch.nn.Module):
        def forward(self, query):
            return sslkernels.info_nce(query, key, queue, normalize=normalize)

    with torch.no_grad():
        program = torch.export.export(Model(), (rows(6, 10),)).module()
    one, two = (rows(6, 10).requires_grad_() for _ in range(2))
    program(one).backward()
    Model()(two).backward()
    torch.testing.assert_close(one.grad, two.grad)


@pytest.mark.parametrize("symmetric", (False, True))
def test_opcheck(symmetric):
    query, key = rows(9, 7).requires_grad_(), None if symmetric else rows(12, 7, 1).requires_grad_()
    scale, skip = torch.tensor(5.0, requires_grad=True), None if symmetric else torch.tensor([[0, 3]] * 9)
    ids = (None, None) if symmetric else (torch.arange(9) % 4, torch.arange(12) % 5)
    options = (False, True, False, not symmetric, False, True, 0)
    op = torch.ops.sslkernels.contrast_fwd.default
    torch.library.opcheck(op, (query, key, scale, skip, *ids, *options))
    if not symmetric:
        torch.library.opcheck(op, (query, key.detach(), scale, skip, *ids, *options[:3], False, True, False, 0))
        attracted = (torch.ones(9, dtype=torch.float64), query.detach(), scale.detach(), rows(9, 7, 2))
        torch.library.opcheck(torch.ops.sslkernels.contrast_attracted_bwd.default, attracted)
        bias = torch.tensor(-1.0, requires_grad=True)
        torch.library.opcheck(
            torch.ops.sslkernels.sigmoid_contrast_fwd.default, (query, key, scale, bias, skip, *ids, 0)
        )


@pytest.mark.parametrize("spec, case", SMALL, ids=SMALL_IDS)
def test_double_backward_is_an_error(spec, case):
    arguments = case.make("cpu", torch.float32)
    leaf = arguments[spec.grad_args[0]].requires_grad_()
    (grad,) = torch.autograd.grad(spec.function(**arguments).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(grad.square().sum(), leaf)


def core(query, key, scale, **options):
    """contrast_fwd, then contrast_bwd for weights of one's own, on the kernel and on the definition."""
    given = {"skip": None, "query_ids": None, "key_ids": None, "unit": False, "columns": False, **options}
    masks = (given["skip"], given["query_ids"], given["key_ids"])
    forward = (False, given["unit"], False, given["columns"], False, True, 0)
    results = []
    for module in (torch.ops.sslkernels, contrast_reference):
        found = module.contrast_fwd(query, key, scale, *masks, *forward)
        weights = [torch.linspace(0.1, 1, len(lse), dtype=torch.float64) for lse in found[:2]]
        columns = (weights[1], found[1]) if given["columns"] else (None, None)
        grads = module.contrast_bwd(
            weights[0], columns[0], found[0], columns[1], query, key, scale, *masks, given["unit"], False, 0
        )
        results.append((*found[:5], *grads))
    return results


@pytest.mark.parametrize("dim", (1, 3, 33, 128, 600))
@pytest.mark.parametrize("count, keys", [(1, 1), (1, 70), (33, 5), (64, 65), (130, 257), (260, 40)])
def test_every_shape(count, keys, dim):
    query, key = rows(count, dim), rows(keys, dim, 1)
    skip = torch.arange(count)[:, None] % (keys + 3)  # some name columns that are not there
    ids = {"query_ids": torch.arange(count) % 7, "key_ids": torch.arange(keys) % 9}
    for options in ({}, {"skip": skip, "columns": True}, {**ids, "unit": True}, {**ids, "skip": skip, "columns": True}):
        for actual, expected in zip(*core(query, key, torch.tensor(3.0), **options), strict=True):
            torch.testing.assert_close(actual, expected, rtol=2e-5, atol=5e-6, check_dtype=False)


@pytest.mark.parametrize("count", (1, 2, 31, 64, 129))
def test_every_symmetric_shape(count):
    for unit in (False, True):
        for actual, expected in zip(*core(rows(count, 20), None, torch.tensor(4.0), unit=unit), strict=True):
            torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-6, check_dtype=False)


@pytest.mark.parametrize("scale", (0.0, -3.0, 200.0, 1e4))
def test_every_scale(scale):
    query, key = rows(40, 16), rows(90, 16, 1)
    actual, _ = core(query, key, torch.tensor(scale), columns=True)
    exact = contrast_reference.contrast(
        query.double(), key.double(), torch.tensor(scale).double(), None, None, None, False, True, True
    )
    for one, two in zip(actual[:4], exact, strict=False):
        torch.testing.assert_close(one.double(), two, rtol=1e-6, atol=1e-6)
    size = max(1, abs(scale))
    for grad in actual[5:]:
        assert grad.isfinite().all() and grad.abs().max() <= 100 * size


@pytest.mark.parametrize("spread", (1.0, 6.0))
def test_columns_far_below_the_largest_logit(spread):
    size = torch.logspace(-spread, 0, 300)[:, None]
    query, key, scale = rows(300, 16), rows(300, 16, 1) * size, torch.tensor(100.0)
    actual, _ = core(query, key, scale, columns=True)
    exact = contrast_reference.contrast(
        query.double(), key.double(), scale.double(), None, None, None, False, True, True
    )
    for one, two in zip(actual[:2], exact, strict=False):
        torch.testing.assert_close(one.double(), two, rtol=1e-6, atol=1e-6)


def test_a_row_with_nothing_left_is_minus_infinity_and_has_no_gradient():
    query, key = rows(3, 8), rows(2, 8, 1)
    ids = {"query_ids": torch.tensor([5, 5, 6]), "key_ids": torch.tensor([5, 5])}
    actual, expected = core(query, key, torch.tensor(3.0), columns=True, unit=True, **ids)
    assert actual[0][:2].tolist() == [-torch.inf] * 2
    for one, two in zip(actual, expected, strict=True):
        assert not one.isnan().any()
        torch.testing.assert_close(one, two, rtol=2e-5, atol=2e-6, check_dtype=False)
    assert actual[5][:2].abs().max() == 0


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("temperature", (0.1, 0.02))
def test_a_queue_of_any_layout_needs_no_copy(dtype, temperature):
    query, key = rows(50, 24).requires_grad_(), rows(50, 24, 1)
    plain = (3 * rows(700, 24, 2)).to(dtype)
    strided = torch.zeros(700, 60, dtype=dtype)[:, 3:51:2].copy_(plain)
    expected = gradients(lambda q: sslkernels.info_nce(q, key, plain, temperature), query)
    for queue in (strided, plain.T.contiguous().T, plain.flip(0).flip(0)):
        actual = gradients(lambda q, queue=queue: sslkernels.info_nce(q, key, queue, temperature), query)
        assert all(torch.equal(one, two) for one, two in zip(actual, expected, strict=True))
    exact = gradients(lambda q: reference.info_nce(q, key.double(), plain.double(), temperature), query.double())
    eager = gradients(lambda q: reference.info_nce(q, key, plain, temperature), query)
    for name, *three in zip(("loss", "grad"), expected, eager, exact, strict=True):
        assert_as_exact_as_eager(name, *three, dtype=torch.float32)


@pytest.mark.parametrize("spec, case", SMALL, ids=SMALL_IDS)
def test_bits_do_not_depend_on_the_threads(spec, case):
    arguments = case.make("cpu", torch.float32)
    leaves = [name for name in spec.grad_args if isinstance(arguments[name], torch.Tensor)]
    before, results = torch.get_num_threads(), []

    def loss(*tensors):
        return spec.function(**{**arguments, **dict(zip(leaves, tensors, strict=True))})

    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(gradients(loss, *(arguments[name] for name in leaves)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("isa", OTHER_ISAS)
def test_every_instruction_set(isa):
    program = (
        "import torch, numerics\n"
        "from sslkernels._library import extension\n"
        "from sslkernels.ops.infonce.cases import OPS\n"
        f"assert extension.isa() == {isa!r}\n"
        "for spec in OPS[1:]:\n"
        "    for case in spec.cases:\n"
        "        if case.name in ('odd', 'tau_0.005', 'excluded', 'rectangular'):\n"
        "            for dtype in (torch.float32, torch.bfloat16): numerics.assert_op_close(spec, case, dtype)\n"
    )
    run_python(program, SSLKERNELS_ISA=isa)


def test_clip_in_bf16_at_scale_100_is_as_exact_as_its_inputs():
    images, texts = rows(256, 512, dtype=torch.bfloat16), rows(256, 512, 1, torch.bfloat16)
    scale = torch.tensor(100.0)
    actual = gradients(sslkernels.clip_loss, images, texts, scale)
    exact = gradients(sslkernels.clip_loss, images.double(), texts.double(), scale.double())
    for one, two in zip(actual[1:3], exact[1:3], strict=True):
        worst = ((one.double() - two).abs().max() / two.abs().max()).item()
        assert worst <= 2.0**-8 + 1e-5, worst  # the rounding of the gradient itself
    with medium_precision():  # the same products, but a gradient that is not rounded
        wide = gradients(sslkernels.clip_loss, images.float(), texts.float(), scale)
    multiplies_bf16 = _library.extension is not None and _library.extension.has_bf16()  # and rounds the softmax to it
    for one, two, three in zip(actual[1:3], wide[1:3], exact[1:3], strict=True):
        assert torch.equal(one, two.bfloat16())
        assert (two - three).norm() <= (1.2e-3 if multiplies_bf16 else 1e-6) * three.norm()
    assert ((actual[3] - exact[3]) / exact[3]).abs() <= 1e-6


def test_stats_are_those_of_the_logits():
    query, key, queue = rows(20, 16), rows(20, 16, 1), rows(50, 16, 2)
    for negatives in (None, queue):
        _, stats = sslkernels.info_nce(query, key, negatives, 0.2, return_stats=True)
        logits = query @ key.T / 0.2 if negatives is None else query @ negatives.T / 0.2
        positive = (query * key).sum(dim=1) / 0.2
        if negatives is None:
            logits.fill_diagonal_(-torch.inf)
        torch.testing.assert_close(stats.positive_logit, positive)
        torch.testing.assert_close(stats.logsumexp, torch.logaddexp(logits.logsumexp(dim=1), positive))
        assert torch.equal(stats.top1, positive > logits.amax(dim=1))
    _, both = sslkernels.clip_loss(query, key, 5.0, 1.0, return_stats=True)
    logits = 5 * query @ key.T + 1
    for stats, side in zip(both, (logits, logits.T), strict=True):
        torch.testing.assert_close(stats.logsumexp, side.logsumexp(dim=1))
        assert torch.equal(stats.top1, side.argmax(dim=1) == torch.arange(20))


def test_equal_keys_tie_with_the_positive():
    query, key = rows(30, 40), rows(1, 40, 1).expand(30, 40)
    _, stats = sslkernels.info_nce(query, key, None, 0.001, return_stats=True)
    assert not stats.top1.any()


def test_a_nan_stays_a_nan():
    query, key = rows(30, 8), rows(30, 8, 1)
    query[3] = torch.nan
    assert sslkernels.info_nce(query, key, None, 0.1).isnan()
    assert sslkernels.info_nce(query, key, rows(90, 8, 2), 0.01).isnan()
    assert sslkernels.sup_con(query, torch.arange(30) % 3, 0.1).isnan()
    assert sslkernels.clip_loss(query, key, 10.0).isnan()
    assert sslkernels.sigmoid_loss(query, key, 10.0, -10.0).isnan()


@pytest.mark.parametrize("value", (torch.nan, torch.inf))
def test_a_key_that_is_no_number_shows_in_every_row_it_is_compared_with(value):
    query, key, queue = rows(6, 5).requires_grad_(), rows(6, 5, 1), rows(30, 5, 2)
    queue[3] = value
    calls = {
        "info_nce": lambda backend: sslkernels.info_nce(
            query, key, queue, 0.1, normalize=False, reduction="none", backend=backend
        ),
        "normalised": lambda backend: sslkernels.info_nce(query, key, queue, 0.1, reduction="none", backend=backend),
        "clip_loss": lambda backend: sslkernels.clip_loss(query, queue, 2.0, reduction="none", backend=backend),
    }
    for name, call in calls.items():
        losses, expected = call(None), call("reference")
        assert expected.isnan().any(), name
        assert torch.equal(losses.isnan(), expected.isnan()), name
        (grad,), (exact,) = (torch.autograd.grad(loss.sum(), query) for loss in (losses, expected))
        assert exact.isnan().any() and torch.equal(grad.isnan(), exact.isnan()), name


@pytest.mark.parametrize("backend", (None, "reference"))
@pytest.mark.parametrize("name", ("decoupled_nt_xent", "hard_nt_xent"))
def test_a_nan_shows_in_every_row_that_meets_it(name, backend):
    z0, z1 = rows(6, 8), rows(6, 8, 1)
    z0[3] = torch.nan
    assert getattr(sslkernels, name)(z0, z1, 0.5, reduction="none", backend=backend).isnan().all()


def bad_calls():
    x, y, ids = torch.ones(4, 3), torch.ones(5, 3), torch.arange(4)
    integers = r"\(int64, int32, int16, int8, uint8\)"
    calls = {
        "info_nce": [
            ((x, y), {}, r"positive_key must be \(N, D\) like query \(4, 3\), got \(5, 3\)"),
            ((x, x, y[:, :2]), {}, r"negative_keys must be \(K, 3\) like query \(4, 3\), got \(5, 2\)"),
            ((x, x, y), {"negative_mode": "paired"}, r"negative_keys must be \(4, M, 3\), got \(5, 3\)"),
            ((x, x, y), {"negative_mode": "all"}, "negative_mode must be 'unpaired' or 'paired', got 'all'"),
            ((x, x), {"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1"),
            ((x, x), {"exclude_ids": x}, rf"exclude_ids must be a tensor of integers {integers}, got torch.float32"),
            ((x, x), {"exclude_ids": ids[:3]}, r"exclude_ids must be \(4,\), got \(3,\)"),
            ((x, x), {"exclude_ids": ids, "label_smoothing": 0.1}, "exclude_ids must be None with label_smoothing"),
            ((x, x, None, 0), {}, "temperature must be finite and not zero in torch.float32, got 0"),
            ((x, x, None, 1e-46), {}, "temperature must be finite and not zero in torch.float32, got 1e-46"),
        ],
        "clip_loss": [
            ((x, x, "1"), {}, "logit_scale must be a float or a tensor, got str"),
            ((x, x, 1e39), {}, r"logit_scale must be finite in torch.float32, got 1e\+39"),
            ((x, x, -(10**400)), {}, r"logit_scale must be finite in torch.float32, got -10+\.\.\.0+"),
            ((x, x.to_sparse(), 1.0), {}, "text_features must be a strided tensor, got torch.sparse_coo"),
            ((x, y[:, :2], 1.0), {}, r"text_features must be \(K, 3\) like image_features \(4, 3\), got \(5, 2\)"),
            ((x, x, 1.0), {"reduction": "all"}, "reduction must be one of 'mean', 'sum', 'none', got 'all'"),
        ],
        "sup_con": [
            ((x, ids.to(torch.uint16)), {}, rf"labels must be a tensor of integers {integers}, got torch.uint16"),
            ((x, ids.to_sparse()), {}, "labels must be a strided tensor, got torch.sparse_coo"),
            ((x, torch.arange(5)), {}, r"labels must be \(4,\), got \(5,\)"),
            ((x, [0, 1, 2, 3]), {}, rf"labels must be a tensor of integers {integers}, got list"),
        ],
        "sigmoid_loss": [
            ((x, x, 1.0, float("nan")), {}, "logit_bias must be finite in torch.float32, got nan"),
            ((x, x, 1.0, 1e39), {}, r"logit_bias must be finite in torch.float32, got 1e\+39"),
        ],
        "decoupled_nt_xent": [
            ((x, x), {"positive_weight": x[:3, 0]}, r"positive_weight must be \(4,\) or \(8,\), got \(3,\)"),
            ((x, x), {"positive_weight": x[:, 0].to_sparse()}, "positive_weight must be a strided tensor, got"),
        ],
        "hard_nt_xent": [
            ((x, x), {"tau_plus": -0.1}, r"tau_plus must be in \[0, 1\), got -0.1"),
            ((x, x), {"beta": 1e39}, r"beta must be in \[0, 1e\+30\), got 1e\+39"),
        ],
        "mises_fisher_weights": [
            ((x, x, 0), {}, "sigma must be finite and not zero in torch.float32, got 0"),
            ((x, x, "0.5"), {}, "sigma must be a float or a tensor, got str"),
        ],
    }
    for name in SPECS.keys() - {"info_nce_queue"}:
        scalars = (1.0, 0.0) if name == "sigmoid_loss" else (1.0,) if name == "clip_loss" else ()
        inputs = (x, ids if name == "sup_con" else x, *scalars)
        for flag in ("normalize", "return_stats"):
            if flag in inspect.signature(getattr(sslkernels, name)).parameters:
                calls[name].append((inputs, {flag: "no"}, f"{flag} must be a bool, got str"))
    return [(name, *call) for name, some in calls.items() for call in some]


@pytest.mark.parametrize("name, args, options, message", bad_calls(), ids=[f"{c[0]}-{c[3]}" for c in bad_calls()])
def test_bad_input_is_one_clear_error(name, args, options, message):
    with pytest.raises((TypeError, ValueError), match=f"^{name}: {message}") as raised:
        getattr(sslkernels, name)(*args, **options)
    assert "\n" not in str(raised.value)

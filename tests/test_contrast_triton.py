"""The Triton kernels of the contrastive core, interpreted on the CPU: as exact as eager, in any order of programs."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_op_close
from triton_on_cpu import TARGETS, interpret, kernels

from sslkernels.ops.infonce import clip_loss, contrast_kernels, contrast_reference, info_nce
from sslkernels.ops.infonce.cases import OPS

SPECS = {spec.name: spec for spec in OPS if "nt_xent" not in spec.name}
CASES = [(spec, case) for spec in SPECS.values() for case in spec.tagged("edge")]
NARROW = ("odd", "excluded", "tau_0.005", "not_normalized", "rectangular", "many_positives")
IN_16_BITS = [(spec, case) for spec, case in CASES if case.name in NARROW]
# the interpreter takes half a minute for each of the larger ones in fp32
COMPILED = [(spec, case) for spec in SPECS.values() for case in spec.tagged("aot_bf16")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# the configurations of a target serve both 16-bit types: they take turns
TURNS = list(zip(TARGETS, cycle(DTYPES[1:]), strict=False)) + list(zip(TARGETS, cycle(DTYPES[:0:-1]), strict=False))
WEIGHTS = 100.0  # the largest of the weights of rows and columns
SHAPES = [(1, 1, 1), (2, 3, 16), (63, 130, 17), (129, 64, 5), (3, 300, 40), (200, 5, 33)]


def unit_rows(rows, dim, *, seed=0, dtype=torch.float32):
    """Rows of unit length that every tile dtype holds exactly."""
    generator = torch.Generator().manual_seed(seed + 100 * rows + dim)
    return F.normalize(torch.randn(rows, dim, generator=generator), dim=1).to(dtype).float()


def ids(count, *, seed=0):
    return torch.randint(0, 5, (count,), generator=torch.Generator().manual_seed(seed)) - 2**40


@pytest.fixture
def one_program(monkeypatch):
    """A GPU of one multiprocessor, where no columns are split and one program meets many tiles."""
    of_family = contrast_kernels.config_of
    monkeypatch.setattr(contrast_kernels, "config_of", lambda *of: replace(of_family(*of), programs=1))


def softmax(ops, query, key, scale, *, skip=None, pair=None, normalize_key=False, bounded=False, columns=False,
            attract=False, peaks=False, matmul=0, seed=0):  # fmt: skip
    """Everything that both operators return, by name; the rows and columns have weights of many magnitudes."""
    pair = pair or (None, None)
    scale = torch.tensor(scale).to(query)
    outputs = ops.contrast_fwd(
        query, key, scale, skip, *pair, normalize_key, bounded, bounded, columns, attract, peaks, matmul
    )
    names = ("lse_rows", "lse_columns", "peak_rows", "peak_columns", "skipped", "attraction")
    found = dict(zip(names, outputs, strict=True))
    if attract:
        return found
    generator = torch.Generator().manual_seed(seed)
    lse_rows, lse_columns = outputs[:2]
    weights = [torch.randn(len(lse), generator=generator).double() * torch.logspace(-3, 2, len(lse))
               for lse in (lse_rows, lse_columns)]  # fmt: skip
    column_arguments = (weights[1], lse_columns) if columns else (None, None)
    grads = ops.contrast_bwd(
        weights[0], column_arguments[0], lse_rows, column_arguments[1], query, key, scale, skip, *pair, bounded,
        bounded, matmul,
    )  # fmt: skip
    return found | dict(zip(("grad_query", "grad_key", "grad_scale"), grads, strict=True))


def sigmoid(ops, query, key, scale, bias, *, positive=None, pair=None, matmul=0):
    pair, scale, bias = pair or (None, None), torch.tensor(scale).to(query), torch.tensor(bias).to(query)
    loss = ops.sigmoid_contrast_fwd(query, key, scale, bias, positive, *pair, matmul)
    weight = torch.randn(len(loss), generator=torch.Generator().manual_seed(0)).double()
    grads = ops.sigmoid_contrast_bwd(weight, query, key, scale, bias, positive, *pair, matmul)
    names = ("loss", "grad_query", "grad_key", "grad_scale", "grad_bias")
    return dict(zip(names, (loss, *grads), strict=True))


def check(run, query, key, scale, *arguments, target="sm_90", roundings=16, **options):
    """Compare with the definition in fp64: an error is relative to the largest element, in roundings of the tiles."""
    with interpret(target, order_seed=1) as launches:
        actual = run(contrast_kernels, query, key, scale, *arguments, **options)
    doubles = (query.double(), None if key is None else key.double())
    exact = run(contrast_reference, *doubles, scale, *arguments, **options)
    rounding = torch.finfo(DTYPES[options.get("matmul", 0)]).eps
    for name, value in exact.items():
        found = actual[name].double()
        assert found.shape == value.shape, name
        if not value.numel():
            continue
        assert torch.equal(found.isinf(), value.isinf()), name
        in_tiles = name in ("grad_query", "grad_key", "attraction")
        allowed = roundings * (rounding if in_tiles else torch.finfo(torch.float32).eps)
        finite = value[value.isfinite()]
        # gradients of scale and bias are sums whose terms cancel
        largest = max(finite.abs().max().item() if finite.numel() else 0.0, WEIGHTS if value.dim() == 0 else 1.0)
        error = torch.where(value.isinf(), 0, found - value).abs().max().item()
        assert error <= allowed * largest, f"{name}: error {error:.1e} of {largest:.1e}"
    return actual, launches


@pytest.mark.parametrize(
    "spec, case, target",
    [(*pair, target) for pair, target in zip(CASES, cycle(TARGETS), strict=False)],
    ids=lambda value: getattr(value, "name", value),
)
def test_fp32_is_as_exact_as_eager(spec, case, target):
    with interpret(target, order_seed=0):
        assert_op_close(spec, case, torch.float32)


@pytest.mark.parametrize(
    "spec, case, target, dtype",
    [(*pair, target, dtype) for pair, (target, dtype) in zip(IN_16_BITS, cycle(TURNS), strict=False)],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_16_bits_are_as_exact_as_eager(spec, case, target, dtype):
    with interpret(target, order_seed=0):
        assert_op_close(spec, case, dtype)


@pytest.mark.parametrize(
    "spec, case, target",
    [(*pair, target) for pair, target in zip(COMPILED, cycle(TARGETS), strict=False)],
    ids=lambda value: getattr(value, "name", value),
)
def test_what_is_compiled_is_as_exact_as_eager(spec, case, target):
    with interpret(target, order_seed=0):
        assert_op_close(spec, case, torch.bfloat16)


@pytest.mark.parametrize("matmul", range(3))
@pytest.mark.parametrize("rows, columns, dim", SHAPES)
def test_ragged_shapes(rows, columns, dim, matmul):
    query, key = (unit_rows(count, dim, seed=seed, dtype=DTYPES[matmul]) for seed, count in enumerate((rows, columns)))
    options = {"target": "gfx942", "matmul": matmul}
    skip = torch.arange(rows)[:, None]
    check(softmax, query, key, 5.0, skip=skip, columns=True, **options)
    check(softmax, query, key, -5.0, bounded=True, attract=True, **options)
    check(sigmoid, query, key, 5.0, -3.0, positive=skip, **options)


# an infinite one that is divided by its length is NaN
@pytest.mark.parametrize("bounded, bad", [(False, torch.nan), (False, torch.inf), (True, torch.nan)])
def test_a_key_that_is_not_finite_shows(bounded, bad):
    query, key = unit_rows(5, 16), unit_rows(70, 16, seed=1)
    key[3] = bad
    options = {"skip": torch.tensor([[9], [3], [9], [9], [9]]), "bounded": bounded}
    with interpret("sm_90", order_seed=1):
        actual = softmax(contrast_kernels, query, key, 5.0, **options)
        attraction = softmax(contrast_kernels, query, key, 5.0, bounded=bounded, attract=True)["attraction"]
    expected = softmax(contrast_reference, query, key, 5.0, **options)
    assert actual["lse_rows"].isnan().tolist() == [True, False, True, True, True]
    assert attraction.isnan().all()
    for name in ("lse_rows", "grad_query", "grad_key", "grad_scale"):
        assert torch.equal(actual[name].isnan(), expected[name].isnan()), name


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("matmul", range(3))
def test_one_program_meets_many_tiles(one_program, matmul, bounded):
    query, key = unit_rows(40, 24, dtype=DTYPES[matmul]), unit_rows(300, 24, seed=1, dtype=DTYPES[matmul])
    options = {"matmul": matmul, "bounded": bounded}
    _, launches = check(softmax, query, key, 20.0, columns=True, skip=torch.arange(40)[:, None], **options)
    assert all(launch.grid[1] == 1 for launch in launches if "bwd_kernel" in launch.kernel.__name__)
    check(softmax, query, key, 20.0, attract=True, **options)
    check(softmax, unit_rows(200, 24, dtype=DTYPES[matmul]), None, 20.0, **options)


@pytest.mark.parametrize("matmul", range(3))
def test_more_width_than_a_program_accumulates(matmul):
    query, key = unit_rows(20, 600, dtype=DTYPES[matmul]), unit_rows(70, 600, seed=1, dtype=DTYPES[matmul])
    _, launches = check(softmax, query, key, 9.0, attract=True, matmul=matmul)
    assert max(launch.grid[2] for launch in launches) > 1
    check(softmax, query, key, 9.0, columns=True, matmul=matmul)


def test_few_rows_and_many_columns_are_split_and_merged():
    query, key = unit_rows(8, 16), unit_rows(1500, 16, seed=1)
    for options in ({"attract": True}, {"columns": True}, {"bounded": True}):
        _, launches = check(softmax, query, key, 30.0, **options)
        assert max(launch.grid[1] for launch in launches) > 8


@pytest.mark.parametrize("scale", [0.0, 1e-30, 0.01, 100.0, 1000.0, -1000.0])
def test_scales(scale):
    query, key = unit_rows(70, 24), unit_rows(90, 24, seed=1)
    roundings = 16 * max(1, abs(scale))  # of the logits
    check(softmax, query, key, scale, columns=True, roundings=roundings)
    check(softmax, query, key, scale, attract=True, roundings=roundings)
    check(softmax, query, None, scale, roundings=roundings)
    check(sigmoid, query, key, scale, -10.0, roundings=roundings)


def test_sigmoid_terms_keep_their_digits_far_below_1():
    query, key = unit_rows(40, 24), unit_rows(300, 24, seed=1)
    with interpret():
        loss = sigmoid(contrast_kernels, query, key, 1.0, -12.0)["loss"]
    exact = sigmoid(contrast_reference, query.double(), key.double(), 1.0, -12.0)["loss"]
    assert exact.max() < 0.01
    torch.testing.assert_close(loss, exact, rtol=3e-6, atol=0)


@pytest.mark.parametrize("matmul", range(3))
def test_several_skips_duplicates_and_what_is_out_of_range(matmul):
    query, key = unit_rows(70, 24, dtype=DTYPES[matmul]), unit_rows(90, 24, seed=1, dtype=DTYPES[matmul])
    skip = torch.randint(-20, 120, (70, 3), generator=torch.Generator().manual_seed(0))
    skip[::2, 1] = skip[::2, 0]
    skip[1::2, 2] += 2**32  # not in range in 64 bits
    check(softmax, query, key, 9.0, skip=skip, columns=True, peaks=True, matmul=matmul)
    check(softmax, query, key, 9.0, skip=skip[:, :0], columns=True, peaks=True, matmul=matmul)
    check(softmax, query, key, 9.0, skip=skip, attract=True, matmul=matmul)
    check(softmax, query, None, 9.0, skip=skip, peaks=True, columns=True, matmul=matmul)
    check(sigmoid, query, key, 9.0, -3.0, positive=skip, matmul=matmul)


def test_ids():
    query, key = unit_rows(70, 24), unit_rows(90, 24, seed=1)
    pair, own = (ids(70), ids(90, seed=1)), (ids(70), ids(70))
    check(softmax, query, key, 9.0, pair=pair, skip=torch.arange(70)[:, None], columns=True, peaks=True)
    check(softmax, query, key, 9.0, pair=pair, attract=True)
    check(softmax, query, None, 9.0, pair=own)
    check(sigmoid, query, key, 9.0, -3.0, pair=pair, positive=torch.arange(70)[:, None])


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("matmul", range(3))
def test_rows_and_columns_with_nothing_left_have_no_gradient(bounded, matmul):
    query, key = unit_rows(70, 24, dtype=DTYPES[matmul]), unit_rows(90, 24, seed=1, dtype=DTYPES[matmul])
    pair = torch.zeros(70, dtype=torch.long), torch.zeros(90, dtype=torch.long)
    for lonely, found in (("rows", slice(10)), ("all", slice(None))):
        pair[0][:] = torch.arange(70) if lonely == "rows" else 0
        pair[0][found] = 0
        for options in ({"columns": True, "peaks": not bounded}, {"attract": True}):
            actual, _ = check(softmax, query, key, 20.0, pair=pair, bounded=bounded, matmul=matmul, **options)
            assert actual["lse_rows"][found].eq(-torch.inf).all()
            for name in ("attraction", "grad_query"):
                assert not actual.get(name, query[:0])[found].any()
    one, _ = check(softmax, query[:1], None, 20.0, bounded=bounded, matmul=matmul)
    assert one["lse_rows"].item() == -torch.inf and not one["grad_query"].any() and one["grad_scale"] == 0


def test_log_sum_exps_of_more_than_is_given():
    query, key = unit_rows(70, 24), unit_rows(200, 24, seed=1)
    weight = torch.randn(70, generator=torch.Generator().manual_seed(0)).double()
    for bounded in (False, True):
        lse = contrast_reference.contrast_fwd(query, key, torch.tensor(20.0), *[None] * 3, *[False] * 6, 0)[0]
        lse[::7] = -torch.inf  # rows that others have left with nothing
        arguments = (torch.tensor(20.0), None, None, None, bounded, bounded, 0)
        parts = []
        for part in key.split(80):
            with interpret(order_seed=1):
                grad, grad_key, _ = contrast_kernels.contrast_bwd(weight, None, lse, None, query, part, *arguments)
            assert grad.isfinite().all() and grad_key.isfinite().all()
            parts.append((grad, grad_key))
        kept = lse > -torch.inf
        exact = contrast_reference.contrast_bwd(
            weight[kept], None, lse[kept], None, query[kept].double(), key.double(), *arguments
        )
        total = sum(grad for grad, _ in parts)
        assert not total[~kept].any()
        torch.testing.assert_close(total[kept].double(), exact[0], rtol=1e-4, atol=1e-5)
        grad_key = torch.cat([part for _, part in parts]).double()
        torch.testing.assert_close(grad_key, exact[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("matmul", range(3))
@pytest.mark.parametrize("key_dtype", DTYPES, ids=str)
def test_a_queue_of_any_dtype_and_length_is_normalised(key_dtype, matmul):
    query = unit_rows(20, 40, dtype=DTYPES[matmul])
    key = (unit_rows(150, 40, seed=1) * torch.logspace(-3, 3, 150)[:, None]).to(key_dtype)
    key[::9] = 0
    with interpret(order_seed=1) as launches:
        actual = softmax(contrast_kernels, query, key, 9.0, normalize_key=True, attract=True, matmul=matmul)
    exact = softmax(contrast_reference, query.double(), key.double(), 9.0, normalize_key=True, attract=True)
    error = (actual["lse_rows"] - exact["lse_rows"]).abs().max()
    assert error < (1e-5, 2e-2, 2e-3)[matmul]  # keys in fp32 may be rounded
    torch.testing.assert_close(
        actual["attraction"].double(), exact["attraction"], rtol=0, atol=(1e-6, 2e-3, 2e-4)[matmul]
    )
    read = [launch.arguments["y_ptr"] for launch in launches if launch.kernel.__name__ == "_contrast_fwd_kernel"]
    exactly = matmul == 0 or (matmul == 1 and key_dtype == torch.bfloat16)
    assert read[0].dtype == (key_dtype if exactly else DTYPES[matmul])
    assert (read[0].data_ptr() == key.data_ptr()) == exactly  # no copy of what can be read as it is


@pytest.mark.parametrize("matmul", range(3))
def test_rows_of_any_length_fit_the_tiles(matmul):
    query = unit_rows(33, 24, dtype=DTYPES[matmul])
    key = unit_rows(70, 24, seed=1, dtype=DTYPES[matmul]) * 2.0 ** torch.arange(-40, 30)[:, None]
    for scale in (2.0**-20, 2.0**-30):
        for options in ({"columns": True}, {"attract": True}):
            actual, _ = check(softmax, query, key, scale, roundings=2.0**20, matmul=matmul, **options)
            assert all(value.isfinite().all() for value in actual.values())
        exact = softmax(contrast_reference, query.double(), key.double(), scale, attract=True)["attraction"]
        error = (actual["attraction"] - exact).abs().max() / exact.abs().max()
        assert error < 16 * torch.finfo(DTYPES[matmul]).eps


def test_strided_inputs():
    query, key = unit_rows(70, 24), unit_rows(90, 24, seed=1)
    views = (key.new_zeros(90, 61)[:, 3:51:2], key.new_zeros(90, 61)[:, 5:29], key.new_zeros(24, 90).T)
    for strided in (view.copy_(key) for view in views):
        with interpret():
            results = [softmax(contrast_kernels, query, k, 9.0, columns=True) for k in (key, strided)]
        for name, value in results[0].items():
            torch.testing.assert_close(results[1][name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_equal_rows_tie(target, dtype):
    row = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)).expand(70, 40).to(dtype)
    with interpret(target):
        _, stats = clip_loss(row, row, 100.0, normalize=True, return_stats=True)
        _, batch = info_nce(row, row, temperature=0.01, return_stats=True)
    assert not any(side.top1.any() for side in (*stats, batch))


@pytest.mark.parametrize("matmul", range(3))
def test_no_result_depends_on_the_order_of_programs(matmul):
    query, key = unit_rows(130, 24, dtype=DTYPES[matmul]), unit_rows(300, 24, seed=1, dtype=DTYPES[matmul])
    for run, options in ((softmax, {"columns": True}), (softmax, {"attract": True}), (sigmoid, {"bias": -3.0})):
        results = []
        for seed in (None, 1, 2):
            with interpret(order_seed=seed):
                results.append(run(contrast_kernels, query, key, 9.0, matmul=matmul, **options))
        for other in results[1:]:
            assert all(torch.equal(other[name], value) for name, value in results[0].items())


def test_one_pass_serves_a_query_that_is_its_own_key():
    query = unit_rows(70, 24)
    _, launches = check(softmax, query, None, 9.0)
    assert [launch.kernel.__name__ for launch in launches].count("_contrast_bwd_kernel") == 1


def test_every_kernel_is_among_these():
    query, key, launched = unit_rows(20, 8), unit_rows(20, 8).half().float(), set()
    with interpret() as launches:
        softmax(contrast_kernels, query, key, 9.0, columns=True, matmul=2)
        sigmoid(contrast_kernels, query, key, 9.0, -3.0)
    launched = {launch.kernel.__name__ for launch in launches}
    assert launched == {name for name in kernels() if "contrast" in name and name.endswith("_kernel")}


def test_what_is_empty_or_fp64_takes_the_definition():
    for query, key in ((unit_rows(0, 8), unit_rows(5, 8)), (unit_rows(5, 8), unit_rows(0, 8)),
                       (unit_rows(5, 8).double(), unit_rows(6, 8).double())):  # fmt: skip
        for run, options in ((softmax, {"columns": True}), (sigmoid, {"bias": -3.0})):
            with interpret() as launches:
                actual = run(contrast_kernels, query, key, 9.0, **options)
            expected = run(contrast_reference, query, key, 9.0, **options)
            assert not launches
            assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_memory_is_linear_in_the_batch(one_program):
    query, key = unit_rows(300, 16), unit_rows(300, 16, seed=1)
    with interpret() as launches:
        softmax(contrast_kernels, query, key, 9.0, columns=True)
    tensors = [value for launch in launches for value in launch.arguments.values() if isinstance(value, torch.Tensor)]
    assert max(tensor.numel() for tensor in tensors) <= 300 * 16


def test_splits_take_the_memory_of_a_tile_for_each_program():
    with interpret() as launches:
        softmax(contrast_kernels, unit_rows(70, 16), unit_rows(3000, 16, seed=1), 9.0, attract=True)
        config = contrast_kernels.config_of(4, contrast_kernels.CONTRAST_CONFIGS)
    [partial] = [launch.arguments["partial_ptr"] for launch in launches if "partial_ptr" in launch.arguments]
    assert len(partial) > 10 and partial.numel() <= config.programs * config.backward.rows * 16


@pytest.mark.parametrize("target", TARGETS)
def test_products_of_float32_are_added_in_one_order_in_every_pass(target):
    config = contrast_kernels.CONTRAST_CONFIGS[target][4]
    assert {tiles.depth for tiles in (config.rows, config.backward, config.backward_wide)} == {16}

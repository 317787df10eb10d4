"""The CUDA kernels of patch masking, run on the CPU in the order in which the launcher runs them: the bits of the
definition, and sums as exact as eager's.
"""

from __future__ import annotations

import mmap
import shutil

import pytest
import torch
from conftest import require_or_skip
from cuda_on_cpu import SCHEDULES
from numerics import assert_op_close
from patch_mask_cuda import Operators, registered

from sslkernels import _library
from sslkernels.ops.patch_mask import reference
from sslkernels.ops.patch_mask.cases import OPS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SEED = torch.tensor(-(2**63) + 12345)
SUM_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 1e-14}
NONSENSE = (-1, -(2**63), 2**63 - 1, 2**32)
# what threads do together does not depend on the dtype
EVERY_DTYPE = [(dtype, schedule) for dtype in DTYPES for schedule in (SCHEDULES if dtype == torch.float32 else (5,))]
SPECS = [spec for spec in OPS if not spec.name.endswith("_mask") or spec.name == "patch_mask"]  # not the mask makers
CASES = [
    pytest.param(spec, case, dtype, id=f"{spec.name}-{case.name}-{dtype}")
    for spec in SPECS
    for case in spec.cases
    for dtype in [d for d in (torch.float32, torch.bfloat16) if d in spec.dtypes] or spec.dtypes
    if case.tags != {"bench"}
]


@pytest.fixture(autouse=True)
def compiler():
    require_or_skip(shutil.which("g++"), "g++ is not installed")


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some_ids(samples, count, tokens, seed=0):
    return torch.randint(tokens, (samples, count), generator=torch.Generator().manual_seed(seed))


def assert_same(actual, expected, *what):
    """Every bit, but that -0 is 0 and a NaN any NaN."""
    if isinstance(expected, tuple):
        for index, pair in enumerate(zip(actual, expected, strict=True)):
            assert_same(*pair, *what, f"result {index}")
        return
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, what
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{what}: {text}")


# ---- which tokens stay


def selections(tokens):
    for num_keep in sorted({0, 1, tokens // 4, tokens - 1, tokens}):
        for ordered in (False, True):
            yield num_keep, ordered


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("tokens", [1, 5, 10, 49, 197, 1568])
def test_masks_have_the_bits_of_the_definition(tokens, schedule):
    operators, sample_ids = Operators(schedule), torch.tensor([3, -1, 2**40 + 5])
    for num_keep, ordered in selections(tokens):
        for given in (None, sample_ids):
            arguments = (SEED, given, None, 3, tokens, num_keep, ordered)
            expected = reference.patch_mask_fwd(*arguments)
            assert_same(operators.patch_mask_fwd(*arguments), expected, num_keep, ordered)
        assert_same(operators.invert_ids(expected[0], tokens), expected[1:], num_keep)


@pytest.mark.parametrize(("tokens", "schedules"), [(4096, (1,)), (5000, (0, 3, 5, 7)), (65536, (4,))], ids=str)
def test_masks_of_many_tokens(tokens, schedules):
    """Keys are drawn again, and from 4097 kept tokens on they are sorted in global memory."""
    for num_keep, ordered in ((0, False), (tokens // 4, False), (tokens // 4, True), (tokens, False)):
        arguments = (SEED, None, None, 1, tokens, num_keep, ordered)
        expected = reference.patch_mask_fwd(*arguments)
        for schedule in schedules:
            operators = Operators(schedule)
            assert_same(operators.patch_mask_fwd(*arguments), expected, num_keep, ordered, schedule)
            assert_same(operators.invert_ids(expected[0], tokens), expected[1:], num_keep, schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("tokens", [1, 7, 50, 1030, 5000])
def test_scores_with_ties_and_every_kind_of_number(tokens, schedule):
    scores = (normal(6, tokens) * 3).round()  # a few values
    scores[1] = 2.5
    scores[2] = torch.tensor([torch.nan, -0.0, 0.0, torch.inf, -torch.inf, -1e-45, 1e-45]).repeat(tokens)[:tokens]
    scores[3] = -torch.nan
    scores[4] = normal(tokens, seed=1)
    scores[5] = torch.where(torch.arange(tokens) % 2 == 0, -0.0, 0.0)
    for num_keep, ordered in selections(tokens):
        arguments = (SEED, None, scores, 6, tokens, num_keep, ordered)
        assert_same(Operators(schedule).patch_mask_fwd(*arguments), reference.patch_mask_fwd(*arguments), num_keep)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ids_that_repeat_or_do_not_exist_are_inverted_in_one_way(schedule):
    """The first of equal ids counts, and what is no id is left out: a GPU raises no error."""
    ids_keep = torch.tensor([[4, 1, 4, *NONSENSE, 0, 1]])
    ids_restore, mask = Operators(schedule).invert_ids(ids_keep, 6)
    assert ids_restore.tolist() == [[7, 1, 9, 10, 0, 11]]
    assert mask.tolist() == [[False, False, True, True, False, True]]


# ---- rows of tokens

# samples, prefix, tokens, kept, columns: rows aligned to 16 bytes and to none, whole batches of nothing
SHAPES = [(2, 1, 49, 12, 64), (3, 2, 29, 7, 37), (2, 0, 10, 10, 6), (3, 1, 7, 0, 8), (1, 3, 300, 70, 16)]
EMPTY = [(0, 1, 6, 2, 8), (2, 0, 0, 0, 8), (2, 1, 6, 2, 0), (2, 3, 0, 0, 4)]


@pytest.mark.parametrize(("dtype", "schedule"), EVERY_DTYPE, ids=str)
def test_rows_have_the_bits_of_the_definition(dtype, schedule):
    operators = Operators(schedule)
    for samples, prefix, tokens, kept, columns in SHAPES:
        x = normal(samples, prefix + tokens, columns, dtype=dtype)
        arguments = (x, SEED, None, None, kept, prefix, False)
        masked = reference.random_masking_fwd(*arguments)
        assert_same(operators.random_masking_fwd(*arguments), masked)
        arguments = (x, some_ids(samples, kept, tokens), prefix)
        assert_same(operators.gather_tokens_fwd(*arguments), reference.gather_tokens_fwd(*arguments))
        row, whole, part = (normal(count, columns, dtype=dtype, seed=1) for count in (1, prefix + tokens, tokens))
        for mask_token in (None, row[0]):
            for pos_embed in (None, whole, part):
                arguments = (masked[0], masked[2], mask_token, pos_embed, prefix)
                assert_same(operators.restore_tokens_fwd(*arguments), reference.restore_tokens_fwd(*arguments))


@pytest.mark.parametrize(("dtype", "schedule"), EVERY_DTYPE, ids=str)
def test_gradients_of_rows(dtype, schedule):
    operators = Operators(schedule)
    for samples, prefix, tokens, kept, columns in SHAPES:
        for count in (kept, 3 * tokens):  # few ids, and every one of them three times over
            grad, ids = normal(samples, prefix + count, columns, dtype=dtype), some_ids(samples, count, tokens)
            arguments = (grad, ids, tokens, prefix)
            assert_same(operators.gather_tokens_bwd(*arguments), reference.gather_tokens_bwd(*arguments))
        grad = normal(samples, prefix + tokens, columns, dtype=dtype)
        _, ids_restore, _ = reference.patch_mask_fwd(SEED, None, None, samples, tokens, kept, False)
        for options in ((0, True, False), (0, False, True), (tokens, True, True), (prefix + tokens, False, False)):
            arguments = (grad, ids_restore, kept, prefix, *options)
            actual, expected = operators.restore_tokens_bwd(*arguments), reference.restore_tokens_bwd(*arguments)
            assert_same(actual[0], expected[0], options)
            for sums, exact in zip(actual[1:], expected[1:], strict=True):
                torch.testing.assert_close(sums, exact, rtol=SUM_TOLERANCE[dtype], atol=SUM_TOLERANCE[dtype] * 30)


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_nothing_at_all(shape):
    samples, prefix, tokens, kept, columns = shape
    operators, x = Operators(), normal(samples, prefix + tokens, columns)
    kept_rows, ids_keep, ids_restore, mask = operators.random_masking_fwd(x, SEED, None, None, kept, prefix, False)
    assert_same(kept_rows[:, :prefix], x[:, :prefix])
    assert (ids_keep.shape, ids_restore.shape, mask.shape) == ((samples, kept), *[(samples, tokens)] * 2)
    assert operators.gather_tokens_bwd(kept_rows, ids_keep, tokens, prefix).shape == x.shape
    assert operators.restore_tokens_fwd(kept_rows, ids_restore, None, x.new_zeros(tokens, columns), prefix).numel() == (
        x.numel()
    )
    grads = operators.restore_tokens_bwd(x, ids_restore, kept, prefix, tokens, True, True)
    assert [tuple(grad.shape) for grad in grads] == [kept_rows.shape, (columns,), (tokens, columns) if tokens else (0,)]
    if not samples or not tokens:
        assert not grads[1].any() and not grads[2].any()


@pytest.mark.parametrize("samples", [5, 700])
@pytest.mark.parametrize("columns", [8, 1030])
def test_sums_are_split_and_the_same_under_every_schedule(samples, columns):
    """Few rows of many samples, and blocks of several rows: the partial sums are added in one order."""
    tokens = 3 if samples == 700 else 260
    grad = normal(samples, tokens, columns)
    _, ids_restore, _ = reference.patch_mask_fwd(SEED, None, None, samples, tokens, 1, False)
    arguments = (grad, ids_restore, 1, 0, tokens, False, True)
    first = Operators().restore_tokens_bwd(*arguments)
    exact = reference.restore_tokens_bwd(grad.double(), *arguments[1:])
    for sums, right in zip(first[1:], exact[1:], strict=True):
        torch.testing.assert_close(sums.double(), right, rtol=1e-6, atol=1e-4)
    for schedule in (1, 6):
        assert_same(Operators(schedule).restore_tokens_bwd(*arguments), first)


# ---- ids that do not exist


@pytest.mark.parametrize(("dtype", "schedule"), EVERY_DTYPE, ids=str)
def test_rows_of_ids_that_do_not_exist_are_nan(dtype, schedule):
    operators, ids = Operators(schedule), torch.tensor([[0, *NONSENSE, 9], [8, 9, 10, 7, -8, 0]])
    x = normal(2, 1 + 9, 5, dtype=dtype)
    exists = (ids >= 0) & (ids < 9)
    out = operators.gather_tokens_fwd(x, ids, 1)
    expected = reference.gather_tokens_fwd(x, torch.where(exists, ids, 0), 1)
    expected[:, 1:][~exists] = torch.nan
    assert_same(out, expected)
    grad = operators.gather_tokens_bwd(out, ids, 9, 1)
    zeros = torch.where(exists[..., None], out[:, 1:], 0)
    assert_same(grad, reference.gather_tokens_bwd(torch.cat([out[:, :1], zeros], 1), torch.where(exists, ids, 0), 9, 1))

    places = torch.tensor([[1, *NONSENSE, 0], [5, 2, 3, 4, -8, 0]])  # any place from num_keep on is removed
    x, mask_token = normal(2, 1 + 3, 5, dtype=dtype), normal(5, dtype=dtype, seed=1)
    expected = reference.restore_tokens_fwd(x, torch.where(places < 0, 3, places), mask_token, None, 1)
    expected[:, 1:][places < 0] = torch.nan
    assert_same(operators.restore_tokens_fwd(x, places, mask_token, None, 1), expected)
    grad = normal(2, 1 + 6, 5, dtype=dtype)
    grad_x, grad_mask_token, _ = operators.restore_tokens_bwd(grad, places, 3, 1, 0, True, True)
    ignored = grad.masked_fill(torch.cat([places[:, :1] < -(2**63) + 1, places < 0], 1)[..., None], 0)
    safe = torch.where(places < 0, 3, places)
    expected = reference.restore_tokens_bwd(ignored, safe, 3, 1, 0, True, True)
    assert_same(grad_x, expected[0])
    torch.testing.assert_close(grad_mask_token, expected[1], rtol=SUM_TOLERANCE[dtype], atol=SUM_TOLERANCE[dtype])


def test_patches_of_ids_that_do_not_exist_are_nan():
    operators, ids = Operators(), torch.tensor([[0, *NONSENSE, 4]])
    images = normal(1, 2, 8, 8)
    out = operators.gather_patches_fwd(images, ids, (4, 4))
    assert_same(out[:, :1], reference.gather_patches_fwd(images, ids[:, :1], (4, 4)))
    assert out[:, 1:].isnan().all()
    grad = operators.gather_patches_bwd(out, ids, images.shape, (4, 4))
    assert_same(grad, reference.gather_patches_bwd(out[:, :1].contiguous(), ids[:, :1], images.shape, (4, 4)))


# ---- layouts


def layouts(x):
    """(N, L, D) in memory of other strides, with dense rows."""
    yield x.transpose(0, 1).contiguous().transpose(0, 1)
    yield torch.cat([x, x], dim=2)[..., : x.shape[2]]
    yield torch.cat([x[..., :1], x], dim=2)[..., 1:]
    yield x[:1].expand(len(x), -1, -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [8, 24, 13])
def test_rows_are_read_where_they_lie(columns, dtype):
    operators, ids = Operators(3), some_ids(3, 20, 9)
    for x in layouts(normal(3, 1 + 9, columns, dtype=dtype)):
        assert_same(operators.gather_tokens_fwd(x, ids, 1), reference.gather_tokens_fwd(x, ids, 1))
    for grad in layouts(normal(3, 1 + 20, columns, dtype=dtype)):
        assert_same(operators.gather_tokens_bwd(grad, ids, 9, 1), reference.gather_tokens_bwd(grad, ids, 9, 1))
        pos_embed = torch.cat([grad[0, :1, :1].flatten(), grad[0].flatten()])[1:].view(grad.shape[1:])  # not aligned
        arguments = (grad[:, :10], torch.argsort(normal(3, 20), dim=1), None, pos_embed, 1)
        assert_same(operators.restore_tokens_fwd(*arguments), reference.restore_tokens_fwd(*arguments))


PATCHES = [
    ((2, 3, 32, 48), (16, 16)), ((2, 4, 6, 9), (2, 3)), ((2, 3, 4, 8, 16), (2, 4, 8)), ((3, 1, 5, 5), (5, 5)),
    ((0, 3, 8, 8), (4, 4)),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "schedule"), EVERY_DTYPE, ids=str)
def test_patches(dtype, schedule):
    operators = Operators(schedule)
    for shape, patch_size in PATCHES:
        images = normal(*shape, dtype=dtype)
        count = torch.Size(shape[2:]).numel() // torch.Size(patch_size).numel()
        ids = some_ids(shape[0], 7, count)
        channels_last = torch.channels_last if images.dim() == 4 else torch.channels_last_3d
        for x in (
            images,
            images.to(memory_format=channels_last),
            images.transpose(-1, -2).contiguous().transpose(-1, -2),
            torch.cat([images[..., :1], images], dim=-1)[..., 1:],
        ):
            expected = reference.gather_patches_fwd(x, ids, patch_size)
            assert_same(operators.gather_patches_fwd(x, ids, patch_size), expected, shape, x.stride())
        grad = normal(*expected.shape, dtype=dtype, seed=1)
        for given in (grad, torch.cat([grad, grad], dim=2)[..., : grad.shape[2]]):
            actual = operators.gather_patches_bwd(given, ids, shape, patch_size)
            assert_same(actual, reference.gather_patches_bwd(grad, ids, shape, patch_size), shape)


def test_more_than_four_thousand_ids():
    """Lists of ids that shared memory does not hold."""
    grad, ids = normal(2, 9000, 3), some_ids(2, 9000, 50)
    actual = Operators(2).gather_tokens_bwd(grad, ids, 50, 0)
    assert_same(actual, reference.gather_tokens_bwd(grad, ids, 50, 0))


def test_offsets_of_more_than_32_bits():
    """Tensors of which only the rows that are touched take memory."""
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, 2**35, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    columns, tokens = 2**14, 2**18
    x = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((2, tokens, columns), (tokens * columns, columns, 1))
    assert x.numel() > 2**32
    rows = torch.tensor([[0, tokens - 1], [2**17 + 1, tokens - 1]])
    for sample in range(2):
        x[sample, rows[sample]] = normal(2, columns, dtype=torch.bfloat16, seed=sample)
    expected = torch.stack([x[sample, rows[sample]] for sample in range(2)])
    assert_same(Operators().gather_tokens_fwd(x, rows, 0), expected)
    images = x.view(2, 1, tokens, columns)
    patch = images[1, 0, -1:, -16:].reshape(1, 1, 16)
    ids = torch.tensor([[0], [tokens * (columns // 16) - 1]])
    assert_same(Operators().gather_patches_fwd(images, ids, (1, 16))[1:], patch)


# ---- the public functions on these operators


@pytest.mark.parametrize(("spec", "case", "dtype"), CASES)
def test_as_exact_as_eager(spec, case, dtype):
    with registered() as called:
        assert_op_close(spec, case, dtype)
    others = {"patch_mask_fwd", "gather_tokens_fwd", "gather_tokens_bwd"}  # given ids are gathered
    assert called and set(called) <= {*spec.torch_ops, *others}


def test_the_compiled_cuda_kernels_own_the_key():
    require_or_skip(shutil.which("nvcc") and _library.extension, "nvcc is not installed, or the extension is not built")
    for spec in SPECS:
        backend = _library.backends()[spec.name]["cuda"]
        assert (backend.active, backend.besides) == ("cuda", ("triton",))

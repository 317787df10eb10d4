"""The Triton kernels of patch masking, interpreted on the CPU: the definition's bits, in any order of programs."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle, product

import pytest
import torch
from numerics import assert_op_close
from triton_on_cpu import TARGETS, interpret, kernels

from sslkernels.ops.patch_mask import kernels as triton_ops
from sslkernels.ops.patch_mask import patch_mask, random_masking, reference
from sslkernels.ops.patch_mask.cases import OPS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SEED = 2**63 + 17
CASES = [(spec, case) for spec in OPS for case in spec.tagged("verify")]
LENGTHS = (1, 5, 10, 49, 197)
# samples, prefix, tokens, kept, columns
ROWS = ((2, 1, 49, 12, 33), (2, 3, 7, 7, 129), (1, 2, 6, 0, 4))


def seed_of(number):
    return torch.tensor(number - 2**64 if number >= 2**63 else number)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def numbers(below, *shape, seed=0):
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def run(name, *arguments, target="sm_90", order=1):
    """What the launcher returns, and its launches."""
    with interpret(target, order_seed=order) as launches:
        out = getattr(triton_ops, name)(*arguments)
    return (out if isinstance(out, tuple) else (out,)), launches


def check(name, *arguments, **options):
    """The launcher returns what the definition does, to the bit."""
    actual, launches = run(name, *arguments, **options)
    expected = getattr(reference, name)(*arguments)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert (a.shape, a.dtype) == (e.shape, e.dtype), f"output {index} of {name}"
        torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{name}: {m}")
    return actual, launches


def mask_arguments(samples, tokens, kept, ordered=False, *, sample_ids=None, scores=None):
    return seed_of(SEED), sample_ids, scores, samples, tokens, kept, ordered


@pytest.mark.parametrize(
    "spec, case, target",
    [(*pair, target) for pair, target in zip(CASES, cycle(TARGETS), strict=False)],
    ids=lambda value: getattr(value, "name", value),
)
def test_public_functions_are_as_exact_as_eager(spec, case, target):
    with interpret(target, order_seed=0):
        assert_op_close(spec, case, spec.dtypes[0])


# ---- which tokens stay


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_masks_are_those_of_the_definition(tokens, ordered):
    for kept, target in zip(sorted({0, tokens // 4, tokens}), cycle(TARGETS), strict=False):
        check("patch_mask_fwd", *mask_arguments(2, tokens, kept, ordered), target=target)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 5, 2**63])
def test_every_bit_of_seed_and_sample_id_counts(seed):
    sample_ids = torch.tensor([0, 5, 2**32, 2**40 + 5, -1])
    check("patch_mask_fwd", seed_of(seed), sample_ids, None, 5, 49, 12, False)


@pytest.mark.parametrize("ordered", [False, True])
def test_long_rows_are_chosen_from_in_chunks(ordered):
    _, launches = check("patch_mask_fwd", *mask_arguments(2, 2500, 600, ordered))
    assert launches[0].arguments["CHUNK"] < 2500
    _, launches = check("patch_mask_fwd", *mask_arguments(2, 2500, 2000, ordered))
    assert [launch.arguments["SORT"] for launch in launches[1:]] == ([] if ordered else [False])


def test_65536_tokens(monkeypatch):
    monkeypatch.setattr(triton_ops, "CONFIG", replace(triton_ops.CONFIG, chunk=8192))  # sooner interpreted
    check("patch_mask_fwd", *mask_arguments(1, 65536, 16384))


@pytest.mark.parametrize("ordered", [False, True])
def test_equal_scores_are_kept_in_the_order_of_their_index(ordered, monkeypatch):
    monkeypatch.setattr(triton_ops, "CONFIG", replace(triton_ops.CONFIG, chunk=64))
    scores = numbers(4, 3, 200).float() - 2  # each in every chunk
    scores[:, ::2] *= -1
    scores[1] = 7
    for kept in (1, 77, 199):
        check("patch_mask_fwd", *mask_arguments(3, 200, kept, ordered, scores=scores))


def test_scores_that_are_no_usual_numbers():
    smallest = torch.finfo(torch.float32).smallest_normal
    row = [torch.inf, torch.nan, -0.0, 1.0, 0.0, -torch.inf, smallest / 2, -smallest / 4, -torch.nan, -1e38, 3e38, -1.0]
    scores = torch.tensor([row, row[::-1]])
    for kept in (1, 3, 5, 9, 10, 11, 12):
        check("patch_mask_fwd", *mask_arguments(2, len(row), kept, scores=scores.T.contiguous().T))


@pytest.mark.parametrize("tokens", [*LENGTHS, 1300])
def test_inverse_of_given_ids(tokens):
    for kept in sorted({0, 1, tokens // 3, tokens}):
        ids = torch.rand(3, tokens, generator=torch.Generator().manual_seed(kept)).argsort(dim=1)[:, :kept]
        check("invert_ids", ids, tokens)


def test_the_seed_is_read_on_the_device():
    seed = seed_of(SEED)
    _, [launch] = check("patch_mask_fwd", seed, None, None, 2, 10, 5, True)
    assert launch.arguments["seed_ptr"] is seed
    with interpret():
        masks = [patch_mask(2, 49, seed=seed.fill_(value)).mask for value in (1, 2)]
        assert torch.equal(masks[1], patch_mask(2, 49, seed=2).mask) and not torch.equal(*masks)


# ---- rows of tokens


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("samples, prefix, tokens, kept, columns", ROWS)
def test_tokens_are_moved_exactly(samples, prefix, tokens, kept, columns, dtype):
    x = random(samples, prefix + tokens, columns, dtype=dtype)
    ids_keep, ids_restore, _ = reference.patch_mask_fwd(*mask_arguments(samples, tokens, kept))
    check("gather_tokens_fwd", x, ids_keep, prefix)
    mask_token, pos_embed = random(columns, dtype=dtype, seed=1), random(prefix + tokens, columns, dtype=dtype, seed=2)
    for token, pos in ((None, None), (mask_token, pos_embed), (mask_token, None), (None, pos_embed[prefix:])):
        check("restore_tokens_fwd", x[:, : prefix + kept], ids_restore, token, pos, prefix)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("samples, prefix, tokens, kept, columns", ROWS)
def test_gradients_of_repeated_ids_accumulate_in_order(samples, prefix, tokens, kept, columns, dtype):
    ids = numbers(tokens, samples, 3 * kept)
    ids[:, ::2] = tokens // 2  # many in one run
    grad = random(samples, prefix + 3 * kept, columns, dtype=dtype)
    for order in range(2):
        check("gather_tokens_bwd", grad, ids, tokens, prefix, order=order)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("samples, prefix, tokens, kept, columns", ROWS)
def test_gradients_of_restored_tokens(samples, prefix, tokens, kept, columns, dtype, monkeypatch):
    monkeypatch.setattr(triton_ops, "CONFIG", replace(triton_ops.CONFIG, sum_samples=2))
    grad = random(samples, prefix + tokens, columns, dtype=dtype)
    _, ids_restore, _ = reference.patch_mask_fwd(*mask_arguments(samples, tokens, kept))
    for need_x, need_mask_token, pos_tokens in ((True, True, prefix + tokens), (True, False, 0), (False, True, tokens)):
        arguments = ids_restore, kept, prefix, pos_tokens, need_x, need_mask_token
        actual, _ = run("restore_tokens_bwd", grad, *arguments)
        expected = reference.restore_tokens_bwd(grad.double(), *arguments)
        for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
            exact = 0 if index == 0 else 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(a.double(), e, rtol=exact, atol=exact)
            assert a.dtype == dtype


def test_the_order_of_programs_leaves_no_trace(monkeypatch):
    monkeypatch.setattr(triton_ops, "CONFIG", replace(triton_ops.CONFIG, sum_samples=2))
    grad, ids_restore = random(9, 20, 33), numbers(9, 9, 20)
    results = [run("restore_tokens_bwd", grad, ids_restore, 0, 0, 20, False, True, order=order)[0] for order in (0, 1)]
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_places_that_do_not_occur_have_no_gradient():
    ids_restore = torch.tensor([[3, 1, 3, 4]])
    actual, _ = run("restore_tokens_bwd", random(1, 4, 5), ids_restore, 3, 0, 0, True, False)
    assert torch.equal(actual[0], reference.restore_tokens_bwd(random(1, 4, 5), ids_restore, 3, 0, 0, True, False)[0])
    assert actual[0][0, 0].eq(0).all() and actual[0][0, 2].eq(0).all()


def test_rows_are_read_in_place_whatever_their_strides():
    wide = random(20, 5, 40)
    x, ids = wide.transpose(0, 1)[:, :, 3:27], numbers(20, 5, 7)
    _, launches = check("gather_tokens_fwd", x, ids, 0)
    assert launches[0].arguments["x_ptr"].data_ptr() == x.data_ptr()
    _, launches = check("gather_tokens_bwd", x[:, :7], ids, 20, 0)
    assert launches[0].arguments["grad_ptr"].data_ptr() == x.data_ptr()
    check("gather_tokens_fwd", wide[..., ::2], numbers(5, 20, 3), 0)
    check("gather_tokens_fwd", random(3, 4, 5), numbers(4, 1, 6).expand(3, 6), 0)
    check(
        "restore_tokens_bwd", torch.ones(()).expand(3, 9, 8), numbers(9, 3, 9).sort(dim=1).indices, 4, 0, 9, True, True
    )


def test_rows_beyond_2_to_the_31(tmp_path):
    stride = 2**30 + 8
    rows = torch.from_file(str(tmp_path / "rows"), shared=True, size=2 * stride + 16, dtype=torch.float16)  # sparse
    x = rows.as_strided((1, 3, 16), (3 * stride, stride, 1))
    x.copy_(random(1, 3, 16))
    ids = torch.tensor([[2, 0, 1]])
    check("gather_tokens_fwd", x, ids, 0)
    check("gather_tokens_bwd", x, ids, 3, 0)
    check("restore_tokens_fwd", x, ids, None, None, 0)
    check("restore_tokens_bwd", x, ids, 3, 0, 3, True, True)
    check("gather_patches_fwd", x[:, None], ids, [1, 16])


# ---- rows of patches


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape, patch_size",
    [((2, 3, 8, 12), (4, 4)), ((3, 1, 6, 6), (2, 3)), ((2, 2, 4, 8, 6), (2, 4, 3)), ((1, 5, 7, 7), (7, 7))],
)
def test_patches(shape, patch_size, dtype):
    images = random(*shape, dtype=dtype)
    patches = reference.patches(images, patch_size).shape[1]
    ids = numbers(patches, shape[0], patches + 3)
    [rows], _ = check("gather_patches_fwd", images, ids, patch_size)
    check("gather_patches_bwd", rows, ids, shape, patch_size)
    check(
        "gather_patches_fwd", images.transpose(-1, -2).contiguous().transpose(-1, -2), ids, patch_size, target="gfx942"
    )
    check("gather_patches_fwd", images[:, :1].expand(-1, 3, *shape[2:]), ids, patch_size)


# ---- bad ids, nothing at all


BAD = torch.tensor([[0, 5, 2, -1], [2**40, 1, -(2**62), 4]])  # of 5 tokens; twice that without a mistake


def test_bad_ids_give_nan_and_touch_no_foreign_memory():
    good = (BAD >= 0) & (BAD < 5)
    safe = BAD.where(good, 0)
    for dtype, prefix in product(DTYPES, (0, 2)):
        x = random(2, prefix + 5, 6, dtype=dtype)
        [out], _ = run("gather_tokens_fwd", x, BAD, prefix)
        expected = reference.gather_tokens_fwd(x, safe, prefix)
        expected[:, prefix:][~good] = torch.nan
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
        grad = random(2, prefix + 4, 6, dtype=dtype)
        [out], _ = run("gather_tokens_bwd", grad, BAD, 5, prefix)
        grad[:, prefix:][~good] = 0
        assert torch.equal(out, reference.gather_tokens_bwd(grad, safe, 5, prefix))
    images = random(2, 1, 2, 10)
    [out], _ = run("gather_patches_fwd", images, BAD, (2, 2))
    assert torch.equal(out.isnan().all(2), ~good) and out[good].isfinite().all()
    rows = random(2, 4, 4)
    [out], _ = run("gather_patches_bwd", rows, BAD, images.shape, (2, 2))
    rows[~good] = 0
    assert torch.equal(out, reference.gather_patches_bwd(rows, safe, images.shape, (2, 2)))


def test_bad_places_give_nan_and_touch_no_foreign_memory():
    ids_restore = torch.tensor([[0, -1, 1, 2**40, 2], [1, 0, -(2**62), 2, 3]])
    bad = ids_restore < 0
    for prefix, pos in product((0, 1), (None, random(5, 6, seed=2))):
        x = random(2, prefix + 2, 6)
        [out], _ = run("restore_tokens_fwd", x, ids_restore, random(6, seed=1), pos, prefix)
        expected = reference.restore_tokens_fwd(x, ids_restore.where(~bad, 4), random(6, seed=1), pos, prefix)
        expected[:, prefix:][bad] = torch.nan
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
        grad = random(2, prefix + 5, 6)
        actual, _ = run("restore_tokens_bwd", grad, ids_restore, 2, prefix, 5, True, True)
        expected = reference.restore_tokens_bwd(grad, ids_restore.where(~bad, 4), 2, prefix, 5, True, True)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)


def test_inverse_of_bad_ids():
    (ids_restore, mask), _ = run("invert_ids", BAD, 5)
    assert mask.tolist() == [[False, True, False, True, True], [True, False, True, True, False]]
    assert ids_restore.tolist() == [[0, 4, 2, 5, 6], [4, 1, 5, 6, 3]]


@pytest.mark.parametrize("samples, tokens, kept, columns", [(0, 5, 2, 3), (2, 0, 0, 3), (2, 5, 0, 3), (2, 5, 2, 0)])
def test_nothing(samples, tokens, kept, columns):
    x, ids = random(samples, tokens, columns), torch.zeros(samples, kept, dtype=torch.int64)
    check("random_masking_fwd", x, seed_of(1), None, None, kept, 0, False)
    check("gather_tokens_fwd", x, ids, 0)
    check("gather_tokens_bwd", x[:, :kept], ids, tokens, 0)
    ids_restore = torch.arange(tokens).expand(samples, tokens)
    check("restore_tokens_fwd", x[:, :kept], ids_restore, None, None, 0)
    check("restore_tokens_bwd", torch.ones_like(x), ids_restore, kept, 0, tokens, True, True)
    check("gather_patches_fwd", random(samples, columns, 2, 6), ids, (2, 2))
    check("gather_patches_bwd", random(samples, kept, columns * 4), ids, (samples, columns, 2, 6), (2, 2))


def test_every_kernel_is_launched():
    with interpret() as launches:
        x = random(2, 9, 4).requires_grad_()
        out = random_masking(x, 0.5, seed=1)
        given = random_masking(x, ids_keep=out.ids_keep)
        (out.x_kept + given.x_kept).sum().backward()
    found = {launch.kernel.__name__ for launch in launches}
    assert found == {
        "_patch_mask_fwd_kernel", "_order_kernel", "_gather_tokens_fwd_kernel", "_invert_kernel", "_complete_kernel",
        "_restore_tokens_fwd_kernel", "_gather_tokens_bwd_kernel",
    } <= kernels()  # fmt: skip

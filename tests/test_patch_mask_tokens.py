"""Tokens and patches by index: values, gradients of any order, shapes, strides, offsets, memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from conftest import require_or_skip
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_as_exact_as_eager
from torch.nn import functional

from sslkernels import (
    _library,
    empty_cache,
    gather_tokens,
    masked_patch_embed,
    patch_mask,
    random_masking,
    restore_tokens,
)
from sslkernels.ops.patch_mask import op as operators
from sslkernels.ops.patch_mask import reference

OPS = torch.ops.sslkernels
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def random(*shape, dtype=torch.float32, seed=0, requires_grad=False):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return tensor.requires_grad_(requires_grad)


def ids_of(samples, kept, tokens, seed=0):
    return torch.randint(tokens, (samples, kept), generator=torch.Generator().manual_seed(seed))


def gradients(function, *tensors):
    """Values and gradients of all that require grad, under a fixed gradient of the result."""
    leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
    out = function(*leaves)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return out.detach(), *torch.autograd.grad(out, wanted, random(*out.shape, seed=9).to(out.dtype))


# ---- values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_masking_is_a_gather(prefix, dtype):
    x = random(3, prefix + 21, 19, dtype=dtype, requires_grad=True)
    out = random_masking(x, 0.6, num_prefix_tokens=prefix, seed=1)
    expected = torch.cat([x[:, :prefix], x[:, prefix:].gather(1, out.ids_keep[..., None].expand(-1, -1, 19))], dim=1)
    assert torch.equal(out.x_kept, expected)
    grad = random(*expected.shape).to(dtype)
    assert torch.equal(*(torch.autograd.grad(kept, x, grad)[0] for kept in (out.x_kept, expected)))
    assert not any(tensor.requires_grad for tensor in out[1:])


@pytest.mark.parametrize("ordered", [False, True])
def test_given_ids(ordered):
    x, ids = random(4, 12, 5, requires_grad=True), patch_mask(4, 10, num_keep=6, seed=2).ids_keep.int()
    out = random_masking(x, ids_keep=ids, num_prefix_tokens=2, ordered=ordered)
    expected = ids.sort(dim=1).values if ordered else ids
    assert torch.equal(out.ids_keep, expected)
    assert torch.equal(out.x_kept, gather_tokens(x, expected, num_prefix_tokens=2))
    assert torch.equal(out.mask, torch.ones(4, 10).scatter(1, expected.long(), 0).bool())
    scores = torch.ones(4, 10).scatter(1, expected.long(), torch.arange(6.0).sub(6).expand(4, 6))
    assert torch.equal(out.ids_restore, patch_mask(4, 10, num_keep=6, scores=scores).ids_restore)
    out.x_kept.sum().backward()
    assert torch.equal(x.grad[:, 2:].sum(dim=2) == 0, out.mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_equal_ids_are_added_exactly(dtype):
    """Thousands of them: a sum in the dtype itself, or a plain one in fp32, would show."""
    x, ids = random(2, 3, 40, dtype=dtype, requires_grad=True), torch.ones(2, 5000, dtype=torch.int64)
    ids[1, ::7] = 2
    grad = (random(2, 5000, 40) + 1).to(dtype)
    (actual,) = torch.autograd.grad(gather_tokens(x, ids), x, grad)
    index = ids[..., None].expand(-1, -1, 40)
    exact = torch.zeros(2, 3, 40, dtype=torch.float64).scatter_add(1, index, grad.double())
    assert_as_exact_as_eager("grad", actual, exact.to(dtype), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_over_the_batch_are_exact(dtype):
    x, ids = random(3000, 2, 24, dtype=dtype), patch_mask(3000, 5, num_keep=2, seed=0).ids_restore
    token, position = random(24, dtype=dtype, requires_grad=True), random(5, 24, dtype=dtype, requires_grad=True)
    grad = (random(3000, 5, 24) + 0.5).to(dtype)
    actual = torch.autograd.grad(restore_tokens(x, ids, token, position), (token, position), grad)
    removed = torch.where((ids >= 2)[..., None], grad.double(), 0)
    for value, exact in zip(actual, (removed.sum(dim=(0, 1)), grad.double().sum(dim=0)), strict=True):
        assert_as_exact_as_eager("grad", value, exact.to(dtype), exact)


@pytest.mark.parametrize("where", ["x_kept", "mask_token", "pos_embed"])
def test_a_gradient_for_one_argument_alone(where):
    tensors = {"x_kept": random(3, 5, 8), "mask_token": random(1, 1, 8, seed=1), "pos_embed": random(1, 12, 8, seed=2)}
    ids = patch_mask(3, 11, num_keep=4, seed=3).ids_restore
    tensors[where].requires_grad_()

    def restore(backend):
        def call(x, token, position):
            return restore_tokens(x, ids, token, position, num_prefix_tokens=1, backend=backend)

        return gradients(call, *tensors.values())

    for actual, expected in zip(restore(None), restore("reference"), strict=True):
        torch.testing.assert_close(actual, expected)
    assert len(restore(None)) == 2


def test_places_beyond_the_kept_are_all_removed_and_absent_ones_have_no_gradient():
    ids = torch.tensor([[7, 1, 3, 100], [0, 3, 4, 2]])  # of three places, the first row has 1, the second 0 and 2
    x, token = random(2, 3, 6, requires_grad=True), random(6)
    out = restore_tokens(x, ids, token)
    assert torch.equal(out[0], torch.stack([token, x[0, 1], token, token]))
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad.sum(dim=2).tolist() == [[0, 6, 0], [6, 0, 6]]


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("rows", [0, 2])
def test_without_tokens_the_embedding_has_a_gradient_all_the_same(rows, backend):
    x, places, position = random(3, 2, 6), torch.zeros(3, 0, dtype=torch.int64), random(rows, 6, requires_grad=True)
    out = restore_tokens(x, places, None, position, num_prefix_tokens=2, backend=backend)
    assert torch.equal(out, x if rows == 0 else x + position)
    (grad,) = torch.autograd.grad(out.sum(), position)
    assert torch.equal(grad, torch.full((rows, 6), 3.0))


@pytest.mark.parametrize("backend", [None, "reference"])
def test_scores_that_are_a_negative_view(backend):
    scores = torch.imag(random(2, 7, dtype=torch.complex64).conj())
    assert scores.is_neg()
    out = patch_mask(2, 7, num_keep=3, scores=scores, backend=backend)
    assert torch.equal(out.ids_keep, scores.resolve_neg().argsort(dim=1)[:, :3])


@pytest.mark.parametrize("shape, patch", [((3, 3, 12, 20), (4, 5)), ((2, 2, 4, 6, 9), (2, 3, 3))])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_masked_patch_embed_is_a_convolution(shape, patch, layout):
    images = random(*shape, dtype=torch.float64)
    if layout == "channels_last":
        images = images.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "strided":
        images = images.repeat_interleave(2, dim=-1)[..., ::2]
    weight, bias = random(7, shape[1], *patch, dtype=torch.float64, seed=1), random(7, dtype=torch.float64, seed=2)
    patches = 1
    for size, side in zip(shape[2:], patch, strict=True):
        patches *= size // side
    position = random(1, patches, 7, dtype=torch.float64, seed=3)
    ids = ids_of(shape[0], 9, patches)
    leaves = [tensor.requires_grad_() for tensor in (images, weight, bias, position)]
    convolve = functional.conv2d if len(patch) == 2 else functional.conv3d

    def whole(images, weight, bias, position):
        tokens = convolve(images, weight, bias, stride=patch).flatten(2).mT + position
        return tokens.gather(1, ids[..., None].expand(-1, -1, 7))

    def masked(images, weight, bias, position):
        return masked_patch_embed(images, weight, bias, ids, position)

    for actual, expected in zip(gradients(masked, *leaves), gradients(whole, *leaves), strict=True):
        torch.testing.assert_close(actual, expected)


# ---- gradients


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_gradients_of_any_order(prefix):
    double = {"dtype": torch.float64, "requires_grad": True}
    x, token, position = random(2, prefix + 6, 3, **double), random(3, seed=1, **double), random(6, 3, seed=2, **double)
    ids, restore = ids_of(2, 4, 6), patch_mask(2, 6, num_keep=3, seed=1).ids_restore
    both = {"num_prefix_tokens": prefix}
    calls = [
        (lambda x: random_masking(x, 0.5, seed=1, **both).x_kept, x),
        (lambda x: gather_tokens(x, ids, **both), x),
        (lambda x, m, p: restore_tokens(x, restore, m, p, **both), x[:, : prefix + 3].detach().requires_grad_(), token,
         position),
    ]  # fmt: skip
    for function, *inputs in calls:
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_gradients_of_any_order_through_patches():
    images, weight = (random(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 2, 4, 6), (3, 2, 2, 3)))
    position, ids = random(4, 3, dtype=torch.float64, requires_grad=True), torch.tensor([[1, 1, 3], [0, 3, 2]])
    inputs = [images, weight, random(3, dtype=torch.float64, requires_grad=True), position]
    assert torch.autograd.gradcheck(lambda i, w, b, p: masked_patch_embed(i, w, b, ids, p), inputs)
    assert torch.autograd.gradgradcheck(lambda i, w, b, p: masked_patch_embed(i, w, b, ids, p) ** 2, inputs)


@pytest.mark.parametrize("need_x, need_token, need_position", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_the_gradient_of_one_argument_is_differentiated_again(need_x, need_token, need_position):
    double = {"dtype": torch.float64}
    x, token, position = random(2, 3, 3, **double), random(3, seed=1, **double), random(5, 3, seed=2, **double)
    inputs = [t.requires_grad_() for t, need in ((x, need_x), (token, need_token), (position, need_position)) if need]
    ids = patch_mask(2, 5, num_keep=3, seed=1).ids_restore
    assert torch.autograd.gradgradcheck(lambda *_: restore_tokens(x, ids, token, position), inputs)


# ---- shapes and strides


@given(
    samples=st.integers(0, 4),
    tokens=st.integers(0, 20),
    columns=st.integers(0, 70),
    prefix=st.integers(0, 3),
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_every_shape_is_as_defined(samples, tokens, columns, prefix, seed, dtype, data):
    kept = data.draw(st.integers(0, tokens))
    x = random(samples, prefix + tokens, columns, dtype=dtype, requires_grad=True)
    token, position = (random(*s, dtype=dtype, requires_grad=True) for s in ((columns,), (tokens, columns)))
    repeated = ids_of(samples, data.draw(st.integers(0, 30)) if tokens else 0, max(tokens, 1))

    def everything(backend):
        both = {"num_prefix_tokens": prefix, "backend": backend}
        out = random_masking(x, num_keep=kept, seed=seed, **both)
        picked = gather_tokens(x, repeated, **both)
        restored = restore_tokens(out.x_kept, out.ids_restore, token, position, **both)
        value = restored.double().square().sum() + picked.double().square().sum()
        return (*out, picked, restored, *torch.autograd.grad(value, (x, token, position), materialize_grads=True))

    for actual, expected in zip(everything(None), everything("reference"), strict=True):
        assert actual.shape == expected.shape and actual.dtype == expected.dtype
        exact = not actual.is_floating_point() or not actual.numel()
        # sums in another order, and of gradients that are each rounded to the dtype
        atol = 0 if exact else 16 * torch.finfo(actual.dtype).eps * expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


STRIDES = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "columns apart": lambda x: x.repeat_interleave(3, dim=2)[..., ::3],
    "columns first": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: torch.cat([x, x], dim=2)[1:, 2:, 3:20],
    "expanded": lambda x: x[:1].expand(4, -1, -1),
    "one token": lambda x: x[:, :1].expand(-1, 9, -1),
    "one number": lambda x: x[:1, :1, :1].expand(4, 9, 17),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strides", STRIDES)
def test_any_strides(strides, dtype):
    x = STRIDES[strides](random(4, 12, 24, dtype=dtype))
    samples, tokens, _ = x.shape
    ids, places = ids_of(samples, 5, tokens), patch_mask(samples, 20, num_keep=tokens, seed=0).ids_restore
    restored = restore_tokens(x, places, x[0, 0], None)
    pairs = [
        (random_masking(x, seed=1).x_kept, random_masking(x.contiguous(), seed=1).x_kept),
        (gather_tokens(x, ids), gather_tokens(x.contiguous(), ids)),
        (gather_tokens(x, ids.T.contiguous().T), gather_tokens(x.contiguous(), ids)),
        (restored, restore_tokens(x.contiguous(), places, x[0, 0].contiguous(), None)),
        (
            OPS.gather_tokens_bwd(x, ids_of(samples, tokens, 6), 6, 0),
            OPS.gather_tokens_bwd(x.contiguous(), ids_of(samples, tokens, 6), 6, 0),
        ),
    ]
    for actual, expected in pairs:
        assert torch.equal(actual, expected)
    grads = [
        OPS.restore_tokens_bwd(g, patch_mask(samples, tokens, num_keep=2, seed=0).ids_restore, 2, 0, tokens, True, True)
        for g in (x, x.contiguous())
    ]
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_offsets_beyond_32_bits(tmp_path):
    """In a sparse file, of which a few pages are touched: samples, tokens and lines of images 2^31 elements apart."""
    far, columns = 2**31 + 6, 5
    file = torch.from_file(str(tmp_path / "sparse"), shared=True, size=3 * far + 100, dtype=torch.float16)
    for strides, shape in (((far, columns, 1), (3, 4, columns)), ((columns, far, 1), (2, 4, columns))):
        x = file.as_strided(shape, strides)
        x.copy_(random(*shape, dtype=torch.float16))
        ids = ids_of(shape[0], 6, 4)
        assert torch.equal(random_masking(x, 0.5, seed=1).x_kept, random_masking(x.clone(), 0.5, seed=1).x_kept)
        assert torch.equal(gather_tokens(x, ids), gather_tokens(x.clone(), ids))
        assert torch.equal(
            OPS.gather_tokens_bwd(x, ids[:, :4], 9, 0), OPS.gather_tokens_bwd(x.clone(), ids[:, :4], 9, 0)
        )
        places = patch_mask(shape[0], 9, num_keep=4, seed=1).ids_restore
        assert torch.equal(restore_tokens(x, places, None), restore_tokens(x.clone(), places, None))
    images = file.as_strided((2, 1, 4, 4), (4, 0, far // 2, 1))
    images.copy_(random(2, 1, 4, 4, dtype=torch.float16))
    ids = ids_of(2, 3, 4)
    assert torch.equal(OPS.gather_patches_fwd(images, ids, [2, 2]), OPS.gather_patches_fwd(images.clone(), ids, [2, 2]))


def test_half_precision_operands_are_promoted_as_in_an_addition():
    x, ids = random(2, 3, 4, dtype=torch.bfloat16, requires_grad=True), patch_mask(2, 6, num_keep=3, seed=0).ids_restore
    token, position = random(4, seed=1, requires_grad=True), random(6, 4, seed=2)
    out = restore_tokens(x, ids, token, position)
    assert out.dtype == torch.float32
    assert torch.equal(out, restore_tokens(x.float(), ids, token, position))
    out.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and token.grad.dtype == torch.float32
    assert restore_tokens(x, ids, None, position.double()).dtype == torch.float64


def test_autocast():
    images, weight, bias = random(2, 3, 8, 8), random(10, 3, 4, 4, seed=1, requires_grad=True), random(10, seed=2)
    ids, position = ids_of(2, 3, 4), random(4, 10, seed=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = masked_patch_embed(images, weight, bias, ids)
        assert tokens.dtype == torch.bfloat16
        assert masked_patch_embed(images, weight, bias, ids, position).dtype == torch.float32
        out = random_masking(tokens, 0.5, seed=1)
        assert out.x_kept.dtype == torch.bfloat16
        restored = restore_tokens(out.x_kept, out.ids_restore, random(10), random(3, 10))
    restored.sum().backward()
    assert weight.grad.dtype == torch.float32 and weight.grad.isfinite().all()
    assert masked_patch_embed(images.bfloat16(), weight.detach().bfloat16(), None, ids).dtype == torch.bfloat16


# ---- torch integration


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    x, grad = random(2, 9, 4, dtype=dtype, requires_grad=True), random(2, 9, 4, dtype=dtype, requires_grad=True)
    seed, samples, scores = torch.tensor(3), torch.tensor([4, 2]), random(2, 7)
    ids, places = ids_of(2, 5, 7), patch_mask(2, 7, num_keep=5, seed=0).ids_restore
    token, position = random(4, dtype=dtype, requires_grad=True), random(9, 4, dtype=dtype, requires_grad=True)
    images, rows = (
        random(2, 3, 4, 6, dtype=dtype, requires_grad=True),
        random(2, 5, 18, dtype=dtype, requires_grad=True),
    )
    calls = {
        "draw_seed": (torch.device("cpu"),),
        "patch_mask_fwd": (seed, samples, None, 2, 7, 3, True),
        "invert_ids": (torch.tensor([[3, 1], [0, 6]]), 7),
        "random_masking_fwd": (x, seed, None, scores, 3, 2, False),
        "gather_tokens_fwd": (x, ids, 2),
        "gather_tokens_bwd": (grad[:, :7], ids, 7, 2),
        "restore_tokens_fwd": (x[:, :7], places, token, position, 2),
        "restore_tokens_bwd": (grad, places, 5, 2, 9, True, True),
        "gather_patches_fwd": (images, ids_of(2, 5, 4), [2, 3]),
        "gather_patches_bwd": (rows, ids_of(2, 5, 4), [2, 3, 4, 6], [2, 3]),
    }
    assert set(calls) == {*operators.SCHEMAS, "draw_seed"}
    for name, args in calls.items():
        leaves = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in args]
        torch.library.opcheck(getattr(OPS, name).default, tuple(leaves))
    for need_x, need_token, pos_tokens in ((True, False, 0), (False, True, 0), (False, False, 9)):  # two are not there
        args = grad.detach(), places, 5, 2, pos_tokens, need_x, need_token
        torch.library.opcheck(OPS.restore_tokens_bwd.default, args, test_utils="test_schema")
        results = reference.restore_tokens_bwd(*args)
        assert len({id(tensor) for tensor in results}) == 3


def test_memory_is_that_of_the_results():
    require_or_skip(_library.extension, _library.extension_error)
    program = (
        "import torch, sslkernels\n"
        "def extra(samples):\n"
        "    x = torch.randn(samples, 196, 256, requires_grad=True)\n"
        "    grad = torch.randn(samples, 49, 256)\n"
        "    status = lambda key: int(open('/proc/self/status').read().split(key)[1].split()[0]) * 1024\n"
        "    open('/proc/self/clear_refs', 'w').write('5')\n"
        "    sslkernels.empty_cache()\n"
        "    before = status('VmRSS:')\n"
        "    out = sslkernels.random_masking(x, seed=1)\n"
        "    out.x_kept.backward(grad)\n"
        "    results = [*out, x.grad]\n"
        "    return (status('VmHWM:') - before) / sum(t.numel() * t.element_size() for t in results)\n"
        "extra(8)\n"
        "ratio = extra(256)\n"
        "assert ratio < 1.1, ratio\n"
    )
    result = subprocess.run([sys.executable, "-c", program], env=dict(os.environ), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_large_results_take_the_memory_of_earlier_ones():
    """A result above 4 MiB has memory that nobody holds, and leaves it to the next."""
    require_or_skip(_library.extension, _library.extension_error)
    x = torch.randn(65, 130, 1024)
    ids = torch.arange(130).expand(65, 130)
    first, second = (gather_tokens(x, order) for order in (ids, ids.flip(1)))
    part = first[:, 5:]  # keeps the memory of the whole
    left = first.data_ptr()
    del first
    third = gather_tokens(x, ids)
    assert third.data_ptr() not in (left, second.data_ptr())
    for result, expected in ((part, x[:, 5:]), (second, x.flip(1)), (third, x)):
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
    del part
    fourth = gather_tokens(x, ids.flip(1))
    assert fourth.data_ptr() == left
    torch.testing.assert_close(fourth, x.flip(1), rtol=0, atol=0)
    empty_cache()
    torch.testing.assert_close(fourth, x.flip(1), rtol=0, atol=0)  # what is held stays


def test_the_definition_agrees_with_a_plain_loop():
    """What all kernels are compared with, against the words of the docstring."""
    images = torch.arange(2.0 * 3 * 4 * 6).view(2, 3, 4, 6)
    rows = reference.patches(images, (2, 3))
    for n, place, c, p, q in ((0, 0, 0, 0, 0), (1, 3, 2, 1, 2), (1, 1, 0, 1, 1), (0, 2, 1, 0, 2)):
        line, column = place // 2 * 2 + p, place % 2 * 3 + q
        assert rows[n, place, c * 6 + p * 3 + q] == images[n, c, line, column]
    assert torch.equal(reference.unpatched(rows, images.shape, (2, 3)), images)

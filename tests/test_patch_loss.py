"""The masked patch loss on the CPU: values, gradients, every layout and dtype, torch integration, and every error."""

from __future__ import annotations

import builtins
import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from conftest import OTHER_ISAS, require_or_skip
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_op_close

import sslkernels
from sslkernels import _library, masked_patch_loss
from sslkernels.ops.patch_loss.cases import OPS, random_mask

SPEC = OPS[0]
CASES = [case for case in SPEC.cases if "bench" not in case.tags]
DTYPES = SPEC.dtypes


def arguments(samples=2, channels=3, size=(16, 24), patch=(8, 6), ratio=0.6, dtype=torch.float32, seed=0):
    """pred, images, mask and patch_size."""
    generator = torch.Generator().manual_seed(seed)
    tokens, width = 1, channels
    for extent, side in zip(size, patch, strict=True):
        tokens, width = tokens * (extent // side), width * side
    pred = torch.randn(samples, tokens, width, generator=generator).to(dtype)
    images = torch.randn(samples, channels, *size, generator=generator).to(dtype)
    return pred, images, random_mask(samples, tokens, ratio, "cpu"), patch


def loss_and_grad(pred, images, mask, patch_size, **options):
    pred = pred.detach().requires_grad_()
    loss = masked_patch_loss(pred, images, mask, patch_size, **options)
    return loss.detach(), *torch.autograd.grad(loss, pred)


def assert_equal(first, second):
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- values and gradients


def test_the_compiled_kernel_is_there():
    require_or_skip(_library.extension, _library.extension_error)
    assert sslkernels.backends()[SPEC.name]["cpu"] == sslkernels.Backend("cpp")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_as_exact_as_eager(case, dtype, backend):
    assert_op_close(SPEC, case, dtype, backend=backend)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_is_the_loss_of_mae(norm_pix, backend):
    """Its patches in its order, for images and videos, written out here once more."""
    for size, patch, pattern in (
        ((16, 24), (8, 6), "nchpwq->nhwpqc"),
        ((4, 10, 12), (2, 5, 4), "ncathpwq->nahwtpqc"),
    ):
        pred, images, mask, _ = arguments(size=size, patch=patch, dtype=torch.float64)
        split = [part for extent, side in zip(size, patch, strict=True) for part in (extent // side, side)]
        target = torch.einsum(pattern, images.reshape(2, 3, *split)).reshape(pred.shape)
        if norm_pix:
            mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
            target = (target - mean) / (var + 1e-6) ** 0.5
        pred.requires_grad_()
        expected = (((pred - target) ** 2).mean(dim=-1) * mask).sum() / mask.sum()
        loss = masked_patch_loss(pred, images, mask, patch, norm_pix=norm_pix, backend=backend)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, pred), torch.autograd.grad(expected, pred))


@pytest.mark.parametrize("norm_pix", [True, False])
def test_gradcheck(norm_pix):
    pred, images, mask, patch = arguments(size=(8, 9), patch=(4, 3), dtype=torch.float64)

    def function(x):
        return masked_patch_loss(x, images, mask, patch, norm_pix=norm_pix)

    assert torch.autograd.gradcheck(function, pred.requires_grad_())


@pytest.mark.parametrize("pred_dtype, images_dtype", list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_every_pair_of_dtypes(pred_dtype, images_dtype):
    pred, images, mask, patch = arguments()
    pred, images = pred.to(pred_dtype), images.to(images_dtype)
    loss, grad = loss_and_grad(pred, images, mask, patch)
    exact_loss, exact_grad = loss_and_grad(pred.double(), images.double(), mask, patch)
    is_double = torch.float64 in (pred_dtype, images_dtype)
    assert loss.dtype == (torch.float64 if is_double else torch.float32) and grad.dtype == pred_dtype
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-12 if is_double else 1e-6, atol=0)
    torch.testing.assert_close(grad, exact_grad.to(pred_dtype), rtol=1e-5, atol=torch.finfo(pred_dtype).eps * 1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_masked_patches_are_read(dtype):
    pred, images, mask, patch = arguments(dtype=dtype)
    expected = loss_and_grad(pred, images, mask, patch)
    pred[~mask] = torch.nan
    grid = mask.view(2, 2, 4).repeat_interleave(patch[0], 1).repeat_interleave(patch[1], 2)
    images.masked_fill_(~grid[:, None], torch.nan)
    actual = loss_and_grad(pred, images, mask, patch)
    assert_equal(actual, expected)
    assert actual[1][~mask].eq(0).all() and actual[1][mask].ne(0).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_nothing_masked_is_zero(dtype, backend):
    pred, images, mask, patch = arguments(dtype=dtype)
    loss, grad = loss_and_grad(pred, images, mask & False, patch, backend=backend)
    assert loss == 0 and grad.eq(0).all()


def test_a_large_mean_does_no_harm():
    """The pixels are as exact as fp32 holds them, which eager's mean is not."""
    pred, images, mask, patch = arguments(size=(32, 32), patch=(16, 16), ratio=1.0)
    images = 1e4 + 0.01 * images
    loss, grad = loss_and_grad(pred, images, mask, patch)
    exact_loss, exact_grad = loss_and_grad(pred.double(), images.double(), mask, patch)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-4, atol=1e-5 * exact_grad.abs().max().item())


@pytest.mark.parametrize("colour", [0.7, 1e4, 0.0])
def test_patches_of_one_colour_have_target_zero(colour):
    pred, images, mask, patch = arguments()
    loss, _ = loss_and_grad(pred, torch.full_like(images, colour), mask, patch)
    torch.testing.assert_close(loss, pred[mask].square().mean(), rtol=1e-5, atol=0)


def test_one_bright_pixel():
    """A shift by some pixel instead of the mean would cost the others their digits."""
    pred, images, mask, patch = arguments(ratio=1.0)
    images[:, :, ::8, ::6] = 1e6
    loss, grad = loss_and_grad(pred, images, mask, patch)
    exact_loss, exact_grad = loss_and_grad(pred.double(), images.double(), mask, patch)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.bfloat16], ids=str)
def test_a_mask_of_numbers(dtype):
    pred, images, mask, patch = arguments()
    assert_equal(loss_and_grad(pred, images, mask.to(dtype), patch), loss_and_grad(pred, images, mask, patch))


def test_an_expanded_mask_and_a_transposed_one():
    pred, images, mask, patch = arguments()
    same = mask[:1].expand(2, -1)
    assert_equal(loss_and_grad(pred, images, same, patch), loss_and_grad(pred, images, same.clone(), patch))
    turned = mask.T.contiguous().T
    assert_equal(loss_and_grad(pred, images, turned, patch), loss_and_grad(pred, images, mask, patch))


def test_an_int_is_a_square():
    pred, images, mask, _ = arguments(patch=(8, 8))
    assert_equal(loss_and_grad(pred, images, mask, 8), loss_and_grad(pred, images, mask, [8, 8]))


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_any_layout(data):
    """Images behind random permutations and steps, against the same pixels laid out plainly: the same bits."""
    dims = data.draw(st.integers(2, 3))
    patch = tuple(data.draw(st.integers(1, 20 if axis == dims - 1 else 5)) for axis in range(dims))
    size = tuple(side * data.draw(st.integers(1, 3)) for side in patch)
    channels, samples = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    dtype, ratio = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    pred, images, mask, _ = arguments(samples, channels, size, patch, ratio, dtype)
    norm_pix = pred.shape[2] > 1 and data.draw(st.booleans())
    order = data.draw(st.permutations(range(dims + 2)))
    steps = [data.draw(st.integers(1, 2)) for _ in order]
    wide = torch.zeros([images.shape[axis] * steps[axis] for axis in order], dtype=dtype)
    view = wide[tuple(slice(None, None, steps[axis]) for axis in order)]
    view = view.permute([order.index(axis) for axis in range(dims + 2)])
    view.copy_(images)
    actual = loss_and_grad(pred, view, mask, patch, norm_pix=norm_pix)
    assert_equal(actual, loss_and_grad(pred, images, mask, patch, norm_pix=norm_pix))


@given(st.integers(0, 2**31), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_a_batch_is_the_mean_of_its_parts(seed, cut):
    pred, images, _, patch = arguments(samples=5, seed=seed % 7)
    mask = torch.rand(pred.shape[:2], generator=torch.Generator().manual_seed(seed)) < 0.4
    parts = [masked_patch_loss(*(x[rows] for x in (pred, images, mask)), patch)
             for rows in (slice(cut), slice(cut, None))]  # fmt: skip
    counts = [mask[:cut].sum(), mask[cut:].sum()]
    expected = sum(part * count for part, count in zip(parts, counts, strict=True)) / sum(counts).clamp_min(1)
    torch.testing.assert_close(masked_patch_loss(pred, images, mask, patch), expected)


def test_offsets_beyond_32_bits():
    """Samples more than 2^31 elements apart, in memory of which only they are ever touched."""
    pred, images, mask, patch = arguments(dtype=torch.bfloat16)
    distance = 2**31 + 64
    far = torch.empty(distance + images[0].numel(), dtype=images.dtype)
    view = far.as_strided(images.shape, (distance, *images.stride()[1:])).copy_(images)
    far_pred = torch.empty(distance + pred[0].numel(), dtype=pred.dtype)
    view_pred = far_pred.as_strided(pred.shape, (distance, *pred.stride()[1:])).copy_(pred)
    assert_equal(loss_and_grad(view_pred, view, mask, patch), loss_and_grad(pred, images, mask, patch))


# ---- determinism


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same(threads):
    given = arguments(samples=9, size=(96, 96), patch=(16, 16))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        actual = loss_and_grad(*given)
        torch.set_num_threads(1)
        assert_equal(actual, loss_and_grad(*given))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", OTHER_ISAS)
def test_every_instruction_set_is_as_exact(isa):
    """Odd patches with every number of channels that has a way of its own."""
    program = (
        "import sys, torch; sys.path.insert(0, sys.argv[1])\n"
        "from test_patch_loss import arguments, loss_and_grad\n"
        "for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):\n"
        "  for channels in (1, 2, 3, 4):\n"
        "    for patch in ((3, 5), (1, 16), (2, 37), (4, 64)):\n"
        "      given = arguments(2, channels, (12, 2 * patch[1]), patch, dtype=dtype)\n"
        "      for norm_pix in (True, False):\n"
        "        actual = loss_and_grad(*given, norm_pix=norm_pix)\n"
        "        exact = loss_and_grad(*given, norm_pix=norm_pix, backend='reference')\n"
        "        torch.testing.assert_close(actual[0], exact[0], rtol=1e-6, atol=0)\n"
        "        torch.testing.assert_close(actual[1], exact[1], rtol=torch.finfo(dtype).eps * 8, atol=1e-6)\n"
    )
    command = [sys.executable, "-c", program, os.path.dirname(__file__)]
    subprocess.run(command, check=True, env={**os.environ, "SSLKERNELS_ISA": isa})


# ---- autograd


def formed_in_the_forward(loss):
    return loss.grad_fn.saved_tensors[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [1.0, 3.0, -0.25])
def test_the_gradient_of_the_loss_scales_it(dtype, factor):
    pred, images, mask, patch = arguments(dtype=dtype)
    _, exact = loss_and_grad(pred.double(), images.double(), mask, patch)
    pred.requires_grad_()
    (masked_patch_loss(pred, images, mask, patch) * factor).backward()
    scale = exact.abs().max().item() * abs(factor)
    info = torch.finfo(dtype)
    atol = 1e-6 * scale + info.smallest_normal * info.eps  # fp16 has no smaller numbers
    torch.testing.assert_close(pred.grad.double(), exact * factor, rtol=2 * info.eps, atol=atol)
    assert pred.grad.dtype == dtype and not pred.grad.requires_grad


def test_a_gradient_that_is_right_as_it_is_is_handed_out():
    pred, images, mask, patch = arguments()
    pred.requires_grad_()
    loss = masked_patch_loss(pred, images, mask, patch)
    place = formed_in_the_forward(loss).data_ptr()
    loss.backward()
    assert pred.grad.data_ptr() == place and pred.grad.grad_fn is None


def test_a_graph_that_is_kept_keeps_its_gradient():
    """Whoever gets the first gradient may change it."""
    pred, images, mask, patch = arguments()
    pred.requires_grad_()
    loss = masked_patch_loss(pred, images, mask, patch)
    (first,) = torch.autograd.grad(loss, pred, retain_graph=True)
    expected = first.clone()
    first.mul_(7)
    (second,) = torch.autograd.grad(loss, pred, retain_graph=True)
    second.mul_(7)
    (third,) = torch.autograd.grad(loss, pred)
    assert torch.equal(third, expected) and torch.equal(second, 7 * expected)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, pred)


def test_two_losses_of_one_prediction_accumulate():
    pred, images, mask, patch = arguments()
    pred.requires_grad_()
    first = masked_patch_loss(pred, images, mask, patch)
    second = masked_patch_loss(pred, images, ~mask, patch)
    (first + second).backward()
    expected = loss_and_grad(pred, images, mask, patch)[1] + loss_and_grad(pred, images, ~mask, patch)[1]
    assert torch.equal(pred.grad, expected)


def test_fp16_gradients_survive_until_they_are_scaled():
    """Times 2 / (D * masked) they are below what fp16 can hold; a gradient scaler multiplies the loss."""
    pred, images, mask, patch = arguments(samples=16, size=(128, 128), patch=(16, 16), dtype=torch.float16)
    pred.requires_grad_()
    (masked_patch_loss(pred, images, mask, patch) * 65536).backward()
    _, exact = loss_and_grad(pred.double(), images.double(), mask, patch)
    torch.testing.assert_close(pred.grad.double(), exact * 65536, rtol=1e-3, atol=1e-4)
    assert (exact.abs() < 2**-24).double().mean() > 0.1


def test_what_is_not_masked_has_no_gradient_even_where_that_of_the_loss_is_infinite():
    pred, images, mask, patch = arguments()
    for backend in (None, "reference"):
        pred.requires_grad_()
        loss = masked_patch_loss(pred, images, mask, patch, backend=backend)
        (grad,) = torch.autograd.grad(loss, pred, torch.tensor(torch.inf))
        assert grad[~mask].eq(0).all() and not grad[mask].isfinite().any()


def test_without_grad_none_is_formed():
    pred, images, mask, patch = arguments()
    expected = masked_patch_loss(pred, images, mask, patch)
    assert not expected.requires_grad
    with torch.no_grad():
        assert torch.equal(masked_patch_loss(pred.requires_grad_(), images, mask, patch), expected)
    loss, grad = torch.ops.sslkernels.patch_loss_fwd(pred.detach(), images, mask, patch, True, 1e-6, False)
    assert torch.equal(loss, expected) and grad.shape == (0,)


def test_second_derivatives():
    pred, images, mask, patch = arguments(dtype=torch.float64)
    torch.autograd.gradgradcheck(lambda x: masked_patch_loss(x, images, mask, patch).square(), pred.requires_grad_())
    (grad,) = torch.autograd.grad(masked_patch_loss(pred, images, mask, patch), pred, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), pred)  # the gradient is linear: H = 2 / (D * masked)
    torch.testing.assert_close(second, 2 * grad.detach() * 2 / (pred.shape[2] * mask.sum()))


def test_images_that_require_grad():
    pred, images, mask, patch = arguments(dtype=torch.float64)
    images.requires_grad_()
    with pytest.raises(ValueError, match=r"images must not require grad.*pass images.detach\(\)"):
        masked_patch_loss(pred, images, mask, patch)
    with torch.no_grad():
        masked_patch_loss(pred, images, mask, patch)
    assert torch.autograd.gradcheck(lambda x: masked_patch_loss(pred, x, mask, patch, backend="reference"), images)


# ---- torch


def test_opcheck():
    pred, images, mask, patch = arguments()
    for dtype in (torch.float32, torch.float16):
        given = (pred.to(dtype).requires_grad_(), images, mask, patch, True, 1e-6, True)
        torch.library.opcheck(torch.ops.sslkernels.patch_loss_fwd.default, given)
        grad = torch.randn(pred.shape)
        torch.library.opcheck(torch.ops.sslkernels.patch_loss_bwd.default, (torch.tensor(2.0), grad, mask, dtype))


def test_compiles_whole_and_once_for_all_batch_sizes():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(masked_patch_loss, fullgraph=True, dynamic=True, backend=counter)
    compiled_graphs = []
    for samples in (4, 7, 3):
        pred, images, mask, patch = arguments(samples=samples)
        for mask_ in (mask, mask.float()):
            expected = loss_and_grad(pred, images, mask_, patch)
            leaf = pred.requires_grad_()
            loss = compiled(leaf, images, mask_, patch)
            assert_equal((loss.detach(), *torch.autograd.grad(loss, leaf)), expected)
        compiled_graphs.append(counter.frame_count)
    assert compiled_graphs[0] == compiled_graphs[-1]


def test_autocast_leaves_narrow_predictions():
    _, images, mask, patch = arguments()
    decoder = torch.nn.Linear(10, 144)
    features = torch.randn(2, 8, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pred = decoder(features)
        loss = masked_patch_loss(pred, images, mask, patch)
    loss.backward()
    assert pred.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert decoder.weight.grad.isfinite().all() and decoder.weight.grad.ne(0).any()


PRED, IMAGES, MASK, PATCH = arguments()
VIDEO = torch.zeros(2, 3, 4, 16, 24)
NAME = "masked_patch_loss"
ERRORS = [
    # what is changed, the error
    ({"pred": [1.0]}, "TypeError: pred must be a tensor, got list"),
    ({"pred": PRED.long()}, "TypeError: pred must be float32, bfloat16, float16 or float64, got torch.int64"),
    ({"pred": PRED[:, 1:]}, "ValueError: pred must be (2, 8, 144) for images (2, 3, 16, 24) in patches of (8, 6), got"),
    ({"pred": PRED[..., 1:]}, "ValueError: pred must be (2, 8, 144) for images (2, 3, 16, 24) in patches of (8, 6)"),
    ({"pred": PRED.to("meta")}, "ValueError: pred must be on the device of images, cpu, got meta"),
    ({"images": 1}, "TypeError: images must be a tensor, got int"),
    ({"images": IMAGES.byte()}, "TypeError: images must be float32, bfloat16, float16 or float64, got torch.uint8"),
    ({"images": IMAGES[0]}, "ValueError: images must be (N, C, H, W) or (N, C, T, H, W), got (3, 16, 24)"),
    ({"images": IMAGES[:, :0]}, "ValueError: images must have at least one channel, got (2, 0, 16, 24)"),
    ({"images": IMAGES[..., 1:]}, "ValueError: images must be a multiple of patch_size (8, 6), got (2, 3, 16, 23)"),
    ({"mask": None}, "TypeError: mask must be a tensor, got NoneType"),
    ({"mask": MASK[:, :3]}, "ValueError: mask must be (2, 8) for images (2, 3, 16, 24) in patches of (8, 6), got"),
    ({"mask": MASK.to(torch.complex64)}, "TypeError: mask must be bool, or 0 and 1 of an integer or floating-point"),
    ({"mask": MASK.to("meta")}, "ValueError: mask must be on the device of images, cpu, got meta"),
    ({"patch_size": 8.0}, "TypeError: patch_size must be an int or (p, q), got 8.0"),
    ({"patch_size": True}, "TypeError: patch_size must be an int or (p, q), got True"),
    ({"patch_size": (8.0, 6)}, "TypeError: patch_size must hold integers, got (8.0, 6)"),
    ({"patch_size": (1, 8, 6)}, "ValueError: patch_size must be (p, q) for images (2, 3, 16, 24), got (1, 8, 6)"),
    ({"patch_size": 0}, "ValueError: patch_size must be positive, got (0, 0)"),
    ({"images": VIDEO, "patch_size": 8}, "TypeError: patch_size must be (t, p, q) for videos, got 8"),
    ({"images": VIDEO}, "ValueError: patch_size must be (t, p, q) for images (2, 3, 4, 16, 24), got (8, 6)"),
    ({"norm_pix": 1}, "TypeError: norm_pix must be a bool, got int"),
    ({"eps": "0"}, "TypeError: eps must be a number, got str"),
    ({"eps": -1e-6}, "ValueError: eps must be finite and not negative, got -1e-06"),
    ({"eps": 10**400}, "ValueError: eps must be finite and not negative, got 1000"),
    ({"pred": PRED.to_sparse()}, "TypeError: pred must be a strided tensor, got torch.sparse_coo"),
    ({"eps": torch.nan}, "ValueError: eps must be finite and not negative, got nan"),
    ({"backend": "triton"}, "RuntimeError: backend 'triton' is not available on cpu: it is for tensors on cuda"),
]  # fmt: skip


@pytest.mark.parametrize("changes, message", ERRORS, ids=[message for _, message in ERRORS])
def test_errors(changes, message):
    kind, _, text = message.partition(": ")
    given = {"pred": PRED, "images": IMAGES, "mask": MASK, "patch_size": PATCH, **changes}
    with pytest.raises(getattr(builtins, kind)) as caught:
        masked_patch_loss(**given)
    assert str(caught.value).startswith(f"{NAME}: {text}")


def test_patches_of_one_pixel_cannot_be_normalised():
    one = torch.zeros(1, 4, 1), torch.zeros(1, 1, 2, 2), torch.ones(1, 4), 1
    with pytest.raises(ValueError, match="norm_pix must be False for patches of one pixel"):
        masked_patch_loss(*one)
    assert masked_patch_loss(*one, norm_pix=False) == 0


def test_operators_that_are_called_directly_check_too():
    require_or_skip(_library.extension, _library.extension_error)
    fwd, bwd = torch.ops.sslkernels.patch_loss_fwd, torch.ops.sslkernels.patch_loss_bwd
    for tensors, message in (
        ((PRED[:, 1:], IMAGES, MASK, PATCH), "pred must be"),
        ((PRED, IMAGES, MASK[:, 1:], PATCH), "mask must be"),
        ((PRED, IMAGES, MASK.float(), PATCH), "mask must be"),
        ((PRED, IMAGES, MASK, (7, 6)), "multiple of patch_size"),
        ((PRED, IMAGES, MASK, (8, 6, 1)), "as many patch sizes"),
        ((PRED, IMAGES.long(), MASK, PATCH), "images must be float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            fwd(*tensors, True, 1e-6, True)
    for tensors, message in (
        ((torch.ones(2), PRED, MASK, torch.float32), "grad_loss must be one"),
        ((torch.ones(()), PRED, MASK, torch.float64), "dtype of the result"),
        ((torch.ones(()), PRED.half(), MASK, torch.float16), "dtype of the result"),
        ((torch.ones(()), PRED[0], MASK, torch.float32), "grad_pred must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            bwd(*tensors)
    with pytest.raises(RuntimeError, match="called with need_grad=False"):
        fwd(PRED.clone().requires_grad_(), IMAGES, MASK, PATCH, True, 1e-6, False)[0].backward()

"""The masked patch loss's GPU kernels without a GPU: Triton's interpreted, CUDA's run on the CPU."""

from __future__ import annotations

import inspect
import shutil

import cuda_on_cpu
import pytest
import torch
from conftest import require_or_skip
from cuda_on_cpu import SCHEDULES
from numerics import assert_op_close
from test_patch_loss import arguments as positional
from test_patch_loss import loss_and_grad
from torch.utils._python_dispatch import TorchDispatchMode
from triton_on_cpu import interpret

from sslkernels import _library, masked_patch_loss
from sslkernels.ops.patch_loss import op, reference
from sslkernels.ops.patch_loss.cases import OPS

SPEC = OPS[0]
CASES = [case for case in SPEC.cases if "bench" not in case.tags]
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class OnCuda(TorchDispatchMode):
    """Within it the operators are those of the CUDA kernels on the CPU, under one schedule."""

    def __init__(self, schedule=0):
        super().__init__()
        require_or_skip(shutil.which("g++"), "g++ is not installed")
        self.module = cuda_on_cpu.kernels(schedule)
        self.called = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("sslkernels::")
        if name not in op.SCHEMAS:
            return func(*args, **(kwargs or {}))
        self.called.append(name)
        return getattr(self, name)(*args)

    def patch_loss_fwd(self, pred, images, mask, patch_size, norm_pix, eps, need_grad):
        pred = pred if pred.stride(2) == 1 else pred.contiguous()
        images, patch_size = (images, patch_size) if images.dim() == 5 else (images[:, :, None], [1, *patch_size])
        loss = torch.full((), torch.nan, dtype=reference.compute_dtype(pred, images))
        grad = torch.full(pred.shape, torch.nan, dtype=reference.grad_dtype(pred)) if need_grad else None
        self.module.patch_loss_fwd(pred, images, mask.contiguous(), patch_size, norm_pix, eps, loss, grad)
        return loss, pred.new_empty(0, dtype=reference.grad_dtype(pred)) if grad is None else grad

    def patch_loss_bwd(self, grad_loss, grad_pred, mask, dtype):
        grad = torch.full(grad_pred.shape, torch.nan, dtype=dtype)
        self.module.patch_loss_bwd(grad_loss, grad_pred, mask.contiguous(), grad)
        return grad


def arguments(**options):
    return dict(zip(("pred", "images", "mask", "patch_size"), positional(**options), strict=True))


@pytest.mark.parametrize("dtype", SPEC.dtypes, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cuda_is_as_exact_as_eager(case, dtype):
    with OnCuda() as mode:
        assert_op_close(SPEC, case, dtype)
    assert mode.called == ["patch_loss_fwd", "patch_loss_bwd"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["n2_56", "two_pixels", "odd", "channels_last_video"])
def test_cuda_under_every_schedule(name, schedule):
    """The order of the sums is fixed: all schedules give the same bits."""
    (case,) = (case for case in CASES if case.name == name)
    for dtype in (torch.float32, torch.bfloat16):
        given = case.make("cpu", dtype)
        with OnCuda(0):
            expected = loss_and_grad(**given)
        with OnCuda(schedule):
            actual = loss_and_grad(**given)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_triton_is_as_exact_as_eager(case, dtype):
    with interpret(order_seed=1) as launches:
        assert_op_close(SPEC, case, dtype)
    assert len(launches) == (2 if case.make("cpu", dtype)["pred"].numel() else 0)


@pytest.mark.parametrize("on_gpu", [OnCuda, interpret], ids=["cuda", "triton"])
class TestBoth:
    """What holds on either."""

    def test_a_large_mean_does_no_harm(self, on_gpu):
        given = arguments(patch=(16, 16), size=(32, 32), ratio=1.0)
        given["images"] = 1e4 + 0.01 * given["images"]
        with on_gpu():
            loss, grad = loss_and_grad(**given)
        exact = given | {"pred": given["pred"].double(), "images": given["images"].double()}
        exact_loss, exact_grad = loss_and_grad(**exact)
        torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-4, atol=1e-5 * exact_grad.abs().max().item())

    @pytest.mark.parametrize("pred_dtype", GPU_DTYPES, ids=str)
    def test_every_pair_of_dtypes(self, on_gpu, pred_dtype):
        for images_dtype in SPEC.dtypes:
            given = arguments()
            given |= {"pred": given["pred"].to(pred_dtype), "images": given["images"].to(images_dtype)}
            expected = loss_and_grad(**given)
            with on_gpu():
                actual = loss_and_grad(**given)
            assert actual[0].dtype == expected[0].dtype
            torch.testing.assert_close(actual[0], expected[0], rtol=1e-6, atol=0)
            torch.testing.assert_close(actual[1], expected[1], rtol=torch.finfo(pred_dtype).eps, atol=1e-8)

    def test_only_masked_patches_are_read(self, on_gpu):
        given = arguments()
        with on_gpu():
            expected = loss_and_grad(**given)
        mask = given["mask"]
        given["pred"][~mask] = torch.nan
        grid = mask.view(2, 2, 4).repeat_interleave(8, 1).repeat_interleave(6, 2)
        given["images"].masked_fill_(~grid[:, None], torch.nan)
        with on_gpu():
            actual = loss_and_grad(**given)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
        assert actual[1][~mask].eq(0).all() and actual[1][mask].ne(0).any()

    def test_without_grad_none_is_formed(self, on_gpu):
        given = arguments()
        expected = masked_patch_loss(**given)
        with on_gpu():
            torch.testing.assert_close(masked_patch_loss(**given), expected)

    @pytest.mark.parametrize("offset", [1, 2, 4])
    def test_memory_that_is_not_aligned(self, on_gpu, offset):
        """Pixels and predictions in rows of whole pieces that start between two of them."""
        for dtype in GPU_DTYPES:
            given = arguments(size=(16, 32), patch=(8, 16), dtype=dtype)
            expected = loss_and_grad(**given)
            for name in ("pred", "images"):
                tensor = given[name]
                moved = torch.zeros(tensor.numel() + offset, dtype=dtype)[offset:].view(tensor.shape).copy_(tensor)
                with on_gpu():
                    actual = loss_and_grad(**given | {name: moved})
                torch.testing.assert_close(actual, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)

    def test_offsets_beyond_32_bits(self, on_gpu):
        """Samples more than 2^31 elements apart, in memory of which only they are ever touched."""
        given = arguments(dtype=torch.bfloat16)
        far = dict(given)
        distance = 2**31 + 64
        for name in ("pred", "images"):
            near = given[name]
            memory = torch.empty(distance + near[0].numel(), dtype=near.dtype)
            far[name] = memory.as_strided(near.shape, (distance, *near.stride()[1:])).copy_(near)
        with on_gpu():
            expected, actual = loss_and_grad(**given), loss_and_grad(**far)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))

    def test_an_infinite_gradient_of_the_loss(self, on_gpu):
        given = arguments()
        given["pred"].requires_grad_()
        with on_gpu():
            loss = masked_patch_loss(**given)
            (grad,) = torch.autograd.grad(loss, given["pred"], torch.tensor(torch.inf))
        assert grad[~given["mask"]].eq(0).all() and not grad[given["mask"]].isfinite().any()


def test_the_compiled_cuda_kernel_owns_the_key():
    require_or_skip(shutil.which("nvcc") and _library.extension, "nvcc is not installed, or the extension is not built")
    backend = _library.backends()[SPEC.name]["cuda"]
    assert (backend.active, backend.besides) == ("cuda", ("triton",))


def test_triton_has_operators_of_its_own():
    """``backend="triton"`` calls them where the compiled kernel has the key; the backward of one is its own."""
    operators = {backend: inspect.unwrap(op.patch_loss_fwd(backend)) for backend in ("triton", "cuda", None)}
    assert operators["triton"] is torch.ops.sslkernels.patch_loss_triton_fwd
    assert operators["cuda"] is operators[None] is torch.ops.sslkernels.patch_loss_fwd
    for name in op.TRITON.values():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sslkernels::{name}", "CUDA")

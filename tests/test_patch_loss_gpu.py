"""The masked patch loss's GPU kernels without a GPU: Triton's interpreted, CUDA's run on the CPU."""

from __future__ import annotations

import shutil

import cuda_on_cpu
import torch
from conftest import require_or_skip
from torch.utils._python_dispatch import TorchDispatchMode

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

"""The torch operators of the masked patch loss: schema, shapes, autograd, and the kernels under CUDA."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from sslkernels import _library, _operators
from sslkernels.ops.patch_loss import reference

NAME = "masked_patch_loss"

# pred (N, L, D); images (N, C, [T,] H, W) of any strides; mask (N, L) bool; patch_size ([t,] p, q), of which L is the
# grid and D = C * prod(patch_size) the size. Any of fp32, bf16, fp16, fp64, pred and images each its own.
# loss: 0-dim, fp32, or fp64 where an argument is. grad_pred (N, L, D), or (0,) without need_grad: the gradient for a
# grad_loss of 1, zero where nothing is masked, in the dtype of pred, but fp32 for fp16: times 2 / (D * masked) it would
# vanish there before a gradient scaler could save it.
# patch_loss_bwd: grad_pred * grad_loss in `dtype`, that of pred; what is not masked stays zero whatever grad_loss is.
SCHEMAS = {
    "patch_loss_fwd": (
        "(Tensor pred, Tensor images, Tensor mask, SymInt[] patch_size, bool norm_pix, float eps, bool need_grad)"
        " -> (Tensor loss, Tensor grad_pred)"
    ),
    "patch_loss_bwd": "(Tensor grad_loss, Tensor grad_pred, Tensor mask, ScalarType dtype) -> Tensor",
}
# Triton's kernels as operators of their own: backend="triton" calls them where the compiled ones have the CUDA key
TRITON = {name: name.replace("patch_loss", "patch_loss_triton") for name in SCHEMAS}


def _fwd_fake(pred, images, mask, patch_size, norm_pix, eps, need_grad):
    loss = pred.new_empty((), dtype=reference.compute_dtype(pred, images))
    return loss, pred.new_empty(pred.shape if need_grad else (0,), dtype=reference.grad_dtype(pred))


def _bwd_fake(grad_loss, grad_pred, mask, dtype):
    return grad_pred.new_empty(grad_pred.shape, dtype=dtype)


def _save(ctx, inputs, output):
    pred, _, mask, _, _, _, ctx.has_grad = inputs
    _, grad_pred = output
    ctx.dtype = pred.dtype
    ctx.save_for_backward(grad_pred, mask)
    ctx.set_materialize_grads(False)  # that of grad_pred would be as large as itself


def _backward(scale, ctx, grad_loss, grad_of_grad):
    """The gradient as the forward has formed it, where grad_loss is 1 and no other backward will need it; or scaled."""
    if not ctx.has_grad:
        raise RuntimeError("patch_loss_fwd: the forward forms the gradient, and was called with need_grad=False")
    grad_pred, mask = ctx.saved_tensors
    if grad_loss is None:
        grad = None
    elif grad_pred.dtype == ctx.dtype and _is_last_use(grad_loss, grad_pred) and grad_loss.item() == 1:
        grad = grad_pred.detach()
    else:
        grad = scale(grad_loss, grad_pred, mask, ctx.dtype)
    if grad_of_grad is not None:  # grad_pred is 2 (pred - target) / (D * masked) where there is a mask
        factor = 2 / (grad_pred.shape[2] * mask.sum().clamp(min=1))
        second = (grad_of_grad * factor).where(mask.unsqueeze(-1), 0).to(ctx.dtype)
        grad = second if grad is None else grad + second
    return grad, None, None, None, None, None, None


def _save_bwd(ctx, inputs, output):
    grad_loss, grad_pred, mask, _ = inputs
    ctx.save_for_backward(grad_loss, grad_pred, mask)


def _backward_bwd(ctx, grad):
    grad_loss, grad_pred, mask = ctx.saved_tensors
    grad = grad.to(grad_pred.dtype).where(mask.unsqueeze(-1), 0)
    return (grad * grad_pred).sum().to(grad_loss.dtype), grad * grad_loss, None, None


def _is_last_use(*tensors) -> bool:
    """Whether plain CPU tensors take part in a backward that frees its graph.

    Otherwise a second one would find what the owner of the first gradient has made of it.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    plain = all(
        type(tensor) is torch.Tensor
        and tensor.device.type == "cpu"
        # of torch.vmap, and of is_grads_batched=True, which has wrappers of its own
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and not torch._C._functorch.is_legacy_batchedtensor(tensor)
        for tensor in tensors
    )
    return plain and not torch._C._autograd._get_current_graph_task_keep_graph()


def _define(fwd: str, bwd: str) -> None:
    """Schemas, shapes and gradients of a pair of operators."""
    fakes: tuple[Callable, ...] = (_fwd_fake, _bwd_fake)
    for name, schema, fake in zip((fwd, bwd), SCHEMAS.values(), fakes, strict=True):
        torch.library.define(f"sslkernels::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.register_fake(f"sslkernels::{name}", fake)
    gradient = functools.partial(_backward, _operators.operator(bwd, NAME))
    _operators.register_autograd(fwd, gradient, save=_save)
    _operators.register_autograd(bwd, _backward_bwd, save=_save_bwd)


_define(*SCHEMAS)
_define(*TRITON.values())
_forward = {name: _operators.operator(name, NAME) for name in ("patch_loss_fwd", TRITON["patch_loss_fwd"])}


def _serve_cuda(name: str, kernel: str) -> None:
    @torch.library.impl(f"sslkernels::{name}", "cuda")
    def _(*args):
        from sslkernels.ops.patch_loss import kernels  # triton takes a while to import: only where it is used

        return getattr(kernels, kernel)(*args)


for _name in SCHEMAS:
    torch.library.impl(f"sslkernels::{_name}", "default", getattr(reference, _name))
    _serve_cuda(TRITON[_name], _name)
    if _library.claim_cuda(_name) == "triton":
        _serve_cuda(_name, _name)


def patch_loss_fwd(backend: str | None):
    """The operator to call for ``backend``: Triton's where it is asked for, else that of the device."""
    return _forward[TRITON["patch_loss_fwd"] if backend == "triton" else "patch_loss_fwd"]

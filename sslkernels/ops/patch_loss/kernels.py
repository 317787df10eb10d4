"""The masked patch loss in Triton: a program for each patch, whose pixels stay in registers."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from sslkernels.ops.patch_loss import reference

LARGEST_PATCH = 16384  # pixels, with channels: larger ones do not fit the registers and go to the definition
LARGEST_BLOCK = 4096  # elements of a gradient that a program scales


@triton.jit
def _pixel_offsets(
    element, stride_xc, stride_xt, stride_xh, stride_xw,
    CHANNELS: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr,
):  # fmt: skip
    """Where the elements of a patch, numbered as (t, p, q, c), lie behind its first pixel."""
    channel, pixel = element % CHANNELS, element // CHANNELS
    column, row, frame = pixel % PATCH_W, pixel // PATCH_W % PATCH_H, pixel // (PATCH_W * PATCH_H)
    offset = channel.to(tl.int64) * stride_xc + column.to(tl.int64) * stride_xw
    return offset + row.to(tl.int64) * stride_xh + frame.to(tl.int64) * stride_xt


@triton.jit
def _normalized(x, inside, eps, WIDTH: tl.constexpr):
    """Centred twice: the mean of numbers around 10,000 is rounded by more than their differences may be."""
    x = tl.where(inside, x - tl.sum(x, 0) / WIDTH, 0.0)
    x = tl.where(inside, x - tl.sum(x, 0) / WIDTH, 0.0)
    return x / tl.sqrt_rn(tl.sum(x * x, 0) / (WIDTH - 1) + eps)


@triton.jit
def _patch_loss_fwd_kernel(
    pred_ptr, images_ptr, mask_ptr, count_ptr, loss_ptr, grad_ptr, TOKENS, GRID_H, GRID_W, stride_pn, stride_pl,
    stride_xn, stride_xc, stride_xt, stride_xh, stride_xw, eps,
    NORM_PIX: tl.constexpr, HAS_GRAD: tl.constexpr, CHANNELS: tl.constexpr, PATCH_T: tl.constexpr,
    PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The share of one patch in the loss, and its gradient: zeros where it is not masked."""
    WIDTH: tl.constexpr = CHANNELS * PATCH_T * PATCH_H * PATCH_W
    index = tl.program_id(0).to(tl.int64)
    element = tl.arange(0, BLOCK)
    inside = element < WIDTH
    if tl.load(mask_ptr + index):
        sample, token = index // TOKENS, index % TOKENS
        column, row, frame = token % GRID_W, token // GRID_W % GRID_H, token // (GRID_W * GRID_H)
        images_ptr += sample * stride_xn + frame * PATCH_T * stride_xt
        images_ptr += row * PATCH_H * stride_xh + column * PATCH_W * stride_xw
        offsets = _pixel_offsets(element, stride_xc, stride_xt, stride_xh, stride_xw, CHANNELS, PATCH_H, PATCH_W)
        target = tl.load(images_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        if NORM_PIX:
            target = _normalized(target, inside, eps, WIDTH)
        pred_ptr += sample * stride_pn + token * stride_pl
        pred = tl.load(pred_ptr + element, mask=inside, other=0.0).to(tl.float32)
        difference = tl.where(inside, pred - target, 0.0)
        count = tl.load(count_ptr).to(tl.float32)
        tl.store(loss_ptr + index, tl.sum(difference * difference, 0) / WIDTH / count)
        gradient = difference * (2 / (count * WIDTH))
    else:
        tl.store(loss_ptr + index, 0.0)
        gradient = tl.zeros((BLOCK,), tl.float32)
    if HAS_GRAD:
        tl.store(grad_ptr + index * WIDTH + element, gradient.to(grad_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _patch_loss_bwd_kernel(grad_loss_ptr, grad_pred_ptr, mask_ptr, out_ptr, WIDTH, BLOCK: tl.constexpr):
    """A block of a patch's gradient: that of a loss whose own is 1, times the one it has."""
    index = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = element < WIDTH
    if tl.load(mask_ptr + index):
        gradient = tl.load(grad_pred_ptr + index * WIDTH + element, mask=inside, other=0.0).to(tl.float32)
        gradient *= tl.load(grad_loss_ptr).to(tl.float32)
    else:
        gradient = tl.zeros((BLOCK,), tl.float32)
    tl.store(out_ptr + index * WIDTH + element, gradient.to(out_ptr.dtype.element_ty), mask=inside)


def _warps(block: int) -> int:
    """So many that a thread has 8 to 32 elements."""
    return 4 if block <= 1024 else 8 if block <= 4096 else 16


def patch_loss_fwd(pred, images, mask, patch_size, norm_pix, eps, need_grad):
    """``sslkernels::patch_loss_fwd`` on a GPU. float64 and very large patches go to the definition."""
    samples, tokens, width = pred.shape
    if reference.compute_dtype(pred, images) == torch.float64 or width > LARGEST_PATCH or not pred.numel():
        return reference.patch_loss_fwd(pred, images, mask, patch_size, norm_pix, eps, need_grad)
    if pred.stride(2) != 1:
        pred = pred.contiguous()
    if images.dim() == 4:
        images, patch_size = images.unsqueeze(2), (1, *patch_size)
    patch_t, patch_h, patch_w = patch_size
    mask = mask.contiguous()
    losses = torch.empty(samples * tokens, dtype=torch.float32, device=pred.device)
    grad_pred = torch.empty(pred.shape if need_grad else (0,), dtype=reference.grad_dtype(pred), device=pred.device)
    block = triton.next_power_of_2(width)

    def grid(meta):
        return (samples * tokens,)

    with torch.cuda.device_of(pred):
        _patch_loss_fwd_kernel[grid](
            pred_ptr=pred, images_ptr=images, mask_ptr=mask, count_ptr=mask.sum(), loss_ptr=losses, grad_ptr=grad_pred,
            TOKENS=tokens, GRID_H=images.shape[3] // patch_h, GRID_W=images.shape[4] // patch_w,
            stride_pn=pred.stride(0), stride_pl=pred.stride(1),
            stride_xn=images.stride(0), stride_xc=images.stride(1), stride_xt=images.stride(2),
            stride_xh=images.stride(3), stride_xw=images.stride(4), eps=eps,
            NORM_PIX=norm_pix, HAS_GRAD=need_grad, CHANNELS=images.shape[1], PATCH_T=patch_t, PATCH_H=patch_h,
            PATCH_W=patch_w, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
    return losses.sum(), grad_pred


def patch_loss_bwd(grad_loss, grad_pred, mask, dtype):
    """``sslkernels::patch_loss_bwd`` on a GPU; float64 goes to the definition."""
    if grad_pred.dtype == torch.float64 or not grad_pred.numel():
        return reference.patch_loss_bwd(grad_loss, grad_pred, mask, dtype)
    samples, tokens, width = grad_pred.shape
    grad_pred, mask = grad_pred.contiguous(), mask.contiguous()
    out = torch.empty(grad_pred.shape, dtype=dtype, device=grad_pred.device)
    block = min(LARGEST_BLOCK, triton.next_power_of_2(width))

    def grid(meta):
        return samples * tokens, math.ceil(width / meta["BLOCK"])

    with torch.cuda.device_of(grad_pred):
        _patch_loss_bwd_kernel[grid](
            grad_loss_ptr=grad_loss, grad_pred_ptr=grad_pred, mask_ptr=mask, out_ptr=out, WIDTH=width,
            BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
    return out

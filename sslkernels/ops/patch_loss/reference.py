"""The loss of masked autoencoders in pure PyTorch: the definition that every kernel is checked against."""

from __future__ import annotations

import torch


def patchify(images, patch_size):
    """The patches of (N, C, [T,] H, W) images, (N, L, prod(patch_size) * C): grid row-major, channels last in each."""
    samples, channels = images.shape[:2]
    split, dims = [samples, channels], len(patch_size)
    for size, patch in zip(images.shape[2:], patch_size, strict=True):
        split += [size // patch, patch]
    patches = images.reshape(split).permute(0, *range(2, 2 * dims + 2, 2), *range(3, 2 * dims + 2, 2), 1)
    tokens, width = 1, channels
    for cells, patch in zip(split[2::2], split[3::2], strict=True):
        tokens, width = tokens * cells, width * patch
    return patches.reshape(samples, tokens, width)


def masked_patch_loss(pred, images, mask, patch_size, *, norm_pix=True, eps=1e-6):
    """The loss as a user would write it in PyTorch, in the dtypes given; ``mask`` bool, or nonzero where masked."""
    target = patchify(images, square(patch_size))
    if norm_pix:
        mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
        target = (target - mean) / (var + eps) ** 0.5
    mask = mask != 0
    difference = torch.where(mask[..., None], pred - target, 0)
    return difference.square().mean(dim=-1).sum() / mask.sum().clamp_min(1)


def square(patch_size):
    """``patch_size`` as a tuple; an int is the side of a square."""
    return (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)


def compute_dtype(pred, images):
    """The dtype of statistics, sums and the loss: fp64 where an argument is, else fp32."""
    return torch.promote_types(torch.promote_types(pred.dtype, images.dtype), torch.float32)


def grad_dtype(pred):
    """The dtype that a gradient is kept in until the backward: that of pred, but for fp16, where it would vanish."""
    return torch.float32 if pred.dtype == torch.float16 else pred.dtype


def normalize(patches, eps):
    """Zero mean and unit (unbiased) variance along the last dimension.

    Centred twice: the mean of numbers around 10,000 is rounded by more than their differences may be.
    """
    for _ in range(2):
        patches = patches - patches.mean(dim=-1, keepdim=True)
    var = patches.square().sum(dim=-1, keepdim=True) / (patches.shape[-1] - 1)
    return patches * (var + eps).rsqrt()


def patch_loss_fwd(pred, images, mask, patch_size, norm_pix, eps, need_grad):
    """Default kernel of ``sslkernels::patch_loss_fwd``."""
    compute = compute_dtype(pred, images)
    target = patchify(images, patch_size).to(compute)
    if norm_pix:
        target = normalize(target, eps)
    difference = torch.where(mask[..., None], pred.to(compute) - target, 0)
    count = mask.sum().clamp_min(1)
    loss = difference.square().mean(dim=-1).sum() / count
    if not need_grad:
        return loss, pred.new_empty(0, dtype=grad_dtype(pred))
    return loss, (difference * (2 / (count * pred.shape[-1]).to(compute))).to(grad_dtype(pred))


def patch_loss_bwd(grad_loss, grad_pred, mask, dtype):
    """Default kernel of ``sslkernels::patch_loss_bwd``."""
    return torch.where(mask[..., None], grad_pred * grad_loss, 0).to(dtype)

"""The reconstruction loss of masked autoencoders, from the images themselves: no target patches are stored."""

from __future__ import annotations

import sys

import torch

from sslkernels._library import check_strided
from sslkernels.ops.infonce.arguments import DTYPES, INTEGERS, check_backend
from sslkernels.ops.patch_loss import op, reference

NAME = op.NAME
MASKS = (torch.bool, *INTEGERS, *DTYPES)


def masked_patch_loss(
    pred: torch.Tensor,
    images: torch.Tensor,
    mask: torch.Tensor,
    patch_size: int | tuple[int, ...],
    *,
    norm_pix: bool = True,
    eps: float = 1e-6,
    backend: str | None = None,
) -> torch.Tensor:
    r"""Mean squared error of predicted patches, over the masked patches of images or videos; the loss of MAE.

    With :math:`x_{nl}` the D pixels of patch l of image n, :math:`\mu` and :math:`\sigma^2` their mean and unbiased
    variance, and M the masked patches:

    .. math:: \mathcal{L} = \frac{1}{|M| D} \sum_{(n, l) \in M} \sum_{d=1}^{D} \Bigl(\hat{x}_{nld} -
              \frac{x_{nld} - \mu_{nl}}{\sqrt{\sigma_{nl}^2 + \epsilon}}\Bigr)^2

    Equivalent PyTorch::

        x = images.reshape(N, C, H // p, p, W // q, q)
        target = torch.einsum("nchpwq->nhwpqc", x).reshape(N, L, p * q * C)
        if norm_pix:
            mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
            target = (target - mean) / (var + eps) ** 0.5
        loss = ((pred - target) ** 2).mean(dim=-1)
        loss = (loss * mask).sum() / mask.sum()

    Args:
        pred: (N, L, D) predictions, L the patches of an image in row-major order of the grid, D = p * q * C the pixels
            of a patch, channels last; for videos (t, p, q, C). float32, bfloat16, float16 or float64, any strides.
        images: (N, C, H, W), or (N, C, T, H, W) for videos, each size a multiple of the patch's; any number of
            channels, any strides (channels_last is read as it lies). Any of those dtypes, also another than that of
            ``pred``: autocast may leave float32 images and bfloat16 predictions.
        mask: (N, L), True or nonzero where a patch was masked and so counts; bool, or 0 and 1 of any dtype.
        patch_size: (p, q), or an int for a square; (t, p, q) for videos.
        norm_pix: compare with normalised patches; otherwise with the pixels themselves.
        eps: added to the variance; >= 0.
        backend: None for the fastest one (see `sslkernels.backends`), or "cpp", "cuda", "triton", "reference".

    Returns:
        The loss, 0-dim; float32, or float64 where ``pred`` or ``images`` is. Without a masked patch it is 0, with a
        gradient of 0.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it. ``images`` requires grad: the
            target is a constant here, and only ``backend="reference"`` differentiates it.
        RuntimeError: ``backend`` is not available here.

    Source: He et al., Masked Autoencoders Are Scalable Vision Learners (2022), section 3; for videos Feichtenhofer et
    al., Masked Autoencoders As Spatiotemporal Learners (2022).

    Cost: reads the masked patches of ``pred`` and ``images`` once and, where ``pred`` requires grad, writes the
    gradient (N, L, D) in the same pass, which is the only memory taken. What is not masked is not read. The backward
    multiplies the gradient by that of the loss: another pass, but for eager PyTorch on the CPU where that is 1 (as in
    ``loss.backward()``) and the graph is not retained. Statistics, sums and the loss are in float32 (float64 where an
    argument is); patches are centred before they are squared, so a large mean does no harm. The result does not depend
    on the number of threads; instruction sets may differ in the last bits.
    """
    size = _checked_patch_size(patch_size, images)
    _check_shapes(pred, images, mask, size)
    if not isinstance(norm_pix, bool):
        raise TypeError(f"{NAME}: norm_pix must be a bool, got {type(norm_pix).__name__}")
    if norm_pix and pred.shape[2] == 1:
        raise ValueError(f"{NAME}: norm_pix must be False for patches of one pixel, which have no variance")
    _check_eps(eps)
    check_backend(NAME, backend, pred.device.type)
    if backend == "reference":
        compute = reference.compute_dtype(pred, images)
        return reference.masked_patch_loss(pred.to(compute), images.to(compute), mask, size, norm_pix=norm_pix, eps=eps)
    need_grad = torch.is_grad_enabled() and pred.requires_grad
    if torch.is_grad_enabled() and images.requires_grad:
        raise ValueError(
            f"{NAME}: images must not require grad, which only backend='reference' gives them; pass images.detach()"
        )
    masked = mask if mask.dtype == torch.bool else mask != 0
    loss, _ = op.patch_loss_fwd(backend)(pred, images, masked, size, norm_pix, float(eps), need_grad)
    return loss


def _check_tensor(argument: str, tensor, dtypes: tuple[torch.dtype, ...], expected: str) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{NAME}: {argument} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{NAME}: {argument} must be {expected}, got {tensor.dtype}")
    check_strided(NAME, argument, tensor)


def _checked_patch_size(patch_size, images) -> tuple[int, ...]:
    """One size for each dimension of the grid."""
    _check_tensor("images", images, DTYPES, "float32, bfloat16, float16 or float64")
    if images.dim() not in (4, 5):
        raise ValueError(f"{NAME}: images must be (N, C, H, W) or (N, C, T, H, W), got {tuple(images.shape)}")
    if images.shape[1] == 0:
        raise ValueError(f"{NAME}: images must have at least one channel, got {tuple(images.shape)}")
    dims = images.dim() - 2
    names = "(p, q)" if dims == 2 else "(t, p, q)"
    if isinstance(patch_size, int) and not isinstance(patch_size, bool) and dims == 2:
        patch_size = (patch_size, patch_size)
    if not isinstance(patch_size, (tuple, list)):
        expected = f"an int or {names}" if dims == 2 else f"{names} for videos"
        raise TypeError(f"{NAME}: patch_size must be {expected}, got {patch_size!r}")
    if len(patch_size) != dims:
        raise ValueError(f"{NAME}: patch_size must be {names} for images {tuple(images.shape)}, got {patch_size!r}")
    for size in patch_size:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{NAME}: patch_size must hold integers, got {patch_size!r}")
        if size < 1:
            raise ValueError(f"{NAME}: patch_size must be positive, got {patch_size!r}")
    for size, extent in zip(patch_size, images.shape[2:], strict=True):
        if extent % size:
            raise ValueError(
                f"{NAME}: images must be a multiple of patch_size {tuple(patch_size)}, got {tuple(images.shape)}"
            )
    return tuple(patch_size)


def _check_shapes(pred, images, mask, patch_size: tuple[int, ...]) -> None:
    _check_tensor("pred", pred, DTYPES, "float32, bfloat16, float16 or float64")
    _check_tensor("mask", mask, MASKS, "bool, or 0 and 1 of an integer or floating-point dtype")
    tokens, width = 1, images.shape[1]
    for size, extent in zip(patch_size, images.shape[2:], strict=True):
        tokens, width = tokens * (extent // size), width * size
    shape = (images.shape[0], tokens, width)
    for argument, tensor, expected in (("pred", pred, shape), ("mask", mask, shape[:2])):
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{NAME}: {argument} must be {expected} for images {tuple(images.shape)} in patches of {patch_size}, "
                f"got {tuple(tensor.shape)}"
            )
        if tensor.device != images.device:
            raise ValueError(
                f"{NAME}: {argument} must be on the device of images, {images.device}, got {tensor.device}"
            )


def _check_eps(eps) -> None:
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"{NAME}: eps must be a number, got {type(eps).__name__}")
    if not 0 <= eps <= sys.float_info.max:  # which an int may exceed
        raise ValueError(f"{NAME}: eps must be finite and not negative, got {eps}")

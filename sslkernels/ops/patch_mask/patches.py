"""The embedding of those patches alone that a mask keeps."""

from __future__ import annotations

import torch
from torch.nn import functional

from sslkernels.ops.patch_mask import arguments, op


def masked_patch_embed(
    images: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ids_keep: torch.Tensor,
    pos_embed: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    r"""Embeds the patches that a mask keeps: a vision transformer's patch embedding without the work that is dropped.

    .. math:: y_{nk} = W \operatorname{patch}(x_n, \mathrm{ids}_{nk}) + b + p_{\mathrm{ids}_{nk}}

    Equivalent PyTorch, for images of two dimensions::

        tokens = F.conv2d(images, weight, bias, stride=weight.shape[2:]).flatten(2).mT + pos_embed
        tokens.gather(1, ids_keep[..., None].expand(-1, -1, tokens.shape[2]))

    Args:
        images: (N, C, H, W), or (N, C, T, H, W) for video, of any strides, in float32, bfloat16, float16 or float64.
        weight: (D, C, p, q), or (D, C, t, p, q): that of the convolution whose stride is the patch size. H, W and T are
            multiples of p, q and t.
        bias: (D,) or None.
        ids_keep: (N, K) integers in [0, L), L patches in row-major order; they may repeat.
        pos_embed: (L, D) or (1, L, D), or None. Without the rows of prefix tokens.
        backend: None for the fastest one (see `sslkernels.backends`), or "cpp", "cuda", "triton", "reference"; for what
            gathers, since the product is PyTorch's.

    Returns:
        (N, K, D), in the dtype that the product and the sum have in PyTorch, also under autocast. Differentiable with
        respect to all but ``ids_keep``.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        RuntimeError: ``backend`` is not available here; or, on a CPU, an id is out of range. On a GPU that gives a row
            of NaN.

    Source: Dosovitskiy et al., An Image Is Worth 16x16 Words (2021), equation 1.

    Cost: 2 N K D C p q flops, and as many again for each gradient. Extra memory: the kept patches, (N, K, C p q).
    """
    name = "masked_patch_embed"
    patch_size, patches = _check_images(name, images, weight)
    ids_keep = arguments.kept_ids(name, "ids_keep", ids_keep, images.shape[0], patches, images.device)
    columns = weight.shape[0]
    if bias is not None:
        arguments.check_floating(name, "bias", bias)
        arguments.check_shape(name, "bias", bias, (columns,))
        arguments.check_device(name, "bias", bias, images.device)
        _check_dtype(name, "bias", bias, images)
    if pos_embed is not None:
        pos_embed = arguments.embedding(name, pos_embed, (patches,), columns, images.device)
    arguments.check_backend(name, backend, images.device.type)
    ops = op.family(backend)
    rows = ops.gather_patches_fwd(images, ids_keep, patch_size)
    tokens = functional.linear(rows, weight.flatten(1), bias)
    if pos_embed is None:
        return tokens
    # as one sample of N * K tokens, for the gradient of pos_embed to need no memory of N * L rows
    picked = ops.gather_tokens_fwd(pos_embed[None], ids_keep.reshape(1, -1), 0)
    return tokens + picked.view(tokens.shape)


def _check_dtype(name: str, argument: str, x: torch.Tensor, images: torch.Tensor) -> None:
    if images.dtype != x.dtype and not torch.is_autocast_enabled(images.device.type):
        raise TypeError(f"{name}: {argument} must have the dtype of images, {images.dtype}, got {x.dtype}")


def _check_images(name: str, images, weight) -> tuple[list[int], int]:
    """The patch size, and how many patches an image has."""
    arguments.check_floating(name, "images", images)
    arguments.check_floating(name, "weight", weight)
    if images.dim() not in (4, 5):
        raise ValueError(f"{name}: images must be (N, C, H, W) or (N, C, T, H, W), got {tuple(images.shape)}")
    channels, sizes = images.shape[1], images.shape[2:]
    arguments.check_shape(name, "weight", weight, (None, channels, *[None] * len(sizes)))
    arguments.check_device(name, "weight", weight, images.device)
    _check_dtype(name, "weight", weight, images)
    patch_size, patches = list(weight.shape[2:]), 1
    for size, patch in zip(sizes, patch_size, strict=True):
        if patch == 0 or size % patch != 0:
            raise ValueError(
                f"{name}: images must be of sizes that are multiples of the patch size {tuple(patch_size)}, "
                f"got {tuple(images.shape)}"
            )
        patches = patches * (size // patch)
    return patch_size, patches

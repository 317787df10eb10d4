"""The named inputs of the masked patch loss, with what each costs."""

from __future__ import annotations

import math

import torch

from sslkernels.ops import patch_loss
from sslkernels.ops.patch_loss import op, reference
from sslkernels.registry import Case, Cost, OpSpec


def patch_loss_cost(tokens: int, masked: int, width: int, itemsize: int = 4) -> Cost:
    """Three flops a pixel for the statistics and six for loss and gradient, of the masked patches.

    Bytes: their predictions and pixels are read and the gradient of all is written, once.
    """
    return Cost(9.0 * masked * width, 0.0, 0.0, 0.0, (2.0 * masked + tokens) * width * itemsize)


def random_mask(samples: int, tokens: int, ratio: float, device) -> torch.Tensor:
    """(N, L) bool with the same number of masked patches in each row."""
    order = torch.rand(samples, tokens, generator=torch.Generator().manual_seed(2)).argsort(dim=1)
    return (order < round(tokens * ratio)).to(device)


def _images(shape, device, dtype):
    """Smooth images with noise, as photographs are: patches differ in mean and in contrast."""
    generator = torch.Generator().manual_seed(1)
    waves = [torch.sin(torch.arange(size) * (0.1 + 0.05 * axis)) for axis, size in enumerate(shape[2:])]
    smooth = sum(wave.view(-1, *[1] * (len(waves) - 1 - axis)) for axis, wave in enumerate(waves))
    offset = torch.randn(shape[:2], generator=generator).view(*shape[:2], *[1] * len(waves))
    return (smooth + offset + 0.3 * torch.randn(shape, generator=generator)).to(device, dtype)


def _case(name, shape, patch_size, ratio=0.75, tags=("verify", "edge"), transform=None, **options) -> Case:
    """``transform`` changes the arguments of the op, a dictionary, in place."""
    sizes = (patch_size,) * (len(shape) - 2) if isinstance(patch_size, int) else patch_size
    tokens = math.prod(size // patch for size, patch in zip(shape[2:], sizes, strict=True))
    width = shape[1] * math.prod(sizes)

    def make(device, dtype):
        generator = torch.Generator().manual_seed(0)
        arguments = {
            "pred": torch.randn(shape[0], tokens, width, generator=generator).to(device, dtype),
            "images": _images(shape, device, dtype),
            "mask": random_mask(shape[0], tokens, ratio, device),
            "patch_size": patch_size,
            **options,
        }
        if transform is not None:
            transform(arguments)
        return arguments

    masked = shape[0] * round(tokens * ratio)
    return Case(name, make, patch_loss_cost(shape[0] * tokens, masked, width), frozenset(tags))


def _channels_last(arguments):
    images = arguments["images"]
    arguments["images"] = images.to(memory_format=torch.channels_last if images.dim() == 4 else torch.channels_last_3d)


def _strided(arguments):
    """Every second column of wider images that lie transposed, and predictions behind a class token."""
    images, pred = arguments["images"], arguments["pred"]
    arguments["images"] = images.transpose(2, 3).repeat_interleave(2, dim=2)[:, :, ::2].transpose(2, 3)
    arguments["pred"] = torch.cat([pred[:, :1], pred], dim=1)[:, 1:]


def _pred_columns(arguments):
    """Predictions whose last dimension is not dense."""
    arguments["pred"] = arguments["pred"].repeat_interleave(2, dim=2)[..., ::2]


def _expanded(arguments):
    """One grey image for all channels and samples."""
    images = arguments["images"]
    arguments["images"] = images[:1, :1].expand(images.shape)


def _float_mask(arguments):
    arguments["mask"] = arguments["mask"].float()


def _offset(arguments):
    """A mean that is large against the deviation."""
    images = arguments["images"]
    arguments["images"] = 1e4 + 1e-2 * images if images.dtype != torch.float16 else 100 + images


def _constant(arguments):
    """Patches of one colour, grey for the most part."""
    images = arguments["images"]
    arguments["images"] = images[..., :1, :1].expand(images.shape) * 0 + 0.7


def _mixed(arguments):
    """Images in fp32 beside bf16 predictions, as autocast leaves them; the other way round for fp32."""
    images = arguments["images"]
    narrow = images.dtype in (torch.bfloat16, torch.float16)
    arguments["images"] = images.float() if narrow else images.bfloat16()


CASES = (
    _case("n2_56", (2, 3, 56, 56), 14, tags=("verify", "aot_bf16")),
    _case("n4_64", (4, 3, 64, 64), 16, tags=("verify",), norm_pix=False),
    _case("one_channel", (3, 1, 28, 28), 4),
    _case("two_channels", (3, 2, 24, 40), (8, 4)),
    _case("ten_channels", (2, 10, 24, 24), 8),
    _case("odd", (3, 3, 15, 21), (5, 7)),
    _case("two_pixels", (3, 1, 6, 4), (1, 2)),
    _case("wide", (2, 3, 8, 120), (4, 40)),
    _case("video", (2, 3, 4, 32, 32), (2, 16, 16), 0.9),
    _case("video_odd", (2, 2, 6, 15, 10), (3, 5, 5), 0.5, norm_pix=False),
    _case("channels_last", (3, 3, 32, 32), 8, transform=_channels_last),
    _case("channels_last_video", (2, 3, 4, 16, 16), (2, 8, 8), transform=_channels_last),
    _case("strided", (3, 3, 32, 24), 8, transform=_strided),
    _case("pred_columns", (3, 3, 32, 24), 8, transform=_pred_columns),
    _case("expanded", (3, 3, 32, 32), 8, transform=_expanded),
    _case("float_mask", (3, 3, 32, 32), 8, transform=_float_mask),
    _case("large_offset", (3, 3, 32, 32), 8, transform=_offset),
    _case("constant", (3, 3, 32, 32), 8, transform=_constant),
    _case("mixed_dtypes", (3, 3, 48, 48), 16, transform=_mixed),
    _case("one_pixel", (3, 1, 5, 7), 1, norm_pix=False),
    _case("all_masked", (2, 3, 32, 32), 16, 1.0),
    _case("none_masked", (2, 3, 32, 32), 16, 0.0),
    _case("large_patch", (2, 3, 128, 128), 64, tags=("verify", "edge", "aot_bf16")),
    _case("no_sample", (0, 3, 32, 32), 16, tags=("edge",)),
    _case("no_patch", (2, 3, 0, 32), 16, tags=("edge",)),
    _case("n64_224", (64, 3, 224, 224), 16, tags=("bench",)),
    _case("n64_224_pixels", (64, 3, 224, 224), 16, tags=("bench",), norm_pix=False),
    _case("n8_video", (8, 3, 16, 224, 224), (2, 16, 16), 0.9, tags=("bench",)),
    _case("n1_224", (1, 3, 224, 224), 16, tags=("bench",)),
)

OPS = (
    OpSpec(
        name="masked_patch_loss",
        function=patch_loss.masked_patch_loss,
        reference=reference.masked_patch_loss,
        torch_ops=tuple(op.SCHEMAS),
        grad_args=("pred",),
        dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
        cases=CASES,
        has_cuda=True,
    ),
)

"""Backbones from timm, fitted to small images, and the projector that contrastive methods train on top."""

from __future__ import annotations

from functools import partial
from typing import Any

import timm
import torch
from timm.layers import GroupNorm
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from sslkernels.trainers import TrainError
from sslkernels.trainers._data import ImageData

PATCHES = 8  # a side at the most, unless a patch size is asked for
SMALL_VIT = {"model_name": "test_vit", "embed_dim": 128, "depth": 2, "num_heads": 8}
TimmModel = Any  # a module with the attributes that timm gives its models, ``num_features`` for one
SMALL_IMAGE = 64  # below it a ResNet's stem must not shrink the image


def build_backbone(name: str, data: ImageData, norm: str) -> TimmModel:
    """timm's model of that name without its classifier; it returns features (N, num_features)."""
    _check_name(name)
    options = {"num_classes": 0, "in_chans": data.channels}
    backbone = _create(name, data.image_size, options)
    if norm == "group" and _has_batch_norm(backbone):
        try:
            backbone = _create(name, data.image_size, {**options, "norm_layer": partial(GroupNorm, num_groups=8)})
        except (TypeError, ValueError) as error:
            raise TrainError(f"--norm group does not fit --backbone {name}: {error}") from error
        if _has_batch_norm(backbone):
            raise TrainError(f"--norm group does not fit --backbone {name}: some batch norm remains")
    if isinstance(backbone, ResNet) and data.image_size < SMALL_IMAGE:
        _keep_resolution(backbone, data.channels)
    _check_size(name, backbone, data)
    return backbone


def build_vit(name: str | None, data: ImageData, patch_size: int | None) -> VisionTransformer:
    """timm's ViT of that name, or a small one; its features are the mean of its patch tokens after the last norm."""
    size = data.image_size
    if patch_size is None:
        patch_size = next(p for p in range(2, size + 1) if size % p == 0 and size // p <= PATCHES)
    if size % patch_size:
        raise TrainError(f"--patch-size {patch_size} does not divide images of {size} pixels")
    if name is not None:
        _check_name(name)
    named = SMALL_VIT if name is None else {"model_name": name}
    try:
        vit = timm.create_model(
            **named, img_size=size, patch_size=patch_size, in_chans=data.channels, num_classes=0, global_pool="avg",
            fc_norm=False, dynamic_img_size=False,
        )  # fmt: skip
    except TypeError:  # convolutions have no such arguments
        vit = None
    if not isinstance(vit, VisionTransformer) or vit.pos_embed is None:
        raise TrainError(f"--backbone {name} is not one of timm's plain ViTs, such as test_vit or vit_tiny_patch16_224")
    return vit


@torch.no_grad()
def _check_size(name: str, backbone: nn.Module, data: ImageData) -> None:
    """Some models take images of few sizes alone, and tell it only when they see one."""
    image = torch.zeros(1, data.channels, data.image_size, data.image_size)
    try:
        backbone.eval()(image)
    except (AssertionError, RuntimeError, ValueError) as error:
        if isinstance(error, RuntimeError) and "memory" in str(error):
            raise
        reason = str(error).partition("\n")[0]
        raise TrainError(
            f"--backbone {name} does not take images of {data.image_size} pixels (--image-size): {reason}"
        ) from error
    backbone.train()


def _check_name(name: str) -> None:
    if not timm.is_model(name):
        raise TrainError(f"--backbone: timm {timm.__version__} has no model {name!r} (timm.list_models() lists them)")


def _create(name: str, image_size: int, options: dict) -> nn.Module:
    try:
        return timm.create_model(name, img_size=image_size, **options)
    except TypeError:  # convolutions take any size and have no such argument
        return timm.create_model(name, **options)


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def _keep_resolution(resnet: ResNet, channels: int) -> None:
    """SimCLR's stem for small images (its appendix B.9): one 3x3 convolution of stride 1, no pooling."""
    resnet.conv1 = nn.Conv2d(channels, len(resnet.bn1.weight), kernel_size=3, padding=1, bias=False)
    resnet.maxpool = nn.Identity()


def projector(features: int, dim: int, norm: str) -> nn.Module:
    """SimCLR's head: the loss shapes its output, the probe reads its input."""
    middle = nn.BatchNorm1d(features) if norm == "batch" else nn.LayerNorm(features)
    return nn.Sequential(nn.Linear(features, features, bias=False), middle, nn.ReLU(), nn.Linear(features, dim))

"""Grids of images as PNG files."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.utils import save_image

from sslkernels._files import replacing

LEAST_PIXELS = 64  # a side of a shown image: smaller ones are enlarged


def write_grid(rows: torch.Tensor, path: Path) -> None:
    """Write (R, N, C, H, W) with values in [-1, 1] as R rows of N images, atomically."""
    enlarged = -(-LEAST_PIXELS // rows.shape[-1])
    images = F.interpolate(rows.float().cpu().flatten(0, 1), scale_factor=enlarged)
    with replacing(path) as file:
        save_image(images, file, format="png", nrow=rows.shape[1], normalize=True, value_range=(-1, 1), pad_value=0.5)

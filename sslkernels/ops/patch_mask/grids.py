"""Grids of patches, and the rectangles that the mask makers place on them; integers, so that all machines agree."""

from __future__ import annotations

import functools
import math

import torch

from sslkernels.ops.patch_mask import arguments

MAX_TOKENS = 65536  # of a sample, as csrc/mask_sets.h
ASPECTS = 128  # as many as csrc/block_mask.h has room for
UNIT = 1 << 16  # of an aspect; areas count in 2^-8 of a patch
ASPECT_LIMIT = 256  # beyond, and below the inverse, a side has no place in 32 bits


def grid(op: str, grid_size) -> tuple[int, int]:
    """Height and width in patches; an int stands for a square."""
    sizes = (grid_size, grid_size) if isinstance(grid_size, arguments.INT) else grid_size
    height, width = rectangle(op, "grid_size", sizes)
    if height * width > MAX_TOKENS:
        raise ValueError(f"{op}: grid_size must be of at most {MAX_TOKENS} patches, got ({height}, {width})")
    return height, width


def rectangle(op: str, argument: str, sizes, within: tuple[int, int] | None = None) -> tuple[int, int]:
    """A pair of positive integers, at most those of ``within``."""
    is_pair = isinstance(sizes, (tuple, list)) and len(sizes) == 2
    if not is_pair or any(isinstance(size, bool) or not isinstance(size, arguments.INT) for size in sizes):
        raise TypeError(f"{op}: {argument} must be two ints, height and width, got {sizes!r}")
    height, width = sizes
    if height < 1 or width < 1:
        raise ValueError(f"{op}: {argument} must be positive, got ({height}, {width})")
    if within is not None and (height > within[0] or width > within[1]):
        raise ValueError(f"{op}: {argument} must fit into the grid, {within}, got ({height}, {width})")
    return height, width


def interval(op: str, argument: str, bounds, least: float, most: float) -> tuple[float, float]:
    """Two numbers in order, in [least, most]."""
    is_pair = isinstance(bounds, (tuple, list)) and len(bounds) == 2
    if not is_pair or any(isinstance(bound, bool) or not isinstance(bound, (int, float)) for bound in bounds):
        raise TypeError(f"{op}: {argument} must be two numbers, got {bounds!r}")
    low, high = bounds
    if not least <= low <= high <= most:
        raise ValueError(f"{op}: {argument} must be in order and in [{least:g}, {most:g}], got ({low}, {high})")
    return low, high


def aspects(low: float, high: float) -> list[int]:
    """Aspects spread evenly in their logarithm over [low, high], each with its inverse, in units of 1 / UNIT."""
    # the compiler takes the elements of a set at their values
    (low,), (high,) = {low}, {high}
    return _aspects(low, high)


@torch.compiler.assume_constant_result
def _aspects(low: float, high: float) -> list[int]:
    return list(_quantiles(float(low), float(high)))


@functools.cache
def _quantiles(low: float, high: float) -> tuple[int, ...]:
    middles = ((index + 0.5) / ASPECTS for index in range(ASPECTS))
    ratios = [low * math.exp(math.log(high / low) * middle) for middle in middles]
    return tuple(round(UNIT * factor) for ratio in ratios for factor in (ratio, 1 / ratio))


def side(area: int, factor: int) -> int:
    """sqrt(area * factor) to nearest, for an area in 2^-8 patches and a factor in units of 1 / UNIT."""
    return (math.isqrt(area * factor >> 22) + 1) // 2

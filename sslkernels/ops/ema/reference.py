"""The exponential moving average in pure PyTorch: the definition that every kernel is checked against."""

from __future__ import annotations

import torch

from sslkernels.philox import EMA_STREAM, WORD, philox, split


def ema_update_(teacher, student, momentum, *, bf16_copy=None, **_):
    """The update as a user would write it in PyTorch, tensor by tensor; a float momentum."""
    for index, (target, source) in enumerate(zip(teacher, student, strict=True)):
        target.lerp_(source.to(target.dtype), 1 - momentum)
        if bf16_copy is not None:
            bf16_copy[index].copy_(target)


def ema_update_op_(teacher, student, momentum, found_inf, bf16_copy, seed, step, keys):
    """Default kernel of ``sslkernels::ema_update_``, for every device; computes in fp32, or fp64 where that is given.

    ``keys`` holds the index of each tensor and the index of its first element, for stochastic rounding.
    """
    weight = (1 - momentum).double()
    if found_inf is not None:
        weight = torch.where(found_inf.reshape(()) == 0, weight, 0)
    seen: set[int] = set()  # a tensor that is listed twice is updated once
    for index, (target, source) in enumerate(zip(teacher, student, strict=True)):
        if not target.numel() or target.data_ptr() in seen:
            continue
        seen.add(target.data_ptr())
        real, other = as_real(target), as_real(source)
        compute = torch.promote_types(torch.promote_types(real.dtype, other.dtype), torch.float32)
        value = lerp(real.to(compute), other.to(compute), weight)
        if seed is not None:
            first = keys[2 * index + 1] * (2 if target.is_complex() else 1)
            value = round_stochastically(value, real.dtype, seed, step, keys[2 * index], first)
        real.copy_(torch.where(weight == 0, real, value))
        if bf16_copy:
            bf16_copy[index].copy_(target)


def as_real(tensor):
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def lerp(start, end, weight):
    """``start`` at weight 0 or where both are equal, ``end`` at weight 1, bit for bit; else as `torch.lerp`.

    Rounded twice, as all kernels do: the difference, and a fused multiply-add, which float64 stands in for.
    """
    factor = weight.to(start.dtype).double()
    difference = (end - start).double()
    near_start = start.double() + difference * factor
    near_end = end.double() - difference * (1 - factor)
    moved = torch.where(weight < 0.5, near_start, near_end).to(start.dtype)
    return torch.where(weight == 1, end, torch.where(end == start, start, moved))


def random_16_bits(shape, device, seed: int, step, tensor: int, first: int):
    """16 random bits for each element: eight elements, in row-major order from ``first`` on, share a Philox counter."""
    count = 1
    for size in shape:
        count *= size
    element = torch.arange(first, first + count, device=device)
    words = philox((element >> 3 & WORD, tensor, step & WORD, EMA_STREAM), split(seed))
    word = torch.stack(words, 1)[torch.arange(count, device=device), element >> 1 & 3] if count else element
    return (word >> ((element & 1) << 4) & 0xFFFF).view(shape)


def round_stochastically(value, dtype, seed: int, step, tensor: int, first: int):
    """``value``, in fp32, in bfloat16 or float16: the neighbour above or below at random, the value being the mean."""
    if dtype not in (torch.bfloat16, torch.float16):
        return value.to(dtype)
    random = random_16_bits(value.shape, value.device, seed, step, tensor, first)
    value = value.float()
    bits = value.contiguous().view(torch.int32).long() & WORD
    sign, magnitude = bits & 0x80000000, bits & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        rounded = magnitude + random & 0x7FFF0000
    else:
        # below the normal numbers of float16 the distance of neighbours is 2^-24 throughout
        small = (magnitude.int().view(torch.float32).clamp(max=2.0**-14) * 2.0**40).long() + random >> 16
        small = (small.float() * 2.0**-24).view(torch.int32).long()
        rounded = torch.where(magnitude < 0x38800000, small, magnitude + (random >> 3) & 0x7FFFE000)
    rounded = (rounded | sign) - ((rounded | sign) >> 31 << 32)  # back into the range of int32
    return torch.where(value.isfinite(), rounded.int().view(torch.float32), value).to(dtype)

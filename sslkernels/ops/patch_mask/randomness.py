"""Where the random bits of a mask come from: a seed, as a tensor on the device, and the numbers of the samples."""

from __future__ import annotations

import torch

from sslkernels.ops.patch_mask import arguments, reference
from sslkernels.ops.patch_mask import op as _op  # noqa: F401  registers draw_seed


def seed_tensor(op: str, seed, generator: torch.Generator | None, device: torch.device) -> torch.Tensor:
    """The seed as a 0-dim int64 tensor on the device: as given, or drawn once.

    Without ``seed`` it comes from ``generator``, or from the device's default one, which `torch.manual_seed` sets.
    A seed that is a tensor stays on its device: a CUDA graph reads what it holds when the graph is replayed.
    """
    if seed is None:
        return _drawn(op, generator, device)
    if generator is not None:
        raise ValueError(f"{op}: seed and generator must not both be given")
    check_seed(op, seed)
    if isinstance(seed, torch.Tensor):
        arguments.check_device(op, "seed", seed, device)
        return seed.reshape(()).to(torch.int64)
    if seed >= 2**63:
        (seed,) = {seed}  # at its value in the compiler, whose integers have 64 bits and a sign
        seed -= 2**64
    return torch.full((), seed, dtype=torch.int64, device=device)


def check_seed(op: str, seed) -> None:
    """An int of 64 bits, or a tensor of one integer."""
    if isinstance(seed, torch.Tensor):
        if seed.dtype not in arguments.INTEGERS or seed.numel() != 1:
            raise ValueError(
                f"{op}: seed must be an int or a tensor of one integer, got {seed.dtype} of shape {tuple(seed.shape)}"
            )
        arguments.check_strided(op, "seed", seed)
        return
    if isinstance(seed, bool) or not isinstance(seed, arguments.INT):
        raise TypeError(f"{op}: seed must be an int or a tensor of one integer, got {type(seed).__name__}")
    check_range(op, seed)


def check_range(op: str, seed) -> None:
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"{op}: seed must be in [-2**63, 2**64), got {seed}")


def _drawn(op: str, generator: torch.Generator | None, device: torch.device) -> torch.Tensor:
    if generator is None:
        # within torch.vmap PyTorch's own draw heeds randomness=, which an operator without tensors never hears of
        if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
            return reference.draw_seed(device)
        return torch.ops.sslkernels.draw_seed(device)
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"{op}: generator must be a torch.Generator, got {type(generator).__name__}")
    bounds = -(2**63), 2**63 - 1
    return torch.randint(*bounds, (), generator=generator, dtype=torch.int64, device=generator.device).to(device)


def samples(op: str, sample_ids, batch_size: int, device: torch.device) -> torch.Tensor | None:
    """sample_ids as (N,) int64, or None: 0 ... N - 1."""
    if sample_ids is None:
        return None
    return arguments.integers(op, "sample_ids", sample_ids, (batch_size,), device)


def device_of(op: str, device, *tensors) -> torch.device:
    """The device of a mask that no data goes with: as given, else that of the first tensor, else the default one."""
    if device is None:
        device = next((tensor.device for tensor in tensors if isinstance(tensor, torch.Tensor)), None)
    return torch.empty(0, device=device).device  # of None and of "cuda" a tensor knows which one it is


def refuse(op: str, instead: str, **given) -> None:
    """Nothing is drawn where the caller says what to keep."""
    for argument, value in given.items():
        if value is not None:
            raise ValueError(f"{op}: {argument} must not be given with {instead}, which leaves nothing to draw")

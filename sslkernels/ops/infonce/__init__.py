"""Contrastive losses whose N x N logits never exist in memory."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from sslkernels import _library
from sslkernels.ops.infonce import op as _op  # noqa: F401  registers the operators
from sslkernels.ops.infonce import reference

REDUCTIONS = ("mean", "sum", "none")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# exp(s / tau - 1 / |tau|) spans exp(-2 / |tau|) to 1 when |s| <= 1: up to here it stays a normal fp32 number
MAX_BOUNDED_SPAN = 80.0


class ContrastiveStats(NamedTuple):
    """What the pass over the logits knows besides the loss. Each field is (2N,), without gradient.

    Row i is ``z0[i]`` for i < N and ``z1[i - N]`` otherwise.
    """

    logsumexp: torch.Tensor  # of the row's logits, the row itself left out
    top1: torch.Tensor  # bool: the positive's logit is larger than every negative's
    positive_logit: torch.Tensor


def nt_xent(
    z0: torch.Tensor,
    z1: torch.Tensor,
    temperature: float | torch.Tensor = 0.5,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ContrastiveStats]:
    r"""Normalised temperature-scaled cross entropy, the loss of SimCLR, without the 2N x 2N matrix.

    With :math:`z` the 2N rows of ``z0`` and ``z1``, each divided by its length, :math:`p(i)` the other view of row i:

    .. math:: \ell_i = -\log \frac{\exp(z_i \cdot z_{p(i)} / \tau)}{\sum_{j \ne i} \exp(z_i \cdot z_j / \tau)}

    Equivalent PyTorch::

        z = F.normalize(torch.cat([z0, z1]), dim=1)
        logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
        loss = F.cross_entropy(logits, torch.arange(2 * N).roll(N))

    Args:
        z0: (N, D) embeddings of the first views; float32, bfloat16, float16 or float64; any strides. D >= 1.
        z1: (N, D) embeddings of the second views, dtype and device of ``z0``.
        temperature: nonzero; a float, or a floating-point tensor of one element on the device of ``z0``, which may
            require grad. Negative values are allowed and turn attraction into repulsion.
        normalize: divide each row by max(length, 1e-12) first, as ``F.normalize`` does; the gradient passes through.
        reduction: "mean" over the 2N rows, "sum", or "none" for the rows.
        return_stats: also return `ContrastiveStats` from the same pass.
        backend: None for the fastest one (see `sslkernels.backends`), or "cpp", "triton", "reference".

    Returns:
        The loss: a scalar, or (2N,) with ``reduction="none"``; float32, or float64 for float64 inputs. With
        ``return_stats``, the pair (loss, `ContrastiveStats`). N = 0 gives a loss of 0, N = 1 a loss of 0.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        RuntimeError: ``backend`` is not available here; or the gradient is differentiated again.

    Source: Chen et al., A Simple Framework for Contrastive Learning of Visual Representations (2020), equation 1.

    Cost: with one unit = 2 (2N)^2 D flops: 0.5 forward and 1.5 backward on the CPU, against 1 and 2 in plain PyTorch;
    O(N D) extra memory. Accumulates in float32 (float64 for float64). float32 inputs are multiplied in float32 unless
    ``torch.get_float32_matmul_precision()`` is "medium".
    """
    _check_embeddings("nt_xent", z0, z1)
    if reduction not in REDUCTIONS:
        raise ValueError(f"nt_xent: reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
    tau, bounded = _temperature("nt_xent", temperature, z0, normalize)
    _check_backend("nt_xent", backend, z0.device.type)
    if backend == "reference":
        loss, *stats = reference.nt_xent_rows(z0.to(tau.dtype), z1.to(tau.dtype), tau, normalize)
    else:
        bf16_matmul = z0.dtype == torch.float32 and _medium_precision()
        loss, *stats = torch.ops.sslkernels.nt_xent_fwd(z0, z1, tau, normalize, bounded, return_stats, bf16_matmul)
    reduced = reference.reduce_rows(loss, reduction)
    if not return_stats:
        return reduced
    logsumexp, positive, top1 = (stat.detach() for stat in stats)
    return reduced, ContrastiveStats(logsumexp.to(tau.dtype), top1, positive)


@torch.compiler.assume_constant_result  # the compiler cannot trace a function that returns a string
def _medium_precision() -> bool:
    return torch.get_float32_matmul_precision() == "medium"


def _check_embeddings(name: str, z0: torch.Tensor, z1: torch.Tensor) -> None:
    for argument, z in (("z0", z0), ("z1", z1)):
        if not isinstance(z, torch.Tensor):
            raise TypeError(f"{name}: {argument} must be a tensor, got {type(z).__name__}")
        if z.dtype not in DTYPES:
            raise TypeError(f"{name}: {argument} must be float32, bfloat16, float16 or float64, got {z.dtype}")
        if z.dim() != 2:
            raise ValueError(f"{name}: {argument} must be (N, D), got {tuple(z.shape)}")
    if z1.shape != z0.shape:
        raise ValueError(f"{name}: z1 must be (N, D) like z0 {tuple(z0.shape)}, got {tuple(z1.shape)}")
    if z1.dtype != z0.dtype:
        raise TypeError(f"{name}: z1 must have the dtype of z0, {z0.dtype}, got {z1.dtype}")
    if z1.device != z0.device:
        raise ValueError(f"{name}: z1 must be on the device of z0, {z0.device}, got {z1.device}")
    if z0.shape[1] == 0:
        raise ValueError(f"{name}: z0 and z1 must have at least one column, got {tuple(z0.shape)}")


def _temperature(name: str, temperature, z0: torch.Tensor, normalize: bool) -> tuple[torch.Tensor, bool]:
    """The temperature as a 0-dim tensor in the accumulation dtype, and whether the fixed bound 1/|tau| is safe."""
    compute = torch.float64 if z0.dtype == torch.float64 else torch.float32
    if isinstance(temperature, torch.Tensor):
        if temperature.numel() != 1 or not temperature.is_floating_point():
            raise ValueError(
                f"{name}: temperature must be a float or a floating-point tensor of one element, "
                f"got {temperature.dtype} of shape {tuple(temperature.shape)}"
            )
        if temperature.device != z0.device:
            raise ValueError(f"{name}: temperature must be on the device of z0, {z0.device}, got {temperature.device}")
        return temperature.reshape(()).to(compute), False  # its value is known on its device alone
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"{name}: temperature must be a float or a tensor, got {type(temperature).__name__}")
    if temperature == 0 or not -math.inf < temperature < math.inf:  # math.isfinite breaks the graph
        raise ValueError(f"{name}: temperature must be finite and not zero, got {temperature}")
    bounded = normalize and 2 / abs(temperature) <= MAX_BOUNDED_SPAN
    return torch.full((), temperature, dtype=compute, device=z0.device), bounded


def _check_backend(name: str, backend: str | None, device: str) -> None:
    if backend in (None, "reference"):
        return
    available = _library.backends()[name].get(device)
    if available is None or backend != available.active:
        reason = available.absent.get(backend) if available else None
        raise RuntimeError(
            f"{name}: backend {backend!r} is not available on {device}: {reason or 'there is none of that name'}"
        )

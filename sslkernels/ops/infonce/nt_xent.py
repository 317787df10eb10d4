"""Contrastive losses over the two views of a batch: NT-Xent, its decoupled form, and hard negatives."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, overload

import torch

from sslkernels.distributed import gather
from sslkernels.ops.infonce import arguments, reference
from sslkernels.ops.infonce import contrast as core
from sslkernels.ops.infonce import contrast_distributed as distributed
from sslkernels.ops.infonce import op as operators
from sslkernels.ops.infonce.contrast import ContrastiveStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

_MAX_BETA = 1e30  # beyond it, a temperature divided by it may vanish in float32


@overload
def nt_xent(
    z0: torch.Tensor, z1: torch.Tensor, temperature: float | torch.Tensor = ...,
    *, return_stats: Literal[False] = ..., **options: Unpack[arguments.Options],
) -> torch.Tensor: ...  # fmt: skip


@overload
def nt_xent(
    z0: torch.Tensor, z1: torch.Tensor, temperature: float | torch.Tensor = ...,
    *, return_stats: Literal[True], **options: Unpack[arguments.Options],
) -> tuple[torch.Tensor, ContrastiveStats]: ...  # fmt: skip


@overload
def nt_xent(
    z0: torch.Tensor, z1: torch.Tensor, temperature: float | torch.Tensor = ...,
    *, return_stats: bool, **options: Unpack[arguments.Options],
) -> torch.Tensor | tuple[torch.Tensor, ContrastiveStats]: ...  # fmt: skip


def nt_xent(
    z0: torch.Tensor,
    z1: torch.Tensor,
    temperature: float | torch.Tensor = 0.5,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str | None = None,
    group: ProcessGroup | None = None,
    exchange: str = "gather",
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
        group, exchange: None: this process alone; else the batch is that of all ranks, whose rows travel by "gather" or
            "ring": see `sslkernels.distributed`.

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
    exchanged = (group, exchange)
    return _two_views("nt_xent", z0, z1, temperature, None, normalize, reduction, return_stats, backend, *exchanged)


class DecoupledOptions(arguments.Options, total=False):
    positive_weight: torch.Tensor | None


@overload
def decoupled_nt_xent(
    z0: torch.Tensor, z1: torch.Tensor, temperature: float | torch.Tensor = ...,
    *, return_stats: Literal[False] = ..., **options: Unpack[DecoupledOptions],
) -> torch.Tensor: ...  # fmt: skip


@overload
def decoupled_nt_xent(
    z0: torch.Tensor, z1: torch.Tensor, temperature: float | torch.Tensor = ...,
    *, return_stats: Literal[True], **options: Unpack[DecoupledOptions],
) -> tuple[torch.Tensor, ContrastiveStats]: ...  # fmt: skip


@overload
def decoupled_nt_xent(
    z0: torch.Tensor, z1: torch.Tensor, temperature: float | torch.Tensor = ...,
    *, return_stats: bool, **options: Unpack[DecoupledOptions],
) -> torch.Tensor | tuple[torch.Tensor, ContrastiveStats]: ...  # fmt: skip


def decoupled_nt_xent(
    z0: torch.Tensor,
    z1: torch.Tensor,
    temperature: float | torch.Tensor = 0.1,
    *,
    positive_weight: torch.Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str | None = None,
    group: ProcessGroup | None = None,
    exchange: str = "gather",
) -> torch.Tensor | tuple[torch.Tensor, ContrastiveStats]:
    r"""Decoupled contrastive loss, DCL: NT-Xent whose denominator leaves the positive out; with weights, DCLW.

    With :math:`z` the 2N rows of ``z0`` and ``z1``, each divided by its length, :math:`p(i)` the other view of row i:

    .. math:: \ell_i = -w_i \frac{z_i \cdot z_{p(i)}}{\tau} + \log \sum_{j \ne i, p(i)} \exp(z_i \cdot z_j / \tau)

    Equivalent PyTorch::

        z = F.normalize(torch.cat([z0, z1]), dim=1)
        logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
        rows, partners = torch.arange(2 * N), torch.arange(2 * N).roll(N)
        positive = logits[rows, partners]
        logits[rows, partners] = -torch.inf
        loss = (torch.logsumexp(logits, dim=1) - weight * positive).mean()

    Args:
        z0, z1, temperature, normalize, reduction, return_stats, backend, group, exchange: as for `nt_xent`.
        positive_weight: the weights :math:`w`, (N,) for both views alike or (2N,), without grad; None: ones. DCLW takes
            `mises_fisher_weights`.

    Returns:
        As `nt_xent`; ``ContrastiveStats.logsumexp`` is that of the negatives. With one pair there are none, and their
        term is left out.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        RuntimeError: ``backend`` is not available here; or the gradient is differentiated again.

    Source: Yeh et al., Decoupled Contrastive Learning (2022), equations 5 and 6.

    Cost: as `nt_xent`.
    """
    name = "decoupled_nt_xent"
    arguments.check_pair(name, "z0", z0, "z1", z1)
    weight = _positive_weight(name, positive_weight, z0)
    return _two_views(name, z0, z1, temperature, weight, normalize, reduction, return_stats, backend, group, exchange)


def mises_fisher_weights(
    z0: torch.Tensor, z1: torch.Tensor, sigma: float = 0.5, *, group: ProcessGroup | None = None
) -> torch.Tensor:
    """The weights of DCLW, (N,) without grad: ``2 - N * softmax(<z0_i, z1_i> / sigma)`` over the pairs.

    Pairs that are alike already weigh less. Takes the rows as they are: normalise them first. ``sigma`` is not 0. With
    ``group``, the softmax and N are those of the pairs of all its ranks.

    Source: Yeh et al., Decoupled Contrastive Learning (2022), section 3.2.
    """
    name = "mises_fisher_weights"
    arguments.check_pair(name, "z0", z0, "z1", z1)
    width = arguments.scalar(name, "sigma", sigma, z0, nonzero=True).tensor.detach()
    compute = arguments.accumulation_dtype(z0)
    products = (z0.detach().to(compute) * z1.detach().to(compute)).sum(dim=1)
    if group is None:
        return 2 - z0.shape[0] * torch.softmax(products / width, dim=0)
    every = gather(products, group)
    return 2 - len(every) * torch.exp(products / width - torch.logsumexp(every / width, dim=0))


def hard_nt_xent(
    z0: torch.Tensor,
    z1: torch.Tensor,
    temperature: float | torch.Tensor = 0.5,
    *,
    beta: float = 1.0,
    tau_plus: float = 0.1,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str | None = None,
    group: ProcessGroup | None = None,
    exchange: str = "gather",
) -> torch.Tensor:
    r"""NT-Xent with hard negatives up-weighted and false ones estimated away (HCL); ``beta=0``: the debiased loss.

    With :math:`l_{ij}` the logits of `nt_xent`, and M = 2N - 2 negatives of each row:

    .. math:: g_i = \max\Bigl(\frac{1}{1 - \tau^+} \Bigl(\frac{M \sum_j \exp((1 + \beta) l_{ij})}
              {\sum_j \exp(\beta l_{ij})} - \tau^+ M \exp(l_{ip(i)})\Bigr), M \exp(-1 / |\tau|)\Bigr)

    .. math:: \ell_i = -\log \frac{\exp(l_{ip(i)})}{\exp(l_{ip(i)}) + g_i}

    Equivalent PyTorch: ``sslkernels.ops.infonce.reference.hard_nt_xent``.

    Args:
        z0, z1, temperature, normalize, reduction, backend, group, exchange: as for `nt_xent`.
        beta: how strongly a negative's logit raises its own weight; in [0, 1e30).
        tau_plus: the share of negatives that are expected to be of the row's own class; in [0, 1).

    Returns:
        The loss: a scalar, or (2N,) with ``reduction="none"``; float32, or float64 for float64 inputs.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        RuntimeError: ``backend`` is not available here; or the gradient is differentiated again.

    Source: Robinson et al., Contrastive Learning with Hard Negative Samples (2021), equation 4.

    Cost: twice that of `nt_xent`, since it takes the softmax at two temperatures; once with ``beta=0``.
    """
    name = "hard_nt_xent"
    arguments.check_pair(name, "z0", z0, "z1", z1)
    arguments.check_fraction(name, "beta", beta, below=_MAX_BETA)
    arguments.check_fraction(name, "tau_plus", tau_plus)
    arguments.check_flags(name, normalize=normalize)
    arguments.check_reduction(name, reduction)
    arguments.check_backend(name, backend, z0.device.type)
    tau = arguments.temperature(name, temperature, z0)
    peers = _meet(name, group, exchange, z0, z1, tau.tensor, normalize=normalize, beta=beta)
    _, positive = core.pairs_of(z0, z1, tau.tensor.reciprocal(), normalize=normalize, backend=backend)
    positive = positive.repeat(2)
    negatives = (len(positive) if peers is None else sum(peers.queries)) - 2
    if negatives <= 0:
        return distributed.reduced(positive * 0, reduction, peers).to(tau.tensor.dtype)

    none = torch.zeros_like(positive, dtype=tau.tensor.dtype)

    def logsumexp(factor: float) -> torch.Tensor:
        scaled = arguments.Scalar(tau.tensor / factor, None if tau.value is None else tau.value / factor)
        return _rows(z0, z1, scaled, none, normalize, False, backend, peers)[0].double()

    uniform = math.log(negatives)  # the log-sum-exp of logits times 0
    mean = logsumexp(1 + beta) - (logsumexp(beta) if beta else uniform)
    floor = -1 / tau.tensor.double().abs()
    rows = core.row_losses(reference.hard_negatives(mean, positive, tau_plus, floor) + uniform, positive)
    return distributed.reduced(rows, reduction, peers).to(tau.tensor.dtype)


def _two_views(name, z0, z1, temperature, weight, normalize, reduction, return_stats, backend, group, exchange):
    """`nt_xent` where ``weight`` is None, else its decoupled form."""
    arguments.check_pair(name, "z0", z0, "z1", z1)
    arguments.check_flags(name, normalize=normalize, return_stats=return_stats)
    arguments.check_reduction(name, reduction)
    tau = arguments.temperature(name, temperature, z0)
    arguments.check_backend(name, backend, z0.device.type)
    peers = _meet(name, group, exchange, z0, z1, tau.tensor, normalize=normalize, return_stats=return_stats)
    loss, *stats = _rows(z0, z1, tau, weight, normalize, return_stats, backend, peers)
    reduced = distributed.reduced(loss, reduction, peers)
    if not return_stats:
        return reduced
    logsumexp, positive, top1 = (stat.detach() for stat in stats)
    return reduced, ContrastiveStats(logsumexp.to(tau.tensor.dtype), top1, positive)


def _meet(name: str, group, exchange: str, z0, z1, tau, **options):
    """Both views are queries, and keys."""
    tensors = {"z0": z0, "z1": z1, "temperature": tau}
    return distributed.meet(name, group, exchange, (2 * len(z0),), tensors, **options)


def _rows(z0, z1, tau: arguments.Scalar, weight, normalize: bool, top1: bool, backend: str | None, peers=None):
    """Loss, log-sum-exp, positive logit and top-1 hit of the 2N rows."""
    if peers is not None:
        return _rows_among(peers, z0, z1, tau, weight, normalize, top1, backend)
    if backend == "reference":
        compute = tau.tensor.dtype
        return reference.nt_xent_rows(z0.to(compute), z1.to(compute), tau.tensor, normalize, weight)
    bounded = normalize and tau.value is not None and 2 / abs(tau.value) <= arguments.MAX_BOUNDED_SPAN
    bf16_matmul = z0.dtype == torch.float32 and arguments.medium_precision()
    return operators.nt_xent_fwd(z0, z1, tau.tensor, weight, normalize, bounded, top1, bf16_matmul)


def _rows_among(peers, z0, z1, tau: arguments.Scalar, weight, normalize: bool, top1: bool, backend: str | None):
    """`_rows` where those of other ranks are negatives too."""
    (a, b), matmul = core.rows_of(z0, z1, normalize=normalize)
    z, own = torch.cat([a, b]), torch.arange(2 * len(a), device=a.device)
    scale = tau.tensor.reciprocal()
    found = distributed.contrast(
        z, z, scale, peers, skip=torch.stack([own.roll(len(a)), own], dim=1), unit=normalize,
        scale_value=None if tau.value is None else 1 / tau.value, peaks=top1, matmul=matmul, backend=backend,
    )  # fmt: skip
    positive = core.positive_logits(a, b, scale).repeat(2)
    hits = found.skipped > found.peak_rows
    if weight is None:
        loss, logsumexp = core.row_losses(found.rows, positive), torch.logaddexp(found.rows, positive)
    else:
        logsumexp = torch.where(found.rows == -torch.inf, 0.0, found.rows)  # one pair in all: no negatives
        loss = logsumexp - weight * positive
    return loss.to(tau.tensor.dtype), logsumexp, positive.to(tau.tensor.dtype), hits


def _positive_weight(name: str, weight, z0: torch.Tensor) -> torch.Tensor:
    """(2N,) in the accumulation dtype."""
    pairs, compute = z0.shape[0], arguments.accumulation_dtype(z0)
    if weight is None:
        return torch.ones(2 * pairs, dtype=compute, device=z0.device)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        given = weight.dtype if isinstance(weight, torch.Tensor) else type(weight).__name__
        raise TypeError(f"{name}: positive_weight must be a floating-point tensor, got {given}")
    arguments.check_strided(name, "positive_weight", weight)
    if weight.shape not in ((pairs,), (2 * pairs,)):
        raise ValueError(f"{name}: positive_weight must be ({pairs},) or ({2 * pairs},), got {tuple(weight.shape)}")
    if weight.requires_grad:
        raise ValueError(f"{name}: positive_weight must not require grad; detach it")
    if weight.device != z0.device:
        raise ValueError(f"{name}: positive_weight must be on the device of z0, {z0.device}, got {weight.device}")
    return (weight.repeat(2) if weight.shape[0] == pairs else weight).to(compute)

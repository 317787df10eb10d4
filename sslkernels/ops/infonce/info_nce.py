"""InfoNCE: a query against its positive key and negatives from the batch, a queue, or a set of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
import torch.nn.functional as F

from sslkernels.ops.infonce import arguments
from sslkernels.ops.infonce import contrast as core
from sslkernels.ops.infonce import contrast_distributed as distributed
from sslkernels.ops.infonce.contrast import ContrastiveStats
from sslkernels.ops.infonce.reference import NORMALIZE_EPS, full_precision

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

NAME = "info_nce"
MODES = ("unpaired", "paired")
QUEUE_ROWS = 8192  # of a queue that are converted at a time, so that no second queue exists
Ids = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class InfoNCEOptions(arguments.Options, total=False):
    negative_mode: str
    label_smoothing: float
    exclude_ids: Ids | None


@overload
def info_nce(
    query: torch.Tensor, positive_key: torch.Tensor, negative_keys: torch.Tensor | None = ...,
    temperature: float | torch.Tensor = ...,
    *, return_stats: Literal[False] = ..., **options: Unpack[InfoNCEOptions],
) -> torch.Tensor: ...  # fmt: skip


@overload
def info_nce(
    query: torch.Tensor, positive_key: torch.Tensor, negative_keys: torch.Tensor | None = ...,
    temperature: float | torch.Tensor = ...,
    *, return_stats: Literal[True], **options: Unpack[InfoNCEOptions],
) -> tuple[torch.Tensor, ContrastiveStats]: ...  # fmt: skip


@overload
def info_nce(
    query: torch.Tensor, positive_key: torch.Tensor, negative_keys: torch.Tensor | None = ...,
    temperature: float | torch.Tensor = ...,
    *, return_stats: bool, **options: Unpack[InfoNCEOptions],
) -> torch.Tensor | tuple[torch.Tensor, ContrastiveStats]: ...  # fmt: skip


def info_nce(
    query: torch.Tensor,
    positive_key: torch.Tensor,
    negative_keys: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 0.1,
    *,
    negative_mode: str = "unpaired",
    normalize: bool = True,
    label_smoothing: float = 0.0,
    exclude_ids: Ids | None = None,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str | None = None,
    group: ProcessGroup | None = None,
    exchange: str = "gather",
) -> torch.Tensor | tuple[torch.Tensor, ContrastiveStats]:
    r"""InfoNCE, the loss of MoCo and CPC, without the matrix of logits.

    With :math:`k_i^+` the positive key of query i, :math:`k_{ij}` its negatives, and every row divided by its length:

    .. math:: \ell_i = -\log \frac{\exp(q_i \cdot k_i^+ / \tau)}
              {\exp(q_i \cdot k_i^+ / \tau) + \sum_j \exp(q_i \cdot k_{ij} / \tau)}

    Equivalent PyTorch, for a queue of negative keys::

        query, positive_key, negative_keys = (F.normalize(x, dim=1) for x in (query, positive_key, negative_keys))
        positive = (query * positive_key).sum(dim=1, keepdim=True)
        logits = torch.cat([positive, query @ negative_keys.T], dim=1) / temperature
        loss = F.cross_entropy(logits, torch.zeros(N, dtype=torch.long), label_smoothing=label_smoothing)

    Args:
        query: (N, D) embeddings; float32, bfloat16, float16 or float64; any strides. D >= 1.
        positive_key: (N, D); row i belongs to query i. The dtype may differ; float64 does not mix with others.
        negative_keys: None: the positive keys of all other queries. "unpaired": (K, D), a queue shared by all queries.
            "paired": (N, M, D), M negatives for each query.
        temperature: nonzero; a float, or a floating-point tensor of one element, which may require grad.
        negative_mode: "unpaired" or "paired"; says how ``negative_keys`` are to be read.
        normalize: divide each row by max(length, 1e-12) first, as ``F.normalize`` does.
        label_smoothing: in [0, 1): so much of the target is spread evenly over all classes, as in ``F.cross_entropy``.
        exclude_ids: a negative whose id equals the query's is left out: a known false negative. (N,) integers where
            the negatives are the batch; otherwise a pair of (N,) and (K,) integers. Not with "paired" negatives, nor
            with label smoothing, whose target an excluded class would make infinite.
        reduction: "mean" over the N queries, "sum", or "none" for the rows.
        return_stats: also return `ContrastiveStats`, (N,) each, from the same pass.
        backend: None for the fastest one (see `sslkernels.backends`), or "cpp", "triton", "cuda", "reference".
        group, exchange: None: this process alone; else the batch is that of all ranks, whose keys travel by "gather" or
            "ring": see `sslkernels.distributed`. With ``negative_keys`` rows are independent: nothing but the reduction
            is of all ranks.

    Returns:
        The loss: a scalar, or (N,) with ``reduction="none"``; float32, or float64 for float64 inputs. With
        ``return_stats``, the pair (loss, `ContrastiveStats`). No query gives 0; a query without negatives a loss of 0.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        RuntimeError: ``backend`` is not available here; or the gradient is differentiated again.

    Source: van den Oord et al., Representation Learning with Contrastive Predictive Coding (2018), equation 4; He et
    al., Momentum Contrast for Unsupervised Visual Representation Learning (2020), equation 1.

    Cost: with one unit = 2 N K D flops: 2 for keys without grad, such as a queue, all of it in the forward; 4 with.
    O((N + K) D) extra memory, O(N D) for a queue without grad. "paired" negatives are read once in each pass by plain
    PyTorch: there is no matrix to avoid. float64 inputs run on the definition.
    """
    arguments.check_pair(NAME, "query", query, "positive_key", positive_key, dtype=False)
    arguments.check_flags(NAME, normalize=normalize, return_stats=return_stats)
    arguments.check_reduction(NAME, reduction)
    arguments.check_fraction(NAME, "label_smoothing", label_smoothing)
    if negative_mode not in MODES:
        raise ValueError(f"{NAME}: negative_mode must be 'unpaired' or 'paired', got {negative_mode!r}")
    paired = negative_keys is not None and negative_mode == "paired"
    _check_negatives(query, negative_keys, paired)
    ids = _ids(exclude_ids, query, negative_keys, paired, label_smoothing)
    tau = arguments.temperature(NAME, temperature, query)
    arguments.check_backend(NAME, backend, query.device.type)

    peers = _meet(
        group,
        exchange,
        query,
        positive_key,
        tau.tensor,
        negative_keys is None,
        normalize=normalize,
        label_smoothing=label_smoothing,
        ids=ids is not None,
        return_stats=return_stats,
    )
    scale = tau.tensor.reciprocal()
    ((q, k), matmul), positive = core.pairs_of(query, positive_key, scale, normalize=normalize, backend=backend)
    if paired:
        found = _paired(q, negative_keys, scale, normalize)
    else:
        options = {
            "unit": normalize,
            "scale_value": None if tau.value is None else 1 / tau.value,
            "peaks": return_stats,
            "matmul": matmul,
            "backend": backend,
            "query_ids": ids and ids[0],
            "key_ids": ids and ids[1],
        }
        if negative_keys is None:
            found = distributed.contrast(q, k, scale, peers, skip=core.pair_columns(len(q), q.device), **options)
        else:
            found = _queue(q, negative_keys, scale, normalize, options)
    rows = core.row_losses(found.rows, positive)
    if label_smoothing:
        rows = rows + label_smoothing * (
            positive - _mean_logit(q, k, negative_keys, paired, positive, scale, normalize, peers)
        )
    loss = distributed.reduced(rows, reduction, peers).to(tau.tensor.dtype)
    return (loss, _stats(found, positive, negative_keys is None, tau.tensor.dtype)) if return_stats else loss


def _check_negatives(query, negative_keys, paired: bool) -> None:
    if negative_keys is None:
        return
    if not paired:
        arguments.check_columns(NAME, "negative_keys", negative_keys, "query", query)
        return
    like = f"({query.shape[0]}, M, {query.shape[1]})"
    arguments.check_matrix(NAME, "negative_keys", negative_keys, like, dims=3)
    if negative_keys.shape[::2] != query.shape:
        raise ValueError(f"{NAME}: negative_keys must be {like} for paired negatives, got {tuple(negative_keys.shape)}")
    arguments.check_like(NAME, "negative_keys", negative_keys, "query", query)


def _ids(exclude_ids, query, negative_keys, paired: bool, label_smoothing: float):
    """Ids of queries and of keys, or None."""
    if exclude_ids is None:
        return None
    if paired or label_smoothing:
        other = "paired negatives" if paired else "label_smoothing"
        raise ValueError(f"{NAME}: exclude_ids must be None with {other}")
    rows = query.shape[0]
    if isinstance(exclude_ids, torch.Tensor):
        if negative_keys is not None:
            raise TypeError(f"{NAME}: exclude_ids must be a pair (ids of the queries, ids of the queue), got a tensor")
        return (arguments.check_integers(NAME, "exclude_ids", exclude_ids, rows, query.device),) * 2
    if not isinstance(exclude_ids, (tuple, list)) or len(exclude_ids) != 2:
        raise TypeError(f"{NAME}: exclude_ids must be a tensor or a pair of tensors, got {type(exclude_ids).__name__}")
    counts = (rows, rows if negative_keys is None else negative_keys.shape[0])
    return tuple(
        arguments.check_integers(NAME, f"exclude_ids[{side}]", ids, counts[side], query.device)
        for side, ids in enumerate(exclude_ids)
    )


def _meet(group, exchange: str, query, positive_key, tau, in_batch: bool, **options):
    tensors = {"query": query, "positive_key": positive_key, "temperature": tau}
    return distributed.meet(NAME, group, exchange, (len(query),), tensors, in_batch=in_batch, **options)


def _queue(q, keys, scale, normalize: bool, options: dict) -> core.Contrast:
    if keys.requires_grad or q.dtype == torch.float64:  # the gradient passes through the conversion
        (keys,), _ = core.rows_of(keys, normalize=normalize)
        return core.contrast(q, keys.to(q.dtype), scale, **options)
    return core.contrast(q, keys, scale, normalize_key=normalize, **options)


@full_precision
def _paired(q, keys, scale, normalize: bool) -> core.Contrast:
    keys = keys.to(q.dtype)
    if normalize:
        keys = F.normalize(keys, dim=2, eps=NORMALIZE_EPS)
    logits = torch.bmm(keys, q[:, :, None])[:, :, 0].double() * scale.double()
    peaks = F.pad(logits.detach(), (0, 1), value=-torch.inf).amax(dim=1)
    lse = torch.logsumexp(logits, dim=1) if keys.shape[1] else peaks
    none = logits.new_empty(0)
    return core.Contrast(lse, none, peaks, none, none)


@full_precision
def _mean_logit(q, k, negative_keys, paired: bool, positive, scale, normalize: bool, peers):
    """(N,) mean over all classes of the logits, from sums of keys."""
    if paired:
        keys = negative_keys.to(q.dtype)
        if normalize:
            keys = F.normalize(keys, dim=2, eps=NORMALIZE_EPS)
        sums, classes = (q * keys.sum(dim=1)).sum(dim=1), 1 + keys.shape[1]
    elif negative_keys is None:
        return (q @ distributed.mean_row(k, peers, peers and sum(peers.keys))).double() * scale.double()
    else:
        sums, classes = q @ _sum_of_keys(negative_keys, q.dtype, normalize), 1 + len(negative_keys)
    return (positive + sums.double() * scale.double()) / classes


def _sum_of_keys(keys, dtype, normalize: bool):
    total = torch.zeros(keys.shape[1], dtype=dtype, device=keys.device)
    for part in keys.split(QUEUE_ROWS):
        part = part.to(dtype)
        total = total + (F.normalize(part, dim=1, eps=NORMALIZE_EPS) if normalize else part).sum(dim=0)
    return total


def _stats(found: core.Contrast, positive, in_batch: bool, dtype) -> ContrastiveStats:
    positive = positive.detach()
    logsumexp = torch.logaddexp(found.rows.detach(), positive)
    # in the batch the positive's logit comes from the same products as the negatives': equal keys tie
    own = found.skipped if in_batch else positive.to(found.peak_rows.dtype)
    return ContrastiveStats(logsumexp.to(dtype), own > found.peak_rows, positive.to(dtype))

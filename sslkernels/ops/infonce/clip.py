"""Two towers, images and texts: the softmax loss of CLIP and the sigmoid loss of SigLIP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch

from sslkernels.ops.infonce import arguments
from sslkernels.ops.infonce import contrast as core
from sslkernels.ops.infonce import contrast_distributed as distributed
from sslkernels.ops.infonce.contrast import ContrastiveStats
from sslkernels.ops.infonce.reference import full_precision

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack


class ClipStats(NamedTuple):
    """`ContrastiveStats` of both directions, (min(N, M),) each."""

    image_to_text: ContrastiveStats
    text_to_image: ContrastiveStats


class ClipOptions(arguments.Options, total=False):
    label_smoothing: float
    exclude_ids: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None


@overload
def clip_loss(
    image_features: torch.Tensor, text_features: torch.Tensor, logit_scale: float | torch.Tensor,
    logit_bias: float | torch.Tensor | None = ...,
    *, return_stats: Literal[False] = ..., **options: Unpack[ClipOptions],
) -> torch.Tensor: ...  # fmt: skip


@overload
def clip_loss(
    image_features: torch.Tensor, text_features: torch.Tensor, logit_scale: float | torch.Tensor,
    logit_bias: float | torch.Tensor | None = ...,
    *, return_stats: Literal[True], **options: Unpack[ClipOptions],
) -> tuple[torch.Tensor, ClipStats]: ...  # fmt: skip


@overload
def clip_loss(
    image_features: torch.Tensor, text_features: torch.Tensor, logit_scale: float | torch.Tensor,
    logit_bias: float | torch.Tensor | None = ...,
    *, return_stats: bool, **options: Unpack[ClipOptions],
) -> torch.Tensor | tuple[torch.Tensor, ClipStats]: ...  # fmt: skip


def clip_loss(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    logit_scale: float | torch.Tensor,
    logit_bias: float | torch.Tensor | None = None,
    *,
    normalize: bool = False,
    label_smoothing: float = 0.0,
    exclude_ids: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str | None = None,
    group: ProcessGroup | None = None,
    exchange: str = "gather",
) -> torch.Tensor | tuple[torch.Tensor, ClipStats]:
    r"""The loss of CLIP: each image picks its text and each text its image, from one pass over the logits.

    With :math:`l_{ij} = s \, x_i \cdot y_j + b`, images :math:`x` and texts :math:`y`:

    .. math:: \ell_i = - \tfrac12 \log \frac{\exp l_{ii}}{\sum_j \exp l_{ij}}
                       - \tfrac12 \log \frac{\exp l_{ii}}{\sum_j \exp l_{ji}}

    Equivalent PyTorch::

        logits = logit_scale * image_features @ text_features.T + logit_bias
        labels = torch.arange(N)
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    Args:
        image_features: (N, D) embeddings; float32, bfloat16, float16 or float64; any strides. D >= 1.
        text_features: (M, D); text i belongs to image i. Where N and M differ, the rows of the longer side that have
            no partner are negatives for the shorter one. The dtype may differ; float64 does not mix with others.
        logit_scale: what the products are multiplied by: open_clip's ``logit_scale.exp()``. A float, or a
            floating-point tensor of one element, which may require grad and is never read on the host.
        logit_bias: as ``logit_scale``, or None. A softmax does not see it: its gradient is 0, only the stats show it.
        normalize: divide each row by max(length, 1e-12) first, as ``F.normalize`` does. The models do it themselves.
        label_smoothing: in [0, 1): so much of the target is spread evenly over all classes, as in ``F.cross_entropy``.
        exclude_ids: (N,) integers, or a pair of (N,) and (M,): an image and a text of equal ids that are not partners
            are left out: known false negatives. Not with label smoothing, whose target they would make infinite.
        reduction: "mean" over the min(N, M) pairs, "sum", or "none" for the pairs.
        return_stats: also return `ClipStats` from the same pass.
        backend: None for the fastest one (see `sslkernels.backends`), or "cpp", "triton", "cuda", "reference".
        group, exchange: None: this process alone; else the batch is that of all ranks, whose keys travel by "gather" or
            "ring": see `sslkernels.distributed`.

    Returns:
        The loss: a scalar, or (min(N, M),) with ``reduction="none"``; float32, or float64 for float64 inputs. With
        ``return_stats``, the pair (loss, `ClipStats`). No pair gives 0.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        RuntimeError: ``backend`` is not available here; or the gradient is differentiated again.

    Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision (2021), figure 3.

    Cost: with one unit = 2 N M D flops: 1 forward and 3 backward on the CPU, against 6 in plain PyTorch, which
    multiplies in both directions; O((N + M) D) extra memory. float64 inputs run on the definition.
    """
    name = "clip_loss"
    _check_towers(name, image_features, text_features)
    arguments.check_flags(name, normalize=normalize, return_stats=return_stats)
    arguments.check_reduction(name, reduction)
    arguments.check_fraction(name, "label_smoothing", label_smoothing)
    if exclude_ids is not None and label_smoothing:
        raise ValueError(f"{name}: exclude_ids must be None with label_smoothing")
    query_ids, key_ids = _pair_ids(name, "exclude_ids", exclude_ids, image_features, text_features)
    factor = arguments.scalar(name, "logit_scale", logit_scale, image_features)
    bias = None if logit_bias is None else arguments.scalar(name, "logit_bias", logit_bias, image_features).tensor
    arguments.check_backend(name, backend, image_features.device.type)

    peers = _meet(
        name, group, exchange, image_features, text_features, {"logit_scale": factor.tensor}, normalize=normalize,
        label_smoothing=label_smoothing, ids=exclude_ids is not None, return_stats=return_stats,
    )  # fmt: skip
    scale = factor.tensor
    if image_features.shape == text_features.shape:
        given = (image_features, text_features, scale)
        ((images, texts), matmul), positive = core.pairs_of(*given, normalize=normalize, backend=backend)
        pairs = len(images)
    else:
        (images, texts), matmul = core.rows_of(image_features, text_features, normalize=normalize)
        pairs = min(len(images), len(texts))
        positive = core.positive_logits(images[:pairs], texts[:pairs], scale)
    found = distributed.contrast(
        images, texts, scale, peers, skip=core.pair_columns(len(images), images.device), query_ids=query_ids,
        key_ids=key_ids, unit=normalize, scale_value=factor.value, columns=True, peaks=return_stats, matmul=matmul,
        backend=backend,
    )  # fmt: skip
    sides = [side if len(side) == pairs else side[:pairs] for side in (found.rows, found.columns)]
    directions = torch.stack(sides)  # at once: a launch costs more than the rows
    rows = core.row_losses(directions, positive).mean(dim=0)
    if label_smoothing:
        mean = _mean_products(images, texts, pairs, peers).double() * scale.double()
        rows = rows + label_smoothing * (positive - mean)
    if bias is not None:
        rows = rows + 0 * bias  # which gives it the gradient that it has
    loss = distributed.reduced(rows, reduction, peers, peers and sum(map(min, *peers.counts))).to(scale.dtype)
    return (loss, _clip_stats(found, positive, bias, pairs, scale.dtype)) if return_stats else loss


def sigmoid_loss(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    logit_scale: float | torch.Tensor,
    logit_bias: float | torch.Tensor,
    *,
    positive_ids: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    backend: str | None = None,
    group: ProcessGroup | None = None,
    exchange: str = "gather",
) -> torch.Tensor:
    r"""The loss of SigLIP: every pair of image and text is a decision of its own, that they belong together or not.

    With :math:`y_{ij}` 1 for partners and -1 otherwise:

    .. math:: \ell_i = \sum_j \log(1 + \exp(-y_{ij} (s \, x_i \cdot y_j + b)))

    Equivalent PyTorch::

        logits = logit_scale * image_features @ text_features.T + logit_bias
        loss = -F.logsigmoid((2 * torch.eye(N) - 1) * logits).sum() / N

    Args:
        image_features: (N, D) embeddings; float32, bfloat16, float16 or float64; any strides. D >= 1.
        text_features: (M, D); text i belongs to image i; rows beyond N, or beyond M, have no partner. The dtype may
            differ; float64 does not mix with others.
        logit_scale, logit_bias: floats, or floating-point tensors of one element, which may require grad and are never
            read on the host. SigLIP starts with 10 and -10.
        positive_ids: (N,) integers, or a pair of (N,) and (M,): images and texts of equal ids belong together too.
        normalize: divide each row by max(length, 1e-12) first, as ``F.normalize`` does. The models do it themselves.
        reduction: "mean" over the N images (of the sums over texts, as in SigLIP), "sum", or "none" for the rows.
        backend: None for the fastest one (see `sslkernels.backends`), or "cpp", "triton", "cuda", "reference".
        group, exchange: None: this process alone; else the batch is that of all ranks, whose keys travel by "gather" or
            "ring": see `sslkernels.distributed`.

    Returns:
        The loss: a scalar, or (N,) with ``reduction="none"``; float32, or float64 for float64 inputs.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        RuntimeError: ``backend`` is not available here; or the gradient is differentiated again.

    Source: Zhai et al., Sigmoid Loss for Language Image Pre-Training (2023), section 3.2.

    Cost: with one unit = 2 N M D flops: 1 forward and 3 backward; O((N + M) D) extra memory, where plain PyTorch keeps
    several N x M matrices. float64 inputs run on the definition.
    """
    name = "sigmoid_loss"
    _check_towers(name, image_features, text_features)
    arguments.check_flags(name, normalize=normalize)
    arguments.check_reduction(name, reduction)
    query_ids, key_ids = _pair_ids(name, "positive_ids", positive_ids, image_features, text_features)
    scale = arguments.scalar(name, "logit_scale", logit_scale, image_features).tensor
    bias = arguments.scalar(name, "logit_bias", logit_bias, image_features).tensor
    arguments.check_backend(name, backend, image_features.device.type)
    peers = _meet(
        name, group, exchange, image_features, text_features, {"logit_scale": scale, "logit_bias": bias},
        normalize=normalize, ids=positive_ids is not None,
    )  # fmt: skip
    (images, texts), matmul = core.rows_of(image_features, text_features, normalize=normalize)
    rows = distributed.sigmoid_contrast(
        images, texts, scale, bias, peers, positive=core.pair_columns(len(images), images.device), query_ids=query_ids,
        key_ids=key_ids, matmul=matmul, backend=backend,
    )  # fmt: skip
    return distributed.reduced(rows, reduction, peers).to(scale.dtype)


def _check_towers(name: str, image_features, text_features) -> None:
    arguments.check_matrix(name, "image_features", image_features)
    arguments.check_columns(name, "text_features", text_features, "image_features", image_features)


def _meet(name: str, group, exchange: str, images, texts, scalars: dict, **options):
    tensors = {"image_features": images, "text_features": texts, **scalars}
    return distributed.meet(name, group, exchange, (len(images), len(texts)), tensors, **options)


@full_precision
def _mean_products(images, texts, pairs: int, peers):
    """(pairs,) mean over all classes and both directions, from sums of embeddings."""
    of_images = images[:pairs] @ distributed.mean_row(texts, peers, peers and sum(peers.keys))
    of_texts = texts[:pairs] @ distributed.mean_row(images, peers, peers and sum(peers.queries))
    return (of_images + of_texts) / 2


def _pair_ids(name: str, argument: str, ids, images, texts):
    """Ids of images and of texts, or a pair of None."""
    if ids is None:
        return None, None
    if isinstance(ids, torch.Tensor):
        ids = (ids, ids)
    if not isinstance(ids, (tuple, list)) or len(ids) != 2:
        raise TypeError(f"{name}: {argument} must be a tensor or a pair of tensors, got {type(ids).__name__}")
    return tuple(
        arguments.check_integers(name, argument, side, len(rows), rows.device)
        for side, rows in zip(ids, (images, texts), strict=True)
    )


def _clip_stats(found: core.Contrast, positive, bias, pairs: int, dtype) -> ClipStats:
    positive, own = positive.detach(), found.skipped[:pairs]
    shift = 0 if bias is None else bias.detach()

    def direction(negatives, peak):
        logsumexp = torch.logaddexp(negatives.detach()[:pairs], positive) + shift
        return ContrastiveStats(logsumexp.to(dtype), own > peak[:pairs], (positive + shift).to(dtype))

    return ClipStats(direction(found.rows, found.peak_rows), direction(found.columns, found.peak_columns))

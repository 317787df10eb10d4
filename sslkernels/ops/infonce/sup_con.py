"""Supervised contrastive loss: several positives by label."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sslkernels.distributed import total
from sslkernels.ops.infonce import arguments
from sslkernels.ops.infonce import contrast as core
from sslkernels.ops.infonce import contrast_distributed as distributed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

NAME = "sup_con"


def sup_con(
    features: torch.Tensor,
    labels: torch.Tensor,
    temperature: float | torch.Tensor = 0.1,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str | None = None,
    group: ProcessGroup | None = None,
    exchange: str = "gather",
) -> torch.Tensor:
    r"""Supervised contrastive loss (``L_out`` of the paper) without the N x N matrix.

    With :math:`P(i)` the other rows that share the label of row i:

    .. math:: \ell_i = - \frac{1}{|P(i)|} \sum_{p \in P(i)}
              \log \frac{\exp(z_i \cdot z_p / \tau)}{\sum_{a \ne i} \exp(z_i \cdot z_a / \tau)}

    Equivalent PyTorch::

        z = F.normalize(features, dim=1)
        logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
        positive = (labels[:, None] == labels) & ~torch.eye(N, dtype=torch.bool) & (labels >= 0)
        rows = -F.log_softmax(logits, dim=1).masked_fill(~positive, 0).sum(dim=1) / positive.sum(dim=1).clamp_min(1)
        loss = rows.sum() / positive.any(dim=1).sum().clamp_min(1)

    Args:
        features: (N, D) embeddings of all views; float32, bfloat16, float16 or float64; any strides. D >= 1.
        labels: (N,) int64, int32, int16, int8 or uint8. -1, or any negative one: no label. Such a row has no positives
            and is a negative for all others.
        temperature: nonzero; a float, or a floating-point tensor of one element, which may require grad.
        normalize: divide each row by max(length, 1e-12) first, as ``F.normalize`` does.
        reduction: "mean" over the rows that have positives, "sum", or "none" for the rows, 0 where there are none.
        backend: None for the fastest one (see `sslkernels.backends`), or "cpp", "triton", "cuda", "reference".
        group, exchange: None: this process alone; else the batch is that of all ranks, whose keys travel by "gather" or
            "ring": see `sslkernels.distributed`.

    Returns:
        The loss: a scalar, or (N,) with ``reduction="none"``; float32, or float64 for float64 inputs.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        RuntimeError: ``backend`` is not available here; or the gradient is differentiated again.

    Source: Khosla et al., Supervised Contrastive Learning (2020), equation 2.

    Cost: with one unit = 2 N^2 D flops: 0.5 forward and 1.5 backward on the CPU, against 1 and 2 in plain PyTorch. The
    positives cost O(N D), however many there are: their mean logit is that of their mean. O(N D) extra memory.

    Accuracy: a row's loss is the difference of a log-sum-exp and the mean logit of its positives. What is smaller than
    about ``1e-7 / |temperature|``, in the loss and in the gradients, is rounding; a run that has converged so far needs
    float64 features with ``backend="reference"``.
    """
    arguments.check_matrix(NAME, "features", features)
    labels = arguments.check_integers(NAME, "labels", labels, features.shape[0], features.device)
    arguments.check_flags(NAME, normalize=normalize)
    arguments.check_reduction(NAME, reduction)
    tau = arguments.temperature(NAME, temperature, features)
    arguments.check_backend(NAME, backend, features.device.type)
    peers = distributed.meet(
        NAME, group, exchange, (len(features),), {"features": features, "temperature": tau.tensor},
        normalize=normalize, reduction=reduction,
    )  # fmt: skip
    (z,), matmul = core.rows_of(features, normalize=normalize, backend=backend)
    scale = tau.tensor.reciprocal()
    found = distributed.contrast(
        z, None, scale, peers, unit=normalize, scale_value=None if tau.value is None else 1 / tau.value,
        matmul=matmul, backend=backend,
    )  # fmt: skip
    exact = z.double()  # the row's loss may be small against its logits
    sums, counts = distributed.class_sums(exact if peers is None else z, labels, peers)  # fp32 travels lighter
    counts = torch.where(labels >= 0, counts - 1, 0)
    # the mean logit of the positives; divided at last, for the rows are many and their elements more
    positive = core.positive_logits(exact, sums - exact, scale) / counts.clamp_min(1)
    has = counts > 0
    rows = torch.where(has, found.rows - positive, 0.0)
    loss = distributed.reduced(rows, "none" if reduction == "none" else "sum", peers)
    if reduction == "mean":
        loss = loss / total(has.sum(), peers).clamp_min(1)
    return loss.to(scale.dtype)

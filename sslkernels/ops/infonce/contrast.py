"""The contrastive core as losses use it: log-sum-exps of similarities on any device, dtype and backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from sslkernels.ops.infonce import arguments, contrast_op, contrast_reference, unit_rows_op
from sslkernels.ops.infonce.reference import NORMALIZE_EPS

SOFTPLUS_THRESHOLD = 50  # where log(1 + exp(x)) is x in fp64 too
MATMUL = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class ContrastiveStats(NamedTuple):
    """What the pass over the logits knows besides the loss. Each field is (rows,), without gradient."""

    logsumexp: torch.Tensor  # of the logits that are the row's denominator
    top1: torch.Tensor  # bool: the positive's logit is larger than every negative's
    positive_logit: torch.Tensor


class Contrast(NamedTuple):
    """See the operator ``contrast_fwd`` for each field."""

    rows: torch.Tensor
    columns: torch.Tensor
    peak_rows: torch.Tensor
    peak_columns: torch.Tensor
    skipped: torch.Tensor


class Inputs(NamedTuple):
    """Rows in the accumulation dtype, and what they may be rounded to where they are multiplied."""

    tensors: tuple[torch.Tensor, ...]
    matmul: int


def rows_of(*tensors: torch.Tensor, normalize: bool, backend: str | None = "reference") -> Inputs:
    """Embeddings of any dtype as `contrast` takes them; a single one by a kernel where ``backend`` has it."""
    dtype = _promoted(tensors)
    if normalize and len(tensors) == 1 and unit_rows_op.serves(tensors[0], backend):
        return Inputs(unit_rows_op.unit_rows_fwd(tensors[0], None)[:1], matmul_of(dtype))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    rows = tuple(tensor.to(compute) for tensor in tensors)
    if normalize:
        rows = tuple(F.normalize(x, dim=1, eps=NORMALIZE_EPS) for x in rows)
    return Inputs(rows, matmul_of(dtype))


def pairs_of(
    query: torch.Tensor, key: torch.Tensor, scale: torch.Tensor, *, normalize: bool, backend: str | None
) -> tuple[Inputs, torch.Tensor]:
    """`rows_of` both, of one shape, and their `positive_logits`."""
    if normalize and unit_rows_op.serves(query, backend):
        *rows, similarity = unit_rows_op.unit_rows_fwd(query, key)
        return Inputs(tuple(rows), matmul_of(_promoted((query, key)))), similarity.double() * scale
    inputs = rows_of(query, key, normalize=normalize)
    q, k = inputs.tensors
    return inputs, positive_logits(q, k, scale)


def _promoted(tensors) -> torch.dtype:
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def matmul_of(dtype: torch.dtype) -> int:
    if dtype == torch.float32 and arguments.medium_precision():
        return MATMUL[torch.bfloat16]
    return MATMUL.get(dtype, 0)


def contrast(
    query: torch.Tensor,
    key: torch.Tensor | None,
    scale: torch.Tensor,
    *,
    skip: torch.Tensor | None = None,
    query_ids: torch.Tensor | None = None,
    key_ids: torch.Tensor | None = None,
    normalize_key: bool = False,
    unit: bool = False,
    scale_value: float | None = None,
    columns: bool = False,
    peaks: bool = False,
    matmul: int = 0,
    backend: str | None = None,
) -> Contrast:
    """Log-sum-exps of ``scale * query @ key.T`` along rows and columns, differentiable in query, key and scale.

    The arguments are those of the operator ``contrast_fwd``; ``scale_value`` is the scale where it is known.
    """
    if normalize_key and key is not None and key.requires_grad:
        raise AssertionError("keys with a gradient are normalised by the caller")
    if backend == "reference" or query.dtype == torch.float64:
        results = contrast_reference.contrast(
            query, key, scale, skip, query_ids, key_ids, normalize_key, columns, peaks
        )
        return Contrast(*results)
    attract = (
        key is not None
        and not columns
        and torch.is_grad_enabled()
        and not key.requires_grad
        and (query.requires_grad or scale.requires_grad)
    )
    *results, _ = contrast_op.operator("contrast_fwd", backend)(
        query, key, scale, skip, query_ids, key_ids, normalize_key, unit, bounded(unit, scale_value), columns, attract,
        peaks, matmul,
    )  # fmt: skip
    return Contrast(*results)


def bounded(unit: bool, scale_value: float | None) -> bool:
    """``bounded`` of the operators."""
    return unit and scale_value is not None and 2 * abs(scale_value) <= arguments.MAX_BOUNDED_SPAN


def sigmoid_contrast(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    *,
    positive: torch.Tensor | None = None,
    query_ids: torch.Tensor | None = None,
    key_ids: torch.Tensor | None = None,
    matmul: int = 0,
    backend: str | None = None,
) -> torch.Tensor:
    """(N,) sums over the keys of ``softplus(-y_ij (scale * <query_i, key_j> + bias))``.

    The arguments are those of the operator ``sigmoid_contrast_fwd``; differentiable in the first four.
    """
    inputs = (query, key, scale, bias, positive, query_ids, key_ids)
    if backend == "reference" or query.dtype == torch.float64:
        return contrast_reference.sigmoid_contrast(*inputs)
    return contrast_op.operator("sigmoid_contrast_fwd", backend)(*inputs, matmul)


def positive_logits(query: torch.Tensor, key: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(N,) fp64 logits of the pairs (query_i, key_i)."""
    return (query * key).sum(dim=1).double() * scale


def row_losses(negatives: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """-log softmax of the positive among itself and the negatives, of which the log-sum-exp is given.

    Exact where the loss is nearly 0, and in its gradient, p - 1 of the positive.
    """
    return F.softplus(negatives - positive, threshold=SOFTPLUS_THRESHOLD)


def pair_columns(rows: int, device: torch.device) -> torch.Tensor:
    """``skip`` where column i is the positive of row i, to be added apart."""
    return torch.arange(rows, device=device)[:, None]

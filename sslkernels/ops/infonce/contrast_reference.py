"""The operators of the contrastive core in pure PyTorch: what a kernel must compute, and what runs where there is none.

Nothing here is fused: the N x M logits exist.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sslkernels.ops.infonce.reference import NORMALIZE_EPS, full_precision


def kept(query, key, skip, query_ids, key_ids):
    """(N, M) bool: the pairs that take part; with ``key`` None, a row does not meet itself."""
    rows, columns = len(query), len(query if key is None else key)
    keep = torch.ones(rows, columns, dtype=torch.bool, device=query.device)
    index = torch.arange(columns, device=query.device)
    if key is None:
        keep &= torch.arange(rows, device=query.device)[:, None] != index
    if skip is not None:
        keep &= (skip[:, :, None] != index).all(dim=1)
    if query_ids is not None:
        keep &= query_ids[:, None] != key_ids
    return keep


def similarities(query, key, normalize_key):
    """(N, M) inner products of the rows, and the keys as they enter them."""
    key = query if key is None else keys_as_used(query, key, normalize_key)
    if query.device.type == "cpu":  # how far its float32 products are off differs from one processor to the next
        return (query.double() @ key.double().T).to(query.dtype), key
    return query @ key.T, key


def keys_as_used(query, key, normalize_key):
    """In the dtype of the query, and at unit length if asked."""
    key = key.to(query.dtype)
    return F.normalize(key, dim=1, eps=NORMALIZE_EPS) if normalize_key else key


def _logsumexp(logits, dim):
    """In fp64: in the dtype of the logits it would be rounded as far as one of them is."""
    if not logits.shape[dim]:
        return logits.new_full(logits.sum(dim).shape, -torch.inf, dtype=torch.float64)
    peak = logits.detach().amax(dim)
    peak = torch.where(peak.isinf(), 0, peak)  # of a row in which nothing takes part, say
    return peak.double() + (logits - peak.unsqueeze(dim)).exp().sum(dim).log().double()


@full_precision
def contrast(query, key, scale, skip, query_ids, key_ids, normalize_key, columns, peaks):
    """The outputs of ``sslkernels::contrast_fwd`` but for the attraction, differentiable."""
    logits = similarities(query, key, normalize_key)[0] * scale
    masked = logits.masked_fill(~kept(query, key, skip, query_ids, key_ids), -torch.inf)
    none = masked.new_empty(0)
    lse_rows, lse_columns = _logsumexp(masked, 1), _logsumexp(masked, 0) if columns else none.double()
    if not peaks:
        return lse_rows, lse_columns, none, none, none
    floored = F.pad(masked.detach(), (0, 1, 0, 1), value=-torch.inf)
    peak_rows, peak_columns = floored.amax(1)[:-1], floored.amax(0)[:-1] if columns else none
    return lse_rows, lse_columns, peak_rows, peak_columns, _skipped(logits.detach(), skip)


def _skipped(logits, skip):
    """The logit of each row's first skipped column; -inf where there is none."""
    none = logits.new_full((len(logits),), -torch.inf)
    if skip is None or not skip.shape[1] or not logits.shape[1]:
        return none
    column = skip[:, 0]
    inside = (column >= 0) & (column < logits.shape[1])
    return torch.where(inside, logits.gather(1, column.clamp(0, logits.shape[1] - 1)[:, None])[:, 0], none)


@full_precision
def contrast_fwd(
    query, key, scale, skip, query_ids, key_ids, normalize_key, unit, bounded, columns, attract, peaks, matmul
):
    """Default kernel of ``sslkernels::contrast_fwd``, for every device."""
    lse_rows, lse_columns, *rest = contrast(query, key, scale, skip, query_ids, key_ids, normalize_key, columns, peaks)
    attraction = query.new_empty(0, 0)
    if attract:
        products, used = similarities(query, key, normalize_key)
        attraction = _softmax(products * scale, lse_rows[:, None], kept(query, key, skip, query_ids, key_ids)) @ used
    fresh = (tensor.clone() for tensor in rest)
    return lse_rows, lse_columns, *fresh, attraction


def _softmax(logits, logsumexp, keep):
    """exp(logits - logsumexp) where it takes part, else 0; what rounding takes from the fp64 one is subtracted too."""
    rounded = logsumexp.to(logits.dtype)
    rest = torch.where(rounded.isfinite(), logsumexp - rounded, 0).to(logits.dtype)
    return (logits - rounded - rest).masked_fill(~keep, -torch.inf).exp()


@full_precision
def contrast_bwd(
    grad_rows, grad_columns, lse_rows, lse_columns, query, key, scale, skip, query_ids, key_ids, unit, bounded, matmul
):
    """Default kernel of ``sslkernels::contrast_bwd``: G = w_i P_ij + v_j Q_ij of the softmaxes P and Q."""
    products, used = similarities(query, key, False)
    logits, keep = products * scale, kept(query, key, skip, query_ids, key_ids)
    weights = _softmax(logits, lse_rows[:, None], keep) * grad_rows[:, None].to(query.dtype)
    if grad_columns is not None:
        weights = weights + _softmax(logits, lse_columns[None], keep) * grad_columns.to(query.dtype)
    return (*_gradients(weights, query, key, used, scale), (weights * products).sum())


def contrast_attracted_bwd(grad_rows, query, scale, attraction):
    """Default kernel of ``sslkernels::contrast_attracted_bwd``: the softmax's mean key is what a query is drawn to."""
    weights = grad_rows.to(query.dtype)
    return attraction * (weights * scale)[:, None], (weights * (query * attraction).sum(dim=1)).sum()


def _gradients(weights, query, key, used, scale):
    """Of query and key, from those of the logits; one tensor, and an empty one, where they are the same."""
    grad_query, grad_key = scale * (weights @ used), scale * (weights.T @ query)
    return (grad_query + grad_key, query.new_empty(0, 0)) if key is None else (grad_query, grad_key)


def _signs(query, key, positive, query_ids, key_ids):
    """(N, M): 1 for a pair that belongs together, else -1."""
    return 1 - 2 * kept(query, key, positive, query_ids, key_ids).to(query.dtype)


@full_precision
def sigmoid_contrast(query, key, scale, bias, positive, query_ids, key_ids):
    """The output of ``sslkernels::sigmoid_contrast_fwd``, differentiable; in the dtype of the query."""
    logits = query @ key.T * scale + bias
    return F.softplus(-_signs(query, key, positive, query_ids, key_ids) * logits, threshold=50).sum(dim=1)


@full_precision
def sigmoid_contrast_fwd(query, key, scale, bias, positive, query_ids, key_ids, matmul):
    """Default kernel of ``sslkernels::sigmoid_contrast_fwd``, for every device."""
    return sigmoid_contrast(query, key, scale, bias, positive, query_ids, key_ids).double()


@full_precision
def sigmoid_contrast_bwd(grad_rows, query, key, scale, bias, positive, query_ids, key_ids, matmul):
    """Default kernel of ``sslkernels::sigmoid_contrast_bwd``: d softplus(-y l) / dl = -y sigmoid(-y l)."""
    products = query @ key.T
    signs = _signs(query, key, positive, query_ids, key_ids)
    weights = -signs * torch.sigmoid(-signs * (products * scale + bias)) * grad_rows[:, None].to(query.dtype)
    return *_gradients(weights, query, key, key, scale), (weights * products).sum(), weights.sum()

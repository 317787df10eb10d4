"""The contrastive core over the batch of many processes: each rank's queries against the keys of all ranks.

With ``peers`` None, every function here is that of `contrast`. See `sslkernels.distributed` for the contract.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from sslkernels.distributed import Peers, Relay, apply, gather_rows, meet, to_owners, total, travel
from sslkernels.ops.infonce import contrast as core
from sslkernels.ops.infonce import contrast_op, contrast_reference
from sslkernels.ops.infonce.reference import reduce_rows

# ---- log-sum-exps


def contrast(query, key, scale, peers: Peers | None, *, skip=None, key_ids=None, **options) -> core.Contrast:
    """`core.contrast` of the own queries with all keys; columns are the own ones, with the queries of all ranks.

    ``skip`` counts the own keys.
    """
    if peers is None:
        return core.contrast(query, key, scale, skip=skip, key_ids=key_ids, **options)
    if key is None:
        key, skip = query, core.pair_columns(len(query), query.device)
    among = _among_gathered if peers.exchange == "gather" else _around_ring
    return among(query, key, scale, peers, skip, key_ids, options)


def _among_gathered(query, key, scale, peers, skip, key_ids, options) -> core.Contrast:
    counts = peers.keys
    keys = gather_rows(key, peers, counts)
    found = core.contrast(
        query, keys, scale, skip=_among_all(skip, peers),
        key_ids=_gathered_ids(key_ids, peers), **options,
    )  # fmt: skip
    if options.get("columns"):
        parts = to_owners(found.columns, keys, peers, counts)
        nothing = (parts == -torch.inf).all(dim=0)  # whose gradient is 0, which logsumexp does not know
        columns = torch.logsumexp(parts.masked_fill(nothing, 0), dim=0).masked_fill(nothing, -torch.inf)
        found = found._replace(columns=columns)
        if options.get("peaks"):
            found = found._replace(peak_columns=to_owners(found.peak_columns, keys.detach(), peers, counts).amax(dim=0))
    return found


def _among_all(skip: torch.Tensor, peers: Peers) -> torch.Tensor:
    """Columns of the own keys as columns of all keys."""
    own, offset = peers.keys[peers.rank], sum(peers.keys[: peers.rank])
    return torch.where((skip >= 0) & (skip < own), skip + offset, -1)


def _gathered_ids(ids, peers: Peers):
    return None if ids is None else gather_rows(ids, peers, peers.keys)


class _Flags(NamedTuple):
    unit: bool
    bounded: bool
    columns: bool
    peaks: bool
    matmul: int
    backend: str | None


def _around_ring(query, key, scale, peers, skip, key_ids, options) -> core.Contrast:
    given = {"unit": False, "scale_value": None, "columns": False, "peaks": False, "matmul": 0, **options}
    flags = _Flags(
        given["unit"], core.bounded(given["unit"], given["scale_value"]), given["columns"], given["peaks"],
        given["matmul"], _backend(query, given.get("backend")),
    )  # fmt: skip
    query_ids = given.get("query_ids")
    return core.Contrast(*apply(_RingContrast, query, key, scale, skip, query_ids, key_ids, peers, flags))


def _backend(query: torch.Tensor, backend: str | None) -> str | None:
    return "reference" if query.dtype == torch.float64 else backend


def _operator(name: str, backend: str | None):
    """An operator of the core, or its definition."""
    return getattr(contrast_reference, name) if backend == "reference" else contrast_op.operator(name, backend)


class _RingContrast(torch.autograd.Function):
    """Each rank's keys meet the own queries; what they find out about the columns travels on with the keys."""

    @staticmethod
    def forward(ctx, query, key, scale, skip, query_ids, key_ids, peers, flags):
        columns = Relay(peers, peers.keys, lambda a, b: torch.logaddexp(a, b, out=a)) if flags.columns else None
        peaks = Relay(peers, peers.keys, lambda a, b: torch.maximum(a, b, out=a))
        rows = peak_rows = skipped = None
        for owner, (keys, ids) in travel(peers, peers.keys, (key, key_ids)):
            found = core.Contrast(
                *_operator("contrast_fwd", flags.backend)(
                    query, keys, scale, skip if owner == peers.rank else None, query_ids, ids, False, flags.unit,
                    flags.bounded, flags.columns, False, flags.peaks, flags.matmul,
                )[:5]
            )  # fmt: skip
            if rows is None:  # the own keys come first
                rows, peak_rows, skipped = found.rows, found.peak_rows, found.skipped
            else:
                rows, peak_rows = torch.logaddexp(rows, found.rows), torch.maximum(peak_rows, found.peak_rows)
            if flags.columns:
                columns.add(owner, found.columns)
                if flags.peaks:
                    peaks.add(owner, found.peak_columns)
        none = rows.new_empty(0)
        lse_columns = columns.result() if flags.columns else none
        peak_columns = peaks.result() if flags.columns and flags.peaks else peak_rows.new_empty(0)
        ctx.save_for_backward(query, key, scale, skip, query_ids, key_ids, rows, lse_columns)
        ctx.peers, ctx.flags = peers, flags
        ctx.mark_non_differentiable(peak_rows, peak_columns, skipped)
        return rows, lse_columns, peak_rows, peak_columns, skipped

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rows, grad_columns, *_):
        query, key, scale, skip, query_ids, key_ids, lse_rows, lse_columns = ctx.saved_tensors
        peers, flags = ctx.peers, ctx.flags
        if not flags.columns:
            grad_columns = lse_columns = None
        grad_query, grad_scale = torch.zeros_like(query), torch.zeros_like(scale)
        grad_keys = Relay(peers, peers.keys, torch.Tensor.add_) if ctx.needs_input_grad[1] else None
        for owner, (keys, ids, grads, sums) in travel(peers, peers.keys, (key, key_ids, grad_columns, lse_columns)):
            parts = _operator("contrast_bwd", flags.backend)(
                grad_rows, grads, lse_rows, sums, query, keys, scale, skip if owner == peers.rank else None, query_ids,
                ids, flags.unit, flags.bounded, flags.matmul,
            )  # fmt: skip
            grad_query += parts[0]
            grad_scale += parts[2]
            if grad_keys:
                grad_keys.add(owner, parts[1])
            del parts  # two buffers fewer while the next ones are computed
        return grad_query, grad_keys and grad_keys.result(), grad_scale, *[None] * 5


# ---- sums of softplus


def sigmoid_contrast(query, key, scale, bias, peers: Peers | None, *, positive, key_ids=None, **options):
    """`core.sigmoid_contrast` of the own queries with all keys; ``positive`` counts the own keys."""
    if peers is None:
        return core.sigmoid_contrast(query, key, scale, bias, positive=positive, key_ids=key_ids, **options)
    if peers.exchange == "gather":
        keys, ids = gather_rows(key, peers, peers.keys), _gathered_ids(key_ids, peers)
        return core.sigmoid_contrast(
            query, keys, scale, bias, positive=_among_all(positive, peers), key_ids=ids, **options
        )
    backend = _backend(query, options.get("backend"))
    return apply(
        _RingSigmoid, query, key, scale, bias, positive, options.get("query_ids"), key_ids, peers,
        options.get("matmul", 0), backend,
    )  # fmt: skip


class _RingSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, scale, bias, positive, query_ids, key_ids, peers, matmul, backend):
        rows = torch.zeros(len(query), dtype=torch.float64, device=query.device)
        for owner, (keys, ids) in travel(peers, peers.keys, (key, key_ids)):
            own = positive if owner == peers.rank else None
            rows += _operator("sigmoid_contrast_fwd", backend)(query, keys, scale, bias, own, query_ids, ids, matmul)
        ctx.save_for_backward(query, key, scale, bias, positive, query_ids, key_ids)
        ctx.peers, ctx.matmul, ctx.backend = peers, matmul, backend
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rows):
        query, key, scale, bias, positive, query_ids, key_ids = ctx.saved_tensors
        peers = ctx.peers
        grads = [torch.zeros_like(x) for x in (query, scale, bias)]
        grad_keys = Relay(peers, peers.keys, torch.Tensor.add_) if ctx.needs_input_grad[1] else None
        for owner, (keys, ids) in travel(peers, peers.keys, (key, key_ids)):
            own = positive if owner == peers.rank else None
            parts = _operator("sigmoid_contrast_bwd", ctx.backend)(
                grad_rows, query, keys, scale, bias, own, query_ids, ids, ctx.matmul
            )
            for grad, part in zip(grads, (parts[0], *parts[2:]), strict=True):
                grad += part
            if grad_keys:
                grad_keys.add(owner, parts[1])
            del parts  # two buffers fewer while the next ones are computed
        grad_query, grad_scale, grad_bias = grads
        return grad_query, grad_keys and grad_keys.result(), grad_scale, grad_bias, *[None] * 6


# ---- sums over the batch


def class_sums(z: torch.Tensor, labels: torch.Tensor, peers: Peers | None):
    """(N, D) sum of all rows with the label of each row, itself among them, and (N,) their number.

    Without peers z is in fp64, as the sum is always.
    """
    return _sums_by_label(labels, labels, z) if peers is None else apply(_ClassSums, z, labels, peers)


class _ClassSums(torch.autograd.Function):
    """Whether two rows share a label is symmetric: the backward is the same sum of gradients."""

    @staticmethod
    def forward(ctx, z, labels, peers):
        ctx.save_for_backward(labels)
        ctx.peers, ctx.dtype = peers, z.dtype
        sums, counts = _sums_among(z, labels, peers)
        ctx.mark_non_differentiable(counts)
        return sums, counts

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        sums, _ = _sums_among(grad.to(ctx.dtype), *ctx.saved_tensors, ctx.peers)
        return sums.to(ctx.dtype), None, None


def _sums_among(rows, labels, peers: Peers):
    sums, counts = torch.zeros(rows.shape, dtype=torch.float64, device=rows.device), torch.zeros_like(labels)
    visits: Iterable[tuple]
    if peers.exchange == "gather":
        visits = [(gather_rows(labels, peers, peers.queries), gather_rows(rows, peers, peers.queries))]
    else:
        visits = (bundle for _, bundle in travel(peers, peers.queries, (labels, rows)))
    for others, theirs in visits:
        part, count = _sums_by_label(labels, others, theirs.double())
        sums += part
        counts += count
    return sums, counts


def _sums_by_label(labels, others, rows):
    """For each of ``labels``: the sum, and the number, of those ``rows`` that have the same label in ``others``.

    Labels are sorted, so that equal ones form a run whose start is its place in a buffer: no shape depends on the
    labels' values, and nothing waits for the device.
    """
    ordered = others.sort().values
    theirs = torch.searchsorted(ordered, others.contiguous())
    own = theirs if others is labels else torch.searchsorted(ordered, labels.contiguous())
    counts = torch.searchsorted(ordered, labels.contiguous(), right=True) - own
    # one place more, for a label greater than all others; the place of any other that is not among them is taken
    totals = rows.new_zeros(len(others) + 1, rows.shape[1]).index_add(0, theirs, rows)
    sums = totals.index_select(0, own)  # whose gradient needs no sorting, unlike that of totals[own]
    return (sums if others is labels else torch.where(counts[:, None] > 0, sums, 0.0)), counts


def mean_row(rows: torch.Tensor, peers: Peers | None, count: int | None) -> torch.Tensor:
    """(D,) mean of the rows of all ranks; ``count`` is their number where there are peers. 0 of none."""
    return total(rows.sum(dim=0), peers) / max(len(rows) if count is None else count, 1)


def reduced(rows: torch.Tensor, reduction: str, peers: Peers | None, count: int | None = None) -> torch.Tensor:
    """``reduction`` of the own rows, by the contract; ``count`` are the rows of all ranks, if not the queries."""
    if peers is None:
        return reduce_rows(rows, reduction)
    if reduction == "none":
        return rows
    scaled = peers.size * rows.sum()
    return scaled / max(sum(peers.queries) if count is None else count, 1) if reduction == "mean" else scaled


__all__ = ["class_sums", "contrast", "mean_row", "meet", "reduced", "sigmoid_contrast"]

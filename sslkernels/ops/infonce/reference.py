"""Contrastive losses in pure PyTorch: the definition that every kernel is checked against."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

NORMALIZE_EPS = 1e-12  # of torch.nn.functional.normalize


def full_precision(function):
    """Runs it without autocast, which would round matrix products to 16 bits."""

    @functools.wraps(function)
    def run(first, *others, **named):
        if not torch.amp.is_autocast_available(first.device.type):
            return function(first, *others, **named)
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *others, **named)

    return run


@full_precision
def nt_xent_rows(z0, z1, temperature, normalize, positive_weight=None):
    """Per-row loss, log-sum-exp, positive logit and top-1 hit of NT-Xent, each (2N,), in the dtype of the inputs.

    Row i of the 2N rows is ``z0[i]`` for i < N and ``z1[i - N]`` otherwise. With ``positive_weight`` (2N,) the loss is
    that of DCL, and the log-sum-exp that of the negatives.
    """
    z = torch.cat([z0, z1])
    if normalize:
        z = F.normalize(z, dim=1, eps=NORMALIZE_EPS)
    logits = z @ z.T / temperature
    views = len(z)
    rows = torch.arange(views, device=z.device)
    partners = (rows + views // 2) % max(views, 1)
    logits = logits.masked_fill(torch.eye(views, dtype=torch.bool, device=z.device), -torch.inf)
    positive = logits[rows, partners]
    negatives = logits.index_put((rows, partners), logits.new_tensor(-torch.inf))
    if positive_weight is not None:
        logsumexp = torch.logsumexp(negatives, dim=1) if views > 2 else torch.zeros_like(positive)
        loss = logsumexp - positive_weight * positive
    else:
        logsumexp = torch.logsumexp(logits, dim=1) if views else positive
        loss = F.cross_entropy(logits, partners, reduction="none") if views else positive
    top1 = (positive.detach()[:, None] > negatives.detach()).all(dim=1)
    return loss, logsumexp, positive, top1


def reduce_rows(rows, reduction):
    """``reduction`` of the per-row losses; the mean of no rows is 0, not NaN."""
    if reduction == "none":
        return rows
    total = rows.sum()
    return total / max(rows.shape[0], 1) if reduction == "mean" else total


def nt_xent(z0, z1, temperature=0.5, *, normalize=True, reduction="mean"):
    """NT-Xent computed throughout in the dtype of the inputs, as a user would write it in PyTorch."""
    rows, *_ = nt_xent_rows(z0, z1, temperature, normalize)
    return reduce_rows(rows, reduction)


def decoupled_nt_xent(z0, z1, temperature=0.1, *, positive_weight=None, normalize=True, reduction="mean"):
    """DCL, and with weights DCLW."""
    weight = z0.new_ones(2 * len(z0)) if positive_weight is None else positive_weight.to(z0)
    weight = weight.repeat(2) if len(weight) == len(z0) else weight
    rows, *_ = nt_xent_rows(z0, z1, temperature, normalize, weight)
    return reduce_rows(rows, reduction)


def hard_nt_xent(z0, z1, temperature=0.5, *, beta=1.0, tau_plus=0.1, normalize=True, reduction="mean"):
    """NT-Xent with hard negatives, debiased."""
    z = torch.cat([z0, z1])
    if normalize:
        z = F.normalize(z, dim=1, eps=NORMALIZE_EPS)
    views = len(z)
    rows = torch.arange(views, device=z.device)
    partners = (rows + views // 2) % max(views, 1)
    logits = z @ z.T / temperature
    positive = logits[rows, partners]
    if views <= 2:
        return reduce_rows(positive * 0, reduction)
    own = (rows[:, None] == rows) | (partners[:, None] == rows)
    hard = torch.logsumexp(((1 + beta) * logits).masked_fill(own, -torch.inf), dim=1)
    weights = torch.logsumexp((beta * logits).masked_fill(own, -torch.inf), dim=1)
    floor = -1 / torch.as_tensor(temperature, dtype=z.dtype, device=z.device).abs()
    count = torch.as_tensor(float(views - 2), dtype=z.dtype, device=z.device).log()
    return reduce_rows(
        F.softplus(hard_negatives(hard - weights, positive, tau_plus, floor) + count - positive), reduction
    )


def hard_negatives(mean, positive, tau_plus, floor):
    """log of ``max((exp(mean) - tau_plus * exp(positive)) / (1 - tau_plus), exp(floor))``, where exp may overflow."""
    if tau_plus == 0:
        return torch.maximum(mean, floor)
    share = positive + math.log(tau_plus) - mean
    some = ~(share >= 0)  # a NaN is to stay one
    rest = mean + torch.log1p(-torch.exp(torch.where(some, share, -1.0))) - math.log1p(-tau_plus)
    return torch.maximum(torch.where(some, rest, -torch.inf), floor)


def info_nce(
    query, positive_key, negative_keys=None, temperature=0.1, *, negative_mode="unpaired", normalize=True,
    label_smoothing=0.0, exclude_ids=None, reduction="mean",
):  # fmt: skip
    """InfoNCE with negatives from the batch, a queue, or a set for each query."""
    dtype = torch.promote_types(query.dtype, positive_key.dtype)
    inputs = [x if x is None else x.to(dtype) for x in (query, positive_key, negative_keys)]
    if normalize:
        inputs = [x if x is None else F.normalize(x, dim=-1, eps=NORMALIZE_EPS) for x in inputs]
    q, k, negatives = inputs
    positive = (q * k).sum(dim=1, keepdim=True)
    ids = exclude_ids if exclude_ids is None or isinstance(exclude_ids, (tuple, list)) else (exclude_ids, exclude_ids)
    if negatives is None:
        logits, target = q @ k.T, torch.arange(len(q), device=q.device)
        own = torch.eye(len(q), dtype=torch.bool, device=q.device)
    else:
        paired = negative_mode == "paired"
        products = torch.einsum("nd,nmd->nm", q, negatives) if paired else q @ negatives.T
        logits, target = torch.cat([positive, products], dim=1), torch.zeros(len(q), dtype=torch.long, device=q.device)
        own = torch.zeros(logits.shape, dtype=torch.bool, device=q.device)
        own[:, 0] = True
    logits = logits / temperature
    if ids is not None:
        same = ids[0][:, None] == ids[1]
        same = F.pad(same, (logits.shape[1] - same.shape[1], 0))
        logits = logits.masked_fill(same & ~own, -torch.inf)
    if not len(q):
        return reduce_rows(positive[:, 0] / temperature, reduction)
    return reduce_rows(F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing), reduction)


def clip_loss(
    image_features, text_features, logit_scale, logit_bias=None, *, normalize=False, label_smoothing=0.0,
    exclude_ids=None, reduction="mean",
):  # fmt: skip
    """The loss of CLIP."""
    dtype = torch.promote_types(image_features.dtype, text_features.dtype)
    x, y = image_features.to(dtype), text_features.to(dtype)
    if normalize:
        x, y = F.normalize(x, dim=1, eps=NORMALIZE_EPS), F.normalize(y, dim=1, eps=NORMALIZE_EPS)
    logits = logit_scale * x @ y.T
    if logit_bias is not None:
        logits = logits + logit_bias
    pairs = min(len(x), len(y))
    labels = torch.arange(pairs, device=x.device)
    if exclude_ids is not None:
        ids = exclude_ids if isinstance(exclude_ids, (tuple, list)) else (exclude_ids, exclude_ids)
        own = torch.eye(len(x), len(y), dtype=torch.bool, device=x.device)
        logits = logits.masked_fill((ids[0][:, None] == ids[1]) & ~own, -torch.inf)
    if not pairs:
        return reduce_rows(logits.sum(dim=1)[:0] if len(y) else logits.new_zeros(0), reduction)
    sides = (logits[:pairs], logits.T[:pairs])
    rows = [F.cross_entropy(side, labels, reduction="none", label_smoothing=label_smoothing) for side in sides]
    return reduce_rows((rows[0] + rows[1]) / 2, reduction)


def sigmoid_loss(
    image_features, text_features, logit_scale, logit_bias, *, positive_ids=None, normalize=False, reduction="mean"
):
    """The loss of SigLIP."""
    dtype = torch.promote_types(image_features.dtype, text_features.dtype)
    x, y = image_features.to(dtype), text_features.to(dtype)
    if normalize:
        x, y = F.normalize(x, dim=1, eps=NORMALIZE_EPS), F.normalize(y, dim=1, eps=NORMALIZE_EPS)
    logits = logit_scale * x @ y.T + logit_bias
    together = torch.eye(len(x), len(y), dtype=torch.bool, device=x.device)
    if positive_ids is not None:
        ids = positive_ids if isinstance(positive_ids, (tuple, list)) else (positive_ids, positive_ids)
        together = together | (ids[0][:, None] == ids[1])
    return reduce_rows(-F.logsigmoid((2 * together.to(dtype) - 1) * logits).sum(dim=1), reduction)


def sup_con(features, labels, temperature=0.1, *, normalize=True, reduction="mean"):
    """Supervised contrastive loss."""
    z = F.normalize(features, dim=1, eps=NORMALIZE_EPS) if normalize else features
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (z @ z.T / temperature).masked_fill(own, -torch.inf)
    positive = (labels[:, None] == labels) & ~own & (labels >= 0)
    counts = positive.sum(dim=1)
    log_softmax = F.log_softmax(logits, dim=1) if len(z) else logits
    rows = -log_softmax.masked_fill(~positive, 0).sum(dim=1) / counts.clamp_min(1)
    return (
        reduce_rows(rows, "sum") / (counts > 0).sum().clamp_min(1)
        if reduction == "mean"
        else reduce_rows(rows, reduction)
    )


def nt_xent_fwd(z0, z1, temperature, positive_weight, normalize, bounded, top1, bf16_matmul):
    """Default kernel of ``sslkernels::nt_xent_fwd``, for every device; accumulates in fp32, or fp64 for fp64 inputs."""
    compute = temperature.dtype
    rows = nt_xent_rows(z0.to(compute), z1.to(compute), temperature, normalize, positive_weight)
    loss, logsumexp, positive, hits = rows
    return loss, logsumexp.double(), positive.clone(), hits if top1 else hits.new_empty(0)


@full_precision
def nt_xent_bwd(grad_loss, z0, z1, temperature, positive_weight, loss, logsumexp, normalize, bounded, bf16_matmul):
    """Default kernel of ``sslkernels::nt_xent_bwd``: the gradients written out, without autograd.

    With w the incoming row gradients and P the softmax of the logits S / tau (zero on the diagonal):
    dL/dS_ij = (w_i (P_ij - [j = p(i)]) + w_j (P_ji - [i = p(j)])) / tau, counted once for each ordered pair;
    dz_i = sum_j dL/dS_ij z_j; tau dL/dtau = -sum_i z_i . dz_i / 2, since S is quadratic in z;
    dx = (dz - z (z . dz)) / |x| through the normalisation.
    """
    compute = temperature.dtype
    x = torch.cat([z0, z1]).to(compute)
    views = len(x)
    norm = x.norm(dim=1, keepdim=True) if normalize else torch.ones_like(x[:, :1])
    scale = norm.clamp_min(NORMALIZE_EPS)
    z = x / scale
    rows = torch.arange(views, device=x.device)
    partners = (rows + views // 2) % max(views, 1)
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    if positive_weight is not None:
        logits[rows, partners] = -torch.inf
    probability = torch.softmax(logits, dim=1).nan_to_num(0) if views else logits  # no negatives: nothing to weigh
    probability[rows, partners] = 0
    # p - 1 of the positive, without cancellation
    pull = probability.sum(dim=1) if positive_weight is None else positive_weight
    probability[rows, partners] = -pull
    weighted = probability * grad_loss.to(compute)[:, None]
    grad_z = (weighted + weighted.T) @ z / temperature
    along = (z * grad_z).sum(dim=1, keepdim=True)
    grad_temperature = -along.sum() / (2 * temperature)
    if normalize:
        grad_z = torch.where(norm > NORMALIZE_EPS, grad_z - z * along, grad_z) / scale
    grad_z0, grad_z1 = grad_z.to(z0.dtype).split(views // 2) if views else (torch.empty_like(z0), torch.empty_like(z1))
    return grad_z0.clone(), grad_z1.clone(), grad_temperature

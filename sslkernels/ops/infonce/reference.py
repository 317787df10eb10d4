"""Contrastive losses in pure PyTorch: the definition that every kernel is checked against."""

from __future__ import annotations

import torch
import torch.nn.functional as F

NORMALIZE_EPS = 1e-12  # of torch.nn.functional.normalize


def nt_xent_rows(z0, z1, temperature, normalize):
    """Per-row loss, log-sum-exp, positive logit and top-1 hit of NT-Xent, each (2N,), in the dtype of the inputs.

    Row i of the 2N rows is ``z0[i]`` for i < N and ``z1[i - N]`` otherwise.
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
    logsumexp = torch.logsumexp(logits, dim=1) if views else positive
    loss = F.cross_entropy(logits, partners, reduction="none") if views else positive
    negatives = logits.detach().index_put((rows, partners), logits.new_tensor(-torch.inf))
    top1 = (positive.detach()[:, None] > negatives).all(dim=1)
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


def nt_xent_fwd(z0, z1, temperature, normalize, bounded, top1, bf16_matmul):
    """Default kernel of ``sslkernels::nt_xent_fwd``, for every device; accumulates in fp32, or fp64 for fp64 inputs."""
    compute = temperature.dtype
    loss, logsumexp, positive, hits = nt_xent_rows(z0.to(compute), z1.to(compute), temperature, normalize)
    return loss, logsumexp.double(), positive.clone(), hits if top1 else hits.new_empty(0)


def nt_xent_bwd(grad_loss, z0, z1, temperature, loss, logsumexp, normalize, bounded, bf16_matmul):
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
    probability = torch.softmax(logits, dim=1) if views else logits
    probability[rows, partners] = 0
    probability[rows, partners] = -probability.sum(dim=1)  # p - 1 of the positive, without cancellation
    weighted = probability * grad_loss.to(compute)[:, None]
    grad_z = (weighted + weighted.T) @ z / temperature
    along = (z * grad_z).sum(dim=1, keepdim=True)
    grad_temperature = -along.sum() / (2 * temperature)
    if normalize:
        grad_z = torch.where(norm > NORMALIZE_EPS, grad_z - z * along, grad_z) / scale
    grad_z0, grad_z1 = grad_z.to(z0.dtype).split(views // 2) if views else (torch.empty_like(z0), torch.empty_like(z1))
    return grad_z0.clone(), grad_z1.clone(), grad_temperature

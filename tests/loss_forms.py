"""What the losses of other libraries compute, written out in plain PyTorch: what our modules are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def unit(x):
    return F.normalize(x, dim=-1)


def nt_xent(out0, out1, temperature):
    """lightly's NTXentLoss without a memory bank: each row against the 2N - 1 others."""
    z = torch.cat([unit(out0), unit(out1)])
    others = ~torch.eye(len(z), dtype=torch.bool)
    target = torch.arange(len(z)).roll(len(out0))
    return torch.stack(
        [
            torch.logsumexp((z[others[i]] @ z[i]) / temperature, 0) - z[i] @ z[target[i]] / temperature
            for i in range(len(z))
        ]
    ).mean()


def moco(out0, out1, bank, temperature):
    """lightly's NTXentLoss with a bank (K, D): the positive first, then the bank."""
    q, k = unit(out0), unit(out1)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ bank.T.to(q)], dim=1) / temperature
    return (torch.logsumexp(logits, dim=1) - logits[:, 0]).mean()


def dcl(out0, out1, temperature, weight_fn=None):
    """lightly's DCLLoss: the negatives of both views, the weighted positive apart."""
    z0, z1 = unit(out0), unit(out1)
    off = ~torch.eye(len(z0), dtype=torch.bool)
    total = 0
    for a, b in ((z0, z1), (z1, z0)):
        weights = 1 if weight_fn is None else weight_fn(a, b)
        negatives = torch.stack(
            [torch.cat([a[off[i]] @ a[i], b[off[i]] @ a[i]]).div(temperature).exp().sum().log() for i in range(len(a))]
        )
        total = total + (negatives - weights * (a * b).sum(1) / temperature).mean()
    return total / 2


def mises_fisher(sigma):
    """The weights of lightly's DCLWLoss."""

    def weights(a, b):
        share = ((a * b).sum(1) / sigma).exp().detach()
        return 2 - len(a) * share / share.sum()

    return weights


def info_nce(query, positive_key, negative_keys=None, temperature=0.1, reduction="mean"):
    """info-nce-pytorch's InfoNCE; negatives (K, D), (N, M, D), or the other positives."""
    q, k = unit(query), unit(positive_key)
    if negative_keys is None:
        logits = q @ k.T / temperature
        rows = torch.logsumexp(logits, dim=1) - logits.diagonal()
    else:
        negatives = unit(negative_keys)
        negatives = (negatives @ q[:, :, None])[..., 0] if negatives.dim() == 3 else q @ negatives.T
        logits = torch.cat([(q * k).sum(1, keepdim=True), negatives], dim=1) / temperature
        rows = torch.logsumexp(logits, dim=1) - logits[:, 0]
    return {"mean": rows.mean(), "sum": rows.sum(), "none": rows}[reduction]


def clip(images, texts, logit_scale, logit_bias=0):
    """open_clip's ClipLoss of one process."""
    logits = logit_scale * images @ texts.T + logit_bias
    rows = (torch.logsumexp(logits, dim=1) + torch.logsumexp(logits, dim=0)) / 2 - logits.diagonal()
    return rows.mean()


def siglip(images, texts, logit_scale, logit_bias=0):
    """open_clip's SigLipLoss of one process."""
    logits = logit_scale * images @ texts.T + logit_bias
    return (F.softplus(logits).sum() - logits.diagonal().sum()) / len(images)


def sup_con(features, labels=None, mask=None, temperature=0.07, contrast_mode="all", base_temperature=0.07):
    """SupContrast's SupConLoss: an anchor that has no positive counts as a loss of 0."""
    samples = len(features)
    z = features.flatten(2).transpose(0, 1).flatten(0, 1)
    if mask is None:
        mask = torch.eye(samples) if labels is None else (labels.view(-1, 1) == labels.view(1, -1))
    anchors = samples if contrast_mode == "one" else len(z)
    total = 0
    for i in range(anchors):
        others = [j for j in range(len(z)) if j != i]
        logits = (z[others] @ z[i]) / temperature
        weights = torch.stack([mask[i % samples, j % samples] for j in others]).to(z.dtype)
        count = weights.sum() if weights.sum() >= 1e-6 else 1
        total = total - (weights * (logits - torch.logsumexp(logits, 0))).sum() / count
    return temperature / base_temperature * total / anchors

"""What the masking functions of other libraries compute, written out: what ours are compared with and raced against."""

from __future__ import annotations

import torch


def mae_random_masking(x, mask_ratio, noise):
    """MAE's ``random_masking``: everything in the order of the noise."""
    num_keep = int(x.shape[1] * (1 - mask_ratio))
    order = noise.argsort(dim=1)
    ids_restore = order.argsort(dim=1)
    mask = (ids_restore >= num_keep).to(torch.float32)
    return x.gather(1, order[:, :num_keep, None].repeat(1, 1, x.shape[2])), mask, ids_restore


def mae_unshuffle(x, mask_token, ids_restore, pos_embed, prefix=1):
    """How MAE's decoder begins: x (N, P + K, D) has P = 1 class token, pos_embed (1, P + L, D)."""
    missing = ids_restore.shape[1] + prefix - x.shape[1]
    tokens = torch.cat([x[:, prefix:], mask_token.repeat(len(x), missing, 1)], dim=1)
    tokens = tokens.gather(1, ids_restore[:, :, None].repeat(1, 1, x.shape[2]))
    return torch.cat([x[:, :prefix], tokens], dim=1) + pos_embed


def lightly_random_token_mask(size, mask_ratio, mask_class_token, noise):
    """lightly's ``random_token_mask``."""
    counted = size[1] - (0 if mask_class_token else 1)
    num_keep = int(counted * (1 - mask_ratio))
    if not mask_class_token and size[1] > 0:
        noise = torch.cat([torch.full_like(noise[:, :1], -1), noise[:, 1:]], dim=1)
        num_keep = max(1, num_keep + 1)
    order = noise.argsort(dim=1)
    return order[:, :num_keep], order[:, num_keep:]


def dinov2_lists(masks):
    """What DINOv2 reads off a batch of masks (N, L)."""
    weights = (1 / masks.sum(dim=1).clamp(min=1.0))[:, None].expand_as(masks)[masks]
    return masks.flatten().nonzero().flatten(), weights


def dinov2_shares(batch_size, mask_ratio_tuple, mask_probability, tokens):
    """The least and the most masked patches of each masked sample of a batch of DINOv2, and the upper bound."""
    masked = int(batch_size * mask_probability)
    edges = torch.linspace(*mask_ratio_tuple, masked + 1)
    bounds = [(int(tokens * edges[i]), int(tokens * edges[i + 1])) for i in range(masked)]
    return bounds, sum(most for _, most in bounds)

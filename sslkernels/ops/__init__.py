"""The public ops, each from its slice."""

from sslkernels.ops.ema import ema_update_
from sslkernels.ops.infonce import (
    ClipStats,
    ContrastiveStats,
    clip_loss,
    decoupled_nt_xent,
    hard_nt_xent,
    info_nce,
    mises_fisher_weights,
    nt_xent,
    sigmoid_loss,
    sup_con,
)
from sslkernels.ops.patch_mask import (
    MaskedTokens,
    MaskIndices,
    gather_tokens,
    masked_patch_embed,
    patch_mask,
    random_masking,
    restore_tokens,
)

__all__ = [
    "ClipStats",
    "ContrastiveStats",
    "MaskIndices",
    "MaskedTokens",
    "clip_loss",
    "decoupled_nt_xent",
    "ema_update_",
    "gather_tokens",
    "hard_nt_xent",
    "info_nce",
    "masked_patch_embed",
    "mises_fisher_weights",
    "nt_xent",
    "patch_mask",
    "random_masking",
    "restore_tokens",
    "sigmoid_loss",
    "sup_con",
]

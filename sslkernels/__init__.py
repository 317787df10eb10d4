"""Fused kernels for self-supervised training.

The functions are here; `sslkernels.nn` has the modules, such as the momentum teacher `sslkernels.nn.EMATeacher`.
"""

from sslkernels._library import Backend, backends
from sslkernels.ops import (
    ClipStats,
    ContrastiveStats,
    MaskedTokens,
    MaskIndices,
    clip_loss,
    decoupled_nt_xent,
    ema_update_,
    gather_tokens,
    hard_nt_xent,
    info_nce,
    masked_patch_embed,
    mises_fisher_weights,
    nt_xent,
    patch_mask,
    random_masking,
    restore_tokens,
    sigmoid_loss,
    sup_con,
)

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "ClipStats",
    "ContrastiveStats",
    "MaskIndices",
    "MaskedTokens",
    "backends",
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

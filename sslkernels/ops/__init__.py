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
from sslkernels.ops.patch_loss import masked_patch_loss

__all__ = [
    "ClipStats",
    "ContrastiveStats",
    "clip_loss",
    "decoupled_nt_xent",
    "ema_update_",
    "hard_nt_xent",
    "info_nce",
    "masked_patch_loss",
    "mises_fisher_weights",
    "nt_xent",
    "sigmoid_loss",
    "sup_con",
]

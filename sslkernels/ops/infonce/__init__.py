"""Contrastive losses whose matrix of logits never exists in memory."""

from sslkernels.ops.infonce.clip import ClipStats, clip_loss, sigmoid_loss
from sslkernels.ops.infonce.contrast import ContrastiveStats
from sslkernels.ops.infonce.info_nce import info_nce
from sslkernels.ops.infonce.nt_xent import decoupled_nt_xent, hard_nt_xent, mises_fisher_weights, nt_xent
from sslkernels.ops.infonce.sup_con import sup_con

__all__ = [
    "ClipStats",
    "ContrastiveStats",
    "clip_loss",
    "decoupled_nt_xent",
    "hard_nt_xent",
    "info_nce",
    "mises_fisher_weights",
    "nt_xent",
    "sigmoid_loss",
    "sup_con",
]

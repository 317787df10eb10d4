"""Fused kernels for self-supervised training.

The functions are here; `sslkernels.nn` has the modules, such as the momentum teacher `sslkernels.nn.EMATeacher`.
"""

from sslkernels._library import Backend, backends, empty_cache
from sslkernels.ops import (
    BlockSizes,
    ClipStats,
    ContrastiveStats,
    MaskedTokens,
    MaskIndices,
    MultiBlockMasks,
    block_mask,
    clip_loss,
    decoupled_nt_xent,
    ema_update_,
    gather_tokens,
    hard_nt_xent,
    info_nce,
    masked_patch_embed,
    masked_patch_loss,
    mises_fisher_weights,
    multi_block_mask,
    multi_block_sizes,
    nt_xent,
    patch_mask,
    random_masking,
    restore_tokens,
    sigmoid_loss,
    span_mask,
    sup_con,
    tube_mask,
)

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "BlockSizes",
    "ClipStats",
    "ContrastiveStats",
    "MaskIndices",
    "MaskedTokens",
    "MultiBlockMasks",
    "backends",
    "block_mask",
    "clip_loss",
    "decoupled_nt_xent",
    "ema_update_",
    "empty_cache",
    "gather_tokens",
    "hard_nt_xent",
    "info_nce",
    "masked_patch_embed",
    "masked_patch_loss",
    "mises_fisher_weights",
    "multi_block_mask",
    "multi_block_sizes",
    "nt_xent",
    "patch_mask",
    "random_masking",
    "restore_tokens",
    "sigmoid_loss",
    "span_mask",
    "sup_con",
    "tube_mask",
]

"""Masking of patch tokens: which stay, the tokens themselves, and how a decoder gets them back."""

from sslkernels.ops.patch_mask.masking import MaskedTokens, MaskIndices, patch_mask, random_masking
from sslkernels.ops.patch_mask.patches import masked_patch_embed
from sslkernels.ops.patch_mask.tokens import gather_tokens, restore_tokens

__all__ = [
    "MaskIndices",
    "MaskedTokens",
    "gather_tokens",
    "masked_patch_embed",
    "patch_mask",
    "random_masking",
    "restore_tokens",
]

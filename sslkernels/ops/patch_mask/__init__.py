"""Masking of patch tokens: which stay, the tokens themselves, how a decoder gets them back; masks of other shapes."""

from sslkernels.ops.patch_mask.block_mask import block_mask
from sslkernels.ops.patch_mask.masking import MaskedTokens, MaskIndices, patch_mask, random_masking
from sslkernels.ops.patch_mask.multi_block_mask import BlockSizes, MultiBlockMasks, multi_block_mask, multi_block_sizes
from sslkernels.ops.patch_mask.patches import masked_patch_embed
from sslkernels.ops.patch_mask.span_mask import span_mask
from sslkernels.ops.patch_mask.tokens import gather_tokens, restore_tokens
from sslkernels.ops.patch_mask.tube_mask import tube_mask

__all__ = [
    "BlockSizes",
    "MaskIndices",
    "MaskedTokens",
    "MultiBlockMasks",
    "block_mask",
    "gather_tokens",
    "masked_patch_embed",
    "multi_block_mask",
    "multi_block_sizes",
    "patch_mask",
    "random_masking",
    "restore_tokens",
    "span_mask",
    "tube_mask",
]

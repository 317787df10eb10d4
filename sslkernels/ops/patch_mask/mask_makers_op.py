"""The torch operators of the mask makers: schemas and shapes. There is nothing to differentiate.

Under CUDA they are compiled, or else the definition: Triton has none, since one lane's sequential algorithm is not what
it is for.
"""

from __future__ import annotations

import torch

from sslkernels import _library
from sslkernels.ops.patch_mask import mask_makers_reference as reference

# seed: 0-dim int64, read on its device. sample_ids (N,) int64, or None for 0 ... N - 1. In the other tensors, a number
# out of range is an error on the CPU; a GPU, which is not waited for, takes the nearest one in range.
SCHEMAS = {
    # num_masked (N,) int64. aspects: each aspect, height to width, and its inverse, times 2^16. attempts: how many
    # rectangles are tried at most. mask (N, H, W) bool.
    "block_mask_fwd": (
        "(Tensor seed, Tensor? sample_ids, Tensor num_masked, SymInt height, SymInt width, SymInt min_patches,"
        " SymInt max_patches, int[] aspects, SymInt attempts) -> Tensor mask"
    ),
    # context_ids (N, h w of the context), of which the first counts[n] are there, in random order, and the rest repeat
    # the first; target_ids (N, T, h w of a target) int64; masks (N, H, W) and (N, T, H, W) bool
    "multi_block_mask_fwd": (
        "(Tensor seed, Tensor? sample_ids, SymInt samples, SymInt height, SymInt width, SymInt target_height,"
        " SymInt target_width, SymInt context_height, SymInt context_width, SymInt num_targets, SymInt min_context,"
        " bool allow_overlap) -> (Tensor context_ids, Tensor context_counts, Tensor target_ids, Tensor context_mask,"
        " Tensor target_mask)"
    ),
    # lengths (N,) int64; num_spans (N,) int64, or None where they are drawn: `share` of a sample's tokens, in units of
    # 2^-32, over the length of a span. mask (N, tokens) bool.
    "span_mask_fwd": (
        "(Tensor seed, Tensor? sample_ids, Tensor lengths, Tensor? num_spans, SymInt tokens, SymInt span_length,"
        " int share, SymInt min_spans, bool overlap) -> Tensor mask"
    ),
}

for _name, _schema in SCHEMAS.items():
    torch.library.define(f"sslkernels::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"sslkernels::{_name}", "default", getattr(reference, _name))
    _library.claim_cuda(_name, has_triton=False)


@torch.library.register_fake("sslkernels::block_mask_fwd")
def _(seed, sample_ids, num_masked, height, width, min_patches, max_patches, aspects, attempts):
    return seed.new_empty(num_masked.shape[0], height, width, dtype=torch.bool)


@torch.library.register_fake("sslkernels::multi_block_mask_fwd")
def _(
    seed, sample_ids, samples, height, width, target_height, target_width, context_height, context_width, num_targets,
    min_context, allow_overlap,
):  # fmt: skip
    return (
        seed.new_empty(samples, context_height * context_width),
        seed.new_empty(samples),
        seed.new_empty(samples, num_targets, target_height * target_width),
        seed.new_empty(samples, height, width, dtype=torch.bool),
        seed.new_empty(samples, num_targets, height, width, dtype=torch.bool),
    )


@torch.library.register_fake("sslkernels::span_mask_fwd")
def _(seed, sample_ids, lengths, num_spans, tokens, span_length, share, min_spans, overlap):
    return seed.new_empty(lengths.shape[0], tokens, dtype=torch.bool)


def family(backend: str | None):
    """What has the operators of ``backend`` as attributes."""
    return reference if backend == "reference" else torch.ops.sslkernels

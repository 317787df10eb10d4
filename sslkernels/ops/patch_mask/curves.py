"""The scaling curves of patch masking and of the mask makers."""

from __future__ import annotations

import functools
import math

from sslkernels.ops.patch_mask.cases import _embed_case, _gather_case, _mask_case, _masking_case, _restore_case
from sslkernels.ops.patch_mask.mask_maker_cases import _block, _multi, _span, _tube, dinov2_counts, wav2vec_lengths
from sslkernels.registry import curve

NS = (4, 16, 64, 256)
LS = (49, 196, 784, 3136)
DS = (192, 384, 768, 1536)
GRIDS = (64, 256, 1024)  # patches of a square


def _over_tokens(make):
    """``make(name, samples, tokens, columns)`` is an input."""
    return (
        curve("N", "L = 196, D = 768", NS, lambda name, samples: make(name, samples, 196, 768)),
        curve("L", "N = 16, D = 768", LS, lambda name, tokens: make(name, 16, tokens, 768)),
        curve("D", "N = 64, L = 196", DS, lambda name, columns: make(name, 64, 196, columns)),
    )


def _over_grids(make, samples=(8, 32, 128)):
    """``make(name, samples, side)`` is an input on a square grid."""
    return (
        curve("N", "L = 256", samples, lambda name, count: make(name, count, 16)),
        curve("L", "N = 32", GRIDS, lambda name, patches: make(name, 32, math.isqrt(patches))),
    )


def _blocks(name, samples, side):
    """As DINOv2 asks for them: no rectangle covers more than half of the grid."""
    counts = functools.partial(dinov2_counts, samples, side * side)
    return _block(name, samples, (side, side), num_masked=counts, max_patches=side * side // 2)


def _multi_blocks(name, samples, side):
    """I-JEPA's, in proportion to the grid."""
    target = (round(side * 7 / 16), round(side * 6 / 16))
    return _multi(name, samples, (side, side), target=target, context=(side - 1, side - 1))


def _spans(name, samples, tokens):
    return _span(name, samples, tokens, lengths=functools.partial(wav2vec_lengths, samples, tokens))


def _embedding(name, samples, columns):
    return _embed_case(name, (samples, 3, 224, 224), (16, 16), 49, columns)


CURVES = {
    "random_masking": _over_tokens(_masking_case),
    "patch_mask": (
        curve("N", "L = 196", (*NS, 1024), lambda name, samples: _mask_case(name, samples, 196)),
        curve("L", "N = 64", (*LS, 12544), lambda name, tokens: _mask_case(name, 64, tokens)),
    ),
    "gather_tokens": _over_tokens(lambda name, n, tokens, d: _gather_case(name, n, tokens, tokens // 4, d)),
    "restore_tokens": _over_tokens(
        lambda name, n, tokens, d: _restore_case(name, n, tokens, tokens // 4, d, pos=tokens)
    ),
    "masked_patch_embed": (
        curve(
            "N",
            "L = 196, D = 768",
            (1, 4, 16, 64),
            lambda name, n: _embed_case(name, (n, 3, 224, 224), (16, 16), 49, 768),
        ),
        curve("D", "N = 8, L = 196", DS, lambda name, d: _embed_case(name, (8, 3, 224, 224), (16, 16), 49, d)),
    ),
    "block_mask": _over_grids(_blocks),
    "multi_block_mask": _over_grids(_multi_blocks),
    "span_mask": (
        curve("N", "L = 1500", (8, 32, 128), lambda name, samples: _spans(name, samples, 1500)),
        curve("L", "N = 32", (375, 1500, 6000), lambda name, tokens: _spans(name, 32, tokens)),
    ),
    "tube_mask": (
        curve(
            "N",
            "8 x 14 x 14, L = 1568",
            (8, 32, 128),
            lambda name, samples: _tube(name, samples, (8, 14, 14), mask_ratio=0.9),
        ),
    ),
}

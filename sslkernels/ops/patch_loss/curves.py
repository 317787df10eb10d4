"""The scaling curves of the masked patch loss."""

from __future__ import annotations

from sslkernels.ops.patch_loss.cases import _case
from sslkernels.registry import curve

SIDES = {side**2: 16 * side for side in (7, 14, 28)}  # tokens: height and width of an image in patches of 16

CURVES = {
    "masked_patch_loss": (
        curve("N", "images of 224 x 224", (1, 4, 16, 64), lambda name, n: _case(name, (n, 3, 224, 224), 16)),
        curve("L", "N = 16", SIDES, lambda name, tokens: _case(name, (16, 3, SIDES[tokens], SIDES[tokens]), 16)),
    )
}

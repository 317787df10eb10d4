"""The scaling curves of the moving average: large tensors are limited by bandwidth, many small ones by their number."""

from __future__ import annotations

from sslkernels.ops.ema.cases import _case
from sslkernels.registry import curve

SIZE = 2**15

CURVES = {
    "ema_update_": (
        curve(
            "P", f"tensors of {SIZE}", (2**15, 2**18, 2**21, 2**24),
            lambda name, parameters: _case(name, parameters // SIZE * [(SIZE,)], 0.996),
        ),
        curve("T", "64 elements each", (10, 100, 1000), lambda name, tensors: _case(name, tensors * [(64,)], 0.996)),
    )
}  # fmt: skip

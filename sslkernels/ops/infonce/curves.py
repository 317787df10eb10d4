"""The scaling curves of the contrastive ops."""

from __future__ import annotations

from sslkernels.ops.infonce.cases import _case, _clip, _info_nce, _sup_con
from sslkernels.registry import curve

NS = (64, 256, 1024, 4096)
DS = (32, 128, 512, 2048)


def _over_rows_and_columns(make):
    """``make(name, rows, columns)`` is an input."""
    return (
        curve("N", "D = 128", NS, lambda name, rows: make(name, rows, 128)),
        curve("D", "N = 1024", DS, lambda name, columns: make(name, 1024, columns)),
    )


CURVES = {
    "nt_xent": _over_rows_and_columns(lambda name, n, d: _case(name, n, d, 0.1)),
    "decoupled_nt_xent": _over_rows_and_columns(lambda name, n, d: _case(name, n, d, 0.1)),
    "hard_nt_xent": _over_rows_and_columns(lambda name, n, d: _case(name, n, d, 0.5)),
    "info_nce": _over_rows_and_columns(lambda name, n, d: _info_nce(name, n, d, 0.1)),
    "info_nce_queue": (
        curve(
            "K", "N = 256, D = 128", (1024, 4096, 16384, 65536),
            lambda name, keys: _info_nce(name, 256, 128, 0.07, negatives=keys),
        ),
        curve(
            "N", "K = 16384, D = 128", (16, 64, 256, 1024),
            lambda name, rows: _info_nce(name, rows, 128, 0.07, negatives=16384),
        ),
        curve(
            "D", "N = 256, K = 16384", (32, 128, 512),
            lambda name, columns: _info_nce(name, 256, columns, 0.07, negatives=16384),
        ),
    ),
    "clip_loss": _over_rows_and_columns(lambda name, n, d: _clip(name, n, n, d, 14.0)),
    "sup_con": _over_rows_and_columns(lambda name, n, d: _sup_con(name, n, d, 100, 0.1)),
    "sigmoid_loss": _over_rows_and_columns(lambda name, n, d: _clip(name, n, n, d, 10.0, -10.0)),
}  # fmt: skip

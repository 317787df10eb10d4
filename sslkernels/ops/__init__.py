"""The public ops, each from its slice."""

from sslkernels.ops.ema import ema_update_
from sslkernels.ops.infonce import ContrastiveStats, nt_xent

__all__ = ["ContrastiveStats", "ema_update_", "nt_xent"]

"""Fused kernels for self-supervised training."""

from sslkernels._library import Backend, backends
from sslkernels.ops import ContrastiveStats, ema_update_, nt_xent

__version__ = "0.1.0"

__all__ = ["Backend", "ContrastiveStats", "backends", "ema_update_", "nt_xent"]

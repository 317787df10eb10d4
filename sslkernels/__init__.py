"""Fused kernels for self-supervised training."""

from sslkernels._library import Backend, backends
from sslkernels.ops import ContrastiveStats, nt_xent

__version__ = "0.1.0"

__all__ = ["Backend", "ContrastiveStats", "backends", "nt_xent"]

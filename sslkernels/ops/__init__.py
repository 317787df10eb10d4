"""The public ops, each from its slice."""

from sslkernels.ops.infonce import ContrastiveStats, nt_xent

__all__ = ["ContrastiveStats", "nt_xent"]

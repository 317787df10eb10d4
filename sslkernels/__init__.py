"""Fused kernels for self-supervised training.

The functions are here; `sslkernels.nn` has the modules, such as the momentum teacher `sslkernels.nn.EMATeacher`.
"""

from sslkernels._library import Backend, backends
from sslkernels.ops import ContrastiveStats, ema_update_, nt_xent

__version__ = "0.1.0"

__all__ = ["Backend", "ContrastiveStats", "backends", "ema_update_", "nt_xent"]

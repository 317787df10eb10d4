"""Modules: the momentum teacher and the schedules of its momentum.

`EMATeacher` follows a student. `ModelEmaV3` and `AveragedModel` are the same with the defaults of timm's and torch's.
"""

from sslkernels.nn.drop_in import AveragedModel, ModelEmaV3
from sslkernels.nn.ema import EMATeacher
from sslkernels.nn.memory_bank import MemoryBank
from sslkernels.nn.momentum import ConstantMomentum, CosineMomentum, EqualMomentum, PowerMomentum, WarmupMomentum

__all__ = [
    "AveragedModel",
    "ConstantMomentum",
    "CosineMomentum",
    "EMATeacher",
    "EqualMomentum",
    "MemoryBank",
    "ModelEmaV3",
    "PowerMomentum",
    "WarmupMomentum",
]

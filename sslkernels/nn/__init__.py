"""Modules: contrastive losses, the memory bank, patch masking, the momentum teacher and schedules of its momentum.

Losses have the constructors of those whose place they take: `NTXentLoss`, `DCLLoss`, `DCLWLoss` and `MemoryBank` of
lightly's, `InfoNCELoss` of info-nce-pytorch's, `ClipLoss` and `SigLipLoss` of open_clip's, `SupConLoss` of
SupContrast's, and `PatchMask` that of timm's patch dropout. `EMATeacher` follows a student; `ModelEmaV3` and
`AveragedModel` are the same with the defaults of timm's and torch's.
"""

from sslkernels.nn.contrastive import DCLLoss, DCLWLoss, HardNegativeNTXentLoss, InfoNCELoss, NTXentLoss
from sslkernels.nn.drop_in import AveragedModel, ModelEmaV3
from sslkernels.nn.ema import EMATeacher
from sslkernels.nn.masking import PatchMask
from sslkernels.nn.memory_bank import MemoryBank
from sslkernels.nn.momentum import ConstantMomentum, CosineMomentum, EqualMomentum, PowerMomentum, WarmupMomentum
from sslkernels.nn.sup_con import SupConLoss
from sslkernels.nn.towers import ClipLoss, SigLipLoss

__all__ = [
    "AveragedModel",
    "ClipLoss",
    "ConstantMomentum",
    "CosineMomentum",
    "DCLLoss",
    "DCLWLoss",
    "EMATeacher",
    "EqualMomentum",
    "HardNegativeNTXentLoss",
    "InfoNCELoss",
    "MemoryBank",
    "ModelEmaV3",
    "NTXentLoss",
    "PatchMask",
    "PowerMomentum",
    "SigLipLoss",
    "SupConLoss",
    "WarmupMomentum",
]

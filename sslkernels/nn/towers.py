"""The losses of two towers, images and texts, as modules with the interface of open_clip's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from sslkernels.nn.processes import Processes
from sslkernels.ops import clip_loss, sigmoid_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

EXCHANGE_OF = {"bidir": "ring", "shift": "ring", "reduce": "gather", "gather": "gather"}  # of SigLipLoss's dist_impl
Scalar = float | torch.Tensor


class TowersLoss(nn.Module):
    """What the two have in common: who the processes are, and the matrix of logits for those who want to see it."""

    def __init__(self, rank: int, world_size: int, group: ProcessGroup | None, exchange: str):
        super().__init__()
        self.rank = rank
        self.world_size = world_size
        name = type(self).__name__
        for argument, value, least in (("world_size", world_size, 1), ("rank", rank, 0)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: {argument} must be an int, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"{name}: {argument} must be at least {least}, got {value}")
        if rank >= world_size:
            raise ValueError(f"{name}: rank must be less than world_size {world_size}, got {rank}")
        self.processes = Processes(name, world_size > 1, group, exchange)

    def get_logits(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        logit_scale: Scalar,
        logit_bias: Scalar | None = None,
    ) -> torch.Tensor:
        """(N, M) logits of the images and texts of this process: the matrix that the loss itself never forms."""
        logits = logit_scale * image_features @ text_features.T
        return logits if logit_bias is None else logits + logit_bias

    def _options(self) -> dict:
        """Arguments of the public function, checked against what the constructor was told."""
        count = self.processes.count()
        if self.world_size not in (1, count):
            raise ValueError(
                f"{type(self).__name__}: world_size must be that of the process group, {count}, got {self.world_size}"
            )
        return self.processes.options()

    def extra_repr(self) -> str:
        return f"rank={self.rank}, world_size={self.world_size}"


class ClipLoss(TowersLoss):
    """In place of ``open_clip.ClipLoss``: `sslkernels.clip_loss`.

    ``forward(image_features, text_features, logit_scale, logit_bias=None, output_dict=False)`` takes the normalised
    (N, D) features of both towers and gives the loss, or ``{"contrastive_loss": loss}``.

    Args:
        local_loss, gather_with_grad: ignored, since the gradients are the exact ones of the whole batch either way.
        cache_labels: ignored, since there are no labels.
        rank, world_size: of the processes whose batches are taken together, if they are more than one.
        use_horovod: must be False.
        group, exchange: of which processes, and how, see `sslkernels.clip_loss`; a group turns gathering on.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Where it differs from open_clip: docs/migration-losses.md.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        group: ProcessGroup | None = None,
        exchange: str = "gather",
    ):
        super().__init__(rank, world_size, group, exchange)
        if use_horovod:
            raise ValueError("ClipLoss: use_horovod must be False: processes are those of torch.distributed")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.use_horovod = use_horovod

    def forward(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        logit_scale: Scalar,
        logit_bias: Scalar | None = None,
        output_dict: bool = False,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        loss = clip_loss(image_features, text_features, logit_scale, logit_bias, **self._options())
        return {"contrastive_loss": loss} if output_dict else loss

    def get_logits(  # type: ignore[override]  # as in open_clip, whose two losses are no relatives
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        logit_scale: Scalar,
        logit_bias: Scalar | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, M) logits per image and (M, N) per text of this process: the matrix that the loss itself never forms."""
        logits = super().get_logits(image_features, text_features, logit_scale, logit_bias)
        return logits, logits.T


class SigLipLoss(TowersLoss):
    """In place of ``open_clip.SigLipLoss``: `sslkernels.sigmoid_loss`.

    ``forward(image_features, text_features, logit_scale, logit_bias, output_dict=False)`` takes the normalised (N, D)
    features of both towers and gives the loss, or ``{"contrastive_loss": loss}``.

    Args:
        cache_labels: ignored, since there are no labels.
        rank, world_size: of the processes whose batches are taken together, if they are more than one.
        dist_impl: how texts travel: "bidir" (None) and "shift" in a ring, "gather" and "reduce" by gathering.
        group: of which processes; a group turns gathering on.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Where it differs from open_clip: docs/migration-losses.md.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        group: ProcessGroup | None = None,
    ):
        dist_impl = "bidir" if dist_impl is None else dist_impl
        if dist_impl not in EXCHANGE_OF:
            known = ", ".join(map(repr, EXCHANGE_OF))
            raise ValueError(f"SigLipLoss: dist_impl must be one of {known}, or None, got {dist_impl!r}")
        super().__init__(rank, world_size, group, EXCHANGE_OF[dist_impl])
        self.cache_labels = cache_labels
        self.dist_impl = dist_impl

    def forward(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        logit_scale: Scalar,
        logit_bias: Scalar | None,
        output_dict: bool = False,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        bias = 0.0 if logit_bias is None else logit_bias
        loss = sigmoid_loss(image_features, text_features, logit_scale, bias, **self._options())
        return {"contrastive_loss": loss} if output_dict else loss

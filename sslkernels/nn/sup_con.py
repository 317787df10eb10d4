"""The supervised contrastive loss as a module, with the interface of the SupContrast repository."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sslkernels.nn.contrastive import ContrastiveLoss, check_temperature
from sslkernels.ops import sup_con
from sslkernels.ops.infonce.arguments import check_integers
from sslkernels.ops.infonce.sup_con_mask import masked_sup_con

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CONTRAST_MODES = ("all", "one")
FIRST_SAMPLE_ID = 1 << 62  # above any label; the samples of process r count from here + r * SAMPLES_PER_PROCESS
SAMPLES_PER_PROCESS = 1 << 40


class SupConLoss(ContrastiveLoss):
    r"""In place of the SupContrast repository's ``SupConLoss``: `sslkernels.sup_con` over several views of samples.

    ``forward(features, labels=None, mask=None)`` takes (N, V, ...) features, V views of N samples, which it does not
    normalise, and either (N,) labels or an (N, N) mask, whose entry (i, j) says whether, or how much, sample j is a
    positive of sample i. With neither, the views of a sample are each other's only positives: SimCLR's loss, which also
    is what a label of -1 asks for. The result is the mean over all anchors, times ``temperature / base_temperature``.

    Args:
        temperature: a float that is not 0, or a floating-point tensor of one element; an ``nn.Parameter`` is learnt.
        contrast_mode: "all" views are anchors, or "one": the first of each sample.
        base_temperature: a float that is not 0.
        group, exchange: take the batches of these processes together, see `sslkernels.sup_con`; not with a mask.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Where it differs from SupContrast: docs/migration-losses.md.

    Source: Khosla et al., Supervised Contrastive Learning (2020), equation 2.
    """

    def __init__(
        self,
        temperature: float | torch.Tensor = 0.07,
        contrast_mode: str = "all",
        base_temperature: float = 0.07,
        *,
        group: ProcessGroup | None = None,
        exchange: str = "gather",
    ):
        super().__init__(temperature, False, group, exchange)
        check_temperature("SupConLoss", base_temperature, "base_temperature")
        if contrast_mode not in CONTRAST_MODES:
            raise ValueError(f"SupConLoss: contrast_mode must be 'all' or 'one', got {contrast_mode!r}")
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature

    def forward(
        self, features: torch.Tensor, labels: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        if not isinstance(features, torch.Tensor) or features.dim() < 3:
            given = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
            raise ValueError(f"SupConLoss: features must be (N, V, ...), at least 3 dimensions, got {given}")
        if labels is not None and mask is not None:
            raise ValueError("SupConLoss: labels and mask must not both be given")
        views = features.flatten(2).transpose(0, 1)  # (V, N, D)
        if mask is None:
            ids = self._ids(labels, views.shape[1], features.device).repeat(len(views))
            options = self.processes.options()
            rows = sup_con(views.flatten(0, 1), ids, self.temperature, normalize=False, reduction="none", **options)
            rows = rows.reshape(views.shape[:2])
        elif self.processes.count() > 1:
            raise ValueError("SupConLoss: mask must be None where the batches of several processes are taken together")
        else:
            rows = masked_sup_con(views, mask, self.temperature)
        anchors = rows[:1] if self.contrast_mode == "one" else rows
        return self.processes.mean(anchors.flatten()) * (self.temperature / self.base_temperature)

    def _ids(self, labels: torch.Tensor | None, samples: int, device: torch.device) -> torch.Tensor:
        """(N,) int64: equal for positives of each other, in all processes."""
        first = FIRST_SAMPLE_ID + self.processes.rank() * SAMPLES_PER_PROCESS
        own = torch.arange(first, first + samples, device=device)
        if labels is None:
            return own
        if isinstance(labels, torch.Tensor) and labels.dim() == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        labels = check_integers("SupConLoss", "labels", labels, samples, device)
        return torch.where(labels < 0, own, labels)

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, contrast_mode={self.contrast_mode!r}, "
            f"base_temperature={self.base_temperature}"
        )

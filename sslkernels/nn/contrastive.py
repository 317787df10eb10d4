"""Contrastive losses of one tower as modules, with the constructors of those of lightly and info-nce-pytorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from sslkernels.nn.memory_bank import MemoryBank
from sslkernels.nn.processes import Processes
from sslkernels.ops import decoupled_nt_xent, hard_nt_xent, info_nce, mises_fisher_weights, nt_xent
from sslkernels.ops.infonce.arguments import check_pair, check_reduction
from sslkernels.ops.infonce.info_nce import MODES

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MIN_TEMPERATURE = 1e-8  # of a number; its inverse stays in range


class ContrastiveLoss(nn.Module):
    """What these losses share: a temperature and the processes whose batches are taken together."""

    def __init__(
        self,
        temperature: float | torch.Tensor,
        gather_distributed: bool,
        group: ProcessGroup | None,
        exchange: str,
    ):
        super().__init__()
        name = type(self).__name__
        check_temperature(name, temperature)
        self.temperature = temperature
        self.processes = Processes(name, gather_distributed, group, exchange)
        self.gather_distributed = self.processes.wanted

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, gather_distributed={self.gather_distributed}"


class NTXentLoss(ContrastiveLoss):
    """In place of ``lightly.loss.NTXentLoss``: `sslkernels.nt_xent`, and with a memory bank `sslkernels.info_nce`.

    Without a bank ``forward(out0, out1)`` takes the two views, (N, D) each, whose rows are each other's negatives. With
    one, ``out0`` are the queries, ``out1`` their positive keys, and the bank holds the negatives: MoCo's loss. The keys
    are enqueued after the loss has seen the bank, and only where ``out0`` requires grad, so that an evaluation leaves
    the bank alone.

    Args:
        temperature: a float that is not 0, or a floating-point tensor of one element; an ``nn.Parameter`` is learnt.
        memory_bank_size: (K, D), or 0 for none; ``memory_bank`` is a `MemoryBank`.
        gather_distributed: take the batches of all processes together: negatives without a bank, keys for the bank
            with one.
        group, exchange: of which processes, and how, see `sslkernels.nt_xent`; a group turns gathering on.
        memory_bank_dtype: of the bank; bfloat16 takes half the memory.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Where it differs from lightly: docs/migration-losses.md.
    """

    eps = MIN_TEMPERATURE

    def __init__(
        self,
        temperature: float | torch.Tensor = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        *,
        group: ProcessGroup | None = None,
        exchange: str = "gather",
        memory_bank_dtype: torch.dtype = torch.float32,
    ):
        super().__init__(temperature, gather_distributed, group, exchange)
        self.memory_bank = MemoryBank(memory_bank_size, gather_distributed, group=group, dtype=memory_bank_dtype)

    def forward(self, out0: torch.Tensor, out1: torch.Tensor) -> torch.Tensor:
        bank = self.memory_bank
        if not bank.enabled:
            return nt_xent(out0, out1, self.temperature, **self.processes.options())
        if isinstance(out0, torch.Tensor):  # what is none gets its error below
            bank.follow(out0.device)
        loss = info_nce(out0, out1, bank.keys, self.temperature)
        if out0.requires_grad:
            bank.enqueue(F.normalize(out1.detach(), dim=1))
        return loss


class HardNegativeNTXentLoss(ContrastiveLoss):
    """`sslkernels.hard_nt_xent` as a module: hard negatives weigh more, false ones are estimated away.

    Args:
        temperature: a float that is not 0, or a floating-point tensor of one element; an ``nn.Parameter`` is learnt.
        beta: how strongly a negative's logit raises its own weight; >= 0, 0 being the debiased loss.
        tau_plus: the share of negatives that are expected to be of the row's own class; in [0, 1).

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """

    def __init__(self, temperature: float | torch.Tensor = 0.5, beta: float = 1.0, tau_plus: float = 0.1):
        super().__init__(temperature, False, None, "gather")
        self.beta = beta
        self.tau_plus = tau_plus

    def forward(self, out0: torch.Tensor, out1: torch.Tensor) -> torch.Tensor:
        return hard_nt_xent(out0, out1, self.temperature, beta=self.beta, tau_plus=self.tau_plus)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, beta={self.beta}, tau_plus={self.tau_plus}"


class DCLLoss(ContrastiveLoss):
    """In place of ``lightly.loss.DCLLoss``: `sslkernels.decoupled_nt_xent`.

    Args:
        temperature: a float that is not 0, or a floating-point tensor of one element; an ``nn.Parameter`` is learnt.
        weight_fn: called with the normalised rows of two views, (N, D) in float32 (float64 for float64), gives the
            (N,) weights of the positives of the first; called for both orders. The gradient passes through. None: ones.
        gather_distributed: take the batches of all processes together. ``weight_fn`` sees the rows of its own process.
        group, exchange: of which processes, and how, see `sslkernels.nt_xent`; a group turns gathering on.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Where it differs from lightly: docs/migration-losses.md.
    """

    def __init__(
        self,
        temperature: float | torch.Tensor = 0.1,
        weight_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        gather_distributed: bool = False,
        *,
        group: ProcessGroup | None = None,
        exchange: str = "gather",
    ):
        super().__init__(temperature, gather_distributed, group, exchange)
        if weight_fn is not None and not callable(weight_fn):
            raise TypeError(
                f"{type(self).__name__}: weight_fn must be callable or None, got {type(weight_fn).__name__}"
            )
        self.weight_fn = weight_fn

    def forward(self, out0: torch.Tensor, out1: torch.Tensor) -> torch.Tensor:
        if self.weight_fn is None:
            return decoupled_nt_xent(out0, out1, self.temperature, **self.processes.options())
        check_pair(type(self).__name__, "out0", out0, "out1", out1)
        z0, z1 = (unit_rows(out) for out in (out0, out1))
        weight = self._weights(self.weight_fn, z0, z1)
        loss = decoupled_nt_xent(
            out0, out1, self.temperature, positive_weight=weight.detach(), **self.processes.options()
        )
        if weight.requires_grad:  # the loss has -weight * logit in it
            through = -weight * ((z0 * z1).sum(dim=1).repeat(2) / self.temperature).detach()
            loss = loss + self.processes.mean(through - through.detach())
        return loss

    def _weights(self, weight_fn: Callable[..., torch.Tensor], z0: torch.Tensor, z1: torch.Tensor) -> torch.Tensor:
        """(2N,)"""
        weights = [weight_fn(z0, z1), weight_fn(z1, z0)]
        for weight in weights:
            if not isinstance(weight, torch.Tensor) or weight.shape != z0.shape[:1]:
                given = tuple(weight.shape) if isinstance(weight, torch.Tensor) else type(weight).__name__
                raise ValueError(f"{type(self).__name__}: weight_fn must give ({len(z0)},) weights, got {given}")
        return torch.cat(weights)


class DCLWLoss(DCLLoss):
    """In place of ``lightly.loss.DCLWLoss``: `DCLLoss` with the weights of `sslkernels.mises_fisher_weights`.

    Args:
        temperature, gather_distributed, group, exchange: as for `DCLLoss`; gathered, the weights are of all pairs.
        sigma: what the similarities in the weights are divided by.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Where it differs from lightly: docs/migration-losses.md.
    """

    def __init__(
        self,
        temperature: float | torch.Tensor = 0.1,
        sigma: float = 0.5,
        gather_distributed: bool = False,
        *,
        group: ProcessGroup | None = None,
        exchange: str = "gather",
    ):
        check_temperature(type(self).__name__, sigma, "sigma")
        weights = partial(mises_fisher_weights, sigma=sigma)
        super().__init__(temperature, weights, gather_distributed, group=group, exchange=exchange)

    def _weights(self, weight_fn: Callable[..., torch.Tensor], z0: torch.Tensor, z1: torch.Tensor) -> torch.Tensor:
        return weight_fn(z0, z1, group=self.processes.active()).repeat(2)


class InfoNCELoss(ContrastiveLoss):
    """In place of ``info_nce.InfoNCE`` of info-nce-pytorch: `sslkernels.info_nce` as a module.

    ``forward(query, positive_key, negative_keys=None)`` takes (N, D), (N, D) and, as negatives, (K, D) for all queries,
    (N, M, D) where they are "paired", or None for the positive keys of the other queries.

    Args:
        temperature: a float that is not 0, or a floating-point tensor of one element; an ``nn.Parameter`` is learnt.
        reduction: "mean" over the queries, "sum", or "none".
        negative_mode: "unpaired" or "paired".
        group, exchange: take the batches of these processes together, see `sslkernels.info_nce`.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Where it differs from info-nce-pytorch: docs/migration-losses.md.
    """

    def __init__(
        self,
        temperature: float | torch.Tensor = 0.1,
        reduction: str = "mean",
        negative_mode: str = "unpaired",
        *,
        group: ProcessGroup | None = None,
        exchange: str = "gather",
    ):
        super().__init__(temperature, False, group, exchange)
        check_reduction("InfoNCELoss", reduction)
        if negative_mode not in MODES:
            raise ValueError(f"InfoNCELoss: negative_mode must be 'unpaired' or 'paired', got {negative_mode!r}")
        self.reduction = reduction
        self.negative_mode = negative_mode

    def forward(
        self, query: torch.Tensor, positive_key: torch.Tensor, negative_keys: torch.Tensor | None = None
    ) -> torch.Tensor:
        return info_nce(
            query, positive_key, negative_keys, self.temperature, negative_mode=self.negative_mode,
            reduction=self.reduction, **self.processes.options(),
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}, negative_mode={self.negative_mode!r}"


def unit_rows(x: torch.Tensor) -> torch.Tensor:
    """Normalised rows in the dtype that losses are computed in."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=1)


def check_temperature(name: str, value: object, argument: str = "temperature") -> None:
    """A number that is not 0, or a floating-point tensor of one element, which the op reads where it can."""
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(
                f"{name}: {argument} must be a float or a floating-point tensor of one element, "
                f"got {value.dtype} of shape {tuple(value.shape)}"
            )
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: {argument} must be a float or a tensor, got {type(value).__name__}")
    if not MIN_TEMPERATURE <= abs(value) < math.inf:
        raise ValueError(f"{name}: {argument} must be finite and at least {MIN_TEMPERATURE} in size, got {value}")

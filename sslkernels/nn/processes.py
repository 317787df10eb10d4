"""Which processes a loss takes together, as the modules are told and as the public functions want to know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from sslkernels.distributed import EXCHANGES

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Processes:
    """The group of a module, if it wants one, and how its embeddings travel.

    Copies of a module share the group: it is a connection, not data.
    """

    def __init__(self, name: str, wanted: bool, group: ProcessGroup | None = None, exchange: str = "gather"):
        if exchange not in EXCHANGES:
            raise ValueError(f"{name}: exchange must be one of {', '.join(map(repr, EXCHANGES))}, got {exchange!r}")
        self.wanted = bool(wanted) or group is not None
        if self.wanted and not dist.is_available():
            raise ValueError(f"{name}: gathering needs a torch that is built with torch.distributed")
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"{name}: group must be a torch.distributed.ProcessGroup that has this rank, got {group!r}")
        self.group = group
        self.exchange = exchange

    def __deepcopy__(self, memo: dict) -> Processes:
        return self

    def active(self) -> ProcessGroup | None:
        """The group; None where none is wanted, none has been set up, or this process is alone in it."""
        if not self.wanted or not dist.is_initialized():
            return None
        group = dist.group.WORLD if self.group is None else self.group
        return group if group is not None and group.size() > 1 else None

    def count(self) -> int:
        group = self.active()
        return 1 if group is None else group.size()

    def rank(self) -> int:
        group = self.active()
        return 0 if group is None else group.rank()

    def options(self) -> dict[str, Any]:
        """Arguments of a public function; none where this process is alone."""
        group = self.active()
        return {} if group is None else {"group": group, "exchange": self.exchange}

    def mean(self, rows: torch.Tensor) -> torch.Tensor:
        """The mean of the rows of all processes, as the average over processes of what this gives; 0 of no rows."""
        group = self.active()
        if group is None:
            return rows.sum() / max(len(rows), 1)
        total = torch.tensor(len(rows), device=rows.device)
        dist.all_reduce(total, group=group)
        return rows.sum() * group.size() / total.clamp_min(1)

"""Which processes a loss takes together, as the modules are told and as the public functions want to know."""

from __future__ import annotations

import torch
from torch import distributed

EXCHANGES = ("gather", "ring")


class Processes:
    """The group of a module, if it wants one, and how its embeddings travel.

    Copies of a module share the group: it is a connection, not data.
    """

    def __init__(self, name: str, wanted: bool, group=None, exchange: str = "gather"):
        if exchange not in EXCHANGES:
            raise ValueError(f"{name}: exchange must be one of {', '.join(map(repr, EXCHANGES))}, got {exchange!r}")
        self.wanted = bool(wanted) or group is not None
        if self.wanted and not distributed.is_available():
            raise ValueError(f"{name}: gathering needs a torch that is built with torch.distributed")
        self.group = group
        self.exchange = exchange

    def __deepcopy__(self, memo) -> Processes:
        return self

    def count(self) -> int:
        """How many there are; 1 where none are wanted, or no group has been set up."""
        return distributed.get_world_size(self.group) if self.wanted and distributed.is_initialized() else 1

    def rank(self) -> int:
        return distributed.get_rank(self.group) if self.count() > 1 else 0

    def options(self) -> dict:
        """Arguments of a public function; none where there is only this process."""
        if self.count() == 1:
            return {}
        return {"group": self.group or distributed.group.WORLD, "exchange": self.exchange}

    @torch.no_grad()
    def gather(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """The rows of each process, without grad; each may have any number of them."""
        if self.count() == 1:
            return [rows.detach()]
        own = torch.tensor([len(rows)], device=rows.device)
        counts = [torch.empty_like(own) for _ in range(self.count())]
        distributed.all_gather(counts, own, group=self.group)
        counts = torch.cat(counts).tolist()
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        distributed.all_gather(parts, padded, group=self.group)
        return [part[:count] for part, count in zip(parts, counts, strict=True)]

    def mean(self, rows: torch.Tensor) -> torch.Tensor:
        """The mean of the rows of all processes as the average over processes of what this gives; 0 of no rows."""
        if self.count() == 1:
            return rows.sum() / max(len(rows), 1)
        total = torch.tensor(len(rows), dtype=torch.float64, device=rows.device)
        distributed.all_reduce(total, group=self.group)
        return rows.sum() * (self.count() / total.clamp_min(1)).to(rows.dtype)

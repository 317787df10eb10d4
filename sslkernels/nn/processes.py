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
            raise ValueError(f"{name}: to gather, torch must be built with torch.distributed; this one is not")
        self.group = group
        self.exchange = exchange

    def __deepcopy__(self, memo) -> Processes:
        return self

    def active(self) -> bool:
        """Whether there are others to be asked."""
        return self.wanted and distributed.is_initialized() and distributed.get_world_size(self.group) > 1

    def options(self) -> dict:
        """Arguments of a public function; none where there is only this process."""
        if not self.active():
            return {}
        return {"group": self.group or distributed.group.WORLD, "exchange": self.exchange}

    @torch.no_grad()
    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all processes in the order of their ranks, without grad; each may have any number of them."""
        if not self.active():
            return rows
        world = distributed.get_world_size(self.group)
        counts = rows.new_empty(world, dtype=torch.int64)
        distributed.all_gather(list(counts.split(1)), counts.new_tensor([len(rows)]), group=self.group)
        counts = counts.tolist()
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(world)]
        distributed.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

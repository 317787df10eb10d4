"""The batch of many processes: what the losses exchange over torch.distributed, and how.

Every function that takes ``group`` keeps this contract:

* Every rank of the group passes its own rows, as many as it has: uneven batches and ranks without a row are right. With
  ``group=None`` nothing is exchanged. Partners (two views, an image and its text) are on one rank.
* ``reduction="mean"`` gives ``world_size * sum(own rows) / (rows of all ranks)`` on each rank: the mean over ranks is
  the loss of one process that holds the whole batch. "sum" gives ``world_size * sum(own rows)``, "none" the own rows.
* Gradients cross ranks: an embedding receives those of every rank's loss. Averaged over ranks, as
  DistributedDataParallel averages those of parameters, all gradients are the ones of that single process: those that
  reach the encoder through the embeddings, of a temperature or logit_scale, and of a bias.
* All ranks call the function with the same options, and all of them differentiate the result or none does. Options,
  dtypes or numbers of columns that differ are one error on all ranks. A rank that is lost, or has failed before, gives
  the others an error of torch.distributed within the timeout of the group.

``exchange="gather"`` collects the keys of all ranks (O(N D) memory of the whole batch) and reduces their gradients by
reduce-scatter. ``exchange="ring"`` sends the keys around: each rank computes with one rank's keys while the next ones
arrive, and gradients follow one step behind (O(N D) memory of the own batch).

The sizes of the batches are exchanged first, which waits for the device. Under ``torch.compile`` all of this breaks the
graph; it is not differentiable twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

__all__ = ["gather", "world"]

EXCHANGES = ("gather", "ring")
MESSAGE = 512  # bytes in which a rank describes its arguments
Bundle = tuple[Any, ...]  # of tensors, or None in the place of one


@dataclass(frozen=True)
class Peers:
    """The ranks that share a batch."""

    group: dist.ProcessGroup
    rank: int
    size: int
    exchange: str
    counts: tuple[tuple[int, ...], ...]  # the rows that each rank has; one tuple for queries, one for keys

    @property
    def queries(self) -> tuple[int, ...]:
        return self.counts[0]

    @property
    def keys(self) -> tuple[int, ...]:
        return self.counts[-1]


def world() -> dist.ProcessGroup | None:
    """The group of all processes, or None where this one is alone: what to pass as ``group``."""
    together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if together else None


def check_exchange(op: str, group: object, exchange: str) -> None:
    if exchange not in EXCHANGES:
        raise ValueError(f"{op}: exchange must be one of {', '.join(map(repr, EXCHANGES))}, got {exchange!r}")
    if group is None:
        return
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{op}: group must be a torch.distributed.ProcessGroup that has this rank, got {group!r}")


def meet(
    op: str,
    group: dist.ProcessGroup | None,
    exchange: str,
    rows: tuple[int, ...],
    tensors: dict[str, torch.Tensor],
    **options: object,
) -> Peers | None:
    """Tell the ranks of ``group`` how many queries and keys this one has; None where it is alone.

    They must agree on op, exchange and ``options``, and in the columns, dtype and requires_grad of ``tensors``.
    """
    check_exchange(op, group, exchange)
    return None if group is None else _meet(op, group, exchange, rows, tensors, options)


@torch.compiler.disable
def _meet(
    op: str, group: dist.ProcessGroup, exchange: str, rows: tuple[int, ...], tensors: dict, options: dict
) -> Peers | None:
    if group.size() == 1:
        return None
    described = {"exchange": exchange, **options}
    for name, x in tensors.items():
        shape = ", ".join(["N", *map(str, x.shape[1:])][: x.dim()])
        gradient = " requires grad" if torch.is_grad_enabled() and x.requires_grad else ""
        described[name] = f"({shape}) {x.dtype}{gradient}"
    message = f"{op}: {', '.join(f'{name}={value}' for name, value in described.items())}".encode()
    device = next(iter(tensors.values())).device
    own = torch.tensor([*rows, *message[:MESSAGE].ljust(MESSAGE)], device=device)
    every = own.new_empty(group.size() * len(own))
    _all_gather(every, own, group)
    messages = every.view(-1, len(own)).tolist()
    said = [bytes(numbers[len(rows) :]).decode(errors="replace").strip() for numbers in messages]
    for rank, other in enumerate(said):
        if other != said[0]:
            raise ValueError(f"{op}: all ranks must pass the like; rank 0 passed [{said[0]}], rank {rank} [{other}]")
    counts = zip(*(numbers[: len(rows)] for numbers in messages), strict=True)
    return Peers(group, group.rank(), group.size(), exchange, tuple(counts))


def gather(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The rows of all ranks, in the order of the ranks; the backward sums every rank's gradient of them.

    Args:
        x: (N, ...) rows of this rank; N may differ between ranks.
        group: the ranks; None: ``x`` is returned.

    Each rank receives the gradient that all ranks' losses have for its rows: where every rank computes the loss of the
    whole batch, that is world_size times the gradient of one, which DistributedDataParallel's mean makes right.

    Raises:
        TypeError, ValueError: ``group`` is none, or the ranks differ in columns, dtype or requires_grad.
    """
    peers = meet("gather", group, "gather", (len(x),), {"x": x})
    return x if peers is None else gather_rows(x, peers, peers.queries)


def gather_rows(x: torch.Tensor, peers: Peers, counts: tuple[int, ...]) -> torch.Tensor:
    """`gather` where it is known how many rows each rank has."""
    return apply(_Gather, x, peers, counts)


def total(x: torch.Tensor, peers: Peers | None) -> torch.Tensor:
    """The sum over ranks, whose backward is the sum of all ranks' gradients."""
    return x if peers is None else apply(_Total, x, peers)


def to_owners(x: torch.Tensor, rows: torch.Tensor, peers: Peers, counts: tuple[int, ...]) -> torch.Tensor:
    """(world_size, N) what each rank has in ``x`` for this rank's N of all the rows.

    ``x`` was found from the gathered ``rows``: on a rank that had nothing to find, they keep it in the graph, so that
    every rank goes through the same exchanges backward, and in the same order.
    """
    return apply(_ToOwners, x, rows, peers, counts)


@torch.compiler.disable
def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply``, outside of every graph."""
    return function.apply(*args)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, peers: Peers, counts: tuple[int, ...]) -> torch.Tensor:
        ctx.peers, ctx.counts = peers, counts
        widest = max(counts)
        every = x.new_empty(peers.size * widest, *x.shape[1:])
        _all_gather(every, _padded(x, widest), peers.group)
        if min(counts) == widest:
            return every
        return torch.cat([part[:rows] for part, rows in zip(every.split(widest), counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        widest = max(ctx.counts)
        if min(ctx.counts) < widest:
            grad = torch.cat([_padded(part, widest) for part in grad.split(ctx.counts)])
        own = grad.new_empty(widest, *grad.shape[1:])
        _reduce_scatter(own, grad.contiguous(), ctx.peers.group)
        return own[: ctx.counts[ctx.peers.rank]], None, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, peers: Peers) -> torch.Tensor:
        ctx.peers = peers
        return _summed(x, peers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _summed(grad, ctx.peers), None


class _ToOwners(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: torch.Tensor, peers: Peers, counts: tuple[int, ...]) -> torch.Tensor:
        ctx.peers, ctx.counts = peers, counts
        own = peers.size * [counts[peers.rank]]
        received = x.new_empty(sum(own))
        dist.all_to_all_single(received, x.contiguous(), own, list(counts), group=peers.group)
        return received.view(peers.size, -1) if sum(own) else received.view(peers.size, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        own = ctx.peers.size * [ctx.counts[ctx.peers.rank]]
        returned = grad.new_empty(sum(ctx.counts))
        dist.all_to_all_single(returned, grad.reshape(-1), list(ctx.counts), own, group=ctx.peers.group)
        return returned, None, None, None


def _padded(x: torch.Tensor, rows: int) -> torch.Tensor:
    return x.contiguous() if len(x) == rows else torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])


def _summed(x: torch.Tensor, peers: Peers) -> torch.Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=peers.group)
    return x


def _all_gather(every: torch.Tensor, own: torch.Tensor, group: dist.ProcessGroup) -> None:
    (dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor)(
        every, own, group=group
    )


def _reduce_scatter(own: torch.Tensor, every: torch.Tensor, group: dist.ProcessGroup) -> None:
    (dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor)(
        own, every, group=group
    )


# ---- around the ring


def travel(peers: Peers, counts: tuple[int, ...], bundle: Bundle) -> Iterator[tuple[int, Bundle]]:
    """Every rank's ``bundle`` with its owner, the own one first; the next one arrives while one is in use."""
    channel = _Channel(peers, counts)
    for step in range(peers.size):
        owner = (peers.rank - step) % peers.size
        last = step + 1 == peers.size
        if not last:
            channel.start(owner, bundle)
        yield owner, bundle
        if not last:
            bundle = channel.wait()


class Relay:
    """What the ranks find out about each bundle of `travel`: it follows one step behind and ends with the owner."""

    def __init__(self, peers: Peers, counts: tuple[int, ...], merge: Callable[[torch.Tensor, torch.Tensor], object]):
        """``merge(a, b)`` adds ``b`` to ``a`` in place."""
        self.channel, self.merge = _Channel(peers, counts), merge
        self.under_way = False

    def add(self, owner: int, found: torch.Tensor) -> None:
        if self.under_way:
            (before,) = self.channel.wait()
            self.merge(before, found)
            found = before
        self.channel.start(owner, (found,))
        self.under_way = True

    def result(self) -> torch.Tensor:
        """What all ranks have found about the own bundle."""
        return self.channel.wait()[0]


class _Channel:
    """Tensors on their way to the next rank, while those of the previous one arrive in one of two buffers."""

    def __init__(self, peers: Peers, counts: tuple[int, ...]):
        self.peers, self.counts = peers, counts
        self.buffers: list[Bundle] = []
        self.work: list[dist.Work] = []
        self.outgoing: Bundle = ()
        self.arriving: Bundle = ()

    def start(self, owner: int, bundle: Bundle) -> None:
        """Send what belongs to ``owner``; what belongs to the rank before it arrives."""
        if len(self.buffers) < 2:  # the first bundle is the caller's own
            widest = max(self.counts)
            self.buffers.append(tuple(None if x is None else x.new_empty(widest, *x.shape[1:]) for x in bundle))
        peers, rows = self.peers, self.counts[(owner - 1) % self.peers.size]
        self.arriving = tuple(None if x is None else x[:rows] for x in self.buffers[-1])
        self.outgoing = tuple(None if x is None else x.contiguous() for x in bundle)  # alive until it is sent
        self.buffers.reverse()
        sides = (
            (dist.isend, self.outgoing, (peers.rank + 1) % peers.size),
            (dist.irecv, self.arriving, (peers.rank - 1) % peers.size),
        )
        operations = [
            dist.P2POp(operation, x, group=peers.group, group_peer=peer, tag=tag)
            for operation, tensors, peer in sides
            for tag, x in enumerate(tensors)
            if x is not None and x.numel()
        ]
        self.work = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> Bundle:
        for work in self.work:
            work.wait()
        self.work, self.outgoing = [], ()
        return self.arriving

"""One of several processes whose batches the loss modules take together; each compares with one process of all rows."""

from __future__ import annotations

import copy

import loss_forms as forms
import torch
import torch.distributed as dist
from torch import nn

from sslkernels import nn as ours

COUNTS = (5, 3, 6)  # rows of each rank
D = 4


def own(rows: torch.Tensor, rank: int) -> torch.Tensor:
    size = dist.get_world_size()
    return rows[: sum(COUNTS[:size])].split(COUNTS[:size])[rank]


def batch(step: int = 0, columns: int = D) -> torch.Tensor:
    """The rows of as many ranks as there are."""
    rows = torch.randn(sum(COUNTS), columns, generator=torch.Generator().manual_seed(step))
    return rows[: sum(COUNTS[: dist.get_world_size()])]


class Learner(nn.Module):
    """Two linear towers and the scalars of two-tower losses, under a loss that sees their outputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(D, 6), nn.Linear(D, 6)
        self.scale, self.bias = nn.Parameter(torch.tensor(5.0)), nn.Parameter(torch.tensor(-2.0))

    def gradients(self, loss) -> dict[str, torch.Tensor]:
        grads = torch.autograd.grad(loss, list(self.parameters()), allow_unused=True)
        return {name: grad for (name, _), grad in zip(self.named_parameters(), grads, strict=True) if grad is not None}


def losses(alone: bool, exchange: str) -> dict[str, nn.Module]:
    world = 1 if alone else dist.get_world_size()
    together = {"gather_distributed": not alone, "exchange": exchange}
    group = {"group": None if alone else dist.group.WORLD, "exchange": exchange}
    return {
        "NTXentLoss": ours.NTXentLoss(0.2, **together),
        "DCLLoss": ours.DCLLoss(0.2, **together),
        "DCLLoss, weights": ours.DCLLoss(0.2, lambda a, b: a[:, 0] + b[:, 1], **together),
        "DCLWLoss": ours.DCLWLoss(0.2, **together),
        "InfoNCELoss": ours.InfoNCELoss(0.2, **group),
        "ClipLoss": ours.ClipLoss(world_size=world, exchange=exchange),
        **{
            f"SigLipLoss, {way}": ours.SigLipLoss(world_size=world, dist_impl=way)
            for way in (("bidir", "shift") if exchange == "ring" else ("gather", "reduce"))
        },
        "SupConLoss": ours.SupConLoss(0.2, **group),
        "SupConLoss, one": ours.SupConLoss(0.2, "one", **group),
        "SupConLoss, no labels": ours.SupConLoss(0.2, **group),
    }


def loss_of(name: str, module: nn.Module, learner: Learner, rows: tuple[torch.Tensor, ...]) -> torch.Tensor:
    x, y, labels = rows
    a, b = learner.first(x), learner.second(y)
    if isinstance(module, (ours.ClipLoss, ours.SigLipLoss)):
        return module(forms.unit(a), forms.unit(b), learner.scale, learner.bias)
    if isinstance(module, ours.SupConLoss):
        return module(forms.unit(torch.stack([a, b], dim=1)), None if "no labels" in name else labels)
    return module(a, b)


def as_one_process(rank: int, exchange: str) -> None:
    """Losses and gradients, averaged over ranks, are those of one process with every row."""
    learner = Learner()
    rows = batch(), batch(1), torch.tensor([0, 1, 0, -1, 2, 2, 0, -1, 1, 3, 3, 2, 1, 0])[: len(batch())]
    alone = losses(True, exchange)
    for name, module in losses(False, exchange).items():
        loss = loss_of(name, module, learner, tuple(own(part, rank) for part in rows))
        found = {"loss": loss.detach(), **learner.gradients(loss)}
        loss = loss_of(name, alone[name], learner, rows)
        expected = {"loss": loss.detach(), **learner.gradients(loss)}
        assert found.keys() == expected.keys()
        for key, value in found.items():
            dist.all_reduce(value)
            difference = (value / dist.get_world_size() - expected[key]).abs().max().item()
            assert difference <= 1e-5 * max(1, expected[key].abs().max().item()), f"{name}, {key}: {difference}"


def one_bank(rank: int) -> None:
    """Banks that begin alike stay alike, and are the bank of one process; the loss is that of the own queries."""
    torch.manual_seed(0)
    together = ours.NTXentLoss(0.2, (17, D), gather_distributed=True)
    alone = ours.NTXentLoss(0.2, (17, D))
    alone.load_state_dict(together.state_dict())
    for step in range(3):
        x, y = batch(step).requires_grad_(), batch(step + 10)
        expected = forms.moco(own(x, rank), own(y, rank), alone.memory_bank.bank, 0.2)
        loss = together(own(x, rank), own(y, rank))
        torch.testing.assert_close(loss, expected)
        loss.backward()
        alone(x, y)
        torch.testing.assert_close(together.memory_bank.bank, alone.memory_bank.bank, rtol=0, atol=0)
        assert torch.equal(together.memory_bank.bank_ptr, alone.memory_bank.bank_ptr)


def odds_and_ends(rank: int) -> None:
    """A copy shares the group; a wrong world size and a mask are errors; a rank without rows takes part in a bank."""
    module = ours.MemoryBank((9, D), group=dist.group.WORLD)
    assert module.gather_distributed
    twin = copy.deepcopy(module)
    assert twin.processes.group is dist.group.WORLD
    keys = batch()[: 3 if rank else 0]
    twin.enqueue(keys)
    assert twin.bank_ptr.item() == 3 * (dist.get_world_size() - 1) % 9
    assert module.bank_ptr.item() == 0
    for wrong, given in (
        (ours.ClipLoss(world_size=7), (keys, keys, 1.0)),
        (ours.SupConLoss(group=dist.group.WORLD), ()),
    ):
        try:
            wrong(*given) if given else wrong(keys[:, None], mask=torch.ones(len(keys), len(keys)))
        except ValueError as error:
            assert "world_size must be that of the process group" in str(error) or "mask must be None" in str(error)
        else:
            raise AssertionError(f"{wrong} raised nothing")

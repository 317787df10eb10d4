"""A small model with everything that a teacher has to follow, and what the tests of teachers do to it."""

from __future__ import annotations

import torch
from torch import nn


class Network(nn.Module):
    """Convolution and batch norm, a mask, a cache, and a tied pair."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.embed, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def forward(self, x):
        return self.head(self.embed(self.body(x).mean((2, 3))))


def network(seed=0):
    torch.manual_seed(seed)
    return Network()


@torch.no_grad()
def change(model, seed):
    """What a step of training does: other parameters and statistics."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        else:
            tensor.copy_(torch.randint(0, 2, tensor.shape, generator=generator))


def train(model, teacher, steps, first=0):
    for step in range(first, first + steps):
        change(model, step)
        teacher.update(model)


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items() if isinstance(tensor, torch.Tensor)}


def assert_equal_states(one, other):
    one, other = (each if isinstance(each, dict) else state(each) for each in (one, other))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name

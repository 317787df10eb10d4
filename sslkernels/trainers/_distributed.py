"""One process, or several under torchrun: who we are, and all processes' embeddings with their gradients."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class World:
    rank: int
    size: int

    @property
    def leads(self) -> bool:
        """Whether this process logs, saves and probes."""
        return self.rank == 0


def join_world(device: torch.device) -> World:
    """Meet the other processes of torchrun, or of whatever sets its variables; alone without them."""
    if "WORLD_SIZE" not in os.environ:
        return World(0, 1)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(dist.get_rank(), dist.get_world_size())


def same_everywhere(value: object, world: World) -> bool:
    if world.size == 1:
        return True
    values: list[object] = [None] * world.size
    dist.all_gather_object(values, value)
    return all(other == value for other in values)


def leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def spread(model: nn.Module, world: World, device: torch.device, parts: int) -> nn.Module:
    """The model with its gradients averaged over the processes; says where batch norm keeps to a part of the batch."""
    batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    if world.size > 1 and batch_norm and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        batch_norm = parts > 1
    if world.leads and batch_norm and world.size * parts > 1:
        print(
            f"batch norm sees {world.size * parts} parts of every batch one by one (SyncBatchNorm needs CUDA and no "
            "accumulation); the curve is not quite that of the undivided batch, with --norm group it is"
        )
    return DistributedDataParallel(model) if world.size > 1 else model


def share_buffers(model: nn.Module, world: World) -> None:
    """Give every process the leading one's buffers; DistributedDataParallel does so only before a forward pass."""
    if world.size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def gather(z: torch.Tensor, world: World) -> torch.Tensor:
    """Every process's (2, n, D) embeddings as (2, world.size * n, D), differentiable.

    Every process computes the loss of the whole batch, and each one's gradient of ``z`` is the sum of what all of them
    send back, world.size times the gradient of that loss. DistributedDataParallel divides the sum over processes by
    world.size: parameters get exactly the gradient that one process with the whole batch would give them.
    """
    return z if world.size == 1 else _Gather.apply(z, world)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, world):
        ctx.world = world
        every = [torch.empty_like(z, memory_format=torch.contiguous_format) for _ in range(world.size)]
        dist.all_gather(every, z.contiguous())
        return torch.cat(every, dim=1)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(ctx.world.size, dim=1)[ctx.world.rank], None

"""The exact gradient of a contrastive loss over micro-batches.

Adding up the losses of micro-batches, as one does for cross entropy, would contrast each image with its own
micro-batch only: more images, not more negatives. The gradient cache (Gao et al., Scaling Deep Contrastive Learning
Batch Size under Memory Limited Setup, 2021) embeds every micro-batch without a graph, takes the loss of all embeddings
and its gradient with respect to them, then embeds each micro-batch again, now with a graph, and sends its part of that
gradient back. It costs one more forward pass of the encoder.

Where images do not meet inside the model, this is the gradient of the large batch up to rounding. Dropout and
drop path draw for a micro-batch what they draw for it on the second visit, so the gradient is exact for those draws.
Batch norm normalises each micro-batch by its own statistics, on both visits: the gradient is exact for that function,
which is not the function of the large batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

Stats = TypeVar("Stats")


def backward(
    model: nn.Module,
    micro_batches: Sequence[torch.Tensor],
    embed: Callable[[Callable, torch.Tensor], torch.Tensor],
    loss_of: Callable[[torch.Tensor], tuple[torch.Tensor, Stats]],
    seed: int,
) -> tuple[torch.Tensor, Stats]:
    """Add the gradient of ``loss_of(all embeddings)`` to the parameters; returns what ``loss_of`` returned.

    ``embed(model, micro_batch)`` gives the embeddings (2, n, D), ``loss_of`` the loss of (2, N, D) and its statistics.
    """
    if len(micro_batches) == 1:
        torch.manual_seed(seed)
        loss, stats = loss_of(embed(model, micro_batches[0]))
        loss.backward()
        return loss.detach(), stats
    cached = [z.requires_grad_() for z in _embed_without_graph(model, micro_batches, embed, seed)]
    loss, stats = loss_of(torch.cat(cached, dim=1))
    loss.backward()
    for index, (images, z) in enumerate(zip(micro_batches, cached, strict=True)):
        with _averaging(model, index == len(micro_batches) - 1):
            torch.manual_seed(seed + index)
            embed(model, images).backward(z.grad)
    return loss.detach(), stats


def backward_of_sum(
    model: nn.Module,
    micro_batches: Sequence[object],
    loss_of: Callable[[Callable, object], tuple[torch.Tensor, object]],
    seed: int,
) -> list:
    """Add the gradient of ``loss_of(model, micro_batch)``, summed over the micro-batches; needs no second forward pass.

    For losses in which the images of a batch do not meet. Returns what else ``loss_of`` returned for each micro-batch.
    """
    results = []
    for index, micro_batch in enumerate(micro_batches):
        with _averaging(model, index == len(micro_batches) - 1):
            torch.manual_seed(seed + index)
            loss, result = loss_of(model, micro_batch)
            loss.backward()
        results.append(result)
    return results


def _averaging(model: nn.Module, last: bool) -> AbstractContextManager:
    """Whether a backward pass averages gradients over processes: that of the last micro-batch does so for all."""
    return nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync()


@torch.no_grad()
def _embed_without_graph(model, micro_batches, embed, seed) -> list[torch.Tensor]:
    module = model.module if isinstance(model, DistributedDataParallel) else model
    # on copies of the buffers, so that running statistics are updated by the second visit alone
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    embeddings = []
    for index, images in enumerate(micro_batches):
        torch.manual_seed(seed + index)
        embeddings.append(embed(lambda x: torch.func.functional_call(module, buffers, x), images))
    return embeddings

"""Patch dropout as a module, with the constructor of timm's."""

from __future__ import annotations

import torch
from torch import nn

from sslkernels.ops import random_masking
from sslkernels.ops.patch_mask import arguments, randomness

NAME = "PatchMask"


class PatchMask(nn.Module):
    """In place of ``timm.layers.PatchDropout``: `sslkernels.random_masking` in training, nothing in evaluation.

    Of the L tokens after the prefix, max(1, floor(L (1 - prob))) stay. In evaluation mode, or where ``prob`` is 0,
    ``forward(x)`` gives ``x`` itself. Within a model that calls ``forward(x)`` alone, as timm's ViT does, the seed and
    the ids of the samples come from the attributes ``seed`` and ``sample_ids``::

        model.patch_drop = PatchMask(0.5)
        model.patch_drop.seed = torch.zeros((), dtype=torch.int64, device=device)
        for step, (images, ids) in enumerate(loader):
            model.patch_drop.seed.fill_(step)  # nothing is compiled or captured anew
            model.patch_drop.sample_ids = ids

    Args:
        prob: the share of tokens to drop, in [0, 1); taken as the decimal that it prints as.
        num_prefix_tokens: the first tokens (class token, registers), which always stay and are not counted.
        ordered: whether the tokens that stay keep their order.
        return_indices: `forward` returns the kept ids besides, as ``timm.layers.PatchDropoutWithIndices`` does.
        seed: that of every call that is given none: masks are then a function of it and of each sample's id. An int, or
            a tensor of one integer on the device of the data. None: each call draws one, from the device's default
            generator.

    Attributes:
        seed, sample_ids: what `forward` takes where it is not given them.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Where it differs from timm: docs/migration-masking.md.
    """

    def __init__(
        self,
        prob: float = 0.5,
        num_prefix_tokens: int = 1,
        ordered: bool = False,
        return_indices: bool = False,
        *,
        seed: int | torch.Tensor | None = None,
    ):
        super().__init__()
        arguments.check_ratio(NAME, "prob", prob)
        if prob == 1:
            raise ValueError(f"{NAME}: prob must be in [0, 1), got {prob}")
        if seed is not None:
            randomness.check_seed(NAME, seed)
        arguments.check_flags(NAME, ordered=ordered)
        self.prob = prob
        self.num_prefix_tokens = arguments.count(NAME, "num_prefix_tokens", num_prefix_tokens)
        self.ordered = ordered
        self.return_indices = return_indices
        self.seed = seed
        self.sample_ids = None

    def forward(
        self,
        x: torch.Tensor,
        *,
        seed: int | torch.Tensor | None = None,
        sample_ids: torch.Tensor | None = None,
        scores: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """(N, P + L, D) -> (N, P + K, D), and with ``return_indices`` (N, K) ids, None where all tokens stay.

        ``seed``, ``sample_ids`` and ``scores`` are those of `sslkernels.random_masking`; ``scores`` replace the others.
        """
        if not self.training or self.prob == 0:
            return (x, None) if self.return_indices else x
        arguments.check_tokens(NAME, "x", x)
        tokens = x.shape[1] - arguments.prefix(NAME, self.num_prefix_tokens, x)
        if scores is None:
            seed = self.seed if seed is None else seed
            sample_ids = self.sample_ids if sample_ids is None else sample_ids
        out = random_masking(
            x, num_keep=min(tokens, max(1, arguments.num_kept(NAME, tokens, self.prob, None))), ordered=self.ordered,
            num_prefix_tokens=self.num_prefix_tokens, seed=seed, sample_ids=sample_ids, scores=scores,
        )  # fmt: skip
        return (out.x_kept, out.ids_keep) if self.return_indices else out.x_kept

    def extra_repr(self) -> str:
        return f"prob={self.prob}, num_prefix_tokens={self.num_prefix_tokens}, ordered={self.ordered}"

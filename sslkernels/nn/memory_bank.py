"""The queue of keys that MoCo draws its negatives from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from sslkernels.distributed import gather
from sslkernels.nn.processes import Processes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

NAME = "MemoryBank"


class MemoryBank(nn.Module):
    r"""A ring buffer of the last K keys, ready to be the negatives of `sslkernels.info_nce`.

    Keys are written where the oldest are: key j of a batch goes to row :math:`(p + j) \bmod K`, with p the number of
    keys that came before. However keys are split into batches, the bank is the same; of a batch of more than K the last
    K stay. Before any came, the rows are random unit vectors.

    Equivalent PyTorch::

        bank[(bank_ptr + torch.arange(B)) % K] = keys.detach()
        bank_ptr = (bank_ptr + B) % K

    One step of MoCo, whose loss sees the bank without the keys of the step::

        loss = sslkernels.info_nce(query, key, bank.keys, temperature)
        bank.enqueue(key)
        loss.backward()

    Args:
        size: (K, D), K keys of D features; 0, or (0, D): no bank.
        gather_distributed: `enqueue` takes the keys of all processes, in the order of their ranks, so that the banks of
            all go on alike. Their batches may differ in size.
        feature_dim_first: `forward` gives the bank as (D, K) rather than (K, D).
        group: the processes that ``gather_distributed`` means; None: all. Giving one turns it on.
        device, dtype: of the bank. bfloat16 takes half the memory: `sslkernels.info_nce` normalises it again.

    Attributes:
        bank: (K, D), the buffer itself, in the ``state_dict``.
        bank_ptr: (1,) int64, the row of the oldest key, in the ``state_dict``. Never read on the host.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it. Nothing has been written then.

    `sslkernels.info_nce` keeps no queue for its backward (of float32 or shorter, on the default backends), and a loss
    that has formed a copy keeps that, so keys may be enqueued between a loss and its backward. What has kept the bank
    itself, such as ``query @ bank.keys.T``, raises PyTorch's error about a modified tensor instead of a wrong gradient.

    Source: He et al., Momentum Contrast for Unsupervised Visual Representation Learning (2020), section 3.2.

    Cost: `enqueue` writes B D elements; no copy of the bank, no synchronisation with the device.
    """

    bank: torch.Tensor
    bank_ptr: torch.Tensor

    def __init__(
        self,
        size: int | Sequence[int],
        gather_distributed: bool = False,
        feature_dim_first: bool = True,
        *,
        group: ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.size = _checked_size(size)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"{NAME}: dtype must be a floating-point dtype, got {dtype!r}")
        self.processes = Processes(NAME, gather_distributed, group)
        self.gather_distributed = self.processes.wanted
        self.feature_dim_first = feature_dim_first
        shape = self.size if self.enabled else (0,)
        bank = F.normalize(torch.randn(shape, device=device), dim=-1).to(dtype)
        self.register_buffer("bank", bank, persistent=self.enabled)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.int64, device=device), persistent=self.enabled)

    @property
    def enabled(self) -> bool:
        """Whether there is a bank."""
        return self.size[0] > 0

    @property
    def keys(self) -> torch.Tensor:
        """(K, D), without grad and without a copy: what is enqueued later shows in it."""
        return self.bank.detach()

    @torch.no_grad()
    def enqueue(self, keys: torch.Tensor) -> None:
        """Takes (B, D) keys of any floating-point dtype, which are stored as they are: normalise them first."""
        if not self.enabled:
            return
        self._check(keys)
        self.follow(keys.device)
        keys = gather(keys.detach(), self.processes.active())
        count, rows = keys.shape[0], self.size[0]
        kept = torch.arange(max(count - rows, 0), count, device=keys.device)
        self.bank.index_copy_(0, (self.bank_ptr + kept) % rows, keys[-rows:].to(self.bank.dtype))
        self.bank_ptr.add_(count).remainder_(rows)

    def follow(self, device: torch.device) -> None:
        """Moves the bank to a device, once: losses are seldom moved to that of the model."""
        if self.bank.device != device:
            self.to(device)

    def forward(
        self, output: torch.Tensor, labels: torch.Tensor | None = None, update: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``output`` as it is, and the bank; None where there is none.

        The bank is (D, K), or (K, D) unless ``feature_dim_first``, and does not know ``output`` yet: with ``update`` it
        is a copy, since ``output`` is enqueued then. `keys` and `enqueue` need none. ``labels`` are ignored.
        """
        if not self.enabled:
            return output, None
        bank = self.keys
        if update:
            bank = bank.clone()
            self.enqueue(output)
        return output, bank.T if self.feature_dim_first else bank

    def extra_repr(self) -> str:
        return f"size={self.size}, dtype={self.bank.dtype}, gather_distributed={self.gather_distributed}"

    def _check(self, keys: object) -> None:
        if not isinstance(keys, torch.Tensor) or not keys.is_floating_point():
            given = keys.dtype if isinstance(keys, torch.Tensor) else type(keys).__name__
            raise TypeError(f"{NAME}: keys must be a floating-point tensor, got {given}")
        if keys.dim() != 2 or keys.shape[1] != self.size[1]:
            raise ValueError(f"{NAME}: keys must be (B, {self.size[1]}), got {tuple(keys.shape)}")


def _checked_size(size: int | Sequence[int]) -> tuple[int, ...]:
    sizes: tuple[int, ...] = (size,) if isinstance(size, int) else tuple(size)
    if any(isinstance(n, bool) or not isinstance(n, int) for n in sizes):
        raise TypeError(f"{NAME}: size must be (K, D) of integers, or 0, got {size!r}")
    if any(n < 0 for n in sizes):
        raise ValueError(f"{NAME}: size must not be negative, got {size!r}")
    if sizes != (0,) and len(sizes) != 2:
        raise ValueError(f"{NAME}: size must be (K, D), or 0 for no bank, got {size!r}")
    if sizes[0] and not sizes[-1]:
        raise ValueError(f"{NAME}: size must have at least one feature, got {size!r}")
    return sizes

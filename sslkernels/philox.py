"""Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011) in pure PyTorch.

The definition of every random number that the kernels draw; ``csrc/philox.h`` is the same for host and GPU.
"""

from __future__ import annotations

import torch

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORD = 0xFFFFFFFF

# the last word of a counter: no two ops draw the same numbers
EMA_STREAM = 1
PATCH_MASK_STREAM = 2
BLOCK_MASK_STREAM = 3
MULTI_BLOCK_MASK_STREAM = 4
SPAN_MASK_STREAM = 5


def philox(counter, key):
    """Four 32-bit random words, as int64, for counters of four broadcastable int64 words and a key of two integers.

    Plain ints where all words of the counter and the key are.
    """
    device = next((word.device for word in counter if isinstance(word, torch.Tensor)), None)
    c0, c1, c2, c3 = counter
    if device is not None:
        c0, c1, c2, c3 = torch.broadcast_tensors(*(torch.as_tensor(word, device=device) for word in counter))
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply_wide(c0, MULTIPLIERS[0])
        high1, low1 = _multiply_wide(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def split(number):
    """Low and high 32 bits of a 64-bit integer, or of each in a tensor of int64."""
    return number & WORD, number >> 32 & WORD


def _multiply_wide(word, multiplier: int):
    """High and low 32 bits of a product of 32-bit numbers, whose 64 bits int64 cannot hold."""
    upper = (word >> 16) * multiplier
    lower = (word & 0xFFFF) * multiplier + ((upper & 0xFFFF) << 16)
    return ((upper >> 16) + (lower >> 32)) & WORD, lower & WORD

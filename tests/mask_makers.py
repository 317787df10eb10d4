"""What the tests of the mask makers share: the CUDA kernels in place of the operators, and the shapes in a mask."""

from __future__ import annotations

import shutil

import cuda_on_cpu
import torch
from conftest import require_or_skip


class OnCuda:
    """The operators of the mask makers by the CUDA kernels on the CPU, under one schedule."""

    def __init__(self, schedule: int = 0):
        require_or_skip(shutil.which("g++"), "g++ is not installed")
        self.schedule = schedule

    @property
    def kernels(self):
        return cuda_on_cpu.kernels(self.schedule)

    def block_mask_fwd(self, seed, ids, num_masked, height, width, least, most, aspects, attempts):
        mask = torch.empty(len(num_masked), height, width, dtype=torch.bool)
        if len(num_masked):
            sizes = height, width, least, most, aspects, attempts
            self.kernels.block_mask(seed, ids, num_masked, *sizes, mask)
        return mask

    def multi_block_mask_fwd(self, seed, ids, samples, *arguments):
        height, width, target_height, target_width, context_height, context_width = sizes = arguments[:6]
        targets, least, allow_overlap = arguments[6:]
        out = (
            torch.empty(samples, context_height * context_width, dtype=torch.int64),
            torch.empty(samples, dtype=torch.int64),
            torch.empty(samples, targets, target_height * target_width, dtype=torch.int64),
            torch.empty(samples, height, width, dtype=torch.bool),
            torch.empty(samples, targets, height, width, dtype=torch.bool),
        )
        if samples:
            self.kernels.multi_block_mask(seed, ids, samples, list(sizes), targets, least, allow_overlap, *out)
        return out

    def span_mask_fwd(self, seed, ids, lengths, num_spans, tokens, span, share, least, overlap):
        mask = torch.empty(len(lengths), tokens, dtype=torch.bool)
        if len(lengths):
            self.kernels.span_mask(seed, ids, lengths, num_spans, tokens, span, share, least, overlap, mask)
        return mask


def box(mask) -> tuple[int, int, int, int]:
    """Top, left, height and width of the smallest rectangle around what is masked."""
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    top, left = int(rows[0]), int(columns[0])
    return top, left, int(rows[-1]) + 1 - top, int(columns[-1]) + 1 - left


def runs(row) -> list[int]:
    """The lengths of the runs of True."""
    edges = torch.diff(row.int(), prepend=torch.zeros(1, dtype=torch.int32), append=torch.zeros(1, dtype=torch.int32))
    return ((edges == -1).nonzero() - (edges == 1).nonzero())[:, 0].tolist()


def assert_uniform(counts, weights=1.0) -> None:
    """A chi-square test: the cells are as likely as their weights, at five standard deviations of the statistic."""
    counts = counts.double().flatten()
    weights = torch.as_tensor(weights, dtype=torch.float64).expand(counts.shape)
    expected = counts.sum() * weights / weights.sum()
    statistic, degrees = ((counts - expected) ** 2 / expected).sum().item(), len(counts) - 1
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5 + 5, f"chi-square {statistic:.0f} of {degrees + 1} cells"

"""The named inputs of the mask makers, with what each costs."""

from __future__ import annotations

import functools
import math

import torch

from sslkernels.ops.patch_mask.block_mask import block_mask
from sslkernels.ops.patch_mask.multi_block_mask import multi_block_mask
from sslkernels.ops.patch_mask.span_mask import span_mask
from sslkernels.ops.patch_mask.tube_mask import tube_mask
from sslkernels.registry import Case, Cost, OpSpec

MASK = (torch.float64,)  # holds every index, so that a comparison of masks is one of integers
VERIFY, EDGE, BENCH = "verify", "edge", "bench"


def blocks(*args, **options):
    """`block_mask` as numbers."""
    return block_mask(*args, **options).double()


def multi_blocks(*args, **options):
    """`multi_block_mask` as one tensor of numbers."""
    return torch.cat([result.flatten() for result in multi_block_mask(*args, **options)]).double()


def spans(*args, **options):
    """`span_mask` as numbers."""
    return span_mask(*args, **options).double()


def tubes(*args, **options):
    """`tube_mask` as one tensor of numbers."""
    return torch.cat(tube_mask(*args, **options), dim=1).double()


def dinov2_counts(samples: int, patches: int, device) -> torch.Tensor:
    """(N,): what DINOv2 asks for: half of the samples between a tenth and a half of their patches, the others none."""
    bounds = torch.linspace(0.1, 0.5, samples // 2 + 1, dtype=torch.float64)
    counts = ((bounds[:-1] + bounds[1:]) / 2 * patches).long()
    return torch.cat([counts, counts.new_zeros(samples - len(counts))]).to(device)


def wav2vec_lengths(samples: int, tokens: int, device) -> torch.Tensor:
    """(N,): from a third of the tokens to all of them."""
    return torch.linspace(tokens / 3, tokens, samples, dtype=torch.float64).long().to(device)


def _case(name: str, tags=(VERIFY,), *, bytes_written: float, **options) -> Case:
    """Options that are functions are called with the device."""

    def make(device, dtype):
        given = {key: value(device) if callable(value) else value for key, value in options.items()}
        return {"seed": 3, "device": device, **given}

    return Case(name, make, Cost(0.0, 0.0, 0.0, 0.0, bytes_written), frozenset(tags))


def _block(name: str, samples: int, grid, tags=(VERIFY, EDGE), **options) -> Case:
    size = samples * math.prod(grid)
    return _case(name, tags, bytes_written=size, batch_size=samples, grid_size=grid, **options)


def _ids(values, device):
    return torch.tensor(values, device=device)


BLOCK_CASES = (
    _block("dinov2", 12, (16, 16), (VERIFY,), num_masked=functools.partial(dinov2_counts, 12, 256), max_patches=128),
    _block("beit", 5, (14, 14), (VERIFY,), num_masked=75, min_patches=16),
    _block("nearly_all", 4, (10, 13), mask_ratio=0.9),
    _block("everything", 3, (6, 7), num_masked=42),
    _block("nothing", 3, (6, 7), num_masked=0),
    _block("one_patch", 3, (1, 1), num_masked=lambda device: _ids((0, 1, 1), device)),
    _block("row", 3, (1, 70), num_masked=33),
    _block("wide", 3, (5, 70), num_masked=150, min_aspect=0.05),
    _block("single_patches", 3, (9, 8), num_masked=50, min_patches=1, max_patches=1),
    _block("few", 6, (8, 8), num_masked=2),
    _block("too_large", 3, (4, 40), num_masked=100, min_patches=100, min_aspect=1.0),
    _block("sample_ids", 4, (8, 8), num_masked=30, seed=-1, sample_ids=lambda device: _ids((7, 2**40, -1, 0), device)),
    _block("no_sample", 0, (4, 4)),
    _block(
        "dinov2_128", 128, (16, 16), (BENCH,), num_masked=functools.partial(dinov2_counts, 128, 256), max_patches=128
    ),
)  # fmt: skip


def _multi(name: str, samples: int, grid, tags=(VERIFY, EDGE), *, target, context, targets=4, **options) -> Case:
    patches = math.prod(grid)
    size = samples * (8 * (math.prod(context) + 1 + targets * math.prod(target)) + (targets + 1) * patches)
    options |= {"target_size": target, "context_size": context, "num_targets": targets}
    return _case(name, tags, bytes_written=size, batch_size=samples, grid_size=grid, **options)


MULTI_BLOCK_CASES = (
    _multi("ijepa", 6, (16, 16), (VERIFY,), target=(7, 6), context=(15, 15)),
    _multi("vit_b", 5, (14, 14), (VERIFY,), target=(6, 5), context=(13, 13), targets=2),
    _multi("overlap", 4, (9, 12), target=(4, 5), context=(7, 8), allow_overlap=True),
    _multi("small_context", 5, (8, 8), target=(5, 5), context=(3, 3), min_context=6),
    _multi("covered", 3, (4, 6), target=(4, 6), context=(2, 2)),
    _multi("no_target", 3, (5, 7), target=(2, 2), context=(4, 4), targets=0),
    _multi("one_patch", 3, (1, 1), target=(1, 1), context=(1, 1)),
    _multi("wide", 3, (3, 70), target=(2, 20), context=(3, 69), targets=3),
    _multi("sample_ids", 4, (8, 8), target=(3, 3), context=(7, 7), sample_ids=lambda d: _ids((7, 2**40, -1, 0), d)),
    _multi("no_sample", 0, (4, 4), target=(2, 2), context=(3, 3)),
    _multi("ijepa_128", 128, (16, 16), (BENCH,), target=(7, 6), context=(15, 15)),
)


def _span(name: str, samples: int, tokens: int, tags=(VERIFY, EDGE), **options) -> Case:
    return _case(name, tags, bytes_written=samples * tokens, batch_size=samples, num_tokens=tokens, **options)


SPAN_CASES = (
    _span("wav2vec", 5, 149, (VERIFY,), lengths=functools.partial(wav2vec_lengths, 5, 149)),
    _span("apart", 5, 149, (VERIFY,), lengths=functools.partial(wav2vec_lengths, 5, 149), overlap=False),
    _span("packed", 4, 60, num_spans=100, overlap=False, span_length=7),
    _span("all_starts", 4, 60, num_spans=100, span_length=7),
    _span("asked", 4, 33, num_spans=lambda device: _ids((0, 1, 2, 3), device), span_length=4),
    _span("short", 6, 12, lengths=lambda device: _ids((0, 1, 3, 4, 5, 12), device), span_length=4, min_spans=2),
    _span("single_tokens", 3, 40, span_length=1),
    _span("none", 3, 40, mask_prob=0.0),
    _span("no_room", 3, 5, span_length=10),
    _span("no_token", 3, 0),
    _span("sample_ids", 4, 50, seed=2**64 - 1, sample_ids=lambda device: _ids((7, 2**40, -1, 0), device)),
    _span("no_sample", 0, 50),
    _span("wav2vec_32", 32, 1500, (BENCH,), lengths=functools.partial(wav2vec_lengths, 32, 1500)),
)


def _tube(name: str, samples: int, grid, tags=(VERIFY, EDGE), **options) -> Case:
    size = samples * 11.0 * math.prod(grid)
    return _case(name, tags, bytes_written=size, batch_size=samples, grid_size=grid, **options)


TUBE_CASES = (
    _tube("video", 3, (4, 5, 6), (VERIFY,)),
    _tube("ordered", 3, (3, 7, 4), (VERIFY,), mask_ratio=0.5, ordered=True),
    _tube("one_frame", 3, (1, 5, 5), num_keep=7),
    _tube("no_frame", 3, (0, 5, 5)),
    _tube("keep_all", 2, (3, 4, 4), mask_ratio=0.0),
    _tube("keep_none", 2, (3, 4, 4), mask_ratio=1.0),
    _tube("videomae_32", 32, (8, 14, 14), (BENCH,), mask_ratio=0.9),
)


def _spec(name: str, function, torch_op: str, cases) -> OpSpec:
    reference = functools.partial(function, backend="reference")
    return OpSpec(name, function, reference, (torch_op,), (), MASK, cases, has_cuda=True, is_mask=True)


OPS = (
    _spec("block_mask", blocks, "block_mask_fwd", BLOCK_CASES),
    _spec("multi_block_mask", multi_blocks, "multi_block_mask_fwd", MULTI_BLOCK_CASES),
    _spec("span_mask", spans, "span_mask_fwd", SPAN_CASES),
    _spec("tube_mask", tubes, "patch_mask_fwd", TUBE_CASES),
)

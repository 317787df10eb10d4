"""Masks for a batch: the published algorithms of those who use them, in Python sample by sample, and ours."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from runs import Run, runs

from sslkernels import ops
from sslkernels.ops.patch_mask.mask_maker_cases import OPS

SPECS = {spec.name: spec for spec in OPS}
RUNS = runs(SPECS)


class MaskingGenerator:
    """BEiT's and DINOv2's rectangles for one sample: NumPy, and a Python loop over the patches of each."""

    def __init__(self, grid: int, min_num_patches: int = 4, max_num_patches: float = math.inf, min_aspect: float = 0.3):
        self.height = self.width = grid
        self.least, self.most = min_num_patches, max_num_patches
        self.log_aspects = math.log(min_aspect), math.log(1 / min_aspect)

    def __call__(self, num_masking_patches: int) -> np.ndarray:
        mask, masked = np.zeros((self.height, self.width), dtype=bool), 0
        while masked < num_masking_patches:
            added = self._add(mask, min(num_masking_patches - masked, self.most))
            if not added:
                break
            masked += added
        return mask

    def _add(self, mask: np.ndarray, limit: float) -> int:
        for _ in range(10):
            area = random.uniform(self.least, limit)
            aspect = math.exp(random.uniform(*self.log_aspects))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if width >= self.width or height >= self.height:
                continue
            top, left = random.randint(0, self.height - height), random.randint(0, self.width - width)
            new = height * width - mask[top : top + height, left : left + width].sum()
            if not 0 < new <= limit:
                continue
            added = 0
            for row in range(top, top + height):
                for column in range(left, left + width):
                    if mask[row, column] == 0:
                        mask[row, column] = 1
                        added += 1
            return added
        return 0


class MaskCollator:
    """I-JEPA's blocks for a batch: a tensor for every block, and a new one until enough of it is left."""

    def __init__(self, grid: int, enc_scale=(0.85, 1.0), pred_scale=(0.15, 0.2), aspect=(0.75, 1.5), targets: int = 4):
        self.height = self.width = grid
        self.enc_scale, self.pred_scale, self.aspect = enc_scale, pred_scale, aspect
        self.targets, self.step = targets, 0
        self.min_keep = 10 if grid >= 14 else 4  # a small grid's targets may have no more than 9

    def _size(self, generator, scale, aspects) -> tuple[int, int]:
        uniform = torch.rand(1, generator=generator).item()
        area = int(self.height * self.width * (scale[0] + uniform * (scale[1] - scale[0])))
        aspect = aspects[0] + uniform * (aspects[1] - aspects[0])
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        return min(height, self.height - 1), min(width, self.width - 1)

    def _block(self, size, allowed=()):
        height, width = size
        left_out, tries = 0, 20
        while True:
            top, left = torch.randint(0, self.height - height, (1,)), torch.randint(0, self.width - width, (1,))
            mask = torch.zeros((self.height, self.width), dtype=torch.int32)
            mask[top : top + height, left : left + width] = 1
            for region in allowed[: max(len(allowed) - left_out, 0)]:
                mask *= region
            ids = torch.nonzero(mask.flatten())
            if len(ids) > self.min_keep:
                break
            tries -= 1
            if tries == 0:
                left_out, tries = left_out + 1, 20
        complement = torch.ones((self.height, self.width), dtype=torch.int32)
        complement[top : top + height, left : left + width] = 0
        return ids.squeeze(), complement

    def __call__(self, samples: int):
        generator = torch.Generator().manual_seed(self.step)
        self.step += 1
        target_size = self._size(generator, self.pred_scale, self.aspect)
        context_size = self._size(generator, self.enc_scale, (1.0, 1.0))
        targets, contexts = [], []
        for _ in range(samples):
            blocks = [self._block(target_size) for _ in range(self.targets)]
            targets.append([ids for ids, _ in blocks])
            contexts.append(self._block(context_size, [complement for _, complement in blocks])[0])
        shortest = min(map(len, contexts))
        collate = torch.utils.data.default_collate
        return [collate([ids[:shortest] for ids in contexts]), *collate(targets)]


def wav2vec(batch_size: int, num_tokens: int, lengths, mask_prob: float = 0.65, span_length: int = 10) -> np.ndarray:
    """fairseq's and transformers' spans: NumPy's choice of starts for each sample, then all of them at once."""
    rounding = np.random.rand(1).item()

    def spans(length: int) -> int:
        wanted = int(mask_prob * length / span_length + rounding)
        return min(wanted, num_tokens // span_length, max(length - span_length + 1, 0))

    mask, most = np.zeros((batch_size, num_tokens), dtype=bool), spans(num_tokens)
    rows = []
    for length in lengths:
        starts = np.random.choice(np.arange(length - (span_length - 1)), spans(length), replace=False)
        padding = np.full(most - len(starts), starts[0] if len(starts) else length - 1)
        rows.append(np.concatenate([starts, padding]))
    covered = np.array(rows)[:, :, None] + np.arange(span_length)
    np.put_along_axis(mask, np.minimum(covered, num_tokens - 1).reshape(batch_size, -1), True, axis=-1)
    return mask


def videomae(batch_size: int, grid_size: tuple[int, int, int], mask_ratio: float) -> np.ndarray:
    """VideoMAE's tubes: NumPy shuffles the mask of a frame for each video, which all of its frames share."""
    frames, patches = grid_size[0], math.prod(grid_size[1:])
    masked = int(mask_ratio * patches)
    masks = []
    for _ in range(batch_size):
        frame = np.arange(patches) >= patches - masked
        np.random.shuffle(frame)
        masks.append(np.tile(frame, frames))
    return np.stack(masks)


def peer(op: str, case, device: str) -> tuple[str, Callable[[], object]]:
    """What a user has instead, with the masks on the device as a training step needs them."""
    options = case.make("cpu", torch.float64)
    if op == "block_mask":
        generator = MaskingGenerator(options["grid_size"][0], max_num_patches=options["max_patches"])
        counts = options["num_masked"].tolist()
        return "dinov2", lambda: torch.stack([torch.from_numpy(generator(count)) for count in counts]).to(device)
    if op == "multi_block_mask":
        collate = MaskCollator(options["grid_size"][0])
        return "ijepa", lambda: [ids.to(device) for ids in collate(options["batch_size"])]
    if op == "tube_mask":
        sizes = options["batch_size"], options["grid_size"], options["mask_ratio"]
        return "videomae", lambda: torch.from_numpy(videomae(*sizes)).to(device)
    sizes, lengths = (options["batch_size"], options["num_tokens"]), options["lengths"].tolist()
    return "wav2vec", lambda: torch.from_numpy(wav2vec(*sizes, lengths)).to(device)


def entrants(run: Run, device: str) -> dict[str, Callable]:
    """By label, what makes the inputs of a contender and returns what is timed."""
    name, theirs = peer(run.op, run.case, device)
    function, options = getattr(ops, run.op), run.case.make(device, torch.float64)
    return {
        f"{name} fp32": lambda: theirs,
        "eager fp32": lambda: functools.partial(function, **options, backend="reference"),
        "ours fp32": lambda: functools.partial(function, **options),
    }


def assert_right(spec, case, device: str) -> None:
    """Ours are the masks of the definition."""
    options = case.make(device, torch.float64)
    torch.testing.assert_close(spec.function(**options), spec.reference(**options), rtol=0, atol=0)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_mask_makers(run, race_calls, device):
    assert_right(SPECS[run.op], run.case, device)
    made = entrants(run, device)
    name = next(iter(made)).split()[0]
    ratios = {f"over {name}": (f"{name} fp32", "ours fp32"), "over eager": ("eager fp32", "ours fp32")}
    race_calls(run, made, {}, {"ours fp32": run.case.cost.bytes}, ratios)

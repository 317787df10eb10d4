"""Patch masking, the decoder's restoring, and embedding of kept patches alone: MAE's code, timm's, lightly's, and ours.

"eager" is MAE's code, "compile" the same through torch.compile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib.util import find_spec

import measure
import pytest
import torch
import torch.nn.functional as F
from masking_forms import mae_random_masking, mae_unshuffle
from runs import runs

import sslkernels
from sslkernels.registry import ops

RATIO = 0.75  # of every case


def mae_masking(x, num_prefix_tokens, seed):
    return mae_random_masking(x, RATIO, torch.rand(x.shape[:2], device=x.device))[0]


def timm_masking(x, num_prefix_tokens, seed):
    from timm.layers import PatchDropout

    return PatchDropout(RATIO, num_prefix_tokens)(x)


def lightly_masking(x, num_prefix_tokens, seed):
    from lightly.models.utils import get_at_index, random_token_mask

    kept, _ = random_token_mask(x.shape[:2], RATIO, mask_class_token=True, device=x.device)
    return get_at_index(x, kept)


def our_masking(x, num_prefix_tokens, seed):
    return sslkernels.random_masking(x, RATIO, num_prefix_tokens=num_prefix_tokens, seed=seed).x_kept


def mae_indices(batch_size, num_patches, seed, device):
    noise = torch.rand(batch_size, num_patches, device=device)
    return mae_random_masking(torch.empty(batch_size, num_patches, 0, device=device), RATIO, noise)[2]


def lightly_indices(batch_size, num_patches, seed, device):
    from lightly.models.utils import random_token_mask

    return torch.cat(random_token_mask((batch_size, num_patches), RATIO, mask_class_token=True, device=device), dim=1)


def our_indices(batch_size, num_patches, seed, device):
    return sslkernels.patch_mask(batch_size, num_patches, RATIO, seed=seed, device=device).ids_restore


def mae_gathering(x, ids, num_prefix_tokens):
    return x.gather(1, ids[..., None].repeat(1, 1, x.shape[2]))


def lightly_gathering(x, ids, num_prefix_tokens):
    from lightly.models.utils import get_at_index

    return get_at_index(x, ids)


def mae_restoring(x_kept, ids_restore, mask_token, pos_embed, num_prefix_tokens):
    return mae_unshuffle(x_kept, mask_token, ids_restore, pos_embed, num_prefix_tokens)


def lightly_restoring(x_kept, ids_restore, mask_token, pos_embed, num_prefix_tokens):
    from lightly.models.utils import repeat_token, set_at_index

    ids_keep = ids_restore.argsort(dim=1)[:, : x_kept.shape[1]]
    return set_at_index(repeat_token(mask_token, tuple(ids_restore.shape)), ids_keep, x_kept) + pos_embed


def embed_all(images, weight, bias, ids_keep, pos_embed):
    tokens = F.conv2d(images, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2) + pos_embed
    return tokens.gather(1, ids_keep[..., None].expand(-1, -1, weight.shape[0]))


def _specs() -> dict:
    """The registry's, with what is timed: one tensor of each op, and gradients of what is trained."""
    made = {spec.name: spec for spec in ops()}
    changes = {
        "random_masking": {"function": our_masking, "reference": mae_masking},
        "patch_mask": {"function": our_indices, "reference": mae_indices},
        "gather_tokens": {"reference": mae_gathering},
        "restore_tokens": {"reference": mae_restoring},
        "masked_patch_embed": {"reference": embed_all, "grad_args": ("weight", "bias", "pos_embed")},
    }
    return {name: dataclasses.replace(made[name], **changed) for name, changed in changes.items()}


SPECS = _specs()
RUNS = runs(SPECS)


def peers(op: str) -> dict[str, Callable]:
    """What users pick instead, where it is installed."""
    found = {
        "random_masking": {"timm": timm_masking, "lightly": lightly_masking},
        "patch_mask": {"lightly": lightly_indices},
        "gather_tokens": {"lightly": lightly_gathering},
        "restore_tokens": {"lightly": lightly_restoring},
        "masked_patch_embed": {},
    }
    return {name: peer for name, peer in found[op].items() if find_spec(name)}


def assert_masked(spec, racers, case, device) -> None:
    """Every contender keeps as many distinct tokens of each sample as ours, whole: they all draw differently."""
    for racer in racers:
        arguments = case.make(device, measure.DTYPES[racer.dtype])
        samples, tokens, columns = arguments["x"].shape
        numbers = torch.arange(tokens, device=device, dtype=arguments["x"].dtype)  # exact in bfloat16 up to 256
        arguments["x"] = numbers[:, None].expand(samples, tokens, columns).contiguous()
        kept = racer.function(**arguments)
        assert kept.shape == (samples, round(tokens * (1 - RATIO)), columns), racer.label
        assert (kept == kept[..., :1]).all() and (kept[..., 0].sort(dim=1).values.diff(dim=1) > 0).all(), racer.label


def assert_permutations(spec, racers, case, device) -> None:
    """Every contender gives all ids of each sample."""
    for racer in racers:
        arguments = case.make(device, measure.DTYPES[racer.dtype])
        ids = racer.function(**arguments)
        assert (ids.sort(dim=1).values == torch.arange(arguments["num_patches"], device=device)).all(), racer.label


CHECKS = {"random_masking": assert_masked, "patch_mask": assert_permutations}


def entrants(run, device):
    spec = SPECS[run.op]
    return measure.entrants(spec, measure.of_run(spec, peers(run.op), run, device), run, device)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_patch_mask(run, race):
    race(run, SPECS[run.op], peers(run.op), CHECKS.get(run.op, measure.assert_correct))

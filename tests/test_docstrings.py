"""What the docstring of a public function calls equivalent, in PyTorch or in Python, runs and is so."""

from __future__ import annotations

import ast
import inspect
import math
import random
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sslkernels

N, D, L, K = 6, 4, 9, 3  # samples, features, tokens, kept tokens
Z0, Z1 = torch.randn(2, N, D)
TOWERS = {"image_features": F.normalize(Z0, dim=1), "text_features": F.normalize(Z1, dim=1)}
TOKENS, IDS = torch.randn(N, L, D), torch.randint(0, L, (N, K))
MASKS = sslkernels.patch_mask(N, L, num_keep=K, seed=0)
P, Q, H, W, C = 2, 3, 6, 9, 5  # patch, image, channels: 3 x 3 patches
IMAGES = torch.randn(N, C, H, W)

# arguments of the public function, which the code knows by the same names
CALLS = {
    "nt_xent": {"z0": Z0, "z1": Z1, "temperature": 0.3},
    "decoupled_nt_xent": {"z0": Z0, "z1": Z1, "temperature": 0.3, "positive_weight": torch.rand(2 * N)},
    "info_nce": {"query": Z0, "positive_key": Z1, "negative_keys": torch.randn(9, D), "temperature": 0.3}
    | {"label_smoothing": 0.1},
    "clip_loss": {**TOWERS, "logit_scale": 5.0, "logit_bias": -1.0},
    "sigmoid_loss": {**TOWERS, "logit_scale": 5.0, "logit_bias": -1.0},
    "sup_con": {"features": Z0, "labels": torch.tensor([0, 1, 0, 2, -1, 1]), "temperature": 0.3},
    "gather_tokens": {"x": TOKENS, "ids": IDS},
    "restore_tokens": {"x_kept": TOKENS[:, :K], "ids_restore": MASKS.ids_restore, "mask_token": torch.randn(D)}
    | {"pos_embed": torch.randn(L, D)},
    "masked_patch_embed": {"images": IMAGES, "weight": torch.randn(D, C, P, Q), "bias": torch.randn(D)}
    | {"ids_keep": MASKS.ids_keep, "pos_embed": torch.randn(L, D)},
    "masked_patch_loss": {"pred": torch.randn(N, L, P * Q * C), "images": IMAGES, "mask": MASKS.mask}
    | {"patch_size": (P, Q), "norm_pix": True, "eps": 1e-6},
}
NAMES = {"weight": CALLS["decoupled_nt_xent"]["positive_weight"], "p": P, "q": Q, "H": H, "W": W, "C": C}


def equivalents(language: str) -> dict[str, str]:
    """Of each public function the code that its docstring calls equivalent."""
    found = {}
    for name in sslkernels.__all__:
        pattern = rf"Equivalent {language}[^\n]*::\n\n((?:    [^\n]*\n|\n)+)"
        match = re.search(pattern, inspect.getdoc(getattr(sslkernels, name)) + "\n")
        if match:
            found[name] = inspect.cleandoc("\n" + match[1])
    return found


def execute(code: str, **names: object) -> dict[str, object]:
    """The names that the code defines; ``_`` is the value of its last line, if that is an expression."""
    names = {"torch": torch, "F": F, "N": N, "D": D, "L": L, "K": K, **names}
    body = ast.parse(code).body
    if isinstance(body[-1], ast.Expr):
        body[-1] = ast.Assign([ast.Name("_", ast.Store())], body[-1].value)
    exec(compile(ast.fix_missing_locations(ast.Module(body, [])), "docstring", "exec"), names)
    return names


def test_every_equivalent_is_tried():
    assert set(equivalents("PyTorch")) == {*CALLS, "ema_update_", "random_masking", "tube_mask"}
    assert set(equivalents("Python")) == {"block_mask", "multi_block_mask", "multi_block_sizes", "span_mask"}


@pytest.mark.parametrize("name", CALLS)
def test_value(name):
    found = execute(equivalents("PyTorch")[name], **{**NAMES, **CALLS[name]})
    torch.testing.assert_close(getattr(sslkernels, name)(**CALLS[name]), found["loss" if "loss" in found else "_"])


def test_ema_update():
    teachers = [[Z0.clone(), TOKENS.clone()] for _ in range(2)]
    arguments = {"student": [Z1, TOKENS + 1], "momentum": 0.9}
    execute(equivalents("PyTorch")["ema_update_"], teacher=teachers[0], **arguments)
    sslkernels.ema_update_(teacher=teachers[1], **arguments)
    torch.testing.assert_close(*teachers)


def test_random_masking():
    found = execute(equivalents("PyTorch")["random_masking"], x=TOKENS)
    kept = sslkernels.random_masking(TOKENS, num_keep=K, scores=found["noise"])
    for field, value in kept._asdict().items():
        assert torch.equal(value, found[field]), field


def test_tube_mask():
    names = {"T": 3, "H": 4, "W": 5, "mask_ratio": 0.6, "seed": 7, "patch_mask": sslkernels.patch_mask}
    found = execute(equivalents("PyTorch")["tube_mask"], **names)
    masks = sslkernels.tube_mask(N, (3, 4, 5), 0.6, seed=7)
    for field, value in masks._asdict().items():
        assert torch.equal(value, found[field]), field


# the random numbers are others, so of these only what does not depend on them can be compared
PYTHON = {
    "np": np,
    "uniform": random.uniform,
    "randint": random.randint,
    "sample": random.sample,
    "random": random.random,
}
PYTHON |= {"exp": math.exp, "log": math.log, "sqrt": math.sqrt, "permutation": np.random.permutation}


def test_block_mask():
    names = {"H": 8, "W": 9, "min_patches": 4, "max_patches": 72, "min_aspect": 0.3, "max_aspect": 3.3}
    found = execute(equivalents("Python")["block_mask"], num_masked=30, **names, **PYTHON)
    assert found["mask"].sum() == sslkernels.block_mask(1, (8, 9), 30, seed=0).sum() == 30


def test_multi_block_mask():
    names = {"H": 14, "W": 14, "h": 5, "w": 6, "context_h": 12, "context_w": 13, "num_targets": 4, "min_context": 10}
    found = execute(equivalents("Python")["multi_block_mask"], allow_overlap=False, **names, **PYTHON)
    masks = sslkernels.multi_block_mask(1, 14, target_size=(5, 6), context_size=(12, 13), seed=0)
    assert np.array(found["targets"]).shape == masks.target_ids[0].shape
    for context, targets in ((found["context_ids"], found["targets"]), (masks.truncated()[0], masks.target_ids[0])):
        assert len(context) >= 10 and not np.isin(context, targets).any()


def test_multi_block_sizes():
    names = {"H": 14, "W": 14, "low": 0.75, "high": 1.5, "target_scale": (0.2, 0.2), "context_scale": (1.0, 1.0)}
    found = execute(equivalents("Python")["multi_block_sizes"], **names, **PYTHON)
    sizes = sslkernels.multi_block_sizes(14, seed=0, target_scale=(0.2, 0.2), context_scale=(1.0, 1.0))
    assert found["context_size"] == sizes.context_size == (14, 14)
    for height, width in (found["target_size"], sizes.target_size):
        assert 34 <= height * width <= 45 and 5 <= height <= 8


def test_span_mask():
    names = {"p": 0.5, "l": 40, "s": 10, "min_spans": 2, "num_tokens": 50}
    found = execute(equivalents("Python")["span_mask"], **names, **PYTHON)
    masks = sslkernels.span_mask(1, 50, 0.5, span_length=10, min_spans=2, lengths=torch.tensor([40]), seed=0)[0]
    for mask in (found["mask"], masks.numpy()):
        assert 10 < mask.sum() <= 30 and not mask[40:].any()

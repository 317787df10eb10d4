"""The family of contrastive losses against the packages that people take them from."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec

import measure
import pytest
import torch
import torch.nn.functional as F
from runs import runs

from sslkernels.registry import ops

OPS = ("decoupled_nt_xent", "hard_nt_xent", "info_nce", "info_nce_queue", "clip_loss", "sup_con", "sigmoid_loss")
SPECS = {spec.name: spec for spec in ops() if spec.name in OPS}
RUNS = runs(SPECS)


def peers(op: str) -> dict[str, Callable]:
    """What users pick instead of an op, where it is installed."""
    found = {
        "decoupled_nt_xent": {"lightly": lightly_dcl},
        "hard_nt_xent": {},
        "info_nce": {"info_nce_pytorch": info_nce_pytorch},
        "info_nce_queue": {"lightly": lightly_queue, "info_nce_pytorch": info_nce_pytorch},
        "clip_loss": {"open_clip": open_clip, "linear_cross_entropy": chunked_cross_entropy},
        "sup_con": {"pytorch_metric_learning": metric_learning},
        "sigmoid_loss": {"open_clip": open_clip_sigmoid},
    }
    packages = {"info_nce_pytorch": "info_nce", "linear_cross_entropy": "torch"}
    installed = {name: peer for name, peer in found[op].items() if find_spec(packages.get(name, name))}
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):  # torch before 2.14
        installed.pop("linear_cross_entropy", None)
    return installed


@functools.cache
def _made(module: str, name: str, *args):
    """An object of a peer, made once."""
    return getattr(__import__(module, fromlist=[name]), name)(*args)


_filled: dict[int, torch.Tensor] = {}  # by memory bank, the queue that it was given


def lightly_dcl(z0, z1, temperature):
    return _made("lightly.loss", "DCLLoss", temperature)(z0, z1)


def lightly_queue(query, positive_key, negative_keys, temperature):
    loss = _made("lightly.loss", "NTXentLoss", temperature, tuple(negative_keys.shape))
    if _filled.get(id(loss)) is not negative_keys:  # from then on it keeps its own
        _filled[id(loss)] = negative_keys
        loss.memory_bank.bank = F.normalize(negative_keys.detach(), dim=1)
    return loss(query, positive_key)


def info_nce_pytorch(query, positive_key, negative_keys, temperature):
    return _made("info_nce", "InfoNCE", temperature)(query, positive_key, negative_keys)


def open_clip(image_features, text_features, logit_scale, logit_bias):
    return _made("open_clip.loss", "ClipLoss")(image_features, text_features, logit_scale)


def open_clip_sigmoid(image_features, text_features, logit_scale, logit_bias):
    return _made("open_clip.loss", "SigLipLoss")(image_features, text_features, logit_scale, logit_bias)


def chunked_cross_entropy(image_features, text_features, logit_scale, logit_bias):
    labels = torch.arange(len(image_features), device=image_features.device)
    options = torch.nn.LinearCrossEntropyOptions()  # chunks
    sides = ((image_features, text_features), (text_features, image_features))
    return sum(F.linear_cross_entropy(logit_scale * x, y, labels, options=options) for x, y in sides) / 2


def metric_learning(features, labels, temperature):
    return _made("pytorch_metric_learning.losses", "SupConLoss", temperature)(features, labels)


def entrants(run, device):
    spec = SPECS[run.op]
    return measure.entrants(spec, measure.of_run(spec, peers(run.op), run, device), run, device)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_contrast(run, race):
    race(run, SPECS[run.op], peers(run.op))

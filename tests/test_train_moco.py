"""MoCo learns by either op, in parts, in several processes; its keys leak nothing; a killed run goes on bit for bit."""

import copy
import functools
import signal

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from train_children import (
    TINY,
    finish,
    logged,
    own_threads,  # noqa: F401  a fixture that every test here uses
    start,
    train,
    train_as_two,
    train_until,
)

import sslkernels
from sslkernels import cli
from sslkernels.trainers import _accumulate, _checkpoint, moco

LEARNING = ["--steps=40", "--batch-size=64", "--warmup=4", "--lr=1e-3", "--queue=512", "--threads=1", "--workers=0"]
QUEUE = "--queue=40"  # of TINY's batches of 16 the third wraps around


_train = functools.partial(train, "moco")


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """The folder of a short run by the fused ops, and its kNN accuracies."""
    folder = tmp_path_factory.mktemp("learned") / "fused"
    return folder, _train(LEARNING, folder)


def test_the_features_improve(learned):
    folder, accuracies = learned
    assert accuracies["trained encoder"] > accuracies["untrained encoder"]
    assert list((folder / "tensorboard").iterdir())


def test_fused_and_reference_give_the_same_curve(learned, tmp_path):
    _train([*LEARNING, "--ops=reference", "--stop-after=10"], tmp_path)
    fused, definition = logged(learned[0])[:10], logged(tmp_path)
    assert len(definition) == 10
    np.testing.assert_allclose(fused, definition, rtol=0, atol=1e-3)


@pytest.mark.parametrize("options", [["--optimizer=lars"], ["--precision=bf16"], ["--accumulate=4"]])
def test_the_options_train(tmp_path, options):
    _train([*TINY, "--stop-after=3", *options], tmp_path)
    assert len(logged(tmp_path)) == 3


def test_accumulation_is_the_whole_batch(tmp_path):
    options = [*TINY, QUEUE, "--norm=group", "--stop-after=4", "--lr=1e-4"]
    _train(options, tmp_path / "whole")
    _train([*options, "--accumulate=4"], tmp_path / "parts")
    np.testing.assert_allclose(logged(tmp_path / "parts"), logged(tmp_path / "whole"), rtol=0, atol=1e-4)
    bank, whole = (_checkpoint.load(tmp_path / name / "checkpoint.pt")["bank"]["bank"] for name in ("parts", "whole"))
    torch.testing.assert_close(bank, whole, rtol=0, atol=1e-4)


def test_gradients_of_parts_add_up():
    torch.manual_seed(0)
    model = nn.Linear(6, 5)
    images, keys, queue = torch.randn(12, 6), torch.randn(12, 5), torch.randn(20, 5)

    def loss_of(network, micro_batch):
        loss = sslkernels.info_nce(network(micro_batch[0]), micro_batch[1], queue, 0.2, reduction="none")
        return loss.sum() / 12, loss.detach()

    gradients = []
    for parts in (1, 4):
        model.zero_grad()
        micro_batches = list(zip(images.chunk(parts), keys.chunk(parts), strict=True))
        rows = _accumulate.backward_of_sum(model, micro_batches, loss_of, 0)
        gradients.append([torch.cat(rows), *(parameter.grad.clone() for parameter in model.parameters())])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_two_processes_train_as_one(tmp_path):
    options = [*TINY, QUEUE, "--norm=group", "--stop-after=4", "--lr=1e-4"]
    train_as_two(options, tmp_path / "two", "moco")
    _train(options, tmp_path / "one")
    np.testing.assert_allclose(logged(tmp_path / "two"), logged(tmp_path / "one"), rtol=0, atol=1e-4)
    np.testing.assert_allclose(logged(tmp_path / "two", "top1"), logged(tmp_path / "one", "top1"), rtol=0, atol=0.1)
    two, one = (_checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("two", "one"))
    torch.testing.assert_close(two["bank"], one["bank"], rtol=0, atol=1e-4)
    for name in ("model", "teacher"):
        states = [{k: v for k, v in state[name].items() if torch.is_tensor(v)} for state in (two, one)]
        torch.testing.assert_close(*states, rtol=0, atol=1e-3)


def test_two_processes_resume_with_one_teacher(tmp_path):
    """With batch norm the processes see other statistics, but their teachers must not."""
    options = [*TINY, QUEUE]
    train_as_two([*options, "--stop-after=5"], tmp_path / "stopped", "moco")
    train_as_two([*options, "--stop-after=7", "--resume"], tmp_path / "stopped", "moco")
    train_as_two([*options, "--stop-after=7"], tmp_path / "run", "moco")
    _assert_same_run(tmp_path / "stopped", tmp_path / "run")


def _assert_same_run(folder, expected):
    assert (folder / "log.csv").read_bytes() == (expected / "log.csv").read_bytes()
    actual, state = (_checkpoint.load(path / "checkpoint.pt") for path in (folder, expected))
    assert {"model", "teacher", "bank", "optimizer"} < actual.keys() == state.keys()
    pairs = list(zip(tree_leaves(actual), tree_leaves(state), strict=True))
    assert all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in pairs)


def test_killed_again_and_again_equals_uninterrupted(tmp_path):
    options, output = [*TINY, QUEUE], tmp_path / "output.txt"
    for moment in ("after the log ran ahead", "when a checkpoint has its name", "in a later checkpoint"):
        argv = [*options, f"--out={tmp_path / 'killed'}", "--resume"]
        assert finish(start(train_until, argv, moment, output, "moco")) == -signal.SIGKILL, output.read_text()
    for argv in ([f"--out={tmp_path / 'killed'}", "--resume"], [f"--out={tmp_path / 'run'}"]):
        assert finish(start(train_until, [*options, *argv], None, output, "moco")) == 0, output.read_text()
    _assert_same_run(tmp_path / "killed", tmp_path / "run")


@pytest.mark.parametrize("ops", ["fused", "reference"])
def test_a_key_depends_on_its_own_image_alone(ops):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))
    teacher = moco.key_encoder(model, 0.9, ops)
    for _ in range(3):
        model(torch.randn(16, 6) * 3 + 1)
        teacher.update_parameters(model)
    images = torch.randn(4, 6)
    torch.testing.assert_close(teacher(images)[:1], teacher(images[:1]))
    assert not any(parameter.requires_grad for parameter in teacher.parameters()) or ops == "reference"


@pytest.mark.parametrize("ops", ["fused", "reference"])
def test_the_key_encoder_averages_weights_and_statistics(ops):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    teacher = moco.key_encoder(model, 0.75, ops)
    expected = copy.deepcopy(model.state_dict())
    for _ in range(4):
        with torch.no_grad():
            for tensor in [*model.parameters(), model[1].running_mean, model[1].running_var]:
                tensor.add_(torch.rand_like(tensor))
        teacher.update_parameters(model)
        expected = {name: old + 0.25 * (model.state_dict()[name] - old) for name, old in expected.items()}
    for name, tensor in teacher.module.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, expected[name])


def test_negatives_are_the_keys_of_earlier_steps(tmp_path, monkeypatch):
    seen = []

    def info_nce(query, key, negatives, *args, **options):
        seen.append((key.clone(), negatives.clone()))
        return original(query, key, negatives, *args, **options)

    original = sslkernels.info_nce
    monkeypatch.setattr(sslkernels, "info_nce", info_nce)
    _train([*TINY, QUEUE, "--stop-after=5"], tmp_path)
    assert [len(negatives) for _, negatives in seen] == [0, 16, 32, 40, 40]
    for step, (_, negatives) in enumerate(seen):
        earlier = torch.cat([negatives[:0], *(key for key, _ in seen[:step])])[-40:]
        order, expected = (rows[rows[:, 0].argsort()] for rows in (negatives, earlier))
        assert torch.equal(order, expected)


@pytest.mark.parametrize(
    ("option", "message"), [("--queue=0", "must be at least 1"), ("--momentum=1.5", "must lie in [0, 1], got 1.5")]
)
def test_a_wrong_option_takes_one_line(capsys, option, message):
    with pytest.raises(SystemExit):
        cli.main(["train", "moco", option])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error

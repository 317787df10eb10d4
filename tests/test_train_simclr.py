"""SimCLR learns, by either op, in parts and in several processes; the probe counts right; mistakes take one line."""

import copy
import functools
import itertools

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.metrics.pairwise import cosine_similarity
from torch import nn
from train_children import (
    TINY,
    finish,
    join_store,
    own_threads,  # noqa: F401  a fixture that every test here uses
    parse,
    start,
    train_as_two,
)

import sslkernels
from sslkernels import cli
from sslkernels.trainers import TrainError, _accumulate, _evaluate, _log, _models, simclr
from sslkernels.trainers._data import load_data
from sslkernels.trainers._distributed import World, gather, join_world, leave_world, spread
from sslkernels.trainers._optim import warmup_cosine
from sslkernels.trainers._views import evaluation

ALONE = World(0, 1)
LEARNING = ["--steps=40", "--batch-size=64", "--warmup=4", "--threads=1", "--workers=0"]


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """The folder of a short run by the fused op, and its kNN accuracies."""
    folder = tmp_path_factory.mktemp("learned") / "fused"
    return folder, simclr.train(parse([*LEARNING, f"--out={folder}"]))


def test_the_loss_falls_and_the_features_improve(learned):
    folder, accuracies = learned
    losses = _log.read_column(folder / "log.csv", "loss")
    assert sum(losses[-8:]) / 8 < sum(losses[:8]) / 8 - 0.3
    assert accuracies["trained encoder"] > accuracies["untrained encoder"]
    assert list((folder / "tensorboard").iterdir())


def test_fused_and_reference_give_the_same_curve(learned, tmp_path):
    simclr.train(parse([*LEARNING, f"--out={tmp_path}", "--ops=reference", "--stop-after=12"]))
    definition = _log.read_column(tmp_path / "log.csv", "loss")
    fused = _log.read_column(learned[0] / "log.csv", "loss")
    assert len(definition) == 12
    np.testing.assert_allclose(fused[:12], definition, rtol=0, atol=1e-3)


@pytest.mark.parametrize("options", [["--optimizer=lars"], ["--precision=bf16"], ["--accumulate=4"]])
def test_the_options_train(tmp_path, options):
    simclr.train(parse([*TINY, f"--out={tmp_path}", "--stop-after=2", *options]))
    assert len(_log.read_column(tmp_path / "log.csv", "loss")) == 2


class Encoder(nn.Module):
    """As small as can be, with dropout, and batch norm if wanted."""

    def __init__(self, batch_norm=False, dropout=0.0):
        super().__init__()
        norm = nn.BatchNorm1d(8) if batch_norm else nn.LayerNorm(8)
        self.layers = nn.Sequential(nn.Linear(6, 8), norm, nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 5))

    def forward(self, x):
        return self.layers(x)


def _embed(network, views):
    return network(views.flatten(0, 1)).unflatten(0, (2, -1))


def _loss_of(embeddings, world=ALONE):
    z0, z1 = gather(embeddings, world)
    return sslkernels.nt_xent(z0, z1, 0.2, return_stats=True)


def _gradients(model, views, parts, loss_of=_loss_of):
    model.zero_grad()
    loss, stats = _accumulate.backward(model, views.chunk(parts, dim=1), _embed, loss_of, seed=3)
    return loss, stats, [parameter.grad.clone() for parameter in model.parameters()]


def _views(images=12):
    return torch.randn(2, images, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("parts", [2, 3, 12])
def test_accumulation_is_the_whole_batch(parts):
    torch.manual_seed(0)
    model = Encoder()
    loss, stats, expected = _gradients(model, _views(), 1)
    split_loss, split_stats, actual = _gradients(model, _views(), parts)
    torch.testing.assert_close(split_loss, loss)
    assert torch.equal(split_stats.top1, stats.top1)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_accumulation_repeats_dropout():
    torch.manual_seed(0)
    model = Encoder(dropout=0.5)
    loss, _, actual = _gradients(model, _views(), 3)
    model.zero_grad()
    embeddings = []
    for index, part in enumerate(_views().chunk(3, dim=1)):
        torch.manual_seed(3 + index)
        embeddings.append(_embed(model, part))
    expected, _ = _loss_of(torch.cat(embeddings, dim=1))
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(actual, [p.grad for p in model.parameters()], rtol=1e-4, atol=1e-6)


def test_accumulation_updates_running_statistics_once_a_part():
    torch.manual_seed(0)
    model = Encoder(batch_norm=True)
    expected = copy.deepcopy(model)
    _gradients(model, _views(), 3)
    for part in _views().chunk(3, dim=1):
        _embed(expected, part)
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[name], buffer)


def _gradients_as_rank(rank, port, parts, folder):
    torch.set_num_threads(1)
    join_store(rank, 2, port)
    world = join_world(torch.device("cpu"))
    torch.manual_seed(0)
    model = spread(Encoder(), world, torch.device("cpu"), parts)
    loss_of = functools.partial(_loss_of, world=world)
    loss, _, gradients = _gradients(model, _views().chunk(2, dim=1)[rank], parts, loss_of)
    torch.save({"loss": loss, "gradients": gradients}, folder / f"{rank}.pt")
    leave_world()


@pytest.mark.parametrize("parts", [1, 3])
def test_two_processes_give_the_gradient_of_one(tmp_path, parts):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [start(_gradients_as_rank, rank, store.port, parts, tmp_path) for rank in range(2)]
    assert [finish(process) for process in ranks] == [0, 0]
    torch.manual_seed(0)
    loss, _, expected = _gradients(Encoder(), _views(), 1)
    for rank in range(2):
        actual = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(actual["loss"], loss)
        torch.testing.assert_close(actual["gradients"], expected, rtol=1e-4, atol=1e-6)


def test_two_processes_train_as_one(tmp_path):
    options = [*TINY, "--norm=group", "--stop-after=3", "--lr=1e-4"]
    train_as_two(options, tmp_path / "two")
    simclr.train(parse([*options, f"--out={tmp_path / 'one'}"]))
    two, one = (_log.read_column(tmp_path / name / "log.csv", "loss") for name in ("two", "one"))
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-4)


def test_knn_counts_votes_of_the_nearest_by_cosine():
    generator = torch.Generator().manual_seed(0)
    features, queries = (torch.randn(n, 4, generator=generator) * 5 for n in (60, 25))
    labels, expected = (torch.randint(0, 3, (n,), generator=generator) for n in (60, 25))
    nearest = np.argsort(-cosine_similarity(queries, features), axis=1)[:, : _evaluate.NEIGHBORS]
    votes = np.stack([np.bincount(labels.numpy()[row], minlength=3) for row in nearest])
    share = float((votes.argmax(axis=1) == expected.numpy()).mean())
    assert _evaluate.knn_accuracy(features, labels, queries, expected) == pytest.approx(share)


def test_the_probe_embeds_every_image_in_evaluation_mode(monkeypatch):
    monkeypatch.setattr(_evaluate, "BATCH", 100)
    data = load_data("digits", None)
    backbone = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64, affine=False))
    features = _evaluate.embed(backbone, data.test, evaluation(data), torch.device("cpu"))
    pixels = data.test.images.flatten(1).float() / 127.5 - 1
    torch.testing.assert_close(features, pixels / (1 + 1e-5) ** 0.5)
    assert backbone.training and backbone[1].num_batches_tracked == 0


def test_without_labels_there_is_no_probe(capsys):
    data = load_data("digits", None)
    unlabelled = copy.copy(data.train)
    object.__setattr__(unlabelled, "labels", None)
    object.__setattr__(data, "train", unlabelled)
    assert _evaluate.probes(data, nn.Flatten(), nn.Flatten(), evaluation(data), torch.device("cpu")) == {}
    _evaluate.print_probes({})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_backbones_fit_small_images(name):
    data = load_data("digits", 32)
    backbone = _models.build_backbone(name, data, "batch")
    assert backbone(torch.zeros(2, 1, 32, 32)).shape == (2, backbone.num_features)


def test_a_small_resnet_keeps_the_resolution():
    backbone = _models.build_backbone("test_resnet", load_data("digits", 8), "group")
    assert backbone.conv1(torch.zeros(1, 1, 8, 8)).shape[-2:] == (8, 8)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())


def test_group_norm_that_does_not_fit_is_told():
    with pytest.raises(TrainError, match="--norm group does not fit --backbone test_byobnet"):
        _models.build_backbone("test_byobnet", load_data("digits", 32), "group")


def test_the_schedule_warms_up_and_falls_to_zero():
    shares = [warmup_cosine(step, 10, 4) for step in range(11)]
    assert shares[:4] == [0.25, 0.5, 0.75, 1.0] and shares[4] == 1.0 and shares[10] == pytest.approx(0)
    assert all(a >= b for a, b in itertools.pairwise(shares[4:]))
    assert warmup_cosine(0, 1, 0) == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data=cifar"], "--data must be digits"),
        (["--backbone=resnet_of_mine"], "has no model 'resnet_of_mine'"),
        (["--batch-size=5000"], "--batch-size 5000 is more than the 1297 training images"),
        (["--batch-size=64", "--accumulate=3"], "--batch-size 64 does not divide into 1 processes x --accumulate 3"),
        (["--lr=1e30"], "training diverged"),
        (["--out={file}"], "File exists"),
    ],
)
def test_a_mistake_takes_one_line(tmp_path, capsys, options, message):
    (tmp_path / "file").touch()
    options = [option.format(file=tmp_path / "file") for option in options]
    assert cli.main(["train", "simclr", *TINY, f"--out={tmp_path / 'run'}", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sslkernels train simclr: ") and message in error and error.count("\n") == 1
    assert (tmp_path / "run").exists() == ("diverged" in message)


@pytest.mark.parametrize(
    "option", ["--steps=0", "--batch-size=1", "--temperature=0", "--lr=inf", "--temperature=nan", "--ops=magic"]
)
def test_a_wrong_option_takes_one_line(capsys, option):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "simclr", option])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and option.split("=")[0] in error

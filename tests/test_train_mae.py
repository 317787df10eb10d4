"""MAE learns by either op, in parts and in several processes; masks follow image and epoch; the picture shows it."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils._pytree import tree_leaves
from train_children import (
    TINY,
    logged,
    own_threads,  # noqa: F401  a fixture that every test here uses
    train,
    train_as_two,
)

import sslkernels
from sslkernels import cli
from sslkernels.trainers import _checkpoint, _evaluate, _pictures, mae
from sslkernels.trainers._data import load_data
from sslkernels.trainers._masked_autoencoder import MaskedAutoencoder, images_of, patches_of, reconstruct
from sslkernels.trainers._models import build_vit

LEARNING = ["--steps=40", "--batch-size=64", "--warmup=4", "--threads=1", "--workers=0"]


_train = functools.partial(train, "mae")


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """The folder of a short run by the fused ops, and its accuracies."""
    folder = tmp_path_factory.mktemp("learned") / "fused"
    return folder, _train(LEARNING, folder)


def test_the_loss_falls_and_features_are_probed(learned):
    folder, accuracies = learned
    losses = logged(folder)
    assert np.mean(losses[-8:]) < np.mean(losses[:8]) - 0.2
    assert list(accuracies) == ["kNN", "linear"]
    for found in accuracies.values():
        assert set(found) == {"raw pixels", "untrained encoder", "trained encoder"}
        assert 0.1 < found["trained encoder"] <= 1
    assert list((folder / "tensorboard").iterdir())


def test_fused_and_reference_give_the_same_curve(learned, tmp_path):
    _train([*LEARNING, "--ops=reference", "--stop-after=15"], tmp_path)
    fused, definition = logged(learned[0])[:15], logged(tmp_path)
    assert len(definition) == 15
    np.testing.assert_allclose(fused, definition, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [["--optimizer=lars"], ["--precision=bf16"], ["--norm-pix", "--mask-ratio=0.5"], ["--backbone=test_vit2"]],
)
def test_the_options_train(tmp_path, options):
    _train([*TINY, "--stop-after=2", *options], tmp_path)
    assert len(logged(tmp_path)) == 2


def _masks(monkeypatch):
    """The masks that training draws from now on, by seed and image."""
    seen = {}

    def random_masking(x, mask_ratio, *, seed, sample_ids, **options):
        out = original(x, mask_ratio, seed=seed, sample_ids=sample_ids, **options)
        seen.update({(seed, index): mask for index, mask in zip(sample_ids.tolist(), out.mask, strict=True)})
        return out

    original = sslkernels.random_masking
    monkeypatch.setattr(sslkernels, "random_masking", random_masking)
    return seen


def test_masks_follow_image_and_epoch_alone(tmp_path, monkeypatch):
    data = load_data("digits", None)
    few = dataclasses.replace(data.train, images=data.train.images[:32])
    monkeypatch.setattr(mae, "load_data", lambda *_: dataclasses.replace(data, train=few))
    masks, options = _masks(monkeypatch), [*TINY, "--stop-after=4"]  # two epochs
    _train(options, tmp_path / "whole")
    whole = dict(masks)
    masks.clear()
    _train([*options, "--accumulate=4"], tmp_path / "parts")
    np.testing.assert_allclose(logged(tmp_path / "parts"), logged(tmp_path / "whole"), rtol=0, atol=1e-4)
    assert masks.keys() == whole.keys() and all(torch.equal(masks[key], whole[key]) for key in whole)
    first, second = (torch.stack([whole[seed, i] for i in range(32)]) for seed in sorted({seed for seed, _ in whole}))
    assert (first != second).any(dim=1).float().mean() > 0.8


def test_two_processes_train_as_one(tmp_path):
    options = [*TINY, "--stop-after=4", "--lr=1e-4"]
    train_as_two(options, tmp_path / "two", "mae")
    _train(options, tmp_path / "one")
    np.testing.assert_allclose(logged(tmp_path / "two"), logged(tmp_path / "one"), rtol=0, atol=1e-4)


def test_stopping_leaves_the_curve(tmp_path):
    _train(TINY, tmp_path / "run")
    _train([*TINY, "--stop-after=5"], tmp_path / "stopped")
    assert not (tmp_path / "stopped" / mae.PICTURE).exists()
    _train([*TINY, "--resume", "--workers=1"], tmp_path / "stopped")
    for name in ("log.csv", mae.PICTURE):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    stopped, run = (_checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("stopped", "run"))
    pairs = list(zip(tree_leaves(stopped), tree_leaves(run), strict=True))
    assert all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in pairs)


def test_the_picture_shows_held_out_images_in_three_rows(learned):
    with Image.open(learned[0] / mae.PICTURE) as picture:
        pixels = np.asarray(picture.convert("L"), dtype=float)
    scale, border = 8, 2  # 64 pixels an image and 2 between them
    assert pixels.shape == (3 * (64 + border) + border, mae.PICTURED * (64 + border) + border)
    data = load_data("digits", None)
    for column in range(mae.PICTURED):
        left = border + column * (64 + border) + scale // 2
        rows = [pixels[border + row * (64 + border) + 4 :: scale, left::scale][:8, :8] for row in range(3)]
        original, seen, whole = rows
        np.testing.assert_allclose(original, data.test.images[column, 0], atol=1)
        visible = np.abs(seen - original) <= 1
        assert visible.sum() >= 16  # four patches of 2 x 2
        np.testing.assert_allclose(seen[~visible], 127.5, atol=1)
        kept = np.abs(seen - 127.5) > 1
        np.testing.assert_allclose(whole[kept], original[kept], atol=1)


def _model(**options):
    torch.manual_seed(0)
    data = load_data("digits", None)
    return MaskedAutoencoder(build_vit(None, data, 2), 0.75, 32, 1, "fused")


def test_patches_are_in_the_order_of_the_loss():
    images = torch.randn(2, 3, 8, 8)
    patches = patches_of(images, 4)
    mask = torch.ones(2, 4, dtype=torch.bool)
    assert sslkernels.masked_patch_loss(patches, images, mask, 4, norm_pix=False) == 0
    assert torch.equal(images_of(patches, 4, (8, 8)), images)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_a_perfect_prediction_is_pictured_as_the_image(norm_pix):
    images = torch.randn(3, 1, 8, 8)

    class Perfect(nn.Module):
        encoder = _model().encoder

        def forward(self, images, seed, sample_ids):
            target = patches_of(images, 2)
            mask = sslkernels.patch_mask(len(images), 16, seed=seed).mask
            if norm_pix:
                target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
            return torch.where(mask[..., None], target, torch.nan), mask

    original, seen, whole = reconstruct(Perfect(), images, norm_pix, seed=0)
    torch.testing.assert_close(whole, images)
    assert torch.equal(original, images)
    shown = seen != 0
    assert shown.sum() == 3 * 16 and torch.equal(seen[shown], images[shown])


def test_the_model_removes_what_the_mask_says():
    model = _model()
    images = torch.randn(4, 1, 8, 8)
    pred, mask = model(images, 3, None)
    assert pred.shape == (4, 16, 4) and mask.sum() == 4 * 12
    elsewhere = images_of(patches_of(images, 2) + mask[..., None], 2, (8, 8))
    torch.testing.assert_close(model(elsewhere, 3, None)[0], pred)
    assert not model.encoder.pos_embed.requires_grad
    assert [name for name, p in model.named_parameters() if p.requires_grad and "pos" in name] == []


def test_a_failed_picture_keeps_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    _pictures.write_grid(torch.zeros(3, 2, 1, 8, 8), path)
    before = path.read_bytes()

    def disk_full(images, file, **options):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_pictures, "save_image", disk_full)
    with pytest.raises(OSError, match="No space"):
        _pictures.write_grid(torch.ones(3, 2, 1, 8, 8), path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_the_linear_probe_is_blind_to_scale_and_counts_right():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(300, 2, generator=generator), torch.arange(300) % 3
    features[:, 0] += 6 * labels
    scaled = features * torch.tensor([1e-3, 1e3]) + 5
    assert _evaluate.linear_accuracy(features, labels, features, labels) > 0.97
    assert _evaluate.linear_accuracy(scaled, labels, scaled, labels) > 0.97
    assert _evaluate.linear_accuracy(features, labels, features, (labels + 1) % 3) < 0.03


def test_both_probes_are_printed_in_one_table(capsys):
    found = {name: {"raw pixels": 0.5, "trained encoder": 0.75} for name in ("kNN", "linear")}
    _evaluate.print_both_probes(found)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["features", "kNN", "linear"] in lines and ["trained", "encoder", "75.0%", "75.0%"] in lines
    _evaluate.print_both_probes({"kNN": {}, "linear": {}})
    _evaluate.print_both_probes({})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--patch-size=3"], "--patch-size 3 does not divide images of 8 pixels"),
        (["--backbone=test_resnet"], "--backbone test_resnet is not one of timm's plain ViTs"),
        (["--backbone=vit_of_mine"], "has no model 'vit_of_mine'"),
        (["--decoder-dim=20"], "--decoder-dim must be a multiple of 16, got 20"),
        (["--lr=1e30"], "training diverged"),
    ],
)
def test_a_mistake_takes_one_line(tmp_path, capsys, options, message):
    assert cli.main(["train", "mae", *TINY, f"--out={tmp_path / 'run'}", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sslkernels train mae: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("option", ["--mask-ratio=1.5", "--patch-size=0", "--decoder-depth=0"])
def test_a_wrong_option_takes_one_line(capsys, option):
    with pytest.raises(SystemExit):
        cli.main(["train", "mae", option])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and option.split("=")[0] in error

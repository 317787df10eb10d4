"""CLIP learns what the captions name, by either op and in several processes; a resumed run goes on bit for bit."""

import functools

import numpy as np
import pytest
import torch
from train_children import (
    TINY,
    logged,
    own_threads,  # noqa: F401  a fixture that every test here uses
    train,
    train_as_two,
)

from sslkernels import cli
from sslkernels.trainers import _checkpoint, clip
from sslkernels.trainers._data import load_data
from sslkernels.trainers._distributed import World
from sslkernels.trainers._views import augmentation

LEARNING = ["--steps=30", "--batch-size=64", "--warmup=4", "--threads=1", "--workers=0"]


_train = functools.partial(train, "clip")


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """The folder of a short run by the fused op, and its zero-shot accuracies."""
    folder = tmp_path_factory.mktemp("learned") / "fused"
    return folder, _train(LEARNING, folder)


def test_held_out_images_find_their_captions(learned):
    folder, accuracies = learned
    assert accuracies["untrained encoder"] < 0.3 and accuracies["trained encoder"] > 0.5, accuracies
    scales = logged(folder, "scale")
    assert scales[0] == pytest.approx(5, abs=0.1) and len(set(scales)) > 20
    assert np.mean(logged(folder)[-5:]) < np.mean(logged(folder)[:5]) - 1


def test_fused_and_reference_give_the_same_curve(learned, tmp_path):
    _train([*LEARNING, "--ops=reference", "--stop-after=12"], tmp_path)
    fused, definition = logged(learned[0])[:12], logged(tmp_path)
    assert len(definition) == 12
    np.testing.assert_allclose(fused, definition, rtol=0, atol=1e-3)


@pytest.mark.parametrize("options", [["--optimizer=lars"], ["--precision=bf16"]])
def test_the_options_train(tmp_path, options):
    _train([*TINY, "--stop-after=2", *options], tmp_path)
    assert len(logged(tmp_path)) == 2


def test_two_processes_train_as_one(tmp_path):
    options = [*TINY, "--norm=group", "--stop-after=3", "--lr=1e-4"]
    train_as_two(options, tmp_path / "two", "clip")
    _train(options, tmp_path / "one")
    for name in ("loss", "scale"):
        np.testing.assert_allclose(logged(tmp_path / "two", name), logged(tmp_path / "one", name), rtol=0, atol=1e-4)


def test_stopping_leaves_the_curve(tmp_path):
    _train(TINY, tmp_path / "run")
    _train([*TINY, "--stop-after=5"], tmp_path / "stopped")
    _train([*TINY, "--resume"], tmp_path / "stopped")
    assert (tmp_path / "stopped" / "log.csv").read_bytes() == (tmp_path / "run" / "log.csv").read_bytes()
    states = [_checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("stopped", "run")]
    for name in ("model", "optimizer"):
        torch.testing.assert_close(states[0][name], states[1][name], rtol=0, atol=0)


def test_captions_name_the_class_and_depend_on_seed_epoch_and_index():
    data = load_data("digits", None)
    pairs = clip.Captioned(data.train, clip.CLASSES["digits"], augmentation(data), seed=3)
    seen = set()
    for epoch in range(12):
        view, characters, label = pairs[epoch, 5]
        torch.manual_seed(epoch)
        again = pairs[epoch, 5]
        assert torch.equal(view, again[0]) and torch.equal(characters, again[1])
        caption = bytes(characters.tolist()).decode().lstrip("\0")
        assert clip.CLASSES["digits"][label] in caption.split() and label == data.train.labels[5]
        seen.add(caption)
    assert len(seen) > 2


def test_captions_of_one_class_are_no_negatives():
    features = torch.nn.functional.normalize(torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)), dim=2)
    alone, scale = World(0, 1), torch.tensor(5.0)
    for ops in ("fused", "reference"):
        same, _ = clip.loss_of(features, torch.zeros(4, dtype=torch.long), scale, alone, ops)
        other, _ = clip.loss_of(features, torch.arange(4), scale, alone, ops)
        assert same.item() == pytest.approx(0, abs=1e-6) and other > 0.1


def test_the_scale_stays_below_its_bound(tmp_path):
    _train([*TINY, "--stop-after=2", "--temperature=0.001"], tmp_path)
    first, second = logged(tmp_path, "scale")
    assert first == pytest.approx(100) and second < 100.001


def test_classes_without_names_take_one_line(tmp_path, capsys):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    assert cli.main(["train", "clip", f"--data=folder:{tmp_path}", f"--out={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--data must be one whose classes have names, digits or fashion-mnist" in error

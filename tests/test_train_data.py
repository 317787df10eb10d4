"""The image sources: what they hold, and what they say when a file is not what it should be."""

import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from sslkernels.trainers import TrainError
from sslkernels.trainers._data import load_data, read_idx
from sslkernels.trainers._views import OneView, StepKeys, TwoViews, Whole, augmentation, crops, evaluation, view_loader

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
LABELS = np.arange(6, dtype=np.uint8) % 3


def _idx(array, magic=None):
    header = struct.pack(f">I{array.ndim}I", 0x800 + array.ndim if magic is None else magic, *array.shape)
    return header + array.tobytes()


def _write_fashion_mnist(folder, compress=lambda content: content, suffix="", labels=LABELS):
    for stem in ("train", "t10k"):
        (folder / f"{stem}-images-idx3-ubyte{suffix}").write_bytes(compress(_idx(PIXELS)))
        (folder / f"{stem}-labels-idx1-ubyte{suffix}").write_bytes(compress(_idx(labels)))


@pytest.mark.parametrize(("compress", "suffix"), [(bytes, ""), (gzip.compress, ".gz")])
def test_fashion_mnist_is_read_plain_and_gzipped(tmp_path, compress, suffix):
    _write_fashion_mnist(tmp_path, compress, suffix)
    data = load_data(f"fashion-mnist:{tmp_path}", None)
    assert (data.kind, data.channels, data.image_size) == ("fashion-mnist", 1, 28)
    for images in (data.train, data.test):
        assert torch.equal(images.images, torch.from_numpy(PIXELS)[:, None])
        assert images.labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file of unsigned bytes with 3 dimensions"),
        (_idx(PIXELS)[:10], "not an IDX file"),
        (_idx(LABELS), "not an IDX file of unsigned bytes with 3 dimensions"),
        (_idx(PIXELS, magic=0xD03), "not an IDX file of unsigned bytes"),
        (_idx(PIXELS)[:-1], r"the header says \(6, 28, 28\), 4704 bytes, but 4703 follow it"),
        (_idx(PIXELS) + b"\0", "but 4705 follow it"),
        (struct.pack(">4I", 0x803, 2**32 - 1, 2**32 - 1, 2**32 - 1), "but 0 follow it"),
        (_idx(PIXELS[:0]), r"holds no data, its shape is \(0, 28, 28\)"),
        (gzip.compress(_idx(PIXELS))[:-20], "cannot be read"),
        (gzip.compress(_idx(PIXELS))[:30] + b"damage" + gzip.compress(_idx(PIXELS))[36:], "cannot be read"),
        (b"\x1f\x8bnot gzip", "cannot be read"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path, content, message):
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(TrainError, match=message) as caught:
        read_idx(path, dimensions=3)
    assert str(caught.value).startswith(f"{path}: ")


def test_images_and_labels_must_be_as_many(tmp_path):
    _write_fashion_mnist(tmp_path, labels=LABELS[:4])
    with pytest.raises(TrainError, match="6 train images but 4 labels"):
        load_data(f"fashion-mnist:{tmp_path}", None)


def test_a_missing_idx_file_is_named(tmp_path):
    _write_fashion_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(TrainError, match=r"neither t10k-labels-idx1-ubyte nor t10k-labels-idx1-ubyte\.gz is there"):
        load_data(f"fashion-mnist:{tmp_path}", None)


def _save_image(path, index, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(PIXELS[index % 6]).convert(mode).save(path)


def test_a_folder_of_classes_holds_out_every_fifth_image(tmp_path):
    for index in range(10):
        _save_image(tmp_path / ("cat" if index < 5 else "dog") / f"{index}.png", index, ("RGB", "L", "P")[index % 3])
    data = load_data(f"folder:{tmp_path}", None)
    assert [path.name for path in data.test.images.paths] == ["4.png", "9.png"]
    assert data.test.labels.tolist() == [0, 1]
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4
    assert torch.equal(data.train.images[0], torch.from_numpy(PIXELS[0]).expand(3, 28, 28))


def test_a_folder_with_train_and_val_shares_its_classes(tmp_path):
    _save_image(tmp_path / "train" / "b" / "0.png", 0)
    _save_image(tmp_path / "train" / "c" / "1.png", 1)
    _save_image(tmp_path / "val" / "c" / "2.png", 2)
    data = load_data(f"folder:{tmp_path}", 32)
    assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([0, 1], [1])


def test_a_flat_folder_has_no_labels_and_holds_nothing_out(tmp_path):
    for index in range(6):
        _save_image(tmp_path / f"{index}.jpg", index)
    data = load_data(f"folder:{tmp_path}", None)
    assert (len(data.train), len(data.test), data.train.labels) == (6, 0, None)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named(tmp_path, workers):
    _save_image(tmp_path / "whole.png", 0)
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(content[: len(content) // 2])
    data = load_data(f"folder:{tmp_path}", 16)
    keys = StepKeys(2, 2, range(1), seed=0)
    with pytest.raises(TrainError, match=r"torn\.png: not a readable image"):
        next(iter(view_loader(TwoViews(data.train, augmentation(data), 0), keys, workers)))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("cifar", "--data must be digits, fashion-mnist"),
        ("folder:", "--data must be"),
        ("digits:here", "--data must be"),
        ("folder:/no/such/place", "/no/such/place: no such folder"),
        ("fashion-mnist:/no/such/place", "dataset-fashion-mnist"),
    ],
)
def test_a_wrong_source_is_told(source, message):
    with pytest.raises(TrainError, match=message):
        load_data(source, None)


def test_an_empty_folder_is_told(tmp_path):
    with pytest.raises(TrainError, match="no images"):
        load_data(f"folder:{tmp_path}", None)


def test_digits_are_split_by_writer_and_span_the_bytes():
    data = load_data("digits", None)
    assert (len(data.train), len(data.test), data.image_size) == (1297, 500, 8)
    assert (data.train.images.min(), data.train.images.max()) == (0, 255)
    assert sorted(data.test.labels.unique().tolist()) == list(range(10))


@pytest.mark.parametrize("kind", ["digits", "fashion-mnist", "folder"])
def test_views_depend_on_seed_epoch_and_index_alone(tmp_path, kind):
    _write_fashion_mnist(tmp_path)
    for index in range(3):
        _save_image(tmp_path / "images" / f"{index}.png", index)
    source = {"digits": "digits", "fashion-mnist": f"fashion-mnist:{tmp_path}", "folder": f"folder:{tmp_path}/images"}
    data = load_data(source[kind], 16)
    views = TwoViews(data.train, augmentation(data), seed=7)
    first = views[3, 1]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again = views[3, 1]
    assert torch.equal(first, again) and torch.equal(torch.get_rng_state(), state)
    others = [views[4, 1], views[3, 2], TwoViews(data.train, augmentation(data), seed=8)[3, 1]]
    assert first.shape == (2, data.channels, 16, 16) and not torch.equal(first[0], first[1])
    assert not any(torch.equal(first, other) for other in others)
    one = OneView(data.train, crops(data), seed=7)
    view, epoch, index = one[3, 1]
    assert (epoch, index) == (3, 1) and torch.equal(view, one[3, 1][0]) and torch.equal(torch.get_rng_state(), state)
    assert any(not torch.equal(view, one[epoch, 1][0]) for epoch in range(9)) == (kind != "digits")
    assert view.shape == evaluation(data)(data.train.images[0]).shape == (data.channels, 16, 16)


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 20, 30), (3, 9, 12)])
def test_the_whole_image_is_resized_and_cropped_to_its_middle(shape):
    image = torch.randint(0, 256, shape, dtype=torch.uint8)
    steps = [v2.ToDtype(torch.float32, scale=True), v2.Resize(16), v2.CenterCrop(16), v2.Normalize([0.5], [0.5])]
    torch.testing.assert_close(Whole(16)(image), v2.Compose(steps)(image))


def test_steps_shuffle_each_epoch_and_split_among_processes():
    whole = list(StepKeys(10, 4, range(6), seed=0))
    assert [len(keys) for keys in whole] == [4] * 6
    for epoch in range(3):
        indices = [index for keys in whole[2 * epoch : 2 * epoch + 2] for e, index in keys if e == epoch]
        assert len(indices) == 8 == len(set(indices)) and set(indices) <= set(range(10))
    assert [i for _, i in whole[0]] != [i for _, i in whole[2]]
    assert list(StepKeys(10, 4, range(3, 6), seed=0)) == whole[3:]
    halves = [list(StepKeys(10, 4, range(6), 0, rank, 2)) for rank in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole

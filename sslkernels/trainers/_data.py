"""Images to train on: scikit-learn's digits, Fashion-MNIST's IDX files, or a folder; all as uint8 (C, H, W)."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from sslkernels.trainers import TrainError

SOURCES = "digits, fashion-mnist[:PATH] or folder:PATH"
FASHION_MNIST = "/usr/share/datasets/fashion-mnist"  # where Debian's package dataset-fashion-mnist puts it
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"}
DIGITS_TRAINING = 1297  # the last 500 digits come from other writers than the first ones
HELD_OUT = 5  # a folder without a test set gives every fifth image to it


@dataclass(frozen=True)
class ImageSet:
    """Images and their labels, or None. ``images[i]`` is uint8 (C, H, W)."""

    images: torch.Tensor | Folder
    labels: torch.Tensor | None

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class ImageData:
    """``kind`` chooses the augmentations; the labels serve the kNN probe alone."""

    kind: str
    channels: int
    image_size: int
    train: ImageSet
    test: ImageSet


@dataclass(frozen=True)
class Folder:
    """The image files at ``paths``, decoded when they are asked for."""

    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                return functional.pil_to_tensor(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise TrainError(f"{path}: not a readable image ({error})") from error


def load_data(source: str, image_size: int | None) -> ImageData:
    """The images that ``--data`` names. ``image_size`` None stands for the size that suits them."""
    kind, _, path = source.partition(":")
    if kind == "digits" and not path:
        return _digits(image_size or 8)
    if kind == "fashion-mnist":
        return _fashion_mnist(Path(path or FASHION_MNIST).expanduser(), image_size or 28)
    if kind == "folder" and path:
        return _folder(Path(path).expanduser(), image_size or 64)
    raise TrainError(f"--data must be {SOURCES}, got {source!r}")


def _digits(image_size: int) -> ImageData:
    from sklearn.datasets import load_digits  # scikit-learn takes seconds to import: only where it is used

    digits = load_digits()
    images = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(digits.target)
    train, test = slice(DIGITS_TRAINING), slice(DIGITS_TRAINING, None)
    return ImageData(
        "digits", 1, image_size, ImageSet(images[train], labels[train]), ImageSet(images[test], labels[test])
    )


def _fashion_mnist(path: Path, image_size: int) -> ImageData:
    if not path.is_dir():
        raise TrainError(f"{path}: no such folder; Debian's package dataset-fashion-mnist installs {FASHION_MNIST}")
    return ImageData("fashion-mnist", 1, image_size, _idx_pair(path, "train"), _idx_pair(path, "t10k"))


def _idx_pair(folder: Path, stem: str) -> ImageSet:
    images = read_idx(_plain_or_gz(folder / f"{stem}-images-idx3-ubyte"), dimensions=3)
    labels = read_idx(_plain_or_gz(folder / f"{stem}-labels-idx1-ubyte"), dimensions=1)
    if len(images) != len(labels):
        raise TrainError(f"{folder}: {len(images)} {stem} images but {len(labels)} labels")
    return ImageSet(images[:, None], labels.long())


def _plain_or_gz(path: Path) -> Path:
    compressed = path.with_name(path.name + ".gz")
    for candidate in (path, compressed):
        if candidate.exists():
            return candidate
    raise TrainError(f"{path.parent}: neither {path.name} nor {compressed.name} is there")


def read_idx(path: Path, dimensions: int) -> torch.Tensor:
    """The uint8 array of an IDX file, gzipped or not.

    The header is two zero bytes, the type (8 for unsigned bytes), the number of dimensions, and each size as a
    big-endian 32-bit number; the data follow in row-major order.
    """
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:  # BadGzipFile is an OSError
        raise TrainError(f"{path}: cannot be read ({error})") from error
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes((0, 0, 8, dimensions)):
        raise TrainError(f"{path}: not an IDX file of unsigned bytes with {dimensions} dimensions")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    if 0 in shape:
        raise TrainError(f"{path}: holds no data, its shape is {shape}")
    if len(content) - header != math.prod(shape):
        raise TrainError(
            f"{path}: the header says {shape}, {math.prod(shape)} bytes, but {len(content) - header} follow it"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).reshape(shape)


def _folder(root: Path, image_size: int) -> ImageData:
    if not root.is_dir():
        raise TrainError(f"{root}: no such folder")
    held_out = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if held_out is not None and (root / "train").is_dir():
        paths, test_paths = _image_paths(root / "train"), _image_paths(held_out)
        labels, test_labels = _class_names(root / "train", paths), _class_names(held_out, test_paths)
    else:
        every = _image_paths(root)
        names = _class_names(root, every)
        # without labels nothing is probed, so nothing is held out
        test = [names is not None and index % HELD_OUT == HELD_OUT - 1 for index in range(len(every))]
        paths, test_paths = ([path for path, t in zip(every, test, strict=True) if t is side] for side in (False, True))
        labels, test_labels = (_class_names(root, side) for side in (paths, test_paths))
    classes = sorted({*(labels or ()), *(test_labels or ())})
    sets = (
        ImageSet(Folder(files), None if names is None else torch.tensor([classes.index(name) for name in names]))
        for files, names in ((paths, labels), (test_paths, test_labels))
    )
    return ImageData("folder", 3, image_size, *sets)


def _image_paths(root: Path) -> list[Path]:
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not paths:
        raise TrainError(f"{root}: no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in it or below")
    return paths


def _class_names(root: Path, paths: Sequence[Path]) -> list[str] | None:
    """The first folder below ``root`` of every image; None where an image lies in ``root`` itself."""
    parts = [path.relative_to(root).parts for path in paths]
    return [first for first, *_ in parts] if all(len(p) > 1 for p in parts) else None

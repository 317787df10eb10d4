"""How good features are without training on them: the accuracy of nearest neighbours."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from sslkernels._table import print_table
from sslkernels.trainers._data import ImageData, ImageSet

NEIGHBORS = 5
PIXELS, UNTRAINED, TRAINED = "raw pixels", "untrained encoder", "trained encoder"
BATCH = 256


def knn_accuracy(features: torch.Tensor, labels, test_features: torch.Tensor, test_labels) -> float:
    """Share of test rows whose `NEIGHBORS` nearest rows, by cosine, vote for their label."""
    from sklearn.neighbors import KNeighborsClassifier  # scikit-learn takes seconds to import: only where it is used

    # on unit vectors the Euclidean order is the order of cosines
    train, test = (F.normalize(x.float(), dim=1).numpy() for x in (features, test_features))
    neighbors = KNeighborsClassifier(min(NEIGHBORS, len(train)), algorithm="brute").fit(train, labels.numpy())
    return float(neighbors.score(test, test_labels.numpy()))


@torch.no_grad()
def embed(backbone: nn.Module, images: ImageSet, transform: Callable, device: torch.device) -> torch.Tensor:
    """Features (N, D) of every image, in evaluation mode, on the CPU."""
    training = backbone.training
    backbone.eval()
    batches = []
    for first in range(0, len(images), BATCH):
        batch = [transform(images.images[i]) for i in range(first, min(first + BATCH, len(images)))]
        batches.append(backbone(torch.stack(batch).to(device)).float().cpu())
    backbone.train(training)
    return torch.cat(batches)


def probe(backbone: nn.Module, data: ImageData, transform: Callable, device: torch.device) -> float | None:
    """kNN accuracy of a backbone's features, the neighbours from the training images; None without labels."""
    if data.train.labels is None or data.test.labels is None or not len(data.test):
        return None
    train, test = (embed(backbone, images, transform, device) for images in (data.train, data.test))
    return knn_accuracy(train, data.train.labels, test, data.test.labels)


def probes(data: ImageData, untrained: nn.Module, trained: nn.Module, transform: Callable, device) -> dict[str, float]:
    """kNN accuracy of raw pixels and of the two backbones, by name; empty without labels."""
    named = {PIXELS: nn.Flatten(), UNTRAINED: untrained, TRAINED: trained}
    accuracies = {name: probe(backbone, data, transform, device) for name, backbone in named.items()}
    return {name: accuracy for name, accuracy in accuracies.items() if accuracy is not None}


def print_probes(accuracies: dict[str, float]) -> None:
    rows = [(name, f"{accuracy:.1%}") for name, accuracy in accuracies.items()]
    if rows:
        print(f"\n{NEIGHBORS} nearest neighbours by cosine, images held out")
        print_table("kNN accuracy", ("features", "accuracy"), rows)

"""How good features are as they are: the accuracy of nearest neighbours and of a linear classifier."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from sslkernels._table import print_table
from sslkernels.trainers._data import ImageData, ImageSet

NEIGHBORS = 5
ITERATIONS = 300  # of the logistic regression at the most
KNN, LINEAR = "kNN", "linear"
PIXELS, UNTRAINED, TRAINED = "raw pixels", "untrained encoder", "trained encoder"
BATCH = 256


def knn_accuracy(features: torch.Tensor, labels, test_features: torch.Tensor, test_labels) -> float:
    """Share of test rows whose `NEIGHBORS` nearest rows, by cosine, vote for their label."""
    from sklearn.neighbors import KNeighborsClassifier  # scikit-learn takes seconds to import: only where it is used

    # on unit vectors the Euclidean order is the order of cosines
    train, test = (F.normalize(x.float(), dim=1).numpy() for x in (features, test_features))
    neighbors = KNeighborsClassifier(min(NEIGHBORS, len(train)), algorithm="brute").fit(train, labels.numpy())
    return float(neighbors.score(test, test_labels.numpy()))


def linear_accuracy(features: torch.Tensor, labels, test_features: torch.Tensor, test_labels) -> float:
    """Share of test rows that a logistic regression on the standardised training rows classifies right."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=ITERATIONS))
    classifier.fit(features.numpy(), labels.numpy())
    return float(classifier.score(test_features.numpy(), test_labels.numpy()))


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


def probes(data: ImageData, untrained: nn.Module, trained: nn.Module, transform: Callable, device) -> dict[str, float]:
    """kNN accuracy of raw pixels and of the two backbones, by name; empty without labels."""
    return _accuracies(knn_accuracy, data, _features(data, untrained, trained, transform, device))


def both_probes(data: ImageData, untrained: nn.Module, trained: nn.Module, transform: Callable, device) -> dict:
    """The same of a linear classifier besides: accuracies by probe, then by name."""
    features = _features(data, untrained, trained, transform, device)
    return {KNN: _accuracies(knn_accuracy, data, features), LINEAR: _accuracies(linear_accuracy, data, features)}


def _features(data, untrained, trained, transform, device) -> dict[str, list[torch.Tensor]]:
    """Of the training and the test images, by the name of what made them."""
    if data.train.labels is None or data.test.labels is None or not len(data.test):
        return {}
    named = {PIXELS: nn.Flatten(), UNTRAINED: untrained, TRAINED: trained}
    sets = (data.train, data.test)
    return {name: [embed(backbone, images, transform, device) for images in sets] for name, backbone in named.items()}


def _accuracies(accuracy: Callable, data: ImageData, features: dict[str, list[torch.Tensor]]) -> dict[str, float]:
    labels, test_labels = data.train.labels, data.test.labels
    return {name: accuracy(train, labels, test, test_labels) for name, (train, test) in features.items()}


def print_probes(accuracies: dict[str, float]) -> None:
    rows = [(name, f"{accuracy:.1%}") for name, accuracy in accuracies.items()]
    if rows:
        print(f"\n{NEIGHBORS} nearest neighbours by cosine, images held out")
        print_table("kNN accuracy", ("features", "accuracy"), rows)


def print_both_probes(accuracies: dict[str, dict[str, float]]) -> None:
    rows = [(name, *(f"{found[name]:.1%}" for found in accuracies.values())) for name in accuracies.get(KNN, ())]
    if rows:
        print(f"\n{NEIGHBORS} nearest neighbours by cosine, and a logistic regression, images held out")
        print_table("accuracies", ("features", *accuracies), rows)

"""CLIP: image and caption of a pair attract, the others of the batch repel (Radford et al., 2021).

The captions are made from the names of the classes, "a picture of a seven"; read by characters, they are all that the
encoders learn of the classes. Captions of one class are no negatives of one another. In the end held-out images are
classified by the nearest caption.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

import sslkernels
from sslkernels._table import print_table
from sslkernels.trainers import TrainError, _checkpoint, _evaluate
from sslkernels.trainers._data import ImageData, ImageSet, load_data
from sslkernels.trainers._distributed import World, gather, join_world, spread
from sslkernels.trainers._log import open_log
from sslkernels.trainers._models import TimmModel, build_backbone
from sslkernels.trainers._optim import LEARNING_RATES, build_optimizer, set_learning_rate, warmup_cosine
from sslkernels.trainers._options import (
    add_encoder_arguments,
    add_optimizer_arguments,
    add_run_arguments,
    check_batch,
    run_guarded,
)
from sslkernels.trainers._views import FORWARD, VIEWS, StepKeys, augmentation, drawn_from, evaluation, seed_of

CLASSES = {
    "digits": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "fashion-mnist": (
        "t-shirt",
        "trouser",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "sneaker",
        "bag",
        "ankle boot",
    ),
}
TEMPLATES = ("{}", "a {}", "the {}", "a picture of a {}", "this is a {}", "one more {}")
LENGTH = max(len(template) for template in TEMPLATES) + max(len(name) for names in CLASSES.values() for name in names)
MAX_SCALE = 100.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser, "clip", data_example="fashion-mnist")
    add_optimizer_arguments(parser, accumulate=False)
    add_encoder_arguments(parser, "clip", norm="of the image encoder", temperature="at the start; it is learnt")


def main(args: argparse.Namespace) -> int:
    return run_guarded("clip", lambda: print_accuracies(train(args)))


class TwoTowers(nn.Module):
    """Images (N, C, H, W) and characters (N, L) as unit vectors (2, N, dim)."""

    def __init__(self, backbone: TimmModel, dim: int, temperature: float):
        super().__init__()
        features = backbone.num_features
        self.image = nn.Sequential(backbone, nn.Linear(features, dim, bias=False))
        self.characters = nn.Embedding(128, features)
        self.recurrent = nn.GRU(features, features, batch_first=True)
        self.text_head = nn.Linear(features, dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    def text(self, characters: torch.Tensor) -> torch.Tensor:
        _, state = self.recurrent(self.characters(characters))
        return self.text_head(state[0])

    def forward(self, images: torch.Tensor, characters: torch.Tensor) -> torch.Tensor:
        return torch.stack([F.normalize(self.image(images), dim=1), F.normalize(self.text(characters), dim=1)])


def encode(caption: str) -> torch.Tensor:
    """(LENGTH,) character codes, zeros first, so that a recurrent network reads the caption last."""
    return torch.tensor(list(caption.rjust(LENGTH, "\0").encode("ascii")))


@dataclass(frozen=True)
class Captioned(Dataset):
    """``pairs[epoch, index]``: an augmented view (C, H, W), a caption (LENGTH,) and the class that it names."""

    images: ImageSet
    names: Sequence[str]
    augment: Callable[[torch.Tensor], torch.Tensor]
    seed: int

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        epoch, index = key
        image, labels = self.images.images[index], self.images.labels
        label = labels[index]  # type: ignore[index]  # where classes have names there are labels
        with drawn_from(self.seed, VIEWS, epoch, index):
            template = TEMPLATES[int(torch.randint(len(TEMPLATES), ()))]
            return self.augment(image), encode(template.format(self.names[int(label)])), label


def train(args: argparse.Namespace) -> dict[str, float]:
    """Train as the arguments say; returns the zero-shot accuracies once all steps are done, in the leading process."""
    device = torch.device(args.device)
    world = join_world(device)
    data = load_data(args.data, args.image_size)
    if data.kind not in CLASSES:
        raise TrainError(f"--data must be one whose classes have names, {' or '.join(CLASSES)}, got {args.data!r}")
    check_batch(args, len(data.train), world.size)

    torch.manual_seed(args.seed)
    model = TwoTowers(build_backbone(args.backbone, data, args.norm), args.dim, args.temperature).to(device)
    untrained = copy.deepcopy(model)
    optimizer = build_optimizer(model, args.optimizer, args.weight_decay)
    parts = {"model": model, "optimizer": optimizer}
    saved = _checkpoint.begin(args, world, parts)
    parallel = spread(model, world, device, parts=1)
    peak_lr = args.lr or LEARNING_RATES[args.optimizer]
    start, end = saved.get("step", 0), min(args.steps, args.stop_after or args.steps)

    keys = StepKeys(len(data.train), args.batch_size, range(start, end), args.seed, world.rank, world.size)
    pairs = Captioned(data.train, CLASSES[data.kind], augmentation(data), args.seed)
    loader = DataLoader(pairs, batch_sampler=keys, num_workers=args.workers)
    columns = ("loss", "top1", "scale", "lr")
    with open_log(world.leads, args.out, columns, args.steps, start, saved.get("log", 0)) as log:
        for step, batch in enumerate(loader, start):
            lr = peak_lr * warmup_cosine(step, args.steps, args.warmup)
            set_learning_rate(optimizer, lr)
            optimizer.zero_grad()
            images, captions, labels = (part.to(device) for part in batch)
            torch.manual_seed(seed_of(args.seed, FORWARD, step, world.rank))
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                features = parallel(images, captions)
            loss, stats = loss_of(features, labels, model.log_scale.exp(), world, args.ops)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                scale = model.log_scale.clamp_(max=math.log(MAX_SCALE)).exp().item()
            top1 = stats.image_to_text.top1.float().mean().item()
            log.write(args.batch_size, loss=loss.item(), top1=top1, scale=scale, lr=lr)
            done = step + 1
            if world.leads and (done % args.checkpoint_every == 0 or done == end):
                _checkpoint.save(args, world, done, log, parts)
    if not world.leads or end < args.steps:
        return {}
    named = {_evaluate.UNTRAINED: untrained, _evaluate.TRAINED: model}
    return {name: zero_shot_accuracy(towers, data, device) for name, towers in named.items()}


def loss_of(features, labels, scale, world: World, ops: str):
    """The loss of the batch of all processes, and its statistics."""
    images, texts = gather(features, world)
    classes = gather(labels[None, :, None], world).flatten()
    backend = "reference" if ops == "reference" else None
    return sslkernels.clip_loss(images, texts, scale, exclude_ids=classes, return_stats=True, backend=backend)


@torch.no_grad()
def zero_shot_accuracy(model: TwoTowers, data: ImageData, device: torch.device) -> float:
    """Share of held-out images whose nearest class, by the mean of its captions, is their own."""
    captions = torch.stack([encode(t.format(name)) for name in CLASSES[data.kind] for t in TEMPLATES])
    texts = F.normalize(model.text(captions.to(device)), dim=1).unflatten(0, (-1, len(TEMPLATES))).mean(dim=1).cpu()
    images = _evaluate.embed(model.image, data.test, evaluation(data), device)
    nearest = (images @ F.normalize(texts, dim=1).T).argmax(dim=1)
    hits: torch.Tensor = nearest == data.test.labels  # type: ignore[assignment]
    return hits.float().mean().item()


def print_accuracies(accuracies: dict[str, float]) -> None:
    rows = [(name, f"{accuracy:.1%}") for name, accuracy in accuracies.items()]
    if rows:
        print("\nheld-out images by their nearest caption")
        print_table("zero-shot accuracy", ("encoders", "accuracy"), rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m sslkernels.trainers.clip", description=__doc__)
    add_arguments(parser)
    sys.exit(main(parser.parse_args()))

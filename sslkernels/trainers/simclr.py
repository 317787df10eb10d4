"""SimCLR: the two augmented views of an image attract, the views of all other images repel (Chen et al., 2020)."""

from __future__ import annotations

import argparse
import copy
import sys

import torch
from torch import nn

import sslkernels
from sslkernels.trainers import _accumulate, _checkpoint, _demo
from sslkernels.trainers._data import load_data
from sslkernels.trainers._distributed import gather, join_world, spread
from sslkernels.trainers._evaluate import print_probes, probes
from sslkernels.trainers._log import open_log
from sslkernels.trainers._models import build_backbone, projector
from sslkernels.trainers._optim import LEARNING_RATES, build_optimizer, set_learning_rate, warmup_cosine
from sslkernels.trainers._options import (
    add_encoder_arguments,
    add_optimizer_arguments,
    add_run_arguments,
    check_batch,
    run_guarded,
)
from sslkernels.trainers._views import FORWARD, StepKeys, TwoViews, augmentation, evaluation, seed_of, view_loader


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser, "simclr")
    add_optimizer_arguments(parser)
    group = add_encoder_arguments(parser, "simclr", norm="group: images never meet in it")
    group.add_argument("--demo", action="store_true", help="train, then compare fused and eager: curve, time, memory")


def main(args: argparse.Namespace) -> int:
    return run_guarded("simclr", lambda: _demo.demo(args, train) if args.demo else print_probes(train(args)))


def train(args: argparse.Namespace) -> dict[str, float]:
    """Train as the arguments say; returns the kNN accuracies once all steps are done, in the leading process."""
    device = torch.device(args.device)
    world = join_world(device)
    data = load_data(args.data, args.image_size)
    check_batch(args, len(data.train), world.size)

    torch.manual_seed(args.seed)
    backbone = build_backbone(args.backbone, data, args.norm).to(device)
    untrained = copy.deepcopy(backbone)
    model = nn.Sequential(backbone, projector(backbone.num_features, args.dim, args.norm).to(device))
    optimizer = build_optimizer(model, args.optimizer, args.weight_decay)
    parts = {"model": model, "optimizer": optimizer}
    saved = _checkpoint.begin(args, world, parts)
    parallel = spread(model, world, device, args.accumulate)
    peak_lr = args.lr or LEARNING_RATES[args.optimizer]
    start, end = saved.get("step", 0), min(args.steps, args.stop_after or args.steps)

    def embed(network, views):  # (2, n, C, H, W) -> (2, n, dim)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            return network(views.flatten(0, 1)).unflatten(0, (2, -1))

    def loss_of(embeddings):
        z0, z1 = gather(embeddings, world)
        backend = "reference" if args.ops == "reference" else None
        return sslkernels.nt_xent(z0, z1, args.temperature, return_stats=True, backend=backend)

    keys = StepKeys(len(data.train), args.batch_size, range(start, end), args.seed, world.rank, world.size)
    loader = view_loader(TwoViews(data.train, augmentation(data), args.seed), keys, args.workers)
    with open_log(world.leads, args.out, ("loss", "top1", "lr"), args.steps, start, saved.get("log", 0)) as log:
        for step, views in enumerate(loader, start):
            lr = peak_lr * warmup_cosine(step, args.steps, args.warmup)
            set_learning_rate(optimizer, lr)
            optimizer.zero_grad()
            micro_batches = views.to(device).chunk(args.accumulate, dim=1)
            seed = seed_of(args.seed, FORWARD, step, world.rank)
            loss, stats = _accumulate.backward(parallel, micro_batches, embed, loss_of, seed)
            optimizer.step()
            log.write(args.batch_size, loss=loss.item(), top1=stats.top1.float().mean().item(), lr=lr)
            done = step + 1
            if world.leads and (done % args.checkpoint_every == 0 or done == end):
                _checkpoint.save(args, world, done, log, parts)
    if not world.leads or end < args.steps:
        return {}
    return probes(data, untrained, backbone, evaluation(data), device)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m sslkernels.trainers.simclr", description=__doc__)
    add_arguments(parser)
    sys.exit(main(parser.parse_args()))

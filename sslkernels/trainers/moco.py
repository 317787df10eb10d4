"""MoCo v2: query and key of an image attract, the keys of earlier images, in a queue, repel (Chen et al., 2020).

The keys come from a momentum teacher of the query encoder. With ordinary batch norm a query would know its own key by
the statistics of their batch, which the keys of the queue do not share; MoCo hides them by shuffling the images among
GPUs. Here nothing is shuffled, and there is nothing to hide, on one process or many. "--norm batch": queries are
normalised by their batch, keys by running statistics, which follow the query encoder's as the weights do (Cai et al.,
Exponential Moving Average Normalization, 2021), so that a key depends on its own image alone. "--norm group": group
norm and layer norm; no image meets another in either encoder.
"""

from __future__ import annotations

import argparse
import copy
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sslkernels
from sslkernels.nn import EMATeacher, MemoryBank
from sslkernels.trainers import _accumulate, _checkpoint
from sslkernels.trainers._data import load_data
from sslkernels.trainers._distributed import gather, join_world, share_buffers, spread
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
    share,
    whole,
)
from sslkernels.trainers._views import FORWARD, StepKeys, TwoViews, augmentation, evaluation, seed_of, view_loader

STATISTICS_IMAGES = 256  # for the first running statistics


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser, "moco")
    add_optimizer_arguments(parser)
    group = add_encoder_arguments(parser, "moco", norm="batch: keys by running statistics; group: images never meet")
    group.add_argument(
        "--queue",
        type=whole(1),
        default=1024,
        metavar="K",
        help="earlier keys kept as negatives (default: %(default)s)",
    )
    group.add_argument(
        "--momentum",
        type=share,
        default=0.99,
        metavar="SHARE",
        help="the key encoder keeps of itself (default: %(default)s)",
    )


def main(args: argparse.Namespace) -> int:
    return run_guarded("moco", lambda: print_probes(train(args)))


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
    pairs = TwoViews(data.train, augmentation(data), args.seed)
    first_views = [pairs[0, i][1] for i in range(min(args.batch_size, STATISTICS_IMAGES))]
    start_statistics(model, torch.stack(first_views).to(device))
    teacher = key_encoder(model, args.momentum, args.ops)
    bank = MemoryBank((args.queue, args.dim), gather_distributed=world.size > 1, device=device)
    optimizer = build_optimizer(model, args.optimizer, args.weight_decay)
    parts = {"model": model, "teacher": teacher, "bank": bank, "optimizer": optimizer}
    saved = _checkpoint.begin(args, world, parts)
    parallel = spread(model, world, device, args.accumulate)
    peak_lr = args.lr or LEARNING_RATES[args.optimizer]
    start, end = saved.get("step", 0), min(args.steps, args.stop_after or args.steps)
    filled = min(start * args.batch_size, args.queue)  # rows without a key yet are no negatives

    def embed(network, images):  # (n, C, H, W) -> (n, dim)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            return network(images)

    def loss_of(network, micro_batch):  # a part of the mean over this process's queries; their losses and hits (2, n)
        images, keys = micro_batch
        rows, hits = losses(embed(network, images), keys, bank.keys[:filled], args.temperature, args.ops)
        return rows.sum() * world.size / args.batch_size, torch.stack([rows.detach(), hits])

    step_keys = StepKeys(len(data.train), args.batch_size, range(start, end), args.seed, world.rank, world.size)
    loader = view_loader(pairs, step_keys, args.workers)
    with open_log(world.leads, args.out, ("loss", "top1", "lr"), args.steps, start, saved.get("log", 0)) as log:
        for step, views in enumerate(loader, start):
            lr = peak_lr * warmup_cosine(step, args.steps, args.warmup)
            set_learning_rate(optimizer, lr)
            optimizer.zero_grad()
            images, key_images = (view.chunk(args.accumulate) for view in views.to(device))
            with torch.no_grad():
                keys = [F.normalize(embed(teacher, part).float()) for part in key_images]
            seed = seed_of(args.seed, FORWARD, step, world.rank)
            rows = _accumulate.backward_of_sum(parallel, list(zip(images, keys, strict=True)), loss_of, seed)
            optimizer.step()
            share_buffers(model, world)  # or the teachers would follow different statistics
            teacher.update_parameters(model)
            bank.enqueue(torch.cat(keys))  # of all processes: the same queue in each
            filled = min(filled + args.batch_size, args.queue)
            loss, top1 = gather(torch.cat(rows, dim=1)[..., None], world).mean(dim=(1, 2)).tolist()
            log.write(args.batch_size, loss=loss, top1=top1, lr=lr)
            done = step + 1
            if world.leads and (done % args.checkpoint_every == 0 or done == end):
                _checkpoint.save(args, world, done, log, parts)
    if not world.leads or end < args.steps:
        return {}
    return probes(data, untrained, backbone, evaluation(data), device)


def losses(query, key, negatives, temperature: float, ops: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of every query, and 1 where its own key is the nearest."""
    backend = "reference" if ops == "reference" else None
    rows, stats = sslkernels.info_nce(
        query, key, negatives, temperature, reduction="none", return_stats=True, backend=backend
    )
    return rows, stats.top1.to(rows.dtype)


@torch.no_grad()
def start_statistics(model: nn.Module, images: torch.Tensor) -> None:
    """Let running statistics begin at those of a batch: a slow average that began at 0 and 1 would long be wrong."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def key_encoder(model: nn.Module, momentum: float, ops: str) -> EMATeacher | AveragedModel:
    """A teacher of the model, in evaluation mode, whose running statistics follow as its weights do."""
    if ops == "fused":
        return EMATeacher(model, momentum, buffers="ema")
    teacher = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(momentum), use_buffers=True)
    teacher.n_averaged.fill_(1)  # at 0 the first update would copy
    return teacher.eval()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m sslkernels.trainers.moco", description=__doc__)
    add_arguments(parser)
    sys.exit(main(parser.parse_args()))

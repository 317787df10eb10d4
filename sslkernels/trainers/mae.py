"""MAE: an encoder sees a quarter of an image's patches, a thin decoder predicts the others (He et al., 2022).

Which patches an image keeps is a function of the seed, the epoch and the image alone, whatever batch or process it is
in. At the end the encoder's features are probed, and a picture shows held-out images, what the encoder saw of them and
what was made of it.
"""

from __future__ import annotations

import argparse
import copy
import sys

import torch
from torch.utils.data import DataLoader

import sslkernels
from sslkernels.trainers import TrainError, _accumulate, _checkpoint
from sslkernels.trainers._data import load_data
from sslkernels.trainers._distributed import gather, join_world, spread
from sslkernels.trainers._evaluate import both_probes, print_both_probes
from sslkernels.trainers._log import open_log
from sslkernels.trainers._masked_autoencoder import HEAD_DIM, MaskedAutoencoder, reconstruct
from sslkernels.trainers._models import build_vit
from sslkernels.trainers._optim import LEARNING_RATES, build_optimizer, set_learning_rate, warmup_cosine
from sslkernels.trainers._options import (
    add_optimizer_arguments,
    add_run_arguments,
    check_batch,
    run_guarded,
    share,
    whole,
)
from sslkernels.trainers._pictures import write_grid
from sslkernels.trainers._views import FORWARD, MASKS, OneView, StepKeys, crops, evaluation, seed_of

BETAS = (0.9, 0.95)
PICTURE = "reconstructions.png"
PICTURED = 16  # images
PHOTOGRAPHS, DRAWINGS = 0.75, 0.5  # shares removed: where an image holds one thing, a quarter of it tells too little


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser, "mae")
    add_optimizer_arguments(parser)
    parser.set_defaults(steps=1000, weight_decay=0.05)
    group = parser.add_argument_group("mae")
    group.add_argument("--backbone", metavar="NAME", help="a ViT of timm (default: test_vit, widened)")
    group.add_argument(
        "--patch-size", type=whole(1), metavar="PIXELS", help="of a side (default: at most 8 patches along a side)"
    )
    group.add_argument(
        "--mask-ratio", type=share, metavar="SHARE",
        help=f"of the patches removed (default: {PHOTOGRAPHS}, {DRAWINGS} of digits and Fashion-MNIST)",
    )  # fmt: skip
    group.add_argument("--norm-pix", action="store_true", help="predict each patch without its mean and deviation")
    group.add_argument(
        "--decoder-dim", type=whole(1, 2**20), default=64, metavar="DIM",
        help=f"a multiple of {HEAD_DIM} (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--decoder-depth", type=whole(1), default=2, metavar="BLOCKS", help="default: %(default)s")


def main(args: argparse.Namespace) -> int:
    return run_guarded("mae", lambda: print_both_probes(train(args)))


def train(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Train as the arguments say; returns both probes' accuracies once all steps are done, in the leading process."""
    device = torch.device(args.device)
    world = join_world(device)
    data = load_data(args.data, args.image_size)
    check_batch(args, len(data.train), world.size)
    if args.decoder_dim % HEAD_DIM:
        raise TrainError(f"--decoder-dim must be a multiple of {HEAD_DIM}, got {args.decoder_dim}")

    torch.manual_seed(args.seed)
    encoder = build_vit(args.backbone, data, args.patch_size)
    if args.mask_ratio is None:
        args.mask_ratio = PHOTOGRAPHS if args.data.startswith("folder") else DRAWINGS
    check_mask(args.mask_ratio, encoder.patch_embed.num_patches)
    model = MaskedAutoencoder(encoder, args.mask_ratio, args.decoder_dim, args.decoder_depth, args.ops).to(device)
    untrained = copy.deepcopy(encoder)
    optimizer = build_optimizer(model, args.optimizer, args.weight_decay, BETAS)
    parts = {"model": model, "optimizer": optimizer}
    saved = _checkpoint.begin(args, world, parts)
    parallel = spread(model, world, device, args.accumulate)
    peak_lr = args.lr or LEARNING_RATES[args.optimizer]
    start, end = saved.get("step", 0), min(args.steps, args.stop_after or args.steps)

    def loss_of(network, micro_batch):
        images, epochs, indices = micro_batch
        mask_seed = seed_of(args.seed, MASKS, int(epochs[0]))  # a step lies in one epoch
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            pred, mask = network(images, mask_seed, indices)
        loss = sslkernels.masked_patch_loss(
            pred, images, mask, encoder.patch_embed.patch_size, norm_pix=args.norm_pix, backend=model.backend
        )
        return loss / args.accumulate, loss.detach()

    keys = StepKeys(len(data.train), args.batch_size, range(start, end), args.seed, world.rank, world.size)
    views = OneView(data.train, crops(data), args.seed)
    loader = DataLoader(views, batch_sampler=keys, num_workers=args.workers)
    with open_log(world.leads, args.out, ("loss", "lr"), args.steps, start, saved.get("log", 0)) as log:
        for step, (images, epochs, indices) in enumerate(loader, start):
            lr = peak_lr * warmup_cosine(step, args.steps, args.warmup)
            set_learning_rate(optimizer, lr)
            optimizer.zero_grad()
            chunks = (part.chunk(args.accumulate) for part in (images.to(device), epochs, indices.to(device)))
            seed = seed_of(args.seed, FORWARD, step, world.rank)
            losses = _accumulate.backward_of_sum(parallel, list(zip(*chunks, strict=True)), loss_of, seed)
            optimizer.step()
            loss = gather(torch.stack(losses)[None, :, None], world).mean().item()
            log.write(args.batch_size, loss=loss, lr=lr)
            done = step + 1
            if world.leads and (done % args.checkpoint_every == 0 or done == end):
                _checkpoint.save(args, world, done, log, parts)
    if not world.leads or end < args.steps:
        return {}
    transform = evaluation(data)
    shown = data.test if len(data.test) else data.train
    images = torch.stack([transform(shown.images[i]) for i in range(min(PICTURED, len(shown)))]).to(device)
    write_grid(reconstruct(model.eval(), images, args.norm_pix, args.seed), args.out / PICTURE)
    return both_probes(data, untrained, encoder, transform, device)


def check_mask(mask_ratio: float, patches: int) -> None:
    """Some patches must be seen, and some predicted."""
    kept = sslkernels.patch_mask(1, patches, mask_ratio, seed=0).ids_keep.shape[1]
    if kept in (0, patches):
        what = "all" if kept else "none"
        raise TrainError(f"--mask-ratio {mask_ratio:g} keeps {what} of the {patches} patches of an image")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m sslkernels.trainers.mae", description=__doc__)
    add_arguments(parser)
    sys.exit(main(parser.parse_args()))

"""The named inputs of patch masking, with what each costs."""

from __future__ import annotations

import functools

import torch

from sslkernels.ops.patch_mask import gather_tokens, masked_patch_embed, patch_mask, random_masking, restore_tokens
from sslkernels.ops.patch_mask.mask_maker_cases import OPS as MASK_MAKERS
from sslkernels.registry import Case, Cost, OpSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MASK = (torch.float64,)  # holds every index, so that a comparison of masks is one of integers
VERIFY, EDGE, BENCH, AOT = "verify", "edge", "bench", "aot_bf16"


def _pick(x, ids):
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[2]))


def masked(x, mask_ratio=0.75, *, num_prefix_tokens=0, **options):
    """`random_masking` as one tensor, in which an error of any of its results shows."""
    out = random_masking(x, mask_ratio, num_prefix_tokens=num_prefix_tokens, **options)
    tokens = x.detach()[:, num_prefix_tokens:]
    shuffled = _pick(tokens, out.ids_restore.argsort(dim=1))
    return torch.cat([out.x_kept, _pick(tokens, out.ids_keep), shuffled, tokens * out.mask[..., None]], dim=1)


def mask(*args, **options):
    """`patch_mask` as one tensor of numbers."""
    return torch.cat(patch_mask(*args, **options), dim=1).double()


def random(shape, device, dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def ids_of(samples: int, kept: int, tokens: int, device, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(tokens, (samples, kept), generator=generator).to(device)


def distinct_scores(samples: int, tokens: int, device, seed: int = 0) -> torch.Tensor:
    """So far apart that none changes its place when all are nudged."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(samples, tokens, generator=generator).argsort(dim=1) - tokens // 2).float().to(device)


# ---- costs, in fp32: bytes that must move, forward and backward


def _moved(forward: float, backward: float) -> Cost:
    return Cost(0.0, 0.0, 0.0, 0.0, 4.0 * (forward + backward), 4.0 * forward)


def masking_cost(samples: int, tokens: int, kept: int, columns: int, prefix: int = 0) -> Cost:
    """Reads and writes what is kept; backward reads that and writes all. Ids of 8 bytes and a mask of 1."""
    rows = (prefix + kept) * columns
    return _moved(samples * (2 * rows + 2 * kept + 2.25 * tokens), samples * (rows + (prefix + tokens) * columns))


def restore_cost(samples: int, tokens: int, kept: int, columns: int, prefix: int = 0) -> Cost:
    """Reads what is kept and the places, writes all; backward the reverse."""
    moved = samples * ((2 * prefix + kept + tokens) * columns + 2 * tokens)
    return _moved(moved, moved)


def embed_cost(samples: int, kept: int, features: int, columns: int) -> Cost:
    """The kept patches are gathered, and read again by the product, whose gradient needs as much for the weight."""
    flops = 2.0 * samples * kept * features * columns
    moved = samples * kept * (3 * features + columns)
    return Cost(flops, flops, 0.0, 0.0, 8.0 * moved)


# ---- cases


def _masking_case(name: str, samples, tokens, columns, tags=(VERIFY,), *, prefix=0, change=None, **options) -> Case:
    options = {"seed": 3, **options}
    ratio = options.get("mask_ratio", 0.75)

    def make(device, dtype):
        x = random((samples, prefix + tokens, columns), device, dtype)
        given = {name: value(device) if callable(value) else value for name, value in options.items()}
        if change is not None:
            x = change(x)
        return {"x": x, "num_prefix_tokens": prefix, **given}

    kept = options.get("num_keep", round(tokens * (1 - ratio)))
    return Case(name, make, masking_cost(samples, tokens, kept, columns, prefix), frozenset(tags))


def _strided(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def _columns_apart(x):
    return x.repeat_interleave(2, dim=2)[..., ::2]


MASKING_CASES = (
    _masking_case("odd", 3, 29, 37),
    _masking_case("prefix", 4, 49, 24, prefix=2, ordered=True),
    _masking_case("one_token", 2, 1, 5, (VERIFY, EDGE), mask_ratio=0.5),
    _masking_case("keep_all", 3, 10, 8, (VERIFY, EDGE), mask_ratio=0.0),
    _masking_case("keep_none", 3, 10, 8, (VERIFY, EDGE), mask_ratio=1.0, prefix=1),
    _masking_case("exact_ratio", 3, 10, 8, (VERIFY, EDGE), mask_ratio=0.9),
    _masking_case("num_keep", 2, 197, 12, (VERIFY, EDGE), num_keep=50),
    _masking_case("strided", 5, 23, 16, (VERIFY, EDGE), change=_strided),
    _masking_case("columns_apart", 5, 23, 16, (VERIFY, EDGE), change=_columns_apart),
    _masking_case(
        "sample_ids", 4, 31, 8, (VERIFY, EDGE), seed=-1, sample_ids=lambda device: _ids((7, 2**40, -1, 0), device)
    ),
    _masking_case(
        "scores", 3, 33, 8, (VERIFY, EDGE), seed=None, scores=lambda device: distinct_scores(3, 33, device)
    ),
    _masking_case(
        "given_ids", 3, 29, 8, (VERIFY, EDGE), prefix=1, seed=None,
        ids_keep=lambda device: distinct_scores(3, 29, device).argsort(dim=1)[:, :7],
    ),
    _masking_case("video", 2, 1568, 16, (VERIFY, EDGE), mask_ratio=0.9),
    _masking_case(
        "ids_keep", 2, 196, 768, (EDGE, AOT), prefix=1, seed=None,
        ids_keep=lambda device: distinct_scores(2, 196, device).argsort(dim=1)[:, :49],
    ),
    _masking_case("two_vit_b", 2, 196, 768, (AOT,), prefix=1),
    _masking_case("vit_b", 256, 196, 768, (BENCH,)),
)  # fmt: skip


def _ids(values, device):
    return torch.tensor(values, device=device)


def _mask_case(name: str, samples, tokens, tags=(VERIFY,), **options) -> Case:
    def make(device, dtype):
        given = {name: value(device) if callable(value) else value for name, value in options.items()}
        where = {} if "scores" in options else {"seed": 3, "device": device}
        return {"batch_size": samples, "num_patches": tokens, **where, **given}

    return Case(name, make, _moved(samples * (2.25 * tokens + 2 * 0.25 * tokens), 0), frozenset(tags))


MASK_CASES = (
    _mask_case("odd", 5, 29),
    _mask_case("ordered", 5, 196, (VERIFY, AOT), ordered=True),
    _mask_case("one_token", 3, 1, (VERIFY, EDGE), mask_ratio=0.0),
    _mask_case("no_token", 3, 0, (VERIFY, EDGE)),
    _mask_case("long", 2, 5000, (VERIFY, EDGE, AOT), mask_ratio=0.9),
    _mask_case("long_scores", 2, 5000, (EDGE, AOT), scores=lambda device: distinct_scores(2, 5000, device)),
    _mask_case("scores", 4, 50, (VERIFY, EDGE), scores=lambda device: distinct_scores(4, 50, device)),
    _mask_case("vit", 256, 196, (BENCH,)),
    _mask_case("very_long", 16, 65536, (BENCH,)),
)


def _gather_case(name: str, samples, tokens, kept, columns, tags=(VERIFY,), *, prefix=0, change=None) -> Case:
    def make(device, dtype):
        x = random((samples, prefix + tokens, columns), device, dtype)
        ids = ids_of(samples, kept, tokens, device)
        return {"x": x if change is None else change(x), "ids": ids, "num_prefix_tokens": prefix}

    return Case(name, make, masking_cost(samples, tokens, kept, columns, prefix), frozenset(tags))


GATHER_CASES = (
    _gather_case("repeated", 3, 9, 30, 37),
    _gather_case("prefix", 4, 49, 12, 24, prefix=5),
    _gather_case("none", 3, 9, 0, 4, (VERIFY, EDGE), prefix=1),
    _gather_case("strided", 5, 23, 8, 16, (VERIFY, EDGE), change=_strided),
    _gather_case("two_vit_b", 2, 196, 49, 768, (AOT,), prefix=1),
    _gather_case("vit_b", 256, 196, 49, 768, (BENCH,)),
)


def _restore_case(name, samples, tokens, kept, columns, tags=(VERIFY,), *, prefix=0, pos=None, token=True) -> Case:
    def make(device, dtype):
        ids_restore = patch_mask(samples, tokens, num_keep=kept, seed=1, device=device).ids_restore
        return {
            "x_kept": random((samples, prefix + kept, columns), device, dtype),
            "ids_restore": ids_restore,
            "mask_token": random((1, 1, columns), device, dtype, 1) if token else None,
            "pos_embed": None if pos is None else random((1, pos, columns), device, dtype, 2),
            "num_prefix_tokens": prefix,
        }

    return Case(name, make, restore_cost(samples, tokens, kept, columns, prefix), frozenset(tags))


RESTORE_CASES = (
    _restore_case("mae", 4, 49, 12, 24, prefix=1, pos=50),
    _restore_case("odd", 3, 29, 7, 37, pos=29),
    _restore_case("prefix_without_position", 3, 16, 7, 5, (VERIFY, EDGE), prefix=2, pos=16),
    _restore_case("no_position", 3, 16, 7, 5, (VERIFY, EDGE)),
    _restore_case("zeros", 3, 16, 7, 5, (VERIFY, EDGE), token=False),
    _restore_case("none_kept", 3, 16, 0, 8, (VERIFY, EDGE), pos=16),
    _restore_case("all_kept", 3, 16, 16, 8, (VERIFY, EDGE), pos=16),
    _restore_case("two_vit_b", 2, 196, 49, 768, (AOT,), prefix=1, pos=197),
    _restore_case("vit_b_decoder", 256, 196, 49, 512, (BENCH,), pos=196),
)


def _embed_case(name, images, patch, kept, columns, tags=(VERIFY,), *, pos=True, channels_last=False) -> Case:
    samples, channels, *sizes = images
    patches, features = 1, channels
    for size, side in zip(sizes, patch, strict=True):
        patches, features = patches * (size // side), features * side

    def make(device, dtype):
        x = random(images, device, dtype)
        return {
            "images": x.to(memory_format=torch.channels_last) if channels_last else x,
            "weight": random((columns, channels, *patch), device, dtype, 1) / features**0.5,
            "bias": random((columns,), device, dtype, 2),
            "ids_keep": ids_of(samples, kept, patches, device),
            "pos_embed": random((1, patches, columns), device, dtype, 3) if pos else None,
        }

    return Case(name, make, embed_cost(samples, kept, features, columns), frozenset(tags))


EMBED_CASES = (
    _embed_case("squares", (3, 3, 16, 24), (4, 4), 5, 20),
    _embed_case("video", (2, 3, 4, 8, 12), (2, 4, 3), 7, 9),
    _embed_case("channels_last", (3, 4, 12, 8), (4, 2), 5, 6, (VERIFY, EDGE), channels_last=True),
    _embed_case("no_position", (2, 1, 10, 10), (5, 5), 2, 6, (VERIFY, EDGE), pos=False),
    _embed_case("two_vit_b", (2, 3, 224, 224), (16, 16), 49, 8, (AOT,), pos=False),
    _embed_case("vit_b", (64, 3, 224, 224), (16, 16), 49, 768, (BENCH,)),
)


def _spec(name: str, function, torch_ops, grad_args, dtypes, cases, is_mask: bool = False) -> OpSpec:
    reference = functools.partial(function, backend="reference")
    return OpSpec(name, function, reference, torch_ops, grad_args, dtypes, cases, has_cuda=True, is_mask=is_mask)


OPS = (
    _spec(
        "random_masking",
        masked,
        ("random_masking_fwd", "restore_tokens_fwd", "invert_ids"),
        ("x",),
        DTYPES,
        MASKING_CASES,
        is_mask=True,
    ),
    _spec("patch_mask", mask, ("patch_mask_fwd",), (), MASK, MASK_CASES, is_mask=True),
    _spec("gather_tokens", gather_tokens, ("gather_tokens_fwd", "gather_tokens_bwd"), ("x",), DTYPES, GATHER_CASES),
    _spec(
        "restore_tokens",
        restore_tokens,
        ("restore_tokens_fwd", "restore_tokens_bwd"),
        ("x_kept", "mask_token", "pos_embed"),
        DTYPES,
        RESTORE_CASES,
    ),
    _spec(
        "masked_patch_embed",
        masked_patch_embed,
        ("gather_patches_fwd", "gather_patches_bwd", "gather_tokens_fwd", "gather_tokens_bwd"),
        ("images", "weight", "bias", "pos_embed"),
        DTYPES,
        EMBED_CASES,
    ),
    *MASK_MAKERS,
)

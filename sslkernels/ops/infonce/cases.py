"""The named inputs of the contrastive ops, with what each costs."""

from __future__ import annotations

import torch

from sslkernels.ops import infonce
from sslkernels.ops.infonce import contrast_op, reference, unit_rows_op
from sslkernels.registry import Case, Cost, OpSpec


def nt_xent_cost(views: int, dim: int, itemsize: int = 4) -> Cost:
    """Half a unit forward and one and a half backward, one unit being one GEMM of 2 views^2 dim flops.

    The upper triangle of tiles is visited once in each pass, with one exp an element. Bytes: both passes read
    the embeddings, the backward writes their gradients.
    """
    unit = 2.0 * views * views * dim
    exps = 0.5 * views * views
    return Cost(0.5 * unit, 1.5 * unit, exps, exps, 3.0 * views * dim * itemsize)


def _embeddings(pairs: int, dim: int, device, dtype, *, noise: float = 0.5, seed: int = 0):
    """Two noisy views of the same points: the cosine of a pair is about 1 / (1 + noise^2)."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(pairs, dim, generator=generator)
    views = [points + noise * torch.randn(pairs, dim, generator=generator) for _ in range(2)]
    return [view.to(device=device, dtype=dtype) for view in views]


def _case(
    name: str,
    pairs: int,
    dim: int,
    temperature: float,
    tags=("verify",),
    transform=None,
    *,
    noise=0.5,
    **options,
) -> Case:
    """Options that are functions are called with the device."""

    def make(device, dtype):
        z0, z1 = _embeddings(pairs, dim, device, dtype, noise=noise)
        if transform is not None:
            z0, z1 = transform(z0, z1)
        given = {key: value(device) if callable(value) else value for key, value in options.items()}
        return {"z0": z0, "z1": z1, "temperature": temperature, **given}

    return Case(name, make, nt_xent_cost(2 * pairs, dim), frozenset(tags))


def _zero_rows(z0, z1):
    z0, z1 = z0.clone(), z1.clone()
    z0[::3] = 0
    z1[1::5] = 0
    return z0, z1


def _strided(z0, z1):
    """The same values behind a column stride of 3 and a row stride that no kernel would choose."""
    wide = torch.zeros(len(z0), 3 * z0.shape[1] + 5, dtype=z0.dtype, device=z0.device)
    view = wide[:, 2 : 2 + 3 * z0.shape[1] : 3]
    view.copy_(z0)
    return view, z1.T.contiguous().T


NT_XENT_CASES = (
    _case("views512_d128", 256, 128, 0.1, ("verify", "bench", "aot")),
    _case("views512_d512", 256, 512, 0.1, ("bench", "aot")),
    _case("views2048_d128", 1024, 128, 0.1, ("bench",)),
    _case("views2048_d512", 1024, 512, 0.1, ("bench",)),
    _case("views8192_d128", 4096, 128, 0.1, ("bench",)),
    _case("views8192_d512", 4096, 512, 0.1, ("bench",)),
    _case("odd", 101, 123, 0.5, ("verify", "edge")),
    _case("one_column", 37, 1, 0.5, ("verify", "edge")),
    _case("three_columns", 64, 3, 0.5, ("verify", "edge")),
    _case("thousand_columns", 48, 1000, 0.1, ("verify", "edge")),
    _case("one_pair", 1, 128, 0.5, ("verify", "edge")),
    _case("no_pair", 0, 128, 0.5, ("edge",)),
    _case("tau_0.001", 100, 64, 0.001, ("verify", "edge"), noise=2.0),  # noisy: not every positive wins
    _case("tau_0.01", 100, 64, 0.01, ("verify", "edge"), noise=2.0),
    _case("tau_0.05", 100, 64, 0.05, ("verify", "edge"), noise=2.0),
    _case("saturated", 100, 64, 0.05, ("verify", "edge")),  # losses near 0, where 1 - p cancels
    _case("tau_5", 100, 64, 5.0, ("verify", "edge")),
    _case("tau_100", 100, 64, 100.0, ("verify", "edge")),
    _case("tau_negative", 100, 64, -1.0, ("verify", "edge")),
    _case("not_normalized", 100, 64, 8.0, ("verify", "edge"), normalize=False),
    _case("sum", 100, 64, 0.5, ("verify", "edge"), reduction="sum"),
    _case("rows", 100, 64, 0.5, ("verify", "edge"), reduction="none"),
    _case("identical", 70, 64, 0.1, ("verify", "edge"), lambda z0, z1: (z0[:1].expand_as(z0), z0[:1].expand_as(z0))),
    _case("opposite", 70, 64, 0.1, ("verify", "edge"), lambda z0, z1: (z0, -z0)),
    _case("zero_rows", 70, 64, 0.1, ("verify", "edge"), _zero_rows),
    _case("strided", 70, 64, 0.1, ("verify", "edge"), _strided),
)


def contrast_cost(rows: int, columns: int, dim: int, units=(1.0, 3.0)) -> Cost:
    """So many units forward and backward, one unit being one GEMM of 2 rows columns dim flops; an exp in each pass."""
    unit = 2.0 * rows * columns * dim
    exps = 1.0 * rows * columns
    return Cost(units[0] * unit, units[1] * unit, exps, exps if units[1] else 0.0, 12.0 * (rows + columns) * dim)


def _towers(rows: int, columns: int, dim: int, device, dtype, *, noise=0.5, seed=0):
    """Two noisy views of the same points, of unit length; the longer side has rows of its own."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(max(rows, columns), dim, generator=generator)
    sides = [points[:count] + noise * torch.randn(count, dim, generator=generator) for count in (rows, columns)]
    return [torch.nn.functional.normalize(side, dim=1).to(device=device, dtype=dtype) for side in sides]


def _stretched(x: torch.Tensor) -> torch.Tensor:
    """The rows at lengths from 1/2 to 4, which whoever does not normalise them notices."""
    lengths = torch.linspace(-1, 2, x.shape[-2]).exp2()
    return x * lengths[:, None].to(x)


def _ids(count: int, device) -> torch.Tensor:
    """Every fifth id is that of the row before."""
    ids = torch.arange(count)
    ids[::5] = (ids[::5] - 1).clamp_min(0)
    return ids.to(device)


def _info_nce(
    name, rows, dim, temperature, tags=("verify",), *, noise=0.5, negatives=None, ids=False, stretch=False, **options
):
    """``negatives``: None for the batch, K for a queue, or (M,) for M of each query's own."""
    paired = isinstance(negatives, tuple)
    columns = rows if negatives is None else negatives[0] if paired else negatives

    def make(device, dtype):
        query, key = _towers(rows, rows, dim, device, dtype, noise=noise)
        made = {"query": query, "positive_key": key, "negative_keys": None, "temperature": temperature, **options}
        if negatives is not None:
            keys, _ = _towers(rows * columns if paired else columns, 0, dim, device, dtype, seed=1)
            made["negative_keys"] = keys.reshape(rows, columns, dim) if paired else keys
        if paired:
            made["negative_mode"] = "paired"
        if ids:
            own = _ids(rows, device)
            made["exclude_ids"] = own if negatives is None else (own, _ids(columns, device))
        for name in ("query", "positive_key", "negative_keys") if stretch else ():
            made[name] = made[name] if made[name] is None else _stretched(made[name])
        return made

    units = (1.0, 3.0) if negatives is None else (2.0, 0.0)
    return Case(name, make, contrast_cost(rows, columns, dim, units), frozenset(tags))


def _clip(
    name, rows, columns, dim, scale, bias=None, tags=("verify",), *, noise=0.5, ids="", stretch=False, **options
) -> Case:
    def make(device, dtype):
        images, texts = _towers(rows, columns, dim, device, dtype, noise=noise)
        if stretch:
            images, texts = _stretched(images), _stretched(texts)
        made = {"image_features": images, "text_features": texts, "logit_scale": scale, "logit_bias": bias, **options}
        return made | ({ids: (_ids(rows, device), _ids(columns, device))} if ids else {})

    return Case(name, make, contrast_cost(rows, columns, dim), frozenset(tags))


def _sup_con(name, rows, dim, classes, temperature, tags=("verify",), *, unlabelled=0, **options) -> Case:
    def make(device, dtype):
        generator = torch.Generator().manual_seed(2)
        labels = torch.randint(0, classes, (rows,), generator=generator)
        centres = torch.randn(classes, dim, generator=generator)
        features = centres[labels] + torch.randn(rows, dim, generator=generator)
        labels[:unlabelled] = -1
        features, labels = features.to(device=device, dtype=dtype), labels.to(device)
        return {"features": features, "labels": labels, "temperature": temperature, **options}

    return Case(name, make, nt_xent_cost(rows, dim), frozenset(tags))


INFO_NCE_CASES = (
    _info_nce("n256_d128", 256, 128, 0.1, ("verify", "bench", "aot_bf16")),
    _info_nce("n4096_d128", 4096, 128, 0.1, ("bench",)),
    _info_nce("odd", 101, 123, 0.07, ("verify", "edge")),
    _info_nce("one_column", 37, 1, 0.5, ("verify", "edge")),
    _info_nce("one_row", 1, 64, 0.5, ("verify", "edge")),
    _info_nce("no_row", 0, 64, 0.5, ("edge",)),
    _info_nce("tau_0.005", 100, 64, 0.005, ("verify", "edge"), noise=4.0),
    _info_nce("tau_negative", 100, 64, -1.0, ("verify", "edge")),
    _info_nce("not_normalized", 100, 64, 0.5, ("verify", "edge"), normalize=False, reduction="sum"),
    _info_nce("excluded", 90, 64, 0.1, ("verify", "edge"), ids=True, reduction="none"),
    _info_nce("smoothed", 90, 64, 0.1, ("verify", "edge"), label_smoothing=0.1),
    _info_nce("lengths", 60, 48, 0.1, ("verify", "edge"), stretch=True),
    _info_nce("queue_with_grad", 70, 64, 0.1, ("verify", "edge"), negatives=300),
    _info_nce("paired", 40, 64, 0.1, ("edge",), negatives=(7,)),
)
INFO_NCE_QUEUE_CASES = (
    _info_nce("n64_k1000_d128", 64, 128, 0.1, ("verify", "bench", "aot_bf16"), negatives=1000),
    _info_nce("n256_k65536_d128", 256, 128, 0.07, ("bench",), negatives=65536),
    _info_nce("odd", 67, 123, 0.2, ("verify", "edge"), negatives=301),
    _info_nce("wide", 33, 700, 0.2, ("verify", "edge"), negatives=130),
    _info_nce("tau_0.005", 60, 64, 0.005, ("verify", "edge"), noise=4.0, negatives=500),
    _info_nce("not_normalized", 60, 64, 0.5, ("verify", "edge"), normalize=False, negatives=200, reduction="none"),
    _info_nce("excluded", 60, 64, 0.1, ("verify", "edge"), ids=True, negatives=200),
    _info_nce("smoothed", 60, 64, 0.1, ("verify", "edge"), negatives=200, label_smoothing=0.2),
    _info_nce("lengths", 40, 48, 0.2, ("verify", "edge"), negatives=200, stretch=True),
    _info_nce("empty_queue", 60, 64, 0.1, ("edge",), negatives=0),
)
CLIP_CASES = (
    _clip("n256_d128", 256, 256, 128, 14.0, tags=("verify", "bench", "aot_bf16")),
    _clip("n256_d512_scale100", 256, 256, 512, 100.0, tags=("verify", "aot_bf16"), noise=4.0),
    _clip("n4096_d512", 4096, 4096, 512, 100.0, tags=("bench",), noise=4.0),
    _clip("rectangular", 70, 131, 64, 10.0, -3.0, tags=("verify", "edge")),
    _clip("tall", 131, 70, 33, 20.0, tags=("verify", "edge"), reduction="none"),
    _clip("normalized", 90, 90, 64, 10.0, 1.0, tags=("verify", "edge"), normalize=True, stretch=True),
    _clip("excluded", 90, 90, 64, 10.0, tags=("verify", "edge"), ids="exclude_ids", reduction="sum"),
    _clip("smoothed", 60, 77, 64, 10.0, tags=("verify", "edge"), label_smoothing=0.1),
    _clip("one_pair", 1, 1, 64, 10.0, tags=("verify", "edge")),
    _clip("no_pair", 0, 5, 64, 10.0, tags=("edge",)),
)
SIGMOID_CASES = (
    _clip("n256_d128", 256, 256, 128, 10.0, -10.0, tags=("verify", "bench", "aot_bf16")),
    _clip("n4096_d512", 4096, 4096, 512, 10.0, -10.0, tags=("bench",)),
    _clip("rectangular", 70, 131, 33, 100.0, -3.0, tags=("verify", "edge"), reduction="none"),
    _clip(
        "many_positives",
        90,
        77,
        64,
        10.0,
        -2.0,
        tags=("verify", "edge"),
        ids="positive_ids",
        normalize=True,
        stretch=True,
    ),
    _clip("one_pair", 1, 1, 64, 10.0, -10.0, tags=("verify", "edge")),
    _clip("no_pair", 0, 5, 64, 10.0, -10.0, tags=("edge",)),
)
SUP_CON_CASES = (
    _sup_con("n256_d128", 256, 128, 10, 0.1, ("verify", "bench", "aot_bf16")),
    _sup_con("n4096_d128", 4096, 128, 100, 0.1, ("bench",)),
    _sup_con("odd", 101, 123, 7, 0.3, ("verify", "edge"), unlabelled=20),
    _sup_con("lonely", 60, 64, 200, 0.5, ("verify", "edge"), reduction="none"),
    _sup_con("tau_0.005", 100, 64, 9, 0.005, ("verify", "edge")),
    _sup_con("not_normalized", 80, 16, 9, 8.0, ("verify", "edge"), normalize=False, reduction="sum"),
    _sup_con("one_row", 1, 16, 3, 0.1, ("edge",)),
    _sup_con("no_row", 0, 16, 3, 0.1, ("edge",)),
)
DECOUPLED_CASES = (
    _case("views512_d128", 256, 128, 0.1, ("verify", "bench", "aot")),
    _case("views4096_d128", 2048, 128, 0.1, ("bench",)),
    _case("odd", 101, 123, 0.5, ("verify", "edge")),
    _case("tau_0.01", 100, 64, 0.01, ("verify", "edge"), noise=2.0),
    _case("rows", 70, 64, 0.5, ("verify", "edge"), reduction="none"),
    _case(
        "weighted",
        70,
        64,
        0.1,
        ("verify", "edge"),
        positive_weight=lambda device: torch.linspace(0.1, 2, 70).to(device),
    ),
    _case("one_pair", 1, 64, 0.5, ("verify", "edge")),
    _case("no_pair", 0, 64, 0.5, ("edge",)),
)
HARD_CASES = (
    _case("views512_d128", 256, 128, 0.5, ("verify", "bench", "aot")),
    _case("views4096_d128", 2048, 128, 0.5, ("bench",)),
    _case("debiased", 70, 64, 0.5, ("verify", "edge"), beta=0.0, tau_plus=0.2),
    _case("hard", 101, 33, 0.2, ("verify", "edge"), beta=2.0, tau_plus=0.01, reduction="none"),
    _case("floor", 70, 64, 0.5, ("verify", "edge"), beta=0.5, tau_plus=0.7),
    _case("one_pair", 1, 64, 0.5, ("verify", "edge")),
)

ALL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CONTRAST = ("contrast_fwd", "contrast_bwd")
VIEWS = ("z0", "z1", "temperature")
TOWERS = ("image_features", "text_features", "logit_scale", "logit_bias")


def _op(name, torch_ops, grad_args, cases, function=None) -> OpSpec:
    public, definition = (getattr(module, function or name) for module in (infonce, reference))
    has_cuda = torch_ops[0] in contrast_op.COMPILED
    gpu_ops = (*unit_rows_op.SCHEMAS, contrast_op.ATTRACTED)
    return OpSpec(name, public, definition, torch_ops, grad_args, ALL_DTYPES, cases, has_cuda, gpu_ops=gpu_ops)


OPS = (
    _op("nt_xent", ("nt_xent_fwd", "nt_xent_bwd"), VIEWS, NT_XENT_CASES),
    _op("decoupled_nt_xent", ("nt_xent_fwd", "nt_xent_bwd"), VIEWS, DECOUPLED_CASES),
    _op("hard_nt_xent", ("nt_xent_fwd", "nt_xent_bwd"), VIEWS, HARD_CASES),
    _op("info_nce", CONTRAST, ("query", "positive_key", "negative_keys", "temperature"), INFO_NCE_CASES),
    # a queue has no gradient, and its own way through the kernels
    _op("info_nce_queue", CONTRAST[:1], ("query", "positive_key", "temperature"), INFO_NCE_QUEUE_CASES, "info_nce"),
    _op("clip_loss", CONTRAST, TOWERS, CLIP_CASES),
    _op("sup_con", CONTRAST, ("features", "temperature"), SUP_CON_CASES),
    _op("sigmoid_loss", ("sigmoid_contrast_fwd", "sigmoid_contrast_bwd"), TOWERS, SIGMOID_CASES),
)

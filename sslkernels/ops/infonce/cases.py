"""The named inputs of the contrastive ops, with what each costs."""

from __future__ import annotations

import torch

from sslkernels.ops import infonce
from sslkernels.ops.infonce import reference
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
    name: str, pairs: int, dim: int, temperature: float, tags=("verify",), transform=None, *, noise=0.5, **options
) -> Case:
    def make(device, dtype):
        z0, z1 = _embeddings(pairs, dim, device, dtype, noise=noise)
        if transform is not None:
            z0, z1 = transform(z0, z1)
        return {"z0": z0, "z1": z1, "temperature": temperature, **options}

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

OPS = (
    OpSpec(
        name="nt_xent",
        function=infonce.nt_xent,
        reference=reference.nt_xent,
        torch_ops=("nt_xent_fwd", "nt_xent_bwd"),
        grad_args=("z0", "z1", "temperature"),
        dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
        cases=NT_XENT_CASES,
    ),
)

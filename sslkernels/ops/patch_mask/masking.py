"""Random masking of patch tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sslkernels.ops.patch_mask import arguments, op, randomness


class MaskedTokens(NamedTuple):
    """What `random_masking` returns."""

    x_kept: torch.Tensor  # (N, P + K, D)
    mask: torch.Tensor  # (N, L) bool, True = removed
    ids_keep: torch.Tensor  # (N, K) int64
    ids_restore: torch.Tensor  # (N, L) int64


class MaskIndices(NamedTuple):
    """What `patch_mask` returns."""

    mask: torch.Tensor  # (N, L) bool, True = removed
    ids_keep: torch.Tensor  # (N, K) int64
    ids_restore: torch.Tensor  # (N, L) int64


def random_masking(
    x: torch.Tensor,
    mask_ratio: float = 0.75,
    *,
    num_keep: int | None = None,
    num_prefix_tokens: int = 0,
    ordered: bool = False,
    seed: int | torch.Tensor | None = None,
    sample_ids: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    scores: torch.Tensor | None = None,
    ids_keep: torch.Tensor | None = None,
    backend: str | None = None,
) -> MaskedTokens:
    r"""Keeps a random subset of each sample's tokens, as masked autoencoders do.

    With :math:`u_{nt}` a random 32-bit integer for token t of sample n, and K = floor(L (1 - mask_ratio)):

    .. math:: \mathrm{ids\_keep}_n = \text{the } K \text{ tokens } t \text{ of the smallest } (u_{nt}, t)

    Equivalent PyTorch, up to the random numbers, for ``num_prefix_tokens=0``::

        noise = torch.rand(N, L, device=x.device)
        ids_keep = noise.argsort(dim=1, stable=True)[:, :K]
        x_kept = x.gather(1, ids_keep[..., None].expand(-1, -1, D))
        mask = torch.ones(N, L, dtype=torch.bool, device=x.device).scatter(1, ids_keep, False)
        ids_restore = torch.cat([ids_keep, mask.nonzero()[:, 1].view(N, L - K)], dim=1).argsort(dim=1)

    ``u`` is a pure function of the seed, the sample's id and the token's index: the mask of a sample is the same, bit
    for bit, eager and compiled, on every backend and device, however samples are batched and spread over processes.

    Args:
        x: (N, P + L, D) in float32, bfloat16, float16 or float64. Read in place if ``x.stride(-1) == 1``.
        mask_ratio: the share of the L tokens to remove, in [0, 1]; taken as the decimal that it prints as, so that
            0.9 of 10 tokens removes 9.
        num_keep: K itself, in [0, L], in place of ``mask_ratio``.
        num_prefix_tokens: P, the first tokens (class token, registers), which always stay and are not counted.
        ordered: whether kept tokens keep their order; otherwise they are in the order of ``u``.
        seed: a 64-bit integer, as an int or as a tensor of one element on the device of ``x``, which is read there.
            None draws one from ``generator``, exactly once.
        sample_ids: (N,) integers, the samples' numbers in the data set or in the global batch. None: 0 ... N - 1.
        generator: what to draw the seed from; None: the device's default generator, which `torch.manual_seed` sets. Not
            under `torch.compile`.
        scores: (N, L) floating-point numbers in place of ``u``, compared as float32: the smallest are kept, ties by
            index, NaN last. Gradients do not flow into them.
        ids_keep: (N, K) integers in [0, L), distinct in each row: the tokens to keep, in place of everything drawn. The
            ``ids_keep`` that is returned may be this very tensor, where it is int64 and not to be ``ordered``.
        backend: None for the fastest one (see `sslkernels.backends`), or "cpp", "cuda", "triton", "reference".

    Returns:
        ``MaskedTokens(x_kept, mask, ids_keep, ids_restore)``: the prefix and the kept tokens (N, P + K, D); (N, L)
        bool, True where a token is removed; (N, K) int64; (N, L) int64, the place of each kept token in ``ids_keep``,
        while removed tokens have K, K + 1, ... in order of index. Differentiable with respect to ``x``, to any order.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        RuntimeError: ``backend`` is not available here; or, on a CPU, ``ids_keep`` has an id out of range or twice. On
            a GPU an id out of range gives a row of NaN. Compiled code that uses ``x_kept`` alone, neither ``mask`` nor
            ``ids_restore``, does not notice an id that is there twice.

    Source: He et al., Masked Autoencoders Are Scalable Vision Learners (2022), section 3. Random numbers are those of
    Philox4x32-10.

    Cost: reads and writes the kept tokens once, and backward the same besides the zeros of the removed ones; ids and
    mask are 8 K + 9 L bytes a sample. No extra memory.
    """
    name = "random_masking"
    arguments.check_tokens(name, "x", x)
    prefix = arguments.prefix(name, num_prefix_tokens, x)
    arguments.check_flags(name, ordered=ordered)
    arguments.check_backend(name, backend, x.device.type)
    samples, tokens = x.shape[0], x.shape[1] - prefix
    ops = op.family(backend)
    if ids_keep is not None:
        given = {"num_keep": num_keep, "seed": seed, "sample_ids": sample_ids, "generator": generator}
        randomness.refuse(name, "ids_keep", scores=scores, **given)
        arguments.check_ratio(name, "mask_ratio", mask_ratio)
        ids_keep = arguments.kept_ids(name, "ids_keep", ids_keep, samples, tokens, x.device)
        if ordered:
            ids_keep = ids_keep.sort(dim=1).values
        ids_restore, mask = ops.invert_ids(ids_keep, tokens)
        return MaskedTokens(ops.gather_tokens_fwd(x, ids_keep, prefix), mask, ids_keep, ids_restore)
    kept = arguments.num_kept(name, tokens, mask_ratio, num_keep)
    keys = _keys(name, seed, sample_ids, generator, scores, samples, tokens, x.device)
    x_kept, ids_keep, ids_restore, mask = ops.random_masking_fwd(x, *keys, kept, prefix, ordered)
    return MaskedTokens(x_kept, mask, ids_keep, ids_restore)


def patch_mask(
    batch_size: int,
    num_patches: int,
    mask_ratio: float = 0.75,
    *,
    num_keep: int | None = None,
    ordered: bool = False,
    seed: int | torch.Tensor | None = None,
    sample_ids: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    scores: torch.Tensor | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> MaskIndices:
    """The mask of `random_masking` without the tokens, for `gather_tokens`, `masked_patch_embed` or a collate function.

    Equivalent PyTorch: that of `random_masking` without its third line.

    Args:
        batch_size: N.
        num_patches: L.
        mask_ratio, num_keep, ordered, seed, sample_ids, generator, scores, backend: as for `random_masking`.
        device: where to draw and return it; None: that of ``scores``, ``sample_ids`` or ``seed``, whichever is a
            tensor, else PyTorch's default device.

    Returns:
        ``MaskIndices(mask, ids_keep, ids_restore)`` as `random_masking` returns them, the same bits for the same seed.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        RuntimeError: ``backend`` is not available here.

    Source: as `random_masking`.

    Cost: 8 K + 9 L bytes a sample.
    """
    name = "patch_mask"
    samples = arguments.count(name, "batch_size", batch_size)
    tokens = arguments.count(name, "num_patches", num_patches)
    kept = arguments.num_kept(name, tokens, mask_ratio, num_keep)
    arguments.check_flags(name, ordered=ordered)
    where = randomness.device_of(name, device, scores, sample_ids, seed)
    arguments.check_backend(name, backend, where.type)
    keys = _keys(name, seed, sample_ids, generator, scores, samples, tokens, where)
    ids_keep, ids_restore, mask = op.family(backend).patch_mask_fwd(*keys, samples, tokens, kept, ordered)
    return MaskIndices(mask, ids_keep, ids_restore)


def _keys(name: str, seed, sample_ids, generator, scores, samples: int, tokens: int, device: torch.device):
    """The operators' seed, sample_ids and scores."""
    if scores is None:
        ids = randomness.samples(name, sample_ids, samples, device)
        return randomness.seed_tensor(name, seed, generator, device), ids, None
    randomness.refuse(name, "scores", seed=seed, sample_ids=sample_ids, generator=generator)
    arguments.check_floating(name, "scores", scores)
    arguments.check_shape(name, "scores", scores, (samples, tokens))
    arguments.check_device(name, "scores", scores, device)
    return torch.zeros((), dtype=torch.int64, device=device), None, scores.detach().float()

"""Masks of spans in time."""

from __future__ import annotations

import torch

from sslkernels.ops.patch_mask import arguments, grids, mask_makers_op, randomness

NAME = "span_mask"


def span_mask(
    batch_size: int,
    num_tokens: int,
    mask_prob: float = 0.65,
    *,
    span_length: int = 10,
    num_spans: int | torch.Tensor | None = None,
    min_spans: int = 0,
    lengths: torch.Tensor | None = None,
    overlap: bool = True,
    seed: int | torch.Tensor | None = None,
    sample_ids: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    r"""Masks spans of tokens in sequences of different lengths, as wav2vec 2.0 does.

    A sample of :math:`l` tokens gets

    .. math:: m = \max(\lfloor p\, l / s + u \rfloor, \mathrm{min\_spans}), \quad u \sim U(0, 1)

    spans of s tokens, or as many as there is room for if that is fewer. Their first tokens are distinct: any choice of
    them that keeps all spans inside the sample and, without ``overlap``, apart, and each equally likely.

    Equivalent Python, for one sample with overlap, up to the random numbers::

        spans = min(max(int(p * l / s + random()), min_spans), max(l - s + 1, 0))
        mask = np.zeros(num_tokens, bool)
        for start in sample(range(l - s + 1), spans):
            mask[start : start + s] = True

    A sample's mask is a pure function of the seed, its id, its length and the other arguments: the same, bit for bit,
    eager and compiled, on every backend and device, however samples are batched and spread over processes.

    Args:
        batch_size: N.
        num_tokens: T, at most 65,536.
        mask_prob: p, in [0, 1]: the share of a sample's tokens that its spans would cover if none overlapped.
        span_length: s, at least 1.
        num_spans: how many spans, in place of ``mask_prob`` and ``min_spans``: an int, or (N,) integers, one for each
            sample; at least 0.
        min_spans: the fewest.
        lengths: (N,) integers in [0, T]: how many tokens each sample has before its padding, which is never masked;
            ``attention_mask.sum(1)``, for example. None: T. A number out of range is an error on a CPU; a GPU, which is
            not waited for, takes the nearest one in range.
        overlap: whether spans may overlap.
        seed: a 64-bit integer, as an int or as a tensor of one element on the device of the mask, which is read there.
            None draws one from ``generator``, exactly once.
        sample_ids: (N,) integers, the samples' numbers in the data set or in the global batch. None: 0 ... N - 1.
        generator: what to draw the seed from; None: the device's default generator, which `torch.manual_seed` sets. Not
            under `torch.compile`.
        device: where to draw and return it; None: that of ``lengths``, ``num_spans``, ``sample_ids`` or ``seed``,
            whichever is a tensor, else PyTorch's default device.
        backend: None for the fastest one (see `sslkernels.backends`), or "cpp", "cuda", "reference".

    Returns:
        (N, T) bool, True where a token is masked.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        RuntimeError: ``backend`` is not available here; or, on a CPU, ``lengths`` or ``num_spans`` has a number out of
            range.

    Source: Baevski et al., wav2vec 2.0: A Framework for Self-Supervised Learning of Speech Representations (2020),
    section 3.1. Random numbers are those of Philox4x32-10.

    Cost: about ten microseconds a sample on one core for 1,500 tokens. Extra memory on a GPU: at most 17 bytes a token.
    """
    samples = arguments.count(NAME, "batch_size", batch_size)
    tokens = arguments.count(NAME, "num_tokens", num_tokens, grids.MAX_TOKENS)
    span = arguments.count(NAME, "span_length", span_length, grids.MAX_TOKENS)
    if span < 1:
        raise ValueError(f"{NAME}: span_length must be at least 1, got {span}")
    numerator, denominator = arguments.ratio(NAME, "mask_prob", mask_prob)
    share = (2 * numerator * 2**32 + denominator) // (2 * denominator)  # to nearest
    least = arguments.count(NAME, "min_spans", min_spans, grids.MAX_TOKENS)
    arguments.check_flags(NAME, overlap=overlap)
    where = randomness.device_of(NAME, device, lengths, num_spans, sample_ids, seed)
    spans = num_spans
    if lengths is None:
        lengths = torch.full((samples,), tokens, dtype=torch.int64, device=where)
    lengths = arguments.integers(NAME, "lengths", lengths, (samples,), where)
    if isinstance(spans, torch.Tensor):
        spans = arguments.integers(NAME, "num_spans", spans, (samples,), where)
    elif spans is not None:
        spans = torch.full_like(lengths, arguments.count(NAME, "num_spans", spans))
    arguments.check_backend(NAME, backend, where.type)
    ids = randomness.samples(NAME, sample_ids, samples, where)
    seed = randomness.seed_tensor(NAME, seed, generator, where)
    ops = mask_makers_op.family(backend)
    return ops.span_mask_fwd(seed, ids, lengths, spans, tokens, span, share, least, overlap)

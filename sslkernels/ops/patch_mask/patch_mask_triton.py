"""The Triton kernels that choose tokens: which are kept, in which order, and the inverse of a list of ids."""

import triton
import triton.language as tl

from sslkernels.philox import PATCH_MASK_STREAM

STREAM = tl.constexpr(PATCH_MASK_STREAM)
DIGIT = tl.constexpr(8)  # bits of a key that one pass settles
LAST = tl.constexpr(2**63 - 1)  # behind every key and index


@triton.jit
def _random_keys(start, seed, sample, CHUNK: tl.constexpr):
    """The 32-bit keys of CHUNK tokens from `start` on, a multiple of 4: four tokens share a Philox counter."""
    counter = (start // 4 + tl.arange(0, CHUNK // 4)).to(tl.uint32)
    low = (sample & 0xFFFFFFFF).to(tl.uint32)
    high = ((sample >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = counter * 0
    a, b, c, d = tl.philox(seed, counter, zero + low, zero + high, zero + STREAM)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (CHUNK,))


@triton.jit
def _score_keys(score):
    """Unsigned numbers in the order of fp32 scores: -0 equals 0, and NaN comes last."""
    bits = score.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    keys = tl.where(bits == magnitude, 0x80000000 + magnitude, 0x80000000 - magnitude)
    return tl.where(magnitude > 0x7F800000, 0xFFFFFFFF, keys)


@triton.jit
def _keys(start, seed, sample, scores_ptr, L, HAS_SCORES: tl.constexpr, CHUNK: tl.constexpr):
    """The indices of CHUNK tokens and their keys; scores_ptr is that of the sample."""
    token = start + tl.arange(0, CHUNK)
    if HAS_SCORES:
        score = tl.load(scores_ptr + token, mask=token < L, other=0.0)
        keys = _score_keys(score)
    else:
        keys = _random_keys(start, seed, sample, CHUNK)
    return token, keys


@triton.jit
def _threshold(seed, sample, scores_ptr, L, K, HAS_SCORES: tl.constexpr, CHUNK: tl.constexpr):
    """The K-th smallest key, and how many of the tokens that have it are kept: the first in order of index.

    Digit after digit, from the top: count the tokens that agree so far by their next digit.
    """
    bins = tl.arange(0, 1 << DIGIT)
    threshold = tl.zeros((), tl.uint32)
    wanted = tl.zeros((), tl.int32) + K
    for shift in range(32 - DIGIT, -1, -DIGIT):
        counts = tl.zeros((1 << DIGIT,), tl.int32)
        for start in range(0, L, CHUNK):
            token, keys = _keys(start, seed, sample, scores_ptr, L, HAS_SCORES, CHUNK)
            agree = (token < L) & ((keys ^ threshold) >> shift >> DIGIT == 0)
            counts += tl.histogram((keys >> shift & ((1 << DIGIT) - 1)).to(tl.int32), 1 << DIGIT, mask=agree)
        digit = tl.sum((tl.cumsum(counts) < wanted).to(tl.int32))
        wanted -= tl.sum(tl.where(bins < digit, counts, 0))
        threshold |= digit.to(tl.uint32) << shift
    return threshold, wanted


@triton.jit
def _patch_mask_fwd_kernel(
    seed_ptr, sample_ids_ptr, scores_ptr, ids_keep_ptr, ids_restore_ptr, mask_ptr, L, K,
    HAS_SAMPLE_IDS: tl.constexpr, HAS_SCORES: tl.constexpr, ORDERED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One sample. Where not ORDERED, ids_keep gets the kept (key, index) pairs as numbers to be sorted."""
    row = tl.program_id(0).to(tl.int64)
    sample = row
    if HAS_SAMPLE_IDS:
        sample = tl.load(sample_ids_ptr + row)
    seed = tl.load(seed_ptr)
    scores_ptr += row * L
    threshold, of_threshold = _threshold(seed, sample, scores_ptr, L, K, HAS_SCORES, CHUNK)
    equal_before = tl.zeros((), tl.int32)
    kept_before = tl.zeros((), tl.int32)
    for start in range(0, L, CHUNK):
        token, keys = _keys(start, seed, sample, scores_ptr, L, HAS_SCORES, CHUNK)
        inside = token < L
        equal = inside & (keys == threshold)
        equal_up_to = equal_before + tl.cumsum(equal.to(tl.int32))
        kept = inside & (keys < threshold) | equal & (equal_up_to <= of_threshold)
        kept_up_to = kept_before + tl.cumsum(kept.to(tl.int32))
        place = tl.where(kept, kept_up_to - 1, K + token - kept_up_to).to(tl.int64)
        tl.store(mask_ptr + row * L + token, kept == 0, mask=inside)
        if ORDERED:
            tl.store(ids_restore_ptr + row * L + token, place, mask=inside)
            tl.store(ids_keep_ptr + row * K + place, token.to(tl.int64), mask=kept)
        else:
            tl.store(ids_restore_ptr + row * L + token, place, mask=inside & (kept == 0))
            signed = (keys ^ 0x80000000).to(tl.int32, bitcast=True).to(tl.int64)
            tl.store(ids_keep_ptr + row * K + place, signed << 32 | token.to(tl.int64), mask=kept)
        equal_before += tl.sum(equal.to(tl.int32))
        kept_before += tl.sum(kept.to(tl.int32))


@triton.jit
def _order_kernel(pairs_ptr, ids_keep_ptr, ids_restore_ptr, K, L, SORT: tl.constexpr, BLOCK: tl.constexpr):
    """From (key, index) pairs of a sample to their indices in order, and the inverse; not SORT: they are in order."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < K
    pairs = tl.load(pairs_ptr + row * K + place, mask=inside, other=LAST)
    if SORT:
        pairs = tl.sort(pairs)
    token = pairs & 0xFFFFFFFF
    tl.store(ids_keep_ptr + row * K + place, token, mask=inside)
    tl.store(ids_restore_ptr + row * L + token, place.to(tl.int64), mask=inside)


@triton.jit
def _invert_kernel(ids_ptr, places_ptr, K, L, BLOCK: tl.constexpr):
    """places[ids[place]] = place; ids outside [0, L) are left out."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(ids_ptr + row * K + place, mask=place < K, other=-1)
    tl.store(places_ptr + row * L + token, place.to(tl.int64), mask=(token >= 0) & (token < L))


@triton.jit
def _complete_kernel(ids_restore_ptr, mask_ptr, K, L, CHUNK: tl.constexpr):
    """The removed tokens of a sample, negative so far, get the places from K on."""
    row = tl.program_id(0).to(tl.int64)
    removed_before = tl.zeros((), tl.int32)
    for start in range(0, L, CHUNK):
        token = start + tl.arange(0, CHUNK)
        inside = token < L
        removed = tl.load(ids_restore_ptr + row * L + token, mask=inside, other=0) < 0
        place = K + removed_before + tl.cumsum(removed.to(tl.int32)) - 1
        tl.store(ids_restore_ptr + row * L + token, place.to(tl.int64), mask=removed)
        tl.store(mask_ptr + row * L + token, removed, mask=inside)
        removed_before += tl.sum(removed.to(tl.int32))

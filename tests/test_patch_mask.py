"""Which tokens stay: the same bits everywhere, exact counts, every order, uniform."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from fractions import Fraction

import pytest
import torch
from conftest import OTHER_ISAS, require_or_skip
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_op_close
from torch.utils.data import DataLoader, Dataset

import sslkernels
from sslkernels import _library, patch_mask, random_masking
from sslkernels.ops.patch_mask.cases import OPS
from sslkernels.philox import PATCH_MASK_STREAM, WORD, philox

CASES = [(spec, case, dtype) for spec in OPS for case in spec.tagged("verify") for dtype in spec.dtypes]


def same(*masks) -> bool:
    first, *others = masks
    return all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("spec", OPS, ids=lambda spec: spec.name)
def test_the_compiled_kernels_are_there(spec):
    require_or_skip(_library.extension, _library.extension_error)
    assert sslkernels.backends()[spec.name]["cpu"] == sslkernels.Backend("cpp")


@pytest.mark.parametrize("spec, case, dtype", CASES, ids=[f"{s.name}-{c.name}-{str(d)[6:]}" for s, c, d in CASES])
def test_as_exact_as_eager(spec, case, dtype):
    assert_op_close(spec, case, dtype)


# ---- the random numbers


def keys(seed: int, sample: int, tokens: int) -> list[int]:
    """By the contract, one token after the other."""
    seed, sample = seed % 2**64, sample % 2**64
    counters = [(t // 4, sample & WORD, sample >> 32, PATCH_MASK_STREAM) for t in range(tokens)]
    return [int(philox(counter, (seed & WORD, seed >> 32))[t % 4]) for t, counter in enumerate(counters)]


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("seed", [0, 12345, -1, 2**63 + 5])
def test_the_smallest_keys_stay(seed, backend):
    samples, tokens, kept = [0, 5, 2**40 + 3, -1], 9, 4
    ids = torch.tensor(samples)
    out = patch_mask(len(samples), tokens, num_keep=kept, seed=seed, sample_ids=ids, backend=backend)
    for row, sample in enumerate(samples):
        order = sorted(range(tokens), key=keys(seed, sample, tokens).__getitem__)
        assert out.ids_keep[row].tolist() == order[:kept]


@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 128, 129, 196, 197, 1568, 4095, 4096, 65536, 65537])
@pytest.mark.parametrize("ordered", [False, True])
def test_every_length_is_as_defined(tokens, ordered):
    for kept in {0, min(1, tokens), tokens // 4, tokens * 3 // 4, max(0, tokens - 1), tokens}:
        options = {"num_keep": kept, "seed": tokens, "ordered": ordered}
        out = patch_mask(2, tokens, **options)
        assert same(out, patch_mask(2, tokens, **options, backend="reference"))
        check_structure(out, kept, ordered)


def check_structure(out, kept: int, ordered: bool) -> None:
    samples, tokens = out.mask.shape
    assert out.ids_keep.shape == (samples, kept) and out.ids_restore.shape == (samples, tokens)
    assert out.mask.dtype == torch.bool and out.ids_keep.dtype == out.ids_restore.dtype == torch.int64
    assert torch.equal(out.mask.logical_not().sum(dim=1), torch.full((samples,), kept))
    shuffled = out.ids_restore.argsort(dim=1)  # the inverse permutation
    assert torch.equal(shuffled[:, :kept], out.ids_keep)
    assert torch.equal(out.ids_restore.gather(1, shuffled), torch.arange(tokens).expand(samples, tokens))
    assert (shuffled[:, kept:].diff(dim=1) > 0).all()  # removed tokens keep their order
    assert torch.equal(out.mask, out.ids_restore >= kept)
    if ordered:
        assert (out.ids_keep.diff(dim=1) > 0).all()


@pytest.mark.parametrize(
    "tokens, ratio, kept",
    [(10, 0.9, 1), (100, 0.9, 10), (5, 0.8, 1), (196, 0.75, 49), (1, 0.5, 0), (7, 0, 7), (7, 1, 0), (3, 1.0, 0),
     (1, 0.0, 1), (10**9, 1e-9, 10**9 - 1), (49, 0.7, 14)],
)  # fmt: skip
def test_counts_are_exact(tokens, ratio, kept):
    if tokens < 1000:
        assert patch_mask(2, tokens, ratio, seed=0).ids_keep.shape == (2, kept)
    from sslkernels.ops.patch_mask.arguments import num_kept

    assert num_kept("", tokens, ratio, None) == kept


@given(tokens=st.integers(0, 300), digits=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_counts_are_those_of_the_decimal(tokens, digits):
    ratio = digits / 10**6
    kept = tokens * (1 - Fraction(digits, 10**6)) // 1
    assert patch_mask(1, tokens, ratio, seed=0).ids_keep.shape[1] == kept


# ---- scores


@pytest.mark.parametrize("backend", [None, "reference"])
def test_scores_take_the_place_of_random_keys(backend):
    nan, inf = torch.nan, torch.inf
    rows = [
        [3.0, 1.0, 2.0, 0.0, 5.0, 4.0],
        [0.0, -0.0, 0.0, -0.0, -1.0, 1.0],  # zeros are equal
        [nan, 1.0, -nan, inf, -inf, 0.0],  # NaN of any sign comes last, after infinity
        [nan, nan, nan, nan, nan, nan],
        [1e-45, -1e-45, 0.0, 1e-40, -1e-40, 1.0],  # denormals count
        [7.0, 7.0, 7.0, 7.0, 7.0, 7.0],
    ]
    orders = [[3, 1, 2, 0, 5, 4], [4, 0, 1, 2, 3, 5], [4, 5, 1, 3, 0, 2], [0, 1, 2, 3, 4, 5], [4, 1, 2, 0, 3, 5],
              [0, 1, 2, 3, 4, 5]]  # fmt: skip
    scores = torch.tensor(rows)
    scores[2, 2] = torch.tensor([-(2**22)], dtype=torch.int32).view(torch.float32)[0]  # a negative NaN
    assert scores[2, 2].isnan()
    flushed = torch.set_flush_denormal(True)
    try:
        for kept in range(7):
            out = patch_mask(6, 6, num_keep=kept, scores=scores, backend=backend)
            assert out.ids_keep.tolist() == [order[:kept] for order in orders]
            check_structure(out, kept, False)
    finally:
        if flushed:
            torch.set_flush_denormal(False)


@given(
    values=st.lists(st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 2.0, torch.inf, torch.nan]), min_size=1, max_size=300),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_ties_break_by_index(values, data):
    kept = data.draw(st.integers(0, len(values)))
    out = patch_mask(1, len(values), num_keep=kept, scores=torch.tensor([values]))
    order = sorted(
        range(len(values)), key=lambda t: (values[t] != values[t], values[t] if values[t] == values[t] else 0)
    )
    assert out.ids_keep[0].tolist() == order[:kept]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_scores_of_any_dtype_and_strides(dtype):
    scores = torch.randn(300, 4, generator=torch.Generator().manual_seed(0)).to(dtype).T
    expected = patch_mask(4, 300, scores=scores.float().contiguous())
    assert same(patch_mask(4, 300, scores=scores), expected)
    x = torch.randn(4, 302, 3, requires_grad=True)
    out = random_masking(x, scores=scores.clone().requires_grad_(), num_prefix_tokens=2)
    assert same(out[1:], (expected.mask, expected.ids_keep, expected.ids_restore))


# ---- seeds and samples


def test_masks_do_not_depend_on_the_batch():
    whole = patch_mask(12, 50, seed=7, sample_ids=torch.arange(12))
    assert same(whole, patch_mask(12, 50, seed=7))
    for parts in ([[0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 10, 11]], [[11, 3], [5], [0, 1, 2, 4, 6, 7, 8, 9, 10]]):
        for part in parts:
            ids = torch.tensor(part)
            masks = patch_mask(len(part), 50, seed=7, sample_ids=ids.int())
            assert same(masks, [tensor[ids] for tensor in whole])
    out = random_masking(torch.randn(12, 50, 2), seed=7)
    assert same(out[1:], (whole.mask, whole.ids_keep, whole.ids_restore))


def test_seeds():
    def draw(seed):
        return patch_mask(3, 64, seed=seed).ids_keep

    for seed in (0, 5, -3, 2**63 - 1, -(2**63)):
        assert torch.equal(draw(seed), draw(seed % 2**64))
        assert torch.equal(draw(seed), draw(torch.tensor(seed)))
        assert torch.equal(draw(seed), draw(torch.tensor([seed])))
    every = [draw(seed) for seed in (0, 1, 2**32, 2**63, 2**64 - 1)]
    assert not any(torch.equal(a, b) for i, a in enumerate(every) for b in every[:i])


def test_a_seed_is_drawn_once():
    torch.manual_seed(5)
    expected = torch.ops.sslkernels.draw_seed(torch.device("cpu"))
    after = torch.rand(3)
    for call in (lambda: patch_mask(4, 40), lambda: random_masking(torch.zeros(4, 40, 1))):
        torch.manual_seed(5)
        out = call()
        assert torch.equal(torch.rand(3), after)
        assert torch.equal(out.ids_keep, patch_mask(4, 40, seed=expected).ids_keep)
        assert not torch.equal(call().ids_keep, out.ids_keep)
    masks = [patch_mask(4, 40, generator=torch.Generator().manual_seed(9)) for _ in range(2)]
    assert same(*masks)
    torch.manual_seed(5)
    patch_mask(4, 40, scores=torch.randn(4, 40, generator=torch.Generator()))  # which leave nothing to draw
    assert torch.equal(torch.ops.sslkernels.draw_seed(torch.device("cpu")), expected)


# ---- wherever they are drawn


def digest() -> str:
    """Of masks, kept tokens and gradients, of every kind."""
    state = hashlib.sha256()
    for tokens, dtype in ((197, torch.float32), (33, torch.bfloat16), (5000, torch.float16), (50, torch.float64)):
        x = torch.sin(torch.arange(4.0 * tokens * 7)).view(4, tokens, 7).to(dtype).requires_grad_()
        out = random_masking(x, 0.6, num_prefix_tokens=1, seed=11)
        token, position = x.detach()[0, 0], x.detach()[1]
        token, position = token.clone().requires_grad_(), position.clone().requires_grad_()
        restored = sslkernels.restore_tokens(out.x_kept, out.ids_restore, token, position, num_prefix_tokens=1)
        picked = sslkernels.gather_tokens(restored, out.ids_keep // 3)
        (picked * picked.detach()).sum().backward()
        for tensor in (*out, restored, picked, x.grad, token.grad, position.grad):
            state.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_any_number_of_threads_gives_the_same(threads):
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            results.append(digest())
    finally:
        torch.set_num_threads(before)
    assert len(set(results)) == 1


@pytest.mark.parametrize("isa", OTHER_ISAS)
def test_every_instruction_set_gives_the_same(isa):
    program = (
        "import test_patch_mask\n"
        "from sslkernels._library import extension\n"
        f"assert extension.isa() == {isa!r}\n"
        "print(test_patch_mask.digest())"
    )
    environment = {
        **os.environ,
        "SSLKERNELS_ISA": isa,
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path]),
    }
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == digest()


class Masks(Dataset):
    """What a collate function would ask for, sample by sample."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return patch_mask(1, 30, seed=3, sample_ids=torch.tensor([index])).mask[0]


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_any_number_of_workers_gives_the_same(workers):
    masks = torch.cat(list(DataLoader(Masks(), batch_size=4, num_workers=workers)))
    assert torch.equal(masks, patch_mask(10, 30, seed=3).mask)


# ---- uniformity: chi-square over 100,000 masks of fixed seeds


def p_value(cells: torch.Tensor, count: int, scale: float = 1.0) -> float:
    """That of counts of equally likely cells."""
    counts = torch.bincount(cells.flatten(), minlength=count).double()
    assert len(counts) == count
    expected = counts.sum() / count
    statistic = scale * ((counts - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((count - 1) / 2, dtype=torch.float64), statistic / 2).item()


def test_masks_are_uniform():
    masks, tokens, kept = 100_000, 14, 5
    for seed in (1, 2**40):
        drawn = patch_mask(masks, tokens, num_keep=kept, seed=seed)
        first, second = drawn.ids_keep[:, 0], drawn.ids_keep[:, 1]
        after_first = second - (second > first).long()
        # of draws without replacement, counts vary less by this factor
        spread = (tokens - 1) / (tokens - kept)
        kept_pairs = patch_mask(masks, tokens, num_keep=2, ordered=True, seed=seed + 1).ids_keep
        pair = kept_pairs[:, 1] * (kept_pairs[:, 1] - 1) // 2 + kept_pairs[:, 0]
        shares = {
            "positions": p_value(drawn.ids_keep, tokens, spread),
            "first": p_value(first, tokens),
            "pairs in order": p_value(first * (tokens - 1) + after_first, tokens * (tokens - 1)),
            "pairs": p_value(pair, tokens * (tokens - 1) // 2),
            "neighbouring samples": p_value(first[::2] * tokens + first[1::2], tokens * tokens),
        }
        assert all(1e-3 < share < 1 - 1e-3 for share in shares.values()), shares


def test_long_masks_are_uniform():
    drawn = patch_mask(100_000, 196, seed=4)
    assert 1e-3 < p_value(drawn.ids_keep, 196, 195 / (196 - 49)) < 1 - 1e-3
    assert 1e-3 < p_value(drawn.ids_keep[:, 0], 196) < 1 - 1e-3

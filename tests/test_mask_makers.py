"""The mask makers: exact counts, bounds and distributions."""

from __future__ import annotations

import bench_mask_makers as peers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_makers import assert_uniform, box, runs

from sslkernels import block_mask, multi_block_mask, multi_block_sizes, patch_mask, span_mask, tube_mask
from sslkernels.ops.patch_mask import grids
from sslkernels.ops.patch_mask import mask_makers_reference as reference
from sslkernels.philox import BLOCK_MASK_STREAM, SPAN_MASK_STREAM

BACKENDS = (None, "reference")
SEEDS = st.integers(-(2**63), 2**64 - 1)


# ---- rectangles


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_block_masks_have_exactly_as_many_patches_as_asked_for(data):
    height, width = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 40))
    counts = torch.tensor(data.draw(st.lists(st.integers(0, height * width), min_size=1, max_size=6)))
    least = data.draw(st.integers(1, 60))
    options = {
        "min_patches": least,
        "max_patches": data.draw(st.none() | st.integers(least, 200)),
        "min_aspect": data.draw(st.sampled_from([0.01, 0.3, 1.0])),
        "max_aspect": data.draw(st.sampled_from([None, 1.0, 20.0])) if least % 2 else None,
        "seed": data.draw(SEEDS),
    }
    if options["max_patches"] is None and least > height * width:
        options["max_patches"] = least
    masks = [block_mask(len(counts), (height, width), counts, **options, backend=backend) for backend in BACKENDS]
    assert torch.equal(masks[0].sum(dim=(1, 2)), counts)
    assert torch.equal(masks[0], masks[1])


@pytest.mark.parametrize("aspect, sides", [(4.0, (8, 2)), (1.0, (4, 4)), (0.25, (2, 8))])
def test_a_block_has_its_area_and_its_aspect(aspect, sides):
    options = {"min_patches": 16, "max_patches": 16, "min_aspect": aspect, "max_aspect": aspect}
    for mask in block_mask(50, (11, 13), 16, seed=1, **options):
        assert mask[box(mask)[0] :, box(mask)[1] :][: sides[0], : sides[1]].all()
        assert box(mask)[2:] == sides


def test_blocks_reach_every_place_equally_often():
    masks = block_mask(40000, (7, 9), 12, min_patches=12, max_patches=12, min_aspect=4 / 3, max_aspect=4 / 3, seed=5)
    places = torch.zeros(4, 7)
    corners = masks.flatten(1).int().argmax(dim=1)  # of a 4 x 3 rectangle, the first patch
    places.view(-1).index_add_(0, corners // 9 * 7 + corners % 9, torch.ones(len(corners)))
    assert_uniform(places)


def test_sides_lie_between_the_bounds():
    words = reference._Draws(torch.tensor(3), None, 20000, BLOCK_MASK_STREAM).words(0, 1)[:, 0]
    limit, factors = torch.full((20000,), 64), torch.tensor(grids.aspects(0.3, 2.0)).view(-1, 2)
    rectangles, fits = reference._draw_rectangle(words, limit, factors, 30, 30, 10)
    height, width = rectangles.any(2).sum(1).double(), rectangles.any(1).sum(1).double()
    assert fits.all()
    # half a patch is what rounding moves a side by
    assert ((height + 0.5) / (width - 0.5) >= 0.3).all() and ((height - 0.5) / (width + 0.5) <= 2.0).all()
    assert ((height + 0.5) * (width + 0.5) >= 10).all() and ((height - 0.5) * (width - 0.5) <= 64).all()
    area, aspect = height * width, (height / width).log()
    assert area.mean().item() == pytest.approx(37, rel=0.03)
    assert aspect.mean().item() == pytest.approx(torch.tensor(0.6).log().item() / 2, abs=0.03)


def test_block_masks_look_like_those_of_dinov2():
    """Neighbours that are both masked, as a share of the pairs: how compact a mask is."""

    def pairs(masks):
        masks = masks.double()
        together = (masks[:, 1:] * masks[:, :-1]).mean((1, 2)), (masks[:, :, 1:] * masks[:, :, :-1]).mean((1, 2))
        return torch.stack(together, 1)

    generator = peers.MaskingGenerator(16, max_num_patches=128)
    ours = pairs(block_mask(2000, 16, 77, max_patches=128, seed=2))
    theirs = pairs(torch.stack([torch.from_numpy(generator(77)) for _ in range(600)]))
    spread = (ours.var(0) / len(ours) + theirs.var(0) / len(theirs)).sqrt()
    # theirs are never as high or as wide as the grid, and sometimes a patch short
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 5 * spread + 0.004).all()


def test_patches_that_no_block_fits_are_drawn_evenly():
    """Where every rectangle is larger than what may be masked, all are drawn one by one."""
    masks = block_mask(20000, (4, 8), 3, min_patches=30, max_patches=32, min_aspect=1.0, seed=1)
    assert_uniform(masks.sum(0))
    reached = block_mask(20000, (2, 3), 3, min_patches=6, max_patches=6, min_aspect=1.0, seed=1).flatten(1)
    kinds = (reached * 2 ** torch.arange(6)).sum(1).bincount(minlength=64)
    assert (kinds > 0).sum() == 20  # every choice of 3 out of 6
    assert_uniform(kinds[kinds > 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mask_ratio_is_exact(backend):
    for size, ratio, masked in (((2, 5), 0.9, 9), ((10, 10), 0.9, 90), ((1, 5), 0.8, 4), ((3, 3), 0.5, 5)):
        mask = block_mask(3, size, mask_ratio=ratio, seed=1, backend=backend)
        assert (mask.sum(dim=(1, 2)) == masked).all()
    assert not block_mask(2, 4, mask_ratio=0.0, seed=1, backend=backend).any()
    assert block_mask(2, 4, mask_ratio=1.0, seed=1, backend=backend).all()


# ---- context and targets


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_targets_and_context_are_what_they_say(data):
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 37))
    target, context = (
        (data.draw(st.integers(1, height)), data.draw(st.integers(1, width))) for _ in range(2)
    )  # fmt: skip
    samples, targets = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 4))
    options = {"num_targets": targets, "target_size": target, "context_size": context, "seed": data.draw(SEEDS)}
    options |= {"min_context": data.draw(st.integers(0, 20)), "allow_overlap": data.draw(st.booleans())}
    masks = multi_block_mask(samples, (height, width), **options)
    defined = multi_block_mask(samples, (height, width), **options, backend="reference")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(masks, defined, strict=True))
    area = context[0] * context[1]
    assert masks.context_ids.shape == (samples, area)
    assert torch.equal(masks.context_counts, masks.context_mask.sum(dim=(1, 2)))
    for s in range(samples):
        for t in range(targets):
            assert box(masks.target_mask[s, t])[2:] == target
            assert torch.equal(masks.target_mask[s, t].flatten().nonzero()[:, 0], masks.target_ids[s, t])
        count, ids = int(masks.context_counts[s]), masks.context_ids[s]
        assert torch.equal(ids[:count].sort().values, masks.context_mask[s].flatten().nonzero()[:, 0])
        assert (ids[count:] == (ids[0] if count else 0)).all()
        taken = masks.target_mask[s].any(0)
        assert options["allow_overlap"] or not (masks.context_mask[s] & taken).any()
        if options["allow_overlap"] or not targets:
            assert count == area and box(masks.context_mask[s])[2:] == context


def test_all_places_of_a_block_are_equally_likely():
    """The last row and column too, which I-JEPA's own code never reaches."""
    masks = multi_block_mask(20000, (6, 8), num_targets=2, target_size=(3, 2), context_size=(4, 5), seed=1,
                             allow_overlap=True)  # fmt: skip
    for first, rows, columns in (
        (masks.target_ids[:, 0, 0], 4, 7),
        (masks.target_ids[:, 1, 0], 4, 7),
        (masks.context_ids.min(dim=1).values, 3, 4),
    ):
        places = torch.zeros(rows, columns)
        places.view(-1).index_add_(0, first // 8 * columns + first % 8, torch.ones(len(first)))
        assert_uniform(places)


def test_the_context_is_the_first_that_is_large_enough_or_the_largest():
    options = {"num_targets": 3, "target_size": (4, 4), "context_size": (3, 3), "seed": 4}
    counts = {least: multi_block_mask(300, 8, min_context=least, **options).context_counts for least in (0, 4, 9, 10)}
    assert (counts[9] >= counts[4]).all() and (counts[4] >= counts[0].clamp(max=4)).all()
    assert torch.equal(counts[9], counts[10])  # there is no block of 10, so the best of all was taken
    assert (counts[0] < 4).any() and (counts[9] < 9).any()
    assert ((counts[0] == counts[4]) | (counts[0] < 4)).all()  # what is enough is not tried again


def test_any_first_ids_of_the_context_are_a_random_part_of_it():
    masks = multi_block_mask(20000, 8, num_targets=0, target_size=(1, 1), context_size=(8, 8), seed=3)
    first = masks.context_ids[:, :5]
    assert_uniform(first.flatten().bincount(minlength=64))
    pairs = first[:, 0] * 64 + first[:, 1]
    assert_uniform(pairs.bincount(minlength=64 * 64).view(64, 64)[~torch.eye(64, dtype=torch.bool)])


def test_truncation_keeps_all_rows():
    masks = multi_block_mask(400, 14, target_size=(6, 5), context_size=(13, 13), seed=8)
    shortest = int(masks.context_counts.min())
    ids = masks.truncated()
    assert ids.shape == (400, shortest) and (ids.diff(dim=1) > 0).all()
    assert masks.context_mask.flatten(1).gather(1, ids).all()
    kept = ids.flatten().bincount(minlength=196).double() / masks.context_mask.sum(0).flatten()
    last, first = kept[-28:].mean().item(), kept[:28].mean().item()
    assert last == pytest.approx(first, rel=0.1)  # I-JEPA's own code would leave nearly nothing of the last rows
    assert masks.truncated(7).shape == (400, 7)
    assert multi_block_mask(0, 4, seed=1).truncated().shape == (0, 0)


def test_sizes_of_a_batch():
    sizes = [multi_block_sizes((14, 20), seed=seed) for seed in range(500)]
    assert sizes[3] == multi_block_sizes((14, 20), seed=3)
    assert len(set(sizes)) > 20
    for (height, width), (tall, wide) in sizes:
        assert (height + 0.5) * (width + 0.5) >= 0.15 * 280 and (height - 0.5) * (width - 0.5) <= 0.2 * 280
        assert (height - 0.5) / (width + 0.5) <= 1.5 and (height + 0.5) / (width - 0.5) >= 0.75
        assert tall == 14 and 15 <= wide <= 17  # round(sqrt(0.85 * 280)) to round(sqrt(280))
    assert multi_block_sizes(1, seed=0) == ((1, 1), (1, 1))
    masks = multi_block_mask(3, (14, 20), seed=3)
    height, width = sizes[3].target_size
    assert masks.target_ids.shape == (3, 4, height * width)


# ---- spans


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_spans_lie_inside_their_samples(data):
    tokens, span = data.draw(st.integers(0, 90)), data.draw(st.integers(1, 12))
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, tokens), min_size=1, max_size=6)))
    asked = torch.tensor([data.draw(st.integers(0, 30)) for _ in lengths]) if data.draw(st.booleans()) else None
    overlap = data.draw(st.booleans())
    options = {"span_length": span, "lengths": lengths, "num_spans": asked, "overlap": overlap}
    options |= {"seed": data.draw(SEEDS), "min_spans": data.draw(st.integers(0, 5))}
    probability = data.draw(st.floats(0, 1))
    masks = [span_mask(len(lengths), tokens, probability, **options, backend=backend) for backend in BACKENDS]
    assert torch.equal(masks[0], masks[1])
    room = (lengths - span + 1).clamp(min=0) if overlap else lengths // span
    for row, mask in enumerate(masks[0]):
        length, masked = int(lengths[row]), int(mask.sum())
        assert not mask[length:].any()
        assert all(run >= span and (overlap or run % span == 0) for run in runs(mask))
        spans = None if asked is None else min(int(asked[row]), int(room[row]))
        if spans is None:
            expected = probability * length / span
            low = min(max(int(expected - 1e-6), options["min_spans"]), int(room[row]))
            high = min(max(int(expected + 1e-6) + 1, options["min_spans"]), int(room[row]))
        else:
            low = high = spans
        if overlap:  # distinct starts: `spans` of them reach at least so far
            assert (low + span - 1 if low else 0) <= masked <= high * span
        else:
            assert masked in range(low * span, high * span + 1, span)


@pytest.mark.parametrize("overlap", [True, False])
def test_every_arrangement_of_spans_is_equally_likely(overlap):
    masks = span_mask(30000, 9, span_length=3, num_spans=2, overlap=overlap, lengths=torch.full((30000,), 8), seed=1)
    kinds = (masks * 2 ** torch.arange(9)).sum(1).bincount(minlength=512)
    assert kinds[256:].sum() == 0
    if overlap:  # two of 6 starts; the first of them is seen
        assert_uniform(masks.int().argmax(dim=1).bincount(minlength=5), weights=range(5, 0, -1))
    else:  # 3 free tokens before, between and after: 6 ways
        assert (kinds > 0).sum() == 6
        assert_uniform(kinds[kinds > 0])


@pytest.mark.parametrize("overlap", [True, False])
def test_the_number_of_spans_has_the_mean_that_was_asked_for(overlap):
    lengths = torch.full((20000,), 57)
    masks = span_mask(20000, 60, 0.3, span_length=4, lengths=lengths, overlap=overlap, seed=2)
    if overlap:  # with spans of one token, the starts can be counted
        masks = span_mask(20000, 60, 0.3 / 4, span_length=1, lengths=lengths, seed=2)
    spans = masks.sum(1) / (1 if overlap else 4)
    assert set(spans.tolist()) == {4, 5}  # 0.3 * 57 / 4 = 4.275
    assert spans.mean().item() == pytest.approx(4.275, abs=0.02)


def test_single_tokens_are_a_random_subset():
    masks = span_mask(20000, 40, span_length=1, num_spans=13, seed=4)
    assert (masks.sum(1) == 13).all()
    assert_uniform(masks.sum(0))


def test_samples_whose_keys_are_all_large_get_what_they_asked_for():
    """The kernels look at keys below a limit first, which in one sample of some ten thousand are too few."""
    ids = torch.tensor([46651, 89715, 101298])
    keys = reference._Draws(torch.tensor(4), ids, 3, SPAN_MASK_STREAM).words(reference.KEY_DRAWS, 75).flatten(1)
    assert ((keys < 2**32 * (8 + 4 * 2 + 8) // 300).sum(1) < 8).all()
    masks = span_mask(3, 300, span_length=1, num_spans=8, seed=4, sample_ids=ids)
    assert torch.equal(masks.nonzero()[:, 1].view(3, 8), keys.argsort(dim=1)[:, :8].sort(dim=1).values)


# ---- tubes


@pytest.mark.parametrize("ordered", [False, True])
def test_tubes_are_the_mask_of_a_frame_in_every_frame(ordered):
    frames, places, samples = 3, 20, 4
    tubes = tube_mask(samples, (frames, 4, 5), 0.75, seed=6, ordered=ordered)
    frame = patch_mask(samples, places, 0.75, seed=6, ordered=ordered)
    assert torch.equal(tubes.mask.view(samples, frames, places), frame.mask[:, None].expand(-1, frames, -1))
    ids = (frame.ids_keep[:, None] + places * torch.arange(frames)[:, None]).flatten(1)
    assert torch.equal(tubes.ids_keep, ids)
    removed = tubes.mask.nonzero()[:, 1].view(samples, -1)
    assert torch.equal(tubes.ids_restore, torch.cat([ids, removed], dim=1).argsort(dim=1))
    assert (tubes.mask.sum(1) == frames * 15).all() and tubes.mask.is_contiguous()

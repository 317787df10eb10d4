"""PatchMask and `sslkernels.compat` keep what the originals keep, given the same noise, and what they add holds."""

import builtins
import re

import pytest
import torch
from masking_forms import (
    dinov2_lists,
    dinov2_shares,
    lightly_random_token_mask,
    mae_random_masking,
    mae_unshuffle,
)
from timm.layers import PatchDropout, PatchDropoutWithIndices
from timm.models.vision_transformer import VisionTransformer

import sslkernels
from sslkernels.compat import dinov2, mae
from sslkernels.compat.lightly import random_token_mask
from sslkernels.nn import PatchMask

DINOV2 = ((0.1, 0.5), 0.5)  # its mask_ratio_tuple and mask_probability


def _tokens(samples=3, length=50, dim=8, seed=0):
    return torch.randn(samples, length, dim, generator=torch.Generator().manual_seed(seed))


def _noise(samples, length, seed=1):
    return torch.rand(samples, length, generator=torch.Generator().manual_seed(seed))


# ---- timm


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("prob", [0.1, 0.5, 0.75, 0.999])
def test_patch_mask_keeps_what_patch_dropout_keeps(prefix, ordered, prob):
    x = _tokens(length=prefix + 49)
    torch.manual_seed(5)
    expected, expected_ids = PatchDropoutWithIndices(prob, prefix, ordered)(x)
    torch.manual_seed(5)
    scores = torch.randn(3, 49)
    kept, ids = PatchMask(prob, prefix, ordered, return_indices=True)(x, scores=scores)
    assert torch.equal(ids, expected_ids) and torch.equal(kept, expected)
    assert torch.equal(PatchMask(prob, prefix, ordered)(x, scores=scores), expected)


def test_patch_mask_has_the_defaults_of_patch_dropout():
    ours, theirs = PatchMask(), PatchDropout()
    for name in ("prob", "num_prefix_tokens", "ordered"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours(_tokens()).shape == theirs(_tokens()).shape
    assert ours.state_dict() == {}


@pytest.mark.parametrize("module", [PatchMask(0.5).eval(), PatchMask(0.0)])
def test_patch_mask_is_the_identity_in_evaluation(module):
    x = _tokens()
    assert module(x) is x
    module.return_indices = True
    assert module(x) == (x, None)


@pytest.mark.parametrize(("prob", "length", "expected"), [(0.9, 10, 1), (0.9, 100, 10), (0.99, 5, 1), (0.5, 1, 1)])
def test_patch_mask_counts_exactly_and_keeps_one(prob, length, expected):
    assert PatchMask(prob, 0)(_tokens(length=length)).shape[1] == expected
    assert PatchMask(prob, 2)(_tokens(length=2)).shape[1] == 2


def test_patch_mask_is_a_function_of_seed_and_sample():
    x, ids = _tokens(6), torch.tensor([9, 4, 7, 1, 0, 2])
    module = PatchMask(0.5, return_indices=True)
    whole, kept = module(x, seed=3, sample_ids=ids)
    parts = [module(x[part], seed=3, sample_ids=ids[part]) for part in (slice(0, 2), slice(2, 6))]
    assert torch.equal(torch.cat([part for part, _ in parts]), whole)
    assert not torch.equal(module(x, seed=4, sample_ids=ids)[1], kept)
    expected = sslkernels.random_masking(x, 0.5, num_prefix_tokens=1, seed=3, sample_ids=ids)
    assert torch.equal(expected.ids_keep, kept) and torch.equal(expected.x_kept, whole)
    module.seed, module.sample_ids = torch.tensor(3), ids
    assert torch.equal(module(x)[1], kept)
    module.seed.fill_(4)
    assert torch.equal(module(x)[1], PatchMask(0.5, return_indices=True, seed=4)(x, sample_ids=ids)[1])


def test_patch_mask_without_a_seed_follows_the_generator():
    x, module = _tokens(), PatchMask()
    torch.manual_seed(0)
    first, second = module(x), module(x)
    torch.manual_seed(0)
    assert torch.equal(module(x), first) and not torch.equal(first, second)


def test_patch_mask_serves_a_vit_of_timm_eager_and_compiled():
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=0)
    vit.patch_drop = PatchMask(0.5, vit.num_prefix_tokens, seed=torch.tensor(1))
    images, lengths = torch.randn(2, 3, 16, 16), []
    vit.blocks.register_forward_hook(lambda _, args, output: lengths.append(output.shape[1]))
    vit(images).sum().backward()
    vit.eval()(images)
    assert lengths == [9, 17] and vit.patch_embed.proj.weight.grad.abs().sum() > 0
    module = vit.patch_drop.train()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for seed in (1, 2):
        module.seed.fill_(seed)
        assert torch.equal(compiled(_tokens()), module(_tokens()))


@pytest.mark.parametrize("prob", [1.0, -0.1, float("nan"), 2])
def test_patch_mask_refuses_a_probability(prob):
    with pytest.raises(ValueError, match=r"PatchMask: prob must be in \[0, 1"):
        PatchMask(prob)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"num_prefix_tokens": -1}, "ValueError: num_prefix_tokens must be at least 0, got -1"),
        ({"num_prefix_tokens": 1.0}, "TypeError: num_prefix_tokens must be an int, got float"),
        ({"ordered": 1}, "TypeError: ordered must be a bool, got int"),
        ({"seed": 2**64}, "ValueError: seed must be in [-2**63, 2**64), got"),
        ({"seed": 0.5}, "TypeError: seed must be an int or a tensor of one integer, got float"),
        ({"seed": torch.zeros(2)}, "ValueError: seed must be an int or a tensor of one integer, got torch.float32 of"),
    ],
)
def test_patch_mask_is_checked_when_it_is_made(options, error):
    kind, _, message = error.partition(": ")
    with pytest.raises(getattr(builtins, kind), match="^" + re.escape(f"PatchMask: {message}")):
        PatchMask(**options)


@pytest.mark.parametrize(
    ("x", "error"),
    [
        ([1.0], "TypeError: x must be a tensor, got list"),
        (torch.zeros(4), "ValueError: x must be (N, L, D), got (4,)"),
        (torch.zeros(2, 3, 4), "ValueError: num_prefix_tokens must be in [0, 3], got 5"),
    ],
)
def test_patch_mask_names_tokens_that_are_none(x, error):
    kind, _, message = error.partition(": ")
    with pytest.raises(getattr(builtins, kind), match="^" + re.escape(f"PatchMask: {message}")):
        PatchMask(0.5, 5)(x)


# ---- MAE


@pytest.mark.parametrize(("length", "ratio"), [(49, 0.75), (16, 0.5), (196, 0.6), (7, 0.0)])
def test_mae_masking_is_that_of_the_original(length, ratio):
    x, noise = _tokens(length=length), _noise(3, length)
    x_masked, mask, ids_restore = mae.random_masking(x, ratio, scores=noise)
    expected, expected_mask, expected_restore = mae_random_masking(x, ratio, noise)
    assert torch.equal(x_masked, expected) and torch.equal(mask, expected_mask) and mask.dtype == torch.float32
    kept = mask == 0
    assert torch.equal(ids_restore[kept], expected_restore[kept])
    assert torch.equal(ids_restore.sort(dim=1).values, torch.arange(length).expand(3, -1))
    # what a decoder makes of the two is the same
    decoded = torch.cat([x[:, :1], x_masked], dim=1)
    mask_token, pos_embed = torch.randn(1, 1, 8), torch.randn(1, length + 1, 8)
    whole = mae_unshuffle(decoded, mask_token, ids_restore, pos_embed)
    assert torch.equal(whole, mae_unshuffle(decoded, mask_token, expected_restore, pos_embed))
    ours = sslkernels.restore_tokens(decoded, ids_restore, mask_token, pos_embed, num_prefix_tokens=1)
    torch.testing.assert_close(ours, whole, rtol=0, atol=0)


def test_mae_masking_counts_exactly_where_the_original_is_off_by_one():
    assert mae.random_masking(_tokens(length=10), 0.9)[0].shape[1] == 1
    assert mae_random_masking(_tokens(length=10), 0.9, _noise(3, 10))[0].shape[1] == 0


def test_mae_masking_is_a_method_of_a_model():
    class MaskedAutoencoderViT:
        random_masking = staticmethod(mae.random_masking)

    x_masked, mask, ids_restore = MaskedAutoencoderViT().random_masking(_tokens(), 0.75)
    assert x_masked.shape == (3, 12, 8) and mask.sum() == 3 * 38 and ids_restore.shape == (3, 50)


def test_mae_masking_is_a_function_of_seed_and_sample():
    x, ids = _tokens(4), torch.tensor([3, 1, 8, 0])
    kept, mask, ids_restore = mae.random_masking(x, 0.75, seed=7, sample_ids=ids)
    last = mae.random_masking(x[3:], 0.75, seed=7, sample_ids=ids[3:])
    assert all(torch.equal(a[3:], b) for a, b in zip((kept, mask, ids_restore), last, strict=True))


# ---- lightly


@pytest.mark.parametrize("mask_class_token", [False, True])
@pytest.mark.parametrize(
    ("size", "ratio"), [((4, 50), 0.6), ((2, 197), 0.75), ((3, 1), 0.5), ((3, 0), 0.5), ((0, 5), 0.5)]
)
def test_lightly_masking_is_that_of_the_original(mask_class_token, size, ratio):
    noise = _noise(*size)
    keep, removed = random_token_mask(size, ratio, mask_class_token, scores=noise)
    expected, expected_removed = lightly_random_token_mask(size, ratio, mask_class_token, noise)
    assert torch.equal(keep, expected) and torch.equal(removed, expected_removed.sort(dim=1).values)
    assert keep.dtype == removed.dtype == torch.int64


def test_lightly_masking_has_its_defaults_and_follows_the_seed():
    keep, removed = random_token_mask((4, 51))
    assert keep.shape == (4, 21) and removed.shape == (4, 30) and not keep[:, 0].any()
    ids = torch.tensor([5, 2, 6, 1])
    keep, removed = random_token_mask((4, 51), seed=2, sample_ids=ids)
    last = random_token_mask((1, 51), seed=2, sample_ids=ids[3:])
    assert torch.equal(keep[3:], last[0]) and torch.equal(removed[3:], last[1])
    every = torch.cat([keep, removed], dim=1).sort(dim=1).values
    assert torch.equal(every, torch.arange(51).expand(4, -1))


# ---- DINOv2


def _generator(**options):
    return dinov2.MaskingGenerator((16, 12), **{"max_num_patches": 0.5 * 16 * 12, **options})


def _samples(count=4, local_crops=3):
    crops = {"global_crops": [torch.randn(3, 8, 8) for _ in range(2)]}
    crops["local_crops"] = [torch.randn(3, 4, 4) for _ in range(local_crops)]
    return [({name: [crop + i for crop in several] for name, several in crops.items()}, None) for i in range(count)]


@pytest.mark.parametrize(
    ("batch_size", "ratios", "probability"), [(32, *DINOV2), (9, (0.0, 1.0), 0.8), (5, (0.3, 0.4), 0.0)]
)
def test_dinov2_masks_are_counted_and_listed_as_in_the_original(batch_size, ratios, probability):
    generator = _generator()
    bounds, upperbound = dinov2_shares(batch_size, ratios, probability, generator.num_patches)
    for seed in range(5):
        out = dinov2.collate_masks(batch_size, ratios, probability, generator, seed=seed)
        masks = out["collated_masks"]
        indices, weights = dinov2_lists(masks)
        assert masks.shape == (batch_size, 192) and masks.dtype == torch.bool
        assert torch.equal(out["mask_indices_list"], indices)
        torch.testing.assert_close(out["masks_weight"], weights, rtol=0, atol=0)
        assert out["n_masked_patches"].tolist() == [len(indices)] and out["upperbound"] == upperbound >= len(indices)
        counts = sorted(masks.sum(dim=1).tolist())
        assert counts[: batch_size - len(bounds)] == [0] * (batch_size - len(bounds))
        for count, (least, most) in zip(counts[batch_size - len(bounds) :], bounds, strict=True):
            assert least <= count <= most


def test_dinov2_collates_the_crops_as_the_original():
    samples = _samples()
    out = dinov2.collate_data_and_cast(samples, *DINOV2, torch.float16, 192, _generator())
    for kind in ("global_crops", "local_crops"):
        number = len(samples[0][0][kind])
        expected = torch.stack([sample[0][kind][i] for i in range(number) for sample in samples])
        assert torch.equal(out[f"collated_{kind}"], expected.half())
    assert out.keys() == {
        "collated_global_crops", "collated_local_crops", "collated_masks", "mask_indices_list", "masks_weight",
        "upperbound", "n_masked_patches",
    }  # fmt: skip
    assert out["collated_masks"].shape == (8, 192)


def test_dinov2_masks_follow_the_seed():
    def masks(**options):
        return dinov2.collate_masks(16, *DINOV2, _generator(), **options)["collated_masks"]

    torch.manual_seed(0)
    drawn, other = masks(), masks()
    torch.manual_seed(0)
    assert torch.equal(masks(), drawn) and not torch.equal(drawn, other)
    assert torch.equal(masks(seed=3), masks(seed=3)) and not torch.equal(masks(seed=3), masks(seed=4))
    # masked samples are in random places
    assert len({tuple(masks(seed=seed).any(dim=1).tolist()) for seed in range(4)}) > 1
    ids = torch.arange(100, 116)
    assert torch.equal(masks(seed=3, sample_ids=ids).sum(dim=1), masks(seed=3).sum(dim=1))
    assert not torch.equal(masks(seed=3, sample_ids=ids), masks(seed=3))


def test_the_generator_of_dinov2_masks_exactly_as_many_in_rectangles():
    generator = _generator()
    assert generator.get_shape() == (16, 12) and not generator().any()
    torch.manual_seed(0)
    for count in (1, 40, 192):
        mask = generator(count)
        assert mask.shape == (16, 12) and mask.dtype == bool and mask.sum() == count
    square = _generator(min_num_patches=25, max_num_patches=25, min_aspect=1.0)(25)
    assert square.any(axis=1).sum() == square.any(axis=0).sum() == 5
    assert dinov2.MaskingGenerator(8, num_masking_patches=20).rectangles["max_patches"] == 20


def test_dinov2_mistakes_are_told():
    with pytest.raises(
        TypeError, match=r"mask_generator must be a sslkernels\.compat\.dinov2\.MaskingGenerator, got None"
    ):
        dinov2.collate_masks(4, *DINOV2, None)
    with pytest.raises(ValueError, match="n_tokens must be 192, those of the grid of mask_generator, got 256"):
        dinov2.collate_data_and_cast(_samples(), *DINOV2, torch.float32, 256, _generator())

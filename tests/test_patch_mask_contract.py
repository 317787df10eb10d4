"""Patch masking among torch and its users: the compiler, fake tensors, backends, every error."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from conftest import require_or_skip
from torch._subclasses import FakeTensorMode

from sslkernels import _library, gather_tokens, masked_patch_embed, patch_mask, random_masking, restore_tokens

OPS = torch.ops.sslkernels


def random(*shape, dtype=torch.float32, requires_grad=False):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_(requires_grad)


# ---- the compiler


def autoencode(x, token, position, **options):
    """As a masked autoencoder does, without its layers."""
    out = random_masking(x, num_prefix_tokens=1, **options)
    restored = restore_tokens(out.x_kept, out.ids_restore, token, position, num_prefix_tokens=1)
    return restored + gather_tokens(restored, out.ids_keep, num_prefix_tokens=1).mean(), *out


def scored(x, token, position):
    return autoencode(x, token, position, scores=x[:, 1:, 0], ordered=True, num_keep=5)


def given(x, token, position):
    return autoencode(x, token, position, ids_keep=x[:, 1:, 0].argsort(dim=1)[:, :6])


def embedded(x, token, position):
    images = x[:, None, 1:13, :4]
    ids = patch_mask(x.shape[0], 6, 0.5, seed=1, device=x.device).ids_keep
    return (masked_patch_embed(images, token.view(4, 1, 2, 4), None, ids, position[:6, :4]),)


CALLS = {
    "seed": lambda *args: autoencode(*args, seed=5),
    "drawn": autoencode,
    "scores": scored,
    "ids": given,
    "patches": embedded,
    "reference": lambda *args: autoencode(*args, seed=5, backend="reference"),
}


def run(function, samples):
    x, token, position = random(samples, 21, 32, requires_grad=True), random(32), random(21, 32, requires_grad=True)
    token.requires_grad_()
    torch.manual_seed(samples)
    value, *masks = function(x, token, position)
    grads = torch.autograd.grad(value.square().sum(), (x, token, position), allow_unused=True)
    return [value.detach(), *(mask.detach() for mask in masks), *grads]


@pytest.mark.parametrize("call", CALLS)
def test_compiled_whole_and_once_for_every_batch_with_the_same_bits(call):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(CALLS[call], fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for samples in (64, 96, 33):
        for actual, expected in zip(run(compiled, samples), run(CALLS[call], samples), strict=True):
            assert torch.equal(actual, expected)
        frames.append(counter.frame_count)
    assert frames[0] == frames[2]  # the last partial batch compiles nothing


def test_compiled_by_inductor_with_the_same_bits():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, seed: random_masking(x, 0.6, seed=seed), fullgraph=True)
    x = random(6, 40, 8)
    for seed in (3, 4, -5, 2**64 - 7):
        for actual, expected in zip(compiled(x, seed), random_masking(x, 0.6, seed=seed), strict=True):
            assert torch.equal(actual, expected)


def test_a_new_ratio_compiles_anew():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, ratio: random_masking(x, ratio, seed=1).mask, fullgraph=True, backend="aot_eager"
    )
    for ratio in (0.75, 0.5, 0.9, 1, 0.1 + 0.2):
        assert torch.equal(compiled(random(3, 10, 4), ratio), random_masking(random(3, 10, 4), ratio, seed=1).mask)


def test_a_seed_on_the_device_is_read_by_what_was_compiled():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, seed: random_masking(x, seed=seed).mask, fullgraph=True, backend=counter)
    seed = torch.tensor(1)
    for value in (1, 2, -3):
        seed.fill_(value)
        assert torch.equal(compiled(random(3, 10, 4), seed), random_masking(random(3, 10, 4), seed=value).mask)
    assert counter.frame_count == 1


def test_exported():
    class Model(torch.nn.Module):
        def forward(self, x):
            return random_masking(x, 0.75, seed=4)

    batch = torch.export.Dim("batch", min=2, max=100)
    program = torch.export.export(Model(), (random(4, 16, 8),), dynamic_shapes={"x": {0: batch}})
    for actual, expected in zip(
        program.module()(random(7, 16, 8)), random_masking(random(7, 16, 8), seed=4), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_shapes_on_fake_devices(device):
    with FakeTensorMode():
        x = torch.empty(4, 18, 8, dtype=torch.float16, device=device, requires_grad=True)
        out = random_masking(x, 0.75, num_prefix_tokens=2, sample_ids=torch.arange(4, device=device))
        token, position = (torch.empty(*s, device=device, requires_grad=True) for s in ((1, 1, 8), (1, 16, 8)))
        restored = restore_tokens(out.x_kept, out.ids_restore, token, position, num_prefix_tokens=2)
        restored_bwd = torch.ops.sslkernels.restore_tokens_bwd  # not by backward(), which would look for the device
        grads = restored_bwd(restored.detach(), out.ids_restore, 4, 2, 16, True, True)
        images, weight = torch.empty(4, 3, 8, 8, device=device), torch.empty(5, 3, 2, 2, device=device)
        ids = patch_mask(4, 16, scores=torch.empty(4, 16, device=device)).ids_keep
        tokens = masked_patch_embed(images, weight, None, ids, torch.empty(16, 5, device=device))
        again = random_masking(x, ids_keep=ids, num_prefix_tokens=2)
        drawn = patch_mask(4, 16, device=device)
    tensors = {out.x_kept: (4, 6, 8), restored: (4, 18, 8), tokens: (4, 4, 5), again.x_kept: (4, 6, 8),
               **dict(zip(grads, ((4, 6, 8), (8,), (16, 8)), strict=True))}  # fmt: skip
    for masks in (out, again, drawn):
        tensors |= {masks.mask: (4, 16), masks.ids_keep: (4, 4), masks.ids_restore: (4, 16)}
    for tensor, shape in tensors.items():
        assert tensor.shape == shape and tensor.device.type == device and tensor.is_contiguous()
    assert out.x_kept.dtype == torch.float16 and restored.dtype == torch.float32


# ---- errors

X, IDS, M = torch.zeros(2, 6, 4), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(4)
KEPT, PLACES = torch.zeros(2, 3, 4), torch.arange(6).expand(2, 6)
IMAGES, WEIGHT = torch.zeros(2, 3, 4, 6), torch.zeros(5, 3, 2, 3)
META = torch.zeros(2, 6, device="meta")
NESTED, JAGGED = (
    torch.nested.nested_tensor([X[0], X[0, 1:]], layout=layout) for layout in (torch.strided, torch.jagged)
)
ERRORS = [
    # the call, the error
    (random_masking, ([1.0],), {}, "TypeError: x must be a tensor, got list"),
    (random_masking, (IDS,), {}, "TypeError: x must be float32, bfloat16, float16 or float64, got torch.int64"),
    (random_masking, (M,), {}, "ValueError: x must be (N, L, D), got (4,)"),
    (random_masking, (X, 1.5), {}, "ValueError: mask_ratio must be in [0, 1], got 1.5"),
    (random_masking, (X, -0.1), {}, "ValueError: mask_ratio must be in [0, 1], got -0.1"),
    (random_masking, (X, torch.nan), {}, "ValueError: mask_ratio must be in [0, 1], got nan"),
    (random_masking, (X, "0.5"), {}, "TypeError: mask_ratio must be a number, got str"),
    (random_masking, (X, True), {}, "TypeError: mask_ratio must be a number, got bool"),
    (random_masking, (X,), {"num_keep": 7}, "ValueError: num_keep must be in [0, 6], got 7"),
    (random_masking, (X,), {"num_keep": -1}, "ValueError: num_keep must be in [0, 6], got -1"),
    (random_masking, (X,), {"num_keep": 2.0}, "TypeError: num_keep must be an int, got float"),
    (random_masking, (X,), {"num_prefix_tokens": 7}, "ValueError: num_prefix_tokens must be in [0, 6], got 7"),
    (random_masking, (X,), {"num_prefix_tokens": True}, "TypeError: num_prefix_tokens must be an int, got bool"),
    (random_masking, (X,), {"seed": 1.0}, "TypeError: seed must be an int or a tensor of one integer, got float"),
    (random_masking, (X,), {"seed": True}, "TypeError: seed must be an int or a tensor of one integer, got bool"),
    (random_masking, (X,), {"seed": 2**64}, "ValueError: seed must be in [-2**63, 2**64), got 18446744073709551616"),
    (random_masking, (X,), {"seed": M}, "ValueError: seed must be an int or a tensor of one integer, got torch.float"),
    (random_masking, (X,), {"seed": IDS}, "ValueError: seed must be an int or a tensor of one integer, got torch.int64 "
     "of shape (2, 3)"),
    (random_masking, (X,), {"seed": torch.zeros((), dtype=torch.int64, device="meta")},
     "ValueError: seed must be on the device of the data, cpu, got meta"),
    (random_masking, (X,), {"generator": 5}, "TypeError: generator must be a torch.Generator, got int"),
    (random_masking, (X,), {"generator": torch.Generator(), "seed": 1},
     "ValueError: seed and generator must not both be given"),
    (random_masking, (X,), {"sample_ids": [0, 1]}, "TypeError: sample_ids must be a tensor of integers, got list"),
    (random_masking, (X,), {"sample_ids": M[:2]}, "TypeError: sample_ids must be a tensor of integers, got torch."),
    (random_masking, (X,), {"sample_ids": IDS[0]}, "ValueError: sample_ids must be (2,), got (3,)"),
    (random_masking, (X,), {"sample_ids": META[:, 0].long()},
     "ValueError: sample_ids must be on the device of the data, cpu, got meta"),
    (random_masking, (X,), {"scores": M}, "ValueError: scores must be (2, 6), got (4,)"),
    (random_masking, (X,), {"scores": IDS}, "TypeError: scores must be float32, bfloat16, float16 or float64, got "),
    (random_masking, (X,), {"scores": META}, "ValueError: scores must be on the device of the data, cpu, got meta"),
    (random_masking, (X,), {"scores": X[..., 0], "seed": 1},
     "ValueError: seed must not be given with scores, which leaves nothing to draw"),
    (random_masking, (X,), {"ids_keep": IDS, "scores": X[..., 0]},
     "ValueError: scores must not be given with ids_keep, which leaves nothing to draw"),
    (random_masking, (X,), {"ids_keep": IDS, "num_keep": 3}, "ValueError: num_keep must not be given with ids_keep"),
    (random_masking, (X,), {"ids_keep": IDS[:1]}, "ValueError: ids_keep must be (2, *), got (1, 3)"),
    (random_masking, (X[:, :0],), {"ids_keep": IDS},
     "ValueError: ids_keep must be (2, 0) where there are no tokens, got (2, 3)"),
    (random_masking, (X,), {"backend": "cuda"}, "RuntimeError: backend 'cuda' is not available on cpu: it is for "
     "tensors on cuda"),
    (random_masking, (X,), {"backend": "fast"}, "RuntimeError: backend 'fast' is not available on cpu: there is none "),
    (random_masking, (X,), {"backend": ["cpp"]}, "TypeError: backend must be a string or None, got list"),
    (random_masking, (X,), {"ordered": 1}, "TypeError: ordered must be a bool, got int"),
    (random_masking, (X, 1.5), {"num_keep": 3}, "ValueError: mask_ratio must be in [0, 1], got 1.5"),
    (random_masking, (X, "0.5"), {"ids_keep": IDS}, "TypeError: mask_ratio must be a number, got str"),
    (random_masking, (X.to_sparse(),), {}, "TypeError: x must be a strided tensor, got torch.sparse_coo"),
    (random_masking, (X.to_mkldnn(),), {}, "TypeError: x must be a strided tensor, got torch._mkldnn"),
    (random_masking, (NESTED,), {}, "TypeError: x must be a strided tensor, got a nested tensor"),
    (random_masking, (JAGGED,), {}, "TypeError: x must be a strided tensor, got a nested tensor"),
    (random_masking, (X,), {"sample_ids": IDS[:, 0].to_sparse()},
     "TypeError: sample_ids must be a strided tensor, got torch.sparse_coo"),
    (random_masking, (X,), {"seed": IDS[0, :1].to_sparse()},
     "TypeError: seed must be a strided tensor, got torch.sparse_coo"),
    (patch_mask, (-1, 4), {}, "ValueError: batch_size must be at least 0, got -1"),
    (patch_mask, (2, 4.0), {}, "TypeError: num_patches must be an int, got float"),
    (patch_mask, (2**70, 4), {}, "ValueError: batch_size must be less than 2**63, got 1180591620717411303424"),
    (patch_mask, (2, 4), {"ordered": None}, "TypeError: ordered must be a bool, got NoneType"),
    (patch_mask, (2, 4), {"scores": X[..., 0]}, "ValueError: scores must be (2, 4), got (2, 6)"),
    (patch_mask, (2, 6), {"scores": X[..., 0], "device": "meta"},
     "ValueError: scores must be on the device of the data, meta, got cpu"),
    (gather_tokens, (M, IDS), {}, "ValueError: x must be (N, L, D), got (4,)"),
    (gather_tokens, (X, IDS.float()), {}, "TypeError: ids must be a tensor of integers, got torch.float32"),
    (gather_tokens, (X, IDS[0]), {}, "ValueError: ids must be (2, *), got (3,)"),
    (gather_tokens, (X, META.long()), {}, "ValueError: ids must be on the device of the data, cpu, got meta"),
    (restore_tokens, (M, PLACES, M), {}, "ValueError: x_kept must be (N, L, D), got (4,)"),
    (restore_tokens, (KEPT, PLACES[:1], M), {}, "ValueError: ids_restore must be (2, *), got (1, 6)"),
    (restore_tokens, (KEPT, IDS[:, :2], M), {},
     "ValueError: ids_restore must have at least as many columns as there are kept tokens, 3, got 2"),
    (restore_tokens, (KEPT, PLACES, M[:3]), {}, "ValueError: mask_token must be (4,) or (1, 1, 4), got (3,)"),
    (restore_tokens, (KEPT, PLACES, M[None]), {}, "ValueError: mask_token must be (4,) or (1, 1, 4), got (1, 4)"),
    (restore_tokens, (KEPT, PLACES, 0.0), {}, "TypeError: mask_token must be a tensor, got float"),
    (restore_tokens, (KEPT, PLACES, M, X[0, :5]), {},
     "ValueError: pos_embed must be (L, 4) or (1, L, 4) with L = 6, got (5, 4)"),
    (restore_tokens, (KEPT, PLACES, M, X), {"num_prefix_tokens": 1},
     "ValueError: pos_embed must be (L, 4) or (1, L, 4) with L = 7 or 6, got (2, 6, 4)"),
    (masked_patch_embed, (X, WEIGHT, None, IDS), {},
     "ValueError: images must be (N, C, H, W) or (N, C, T, H, W), got (2, 6, 4)"),
    (masked_patch_embed, (IMAGES, WEIGHT[:, :2], None, IDS), {},
     "ValueError: weight must be (*, 3, *, *), got (5, 2, 2, 3)"),
    (masked_patch_embed, (IMAGES[..., :5], WEIGHT, None, IDS), {},
     "ValueError: images must be of sizes that are multiples of the patch size (2, 3), got (2, 3, 4, 5)"),
    (masked_patch_embed, (IMAGES, WEIGHT[..., :0], None, IDS), {},
     "ValueError: images must be of sizes that are multiples of the patch size (2, 0), got (2, 3, 4, 6)"),
    (masked_patch_embed, (IMAGES, WEIGHT.double(), None, IDS), {},
     "TypeError: weight must have the dtype of images, torch.float32, got torch.float64"),
    (masked_patch_embed, (IMAGES, WEIGHT, M, IDS), {}, "ValueError: bias must be (5,), got (4,)"),
    (masked_patch_embed, (IMAGES, WEIGHT, torch.zeros(5).double(), IDS), {},
     "TypeError: bias must have the dtype of images, torch.float32, got torch.float64"),
    (masked_patch_embed, (IMAGES, WEIGHT, None, IDS, M), {},
     "ValueError: pos_embed must be (L, 5) or (1, L, 5) with L = 4, got (4,)"),
]  # fmt: skip


@pytest.mark.parametrize("function, args, options, error", ERRORS, ids=[f"{f.__name__}-{e}" for f, _, _, e in ERRORS])
def test_errors_name_what_is_wrong(function, args, options, error):
    kind, message = error.split(": ", 1)
    with pytest.raises((TypeError, ValueError, RuntimeError)) as raised:
        function(*args, **options)
    assert type(raised.value).__name__ == kind
    assert str(raised.value).startswith(f"{function.__name__}: {message}")


def bad(ids, row, place, value):
    ids = ids.clone()
    ids[row, place] = value
    return ids


DISTINCT = torch.tensor([[0, 1, 2], [5, 4, 3]])
BAD_IDS = [
    (lambda b: gather_tokens(X, bad(IDS, 1, 2, 6), backend=b), "gather_tokens: ids must be in [0, 6), got 6 in row 1"),
    (lambda b: gather_tokens(X, bad(IDS, 0, 1, -9), backend=b),
     "gather_tokens: ids must be in [0, 6), got -9 in row 0"),
    (lambda b: random_masking(X, ids_keep=bad(DISTINCT, 1, 0, 2**40), backend=b),
     "random_masking: ids_keep must be in [0, 6), got 1099511627776 in row 1"),
    (lambda b: random_masking(X, ids_keep=bad(DISTINCT, 1, 0, 3), backend=b),
     "random_masking: ids_keep must not repeat an id, row 1 does"),
    (lambda b: restore_tokens(KEPT, bad(PLACES, 1, 4, -2), M, backend=b),
     "restore_tokens: ids_restore must be 0 or more, got -2 in row 1"),
    (lambda b: restore_tokens(KEPT, bad(PLACES, 0, 4, 2), M, backend=b),
     "restore_tokens: ids_restore must not repeat a place below 3, row 0 does"),
    (lambda b: masked_patch_embed(IMAGES, WEIGHT, None, bad(IDS, 1, 0, 4), backend=b),
     "masked_patch_embed: ids_keep must be in [0, 4), got 4 in row 1"),
]  # fmt: skip


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("call, error", BAD_IDS, ids=[error for _, error in BAD_IDS])
def test_bad_ids_are_named(call, error, backend):
    with pytest.raises(RuntimeError) as raised:
        call(backend)
    assert error in str(raised.value)


def test_operators_that_are_called_directly_check_too():
    require_or_skip(_library.extension, _library.extension_error)
    seed, places = torch.tensor(0), PLACES.contiguous()
    for call, error in (
        (lambda: OPS.patch_mask_fwd(seed, None, None, 2, 6, 7, False), "num_keep must be in"),
        (lambda: OPS.patch_mask_fwd(seed.int(), None, None, 2, 6, 3, False), "seed must be"),
        (lambda: OPS.patch_mask_fwd(seed, IDS, None, 2, 6, 3, False), "sample_ids must be"),
        (lambda: OPS.patch_mask_fwd(seed, None, X[..., 0].double(), 2, 6, 3, False), "scores must be"),
        (lambda: OPS.random_masking_fwd(X, seed, None, None, 3, 7, False), "num_prefix must be in"),
        (lambda: OPS.random_masking_fwd(X[0], seed, None, None, 3, 0, False), "x must be"),
        (lambda: OPS.gather_tokens_fwd(X, IDS[:1], 0), "ids must be"),
        (lambda: OPS.gather_tokens_bwd(X, IDS, 6, 0), "a row for each id"),
        (lambda: OPS.gather_tokens_bwd(X[:, :3], bad(IDS, 0, 0, 6), 6, 0), "ids must be in"),
        (lambda: OPS.restore_tokens_fwd(KEPT, places, M[:3], None, 0), "mask_token must have"),
        (lambda: OPS.restore_tokens_fwd(KEPT, places, M.double(), None, 0), "mask_token must have"),
        (lambda: OPS.restore_tokens_fwd(KEPT, places, M, X[0, :5], 0), "pos_embed must have"),
        (lambda: OPS.restore_tokens_bwd(KEPT, places, 3, 0, 0, True, True), "a row for each token"),
        (lambda: OPS.gather_patches_fwd(IMAGES, IDS, [2]), "images must be"),
        (lambda: OPS.gather_patches_fwd(IMAGES, IDS, [2, 4]), "multiples of the patch size"),
        (lambda: OPS.gather_patches_bwd(X[:, :3], IDS, [2, 3, 4, 6], [2, 3]), "of one patch"),
    ):
        with pytest.raises(RuntimeError, match=error):
            call()

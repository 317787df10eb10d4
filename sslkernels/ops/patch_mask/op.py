"""The torch operators of patch masking: schemas, shapes, autograd, and the Triton kernels under CUDA.

All of them but the selection are linear, and the backward of each is the adjoint: differentiated again, it is the
forward, so that gradients of any order are right.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from sslkernels import _library, _operators
from sslkernels.ops.patch_mask import reference

# x (N, P + L, D): P = num_prefix tokens that always stay, then the L that ids, scores and masks count.
# seed: 0-dim int64, read on its device. sample_ids (N,) int64, or None for 0 ... N - 1. scores (N, L) fp32 replace the
# random keys. ids, ids_keep (N, K) and ids_restore (N, L) int64; mask (N, L) bool, True where a token is removed.
# ids_restore[n, t] is the place of a kept token in ids_keep; removed tokens have K, K + 1, ... in order of index.
# ordered: ids_keep ascend; otherwise they are in the order of their keys.
# ids out of range are an error on the CPU; on a GPU, which is not waited for, they give rows of NaN.
SCHEMAS = {
    "patch_mask_fwd": (
        "(Tensor seed, Tensor? sample_ids, Tensor? scores, SymInt samples, SymInt tokens, SymInt num_keep,"
        " bool ordered) -> (Tensor ids_keep, Tensor ids_restore, Tensor mask)"
    ),
    "invert_ids": "(Tensor ids_keep, SymInt tokens) -> (Tensor ids_restore, Tensor mask)",
    "random_masking_fwd": (
        "(Tensor x, Tensor seed, Tensor? sample_ids, Tensor? scores, SymInt num_keep, SymInt num_prefix, bool ordered)"
        " -> (Tensor x_kept, Tensor ids_keep, Tensor ids_restore, Tensor mask)"
    ),
    "gather_tokens_fwd": "(Tensor x, Tensor ids, SymInt num_prefix) -> Tensor",
    "gather_tokens_bwd": "(Tensor grad, Tensor ids, SymInt tokens, SymInt num_prefix) -> Tensor",
    # x (N, P + K, D). Tokens whose place is K or more are mask_token (D,), or zeros; plus pos_embed (P + L, D), or
    # (L, D), which leaves the prefix alone. All in one dtype.
    "restore_tokens_fwd": (
        "(Tensor x, Tensor ids_restore, Tensor? mask_token, Tensor? pos_embed, SymInt num_prefix) -> Tensor"
    ),
    # pos_tokens: the rows of pos_embed, or 0. What is not needed is (0,). A place below K occurs once in a row.
    "restore_tokens_bwd": (
        "(Tensor grad, Tensor ids_restore, SymInt num_keep, SymInt num_prefix, SymInt pos_tokens, bool need_x,"
        " bool need_mask_token) -> (Tensor grad_x, Tensor grad_mask_token, Tensor grad_pos)"
    ),
    # images (N, C, H, W) or (N, C, T, H, W) of any strides; (N, K, C * prod(patch_size)), in the order of a
    # convolution's weight
    "gather_patches_fwd": "(Tensor images, Tensor ids, SymInt[] patch_size) -> Tensor",
    "gather_patches_bwd": "(Tensor grad, Tensor ids, SymInt[] image_shape, SymInt[] patch_size) -> Tensor",
}
TRITON = {name: f"{name}_triton" for name in SCHEMAS}  # for backend="triton" where the compiled kernels own CUDA

for _name, _schema in SCHEMAS.items():
    for _operator in (_name, TRITON[_name]):
        torch.library.define(f"sslkernels::{_operator}", _schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"sslkernels::{_name}", "default", getattr(reference, _name))

torch.library.define(
    "sslkernels::draw_seed",
    "(Device device) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded),
)
torch.library.impl("sslkernels::draw_seed", "default", reference.draw_seed)


@torch.library.register_fake("sslkernels::draw_seed")
def _(device):
    return torch.empty((), dtype=torch.int64, device=device)


# ---- shapes


def _patch_mask_fwd_fake(seed, sample_ids, scores, samples, tokens, num_keep, ordered):
    return seed.new_empty(samples, num_keep), *_places_fake(seed, samples, tokens)


def _places_fake(like, samples, tokens):
    return (
        like.new_empty(samples, tokens, dtype=torch.int64),
        like.new_empty(samples, tokens, dtype=torch.bool),
    )


def _invert_ids_fake(ids_keep, tokens):
    return _places_fake(ids_keep, ids_keep.shape[0], tokens)


def _random_masking_fwd_fake(x, seed, sample_ids, scores, num_keep, num_prefix, ordered):
    samples, tokens, columns = x.shape
    kept = x.new_empty(samples, num_prefix + num_keep, columns)
    ids_keep = x.new_empty(samples, num_keep, dtype=torch.int64)
    return kept, ids_keep, *_places_fake(x, samples, tokens - num_prefix)


def _gather_tokens_fwd_fake(x, ids, num_prefix):
    return x.new_empty(x.shape[0], num_prefix + ids.shape[1], x.shape[2])


def _gather_tokens_bwd_fake(grad, ids, tokens, num_prefix):
    return grad.new_empty(grad.shape[0], num_prefix + tokens, grad.shape[2])


def _restore_tokens_fwd_fake(x, ids_restore, mask_token, pos_embed, num_prefix):
    return x.new_empty(x.shape[0], num_prefix + ids_restore.shape[1], x.shape[2])


def _restore_tokens_bwd_fake(grad, ids_restore, num_keep, num_prefix, pos_tokens, need_x, need_mask_token):
    samples, _, columns = grad.shape
    return (
        grad.new_empty((samples, num_prefix + num_keep, columns) if need_x else 0),
        grad.new_empty(columns if need_mask_token else 0),
        grad.new_empty((pos_tokens, columns) if pos_tokens else 0),
    )


def _gather_patches_fwd_fake(images, ids, patch_size):
    return images.new_empty(*ids.shape, images.shape[1] * torch.Size(patch_size).numel())


def _gather_patches_bwd_fake(grad, ids, image_shape, patch_size):
    return grad.new_empty(image_shape)


# ---- gradients: ctx keeps what the adjoint needs


def _save_masking(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # the ids and the mask have none
    ctx.num_prefix = inputs[5]
    ctx.save_for_backward(output[2])


def _masking_backward(family, ctx, grad, *_):
    (ids_restore,) = ctx.saved_tensors
    grad_x = None if grad is None else family.restore_tokens_fwd(grad, ids_restore, None, None, ctx.num_prefix)
    return grad_x, *[None] * 6


def _save_gather(ctx, inputs, output):
    x, ids, ctx.num_prefix = inputs
    ctx.tokens = x.shape[1] - ctx.num_prefix
    ctx.save_for_backward(ids)


def _gather_backward(family, ctx, grad):
    (ids,) = ctx.saved_tensors
    return family.gather_tokens_bwd(grad, ids, ctx.tokens, ctx.num_prefix), None, None


def _save_gather_bwd(ctx, inputs, output):
    _, ids, _, ctx.num_prefix = inputs
    ctx.save_for_backward(ids)


def _gather_bwd_backward(family, ctx, grad):
    (ids,) = ctx.saved_tensors
    return family.gather_tokens_fwd(grad, ids, ctx.num_prefix), None, None, None


def _save_restore(ctx, inputs, output):
    x, ids_restore, _, pos_embed, ctx.num_prefix = inputs
    ctx.num_keep = x.shape[1] - ctx.num_prefix
    ctx.pos_tokens = 0 if pos_embed is None else pos_embed.shape[0]
    ctx.save_for_backward(ids_restore)


def _restore_backward(family, ctx, grad):
    (ids_restore,) = ctx.saved_tensors
    need_x, _, need_mask_token, need_pos, _ = ctx.needs_input_grad
    pos_tokens = ctx.pos_tokens if need_pos else 0
    grad_x, grad_mask_token, grad_pos = family.restore_tokens_bwd(
        grad, ids_restore, ctx.num_keep, ctx.num_prefix, pos_tokens, need_x, need_mask_token
    )
    return (
        grad_x if need_x else None,
        None,
        grad_mask_token if need_mask_token else None,
        grad_pos.reshape(pos_tokens, grad.shape[2]) if need_pos else None,
        None,
    )


def _save_restore_bwd(ctx, inputs, output):
    grad, ids_restore, num_keep, ctx.num_prefix, ctx.pos_tokens, ctx.need_x, ctx.need_mask_token = inputs
    ctx.shape = grad.shape[0], ctx.num_prefix + num_keep, grad.shape[2]
    ctx.save_for_backward(ids_restore)


def _restore_bwd_backward(family, ctx, grad_x, grad_mask_token, grad_pos):
    (ids_restore,) = ctx.saved_tensors
    x = grad_x if ctx.need_x else grad_mask_token.new_zeros(ctx.shape)
    mask_token = grad_mask_token if ctx.need_mask_token else None
    pos_embed = grad_pos if ctx.pos_tokens else None
    return family.restore_tokens_fwd(x, ids_restore, mask_token, pos_embed, ctx.num_prefix), *[None] * 6


def _save_patches(ctx, inputs, output):
    images, ids, ctx.patch_size = inputs
    ctx.image_shape = images.shape
    ctx.save_for_backward(ids)


def _patches_backward(family, ctx, grad):
    (ids,) = ctx.saved_tensors
    return family.gather_patches_bwd(grad, ids, ctx.image_shape, ctx.patch_size), None, None


def _save_patches_bwd(ctx, inputs, output):
    _, ids, _, ctx.patch_size = inputs
    ctx.save_for_backward(ids)


def _patches_bwd_backward(family, ctx, grad):
    (ids,) = ctx.saved_tensors
    return family.gather_patches_fwd(grad, ids, ctx.patch_size), None, None, None


GRADIENTS: dict[str, tuple[Callable, Callable]] = {
    "random_masking_fwd": (_save_masking, _masking_backward),
    "gather_tokens_fwd": (_save_gather, _gather_backward),
    "gather_tokens_bwd": (_save_gather_bwd, _gather_bwd_backward),
    "restore_tokens_fwd": (_save_restore, _restore_backward),
    "restore_tokens_bwd": (_save_restore_bwd, _restore_bwd_backward),
    "gather_patches_fwd": (_save_patches, _patches_backward),
    "gather_patches_bwd": (_save_patches_bwd, _patches_bwd_backward),
}


class _Family:
    """The operators of one kind of kernels, as attributes with the plain names."""

    def __init__(self, names: dict[str, str]):
        for name, operator in names.items():
            op = name.replace("gather_patches", "masked_patch_embed").removesuffix("_fwd").removesuffix("_bwd")
            setattr(self, name, _operators.operator(operator, op))
            torch.library.register_fake(f"sslkernels::{operator}", globals()[f"_{name}_fake"])
            if name in GRADIENTS:
                save, backward = GRADIENTS[name]
                _operators.register_autograd(operator, functools.partial(backward, self), save=save)


_plain, _triton = _Family({name: name for name in SCHEMAS}), _Family(TRITON)


def family(backend: str | None):
    """What has the operators of ``backend`` as attributes."""
    if backend == "reference":
        return reference
    return _triton if backend == "triton" else _plain


def _serve_cuda(name: str, operator: str) -> None:
    @torch.library.impl(f"sslkernels::{operator}", "cuda")
    def _(*args):
        from sslkernels.ops.patch_mask import kernels  # triton takes a while to import: only where it is used

        return getattr(kernels, name)(*args)


for _name in SCHEMAS:
    if _library.claim_cuda(_name) == "triton":
        _serve_cuda(_name, _name)
    if not _library.triton_error():
        _serve_cuda(_name, TRITON[_name])

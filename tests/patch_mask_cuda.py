"""The operators of csrc/cuda/patch_mask.cu on CPU tensors: the same kernels in the same order, by `cuda_on_cpu`."""

from __future__ import annotations

import contextlib
import math

import cuda_on_cpu
import torch

POISON = -(2**40)


class Operators:
    """Implementations of the operators under one schedule, with the arguments of their schemas."""

    def __init__(self, schedule: int = 0):
        self.module = cuda_on_cpu.kernels(schedule)

    def patch_mask_fwd(self, seed, sample_ids, scores, samples, tokens, num_keep, ordered):
        results = ids(samples, num_keep), ids(samples, tokens), flags(samples, tokens)
        self.module.patch_mask_fwd(seed, sample_ids, scores, samples, tokens, num_keep, ordered, *results)
        return results

    def invert_ids(self, ids_keep, tokens):
        samples, num_keep = ids_keep.shape
        results = ids(samples, tokens), flags(samples, tokens)
        self.module.invert_ids(ids_keep.contiguous(), samples, num_keep, tokens, *results)
        return results

    def random_masking_fwd(self, x, seed, sample_ids, scores, num_keep, num_prefix, ordered):
        samples, tokens = x.shape[0], x.shape[1] - num_prefix
        selected = self.patch_mask_fwd(seed, sample_ids, scores, samples, tokens, num_keep, ordered)
        return self.gather_tokens_fwd(x, selected[0], num_prefix), *selected

    def gather_tokens_fwd(self, x, ids, num_prefix):
        out = poisoned(x, len(x), num_prefix + ids.shape[1], x.shape[2])
        self.module.gather_tokens_fwd(dense(x), ids.contiguous(), num_prefix, out)
        return out

    def gather_tokens_bwd(self, grad, ids, tokens, num_prefix):
        out = poisoned(grad, len(grad), num_prefix + tokens, grad.shape[2])
        self.module.gather_tokens_bwd(dense(grad), ids.contiguous(), num_prefix, out)
        return out

    def restore_tokens_fwd(self, x, ids_restore, mask_token, pos_embed, num_prefix):
        out = poisoned(x, len(x), num_prefix + ids_restore.shape[1], x.shape[2])
        self.module.restore_tokens_fwd(dense(x), ids_restore, mask_token, pos_embed, num_prefix, out)
        return out

    def restore_tokens_bwd(self, grad, ids_restore, num_keep, num_prefix, pos_tokens, need_x, need_mask_token):
        samples, _, dim = grad.shape
        fill = poisoned if grad.numel() else torch.Tensor.new_zeros  # sums of nothing are the launcher's
        grad_x = poisoned(grad, samples, num_prefix + num_keep, dim) if need_x else None
        grad_mask_token = fill(grad, dim) if need_mask_token else None
        grad_pos = fill(grad, pos_tokens, dim) if pos_tokens else None
        grads = grad_x, grad_mask_token, grad_pos
        self.module.restore_tokens_bwd(dense(grad), ids_restore, num_keep, num_prefix, pos_tokens, *grads)
        return tuple(grad.new_empty(0) if result is None else result for result in grads)

    def gather_patches_fwd(self, images, ids, patch_size):
        out = poisoned(images, *ids.shape, images.shape[1] * math.prod(patch_size))
        self.module.gather_patches_fwd(images, ids, list(patch_size), out)
        return out

    def gather_patches_bwd(self, grad, ids, image_shape, patch_size):
        out = poisoned(grad, *image_shape)
        self.module.gather_patches_bwd(dense(grad), ids, list(patch_size), out)
        return out


def dense(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where its rows are not dense, as the launcher makes one."""
    return x.contiguous() if x.shape[-1] > 1 and x.stride(-1) != 1 else x


def poisoned(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return like.new_full(shape, torch.nan)


def ids(*shape: int) -> torch.Tensor:
    return torch.full(shape, POISON)


def flags(*shape: int) -> torch.Tensor:
    return torch.full(shape, 77, dtype=torch.uint8).view(torch.bool)


@contextlib.contextmanager
def registered(schedule: int = 0):
    """Within it the operators run on CPU tensors; yields the names of those that were called, in order."""
    from sslkernels.ops.patch_mask.op import SCHEMAS

    operators, called = Operators(schedule), []

    def counted(name):
        def run(*args):
            called.append(name)
            return getattr(operators, name)(*args)

        return run

    with torch.library._scoped_library("sslkernels", "IMPL") as library:
        for name in SCHEMAS:
            library.impl(name, counted(name), "CPU", allow_override=True)
        yield called

"""The operators of csrc/cuda/contrast.cu on CPU tensors: the same kernels in the same order, by `cuda_on_cpu`."""

from __future__ import annotations

import contextlib

import cuda_on_cpu
import torch

CHUNK_BYTES = 1 << 10  # the fewest rows a chunk may have, so that there are several


class Operators:
    """Implementations of the four operators, under one schedule."""

    def __init__(self, schedule: int = 0, chunk_bytes: int = CHUNK_BYTES):
        self.module = cuda_on_cpu.kernels(schedule)
        self.chunk_bytes = chunk_bytes

    def contrast_cuda_fwd(
        self, query, key, scale, skip, query_ids, key_ids, normalize_key, unit, bounded, columns, attract, peaks, matmul
    ):
        rows, width = len(query), len(query if key is None else key) if columns else 0
        results = (
            poisoned(rows, torch.float64),
            poisoned(width, torch.float64),
            poisoned(rows if peaks else 0),
            poisoned(width if peaks else 0),
            poisoned(rows if peaks else 0),
            torch.zeros(query.shape if attract else (0, 0)),
        )
        wanted = (True, columns, peaks, columns and peaks, peaks, attract)
        outputs = [result if asked else None for result, asked in zip(results, wanted, strict=True)]
        inputs = contiguous(query, key, scale, skip, query_ids, key_ids)
        self.module.contrast_fwd(*inputs, normalize_key, matmul, self.chunk_bytes, *outputs)
        return results

    def contrast_cuda_bwd(
        self, grad_rows, grad_columns, lse_rows, lse_columns, query, key, scale, skip, query_ids, key_ids,
        unit, bounded, matmul,
    ):  # fmt: skip
        grads = torch.zeros_like(query), torch.zeros((0, 0) if key is None else key.shape), torch.zeros(())
        inputs = contiguous(grad_rows, grad_columns, lse_rows, lse_columns, query, key, scale, skip, query_ids, key_ids)
        self.module.contrast_bwd(*inputs, matmul, self.chunk_bytes, *grads)
        return grads

    def sigmoid_contrast_cuda_fwd(self, query, key, scale, bias, positive, query_ids, key_ids, matmul):
        loss = poisoned(len(query), torch.float64)
        inputs = contiguous(query, key, scale, bias, positive, query_ids, key_ids)
        self.module.sigmoid_contrast_fwd(*inputs, matmul, self.chunk_bytes, loss)
        return loss

    def sigmoid_contrast_cuda_bwd(self, grad_rows, query, key, scale, bias, positive, query_ids, key_ids, matmul):
        grads = torch.zeros_like(query), torch.zeros_like(key), torch.zeros(()), torch.zeros(())
        inputs = contiguous(grad_rows, query, key, scale, bias, positive, query_ids, key_ids)
        self.module.sigmoid_contrast_bwd(*inputs, matmul, self.chunk_bytes, *grads)
        return grads


def poisoned(size: int, dtype=torch.float32) -> torch.Tensor:
    return torch.full((size,), torch.nan, dtype=dtype)


def contiguous(*tensors):
    return [None if tensor is None else tensor.detach().contiguous() for tensor in tensors]


@contextlib.contextmanager
def registered(schedule: int = 0, chunk_bytes: int = CHUNK_BYTES):
    """Within it the operators run on CPU tensors; yields the names of those that were called, in order."""
    from sslkernels.ops.infonce import contrast_op

    operators, called = Operators(schedule, chunk_bytes), []

    def counted(name):
        def run(*args):
            called.append(name)
            return getattr(operators, name)(*args)

        return run

    with torch.library._scoped_library("sslkernels", "IMPL") as library:
        for name in contrast_op.COMPILED.values():
            library.impl(name, counted(name), "CPU")
        yield called

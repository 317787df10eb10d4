"""Losses over the batch of several processes, by gloo: as exact as one process, and no hang where one is lost."""

import os
import subprocess
import sys

import distributed_children as children
import pytest
import torch
import torch.distributed as dist
from conftest import require_or_skip
from ema_children import PATIENCE, run


@pytest.mark.parametrize("size", children.ROWS)
def test_as_one_process_with_the_whole_batch(size):
    run(children.agree_with_one_process, size)


@pytest.mark.parametrize("moment", ["forward", "backward"])
@pytest.mark.parametrize("exchange", children.EXCHANGES)
def test_a_rank_that_dies_is_an_error_for_the_others(exchange, moment):
    run(children.left_by_one, 3, exchange, moment)


def extra_memory(exchange, size, rows, dim):
    """Of every rank, in processes of their own that give freed memory back at once."""
    store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
    path = os.pathsep.join([os.path.dirname(children.__file__), *filter(None, sys.path)])
    call = "import distributed_children as c; c.print_extra_memory({!r}, {}, {}, {}, {}, {})"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", call.format(exchange, rank, size, store.port, rows, dim)],
            env={**os.environ, **malloc, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        return [int(rank.communicate(timeout=PATIENCE)[0]) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def test_the_ring_takes_memory_for_the_own_batch_alone():
    compiled = torch._C._dispatch_has_kernel_for_dispatch_key("sslkernels::contrast_bwd", "CPU")
    require_or_skip(
        compiled, "the definition, which holds the logits, is all that runs here: the extension is not built"
    )
    require_or_skip(os.access("/proc/self/clear_refs", os.W_OK), "peak memory is read from Linux' /proc")
    size, rows, dim = 4, 4096, 64
    # in units of the own (N, D) rows, at the backward's peak: normalised queries and keys; of two other ranks the keys,
    # and what is known of their gradients; a chunk's gradients of queries and keys; the sum of those of queries; and
    # what the kernel packs of both sides: rows, transposed rows, gradients (with AMX 8). gather takes 27.
    units = 2 + 2 + 2 + 2 + 1 + 6
    accounted = units * rows * dim * 4
    measured = max(extra_memory("ring", size, rows, dim))
    assert measured <= 1.3 * accounted, f"{measured} bytes, not {accounted}"

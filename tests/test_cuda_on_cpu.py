"""The harness that runs CUDA kernels on the CPU: right kernels pass it, and every kind of bug that it claims to find,
it finds.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import cache
from itertools import pairwise, product
from pathlib import Path

import cuda_on_cpu
import pytest
import torch
from conftest import require_or_skip
from cuda_on_cpu import SCHEDULES, kernels

EXAMPLE = Path(cuda_on_cpu.__file__).with_name("example.cuh")
INCLUDES = [f"-I{cuda_on_cpu.ROOT / path}" for path in ("csrc", "tests/cuda_on_cpu")]
NAN = float("nan")
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", autouse=True)
def cxx():
    require_or_skip(shutil.which("g++"), "g++ is not installed")


def run(command: list, **options) -> tuple[int, str]:
    """Exit status and output, errors included."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    return result.returncode, result.stdout


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def row_logsumexp(schedule: int, bug: str = "NONE", rows: int = 5, columns: int = 300, threads: int = 128) -> None:
    """Runs the kernel; AssertionError where it is wrong."""
    x, module = normal(rows, columns), kernels(schedule)
    out, total, positives = torch.full((rows,), NAN), torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    module.row_logsumexp(x, out, total, positives, threads, getattr(module.Bug, bug))
    torch.testing.assert_close(out, x.logsumexp(1))
    torch.testing.assert_close(total[0], x.logsumexp(1).sum())
    assert positives.item() == (x > 0).sum()


def matrix_product(schedule: int, dtype: torch.dtype, bug: str = "NONE", m: int = 32, n: int = 24, depth: int = 80):
    a, b, module = normal(m, depth, dtype=dtype), normal(n, depth, dtype=dtype), kernels(schedule)
    c = torch.full((m, n), NAN)
    module.product(a, b, c, m, n, depth, getattr(module.Bug, bug))
    torch.testing.assert_close(c.double(), a.double() @ b.double().T, rtol=1e-5, atol=1e-5)


def lines(pattern: str) -> list[int]:
    """Where example.cuh says so: tests name a line by what stands there."""
    return [number for number, line in enumerate(EXAMPLE.read_text().splitlines(), 1) if re.search(pattern, line)]


# ---- right kernels


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rows, columns, threads", [(1, 1, 32), (7, 33, 64), (3, 1000, 1024), (40, 100, 96)])
def test_right_kernel_is_right_under_every_schedule(schedule, rows, columns, threads):
    row_logsumexp(schedule, rows=rows, columns=columns, threads=threads)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_right_product_is_right_under_every_schedule(schedule, dtype):
    matrix_product(schedule, dtype)
    matrix_product(schedule, dtype, m=16, n=8, depth=16)


def test_no_two_schedules_are_the_same_and_each_is_repeatable():
    def order(schedule: int) -> tuple[int, ...]:
        threads, visited = torch.full((3 * 64,), -1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        kernels(schedule).order(threads, visited)
        assert sorted(threads.tolist()) == list(range(3 * 64))
        return tuple(threads.tolist())

    orders = [order(schedule) for schedule in SCHEDULES]
    assert len(set(orders)) == len(SCHEDULES)
    assert orders == [order(schedule) for schedule in SCHEDULES]
    # the blocks, the warps of a block and the lanes of a warp: none of them comes in the same place under all schedules
    for unit in (64, 32, 1):
        assert all(len({threads[i] // unit for threads in orders}) > 1 for i in (0, 64, 128))
    # warps take turns under some schedules and run for as long as they can under the others
    changes = [sum(a // 32 != b // 32 for a, b in pairwise(threads)) for threads in orders]
    assert [count > 5 for count in changes] == [False] * 4 + [True] * 4


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_spinning_threads_let_the_holder_of_a_lock_go_on(schedule):
    lock, count, spins = torch.zeros(3, 1, dtype=torch.int32)
    kernels(schedule).lock(lock, count, spins)
    assert count == 2 * 64
    assert (spins > 0) == (schedule >= 6), "a thread that has the lock is interrupted under the last schedules only"


# ---- bugs that the module finds


def barriers(*texts: str) -> str:
    return r"example\.cuh:(" + "|".join(str(line) for text in texts for line in lines(text)) + r")\b"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bug", ["DIVERGENT_BARRIER", "TWO_BARRIERS"])
def test_divergent_barrier_is_an_error_with_both_places(schedule, bug):
    place = barriers(r"__syncthreads\(\)")
    with pytest.raises(
        RuntimeError, match=rf"^\S*{place}: threads of one block meet at different barriers: \S*{place}"
    ):
        row_logsumexp(schedule, bug)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_barrier_that_a_thread_never_reaches_is_a_deadlock(schedule):
    place = barriers(r"__syncthreads\(\)")
    with pytest.raises(RuntimeError, match=rf"deadlock: 127 threads wait at \S*{place}.*1 of 128 have left the kernel"):
        row_logsumexp(schedule, "LEAVES_EARLY")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bug", ["MISSING_BARRIER", "UNINITIALISED_SHARED", "BLOCK_BEFORE"])
def test_wrong_kernel_is_wrong_under_every_schedule(schedule, bug):
    with pytest.raises(AssertionError):
        row_logsumexp(schedule, bug)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_missing_wait_reads_poison(schedule, dtype):
    with pytest.raises(AssertionError, match="Greatest absolute difference: nan"):
        matrix_product(schedule, dtype, "MISSING_WAIT")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_misaligned_access_is_an_error_with_its_place(schedule):
    module, x, out = kernels(schedule), normal(100, 4), torch.full((99,), NAN)
    module.sum4(x, out, module.Bug.NONE)
    torch.testing.assert_close(out, x[:99].sum(1))
    with pytest.raises(RuntimeError, match=barriers("float4 v =") + ": misaligned access"):
        module.sum4(x, out, module.Bug.MISALIGNED)


def test_exception_of_a_kernel_reaches_the_host():
    with pytest.raises(RuntimeError, match="thread 33 has had enough"):
        row_logsumexp(0, "THROWS")
    row_logsumexp(0)


# ---- bugs that the sanitizers find


@cache
def program(sanitizer: str) -> Path:
    probe = ["g++", f"-fsanitize={sanitizer}", "-x", "c++", "-o", os.devnull, "-"]
    status, _ = run(probe, input="int main() {}")
    require_or_skip(status == 0, f"g++ has no {sanitizer} sanitizer")
    return cuda_on_cpu.build(sanitizer)


def sanitized(sanitizer: str, bug: str | None = None, schedule: int = 0) -> tuple[int, str]:
    """Exit status and output of tests/cuda_on_cpu/example_test.cpp."""
    arguments = [] if bug is None else [str(int(getattr(kernels().Bug, bug))), str(schedule)]
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "UBSAN_OPTIONS": "halt_on_error=1"}
    return run([*fixed, program(sanitizer), *arguments], env=environment)


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers_pass_right_kernels(sanitizer):
    assert sanitized(sanitizer) == (0, "0 failed\n")


@pytest.mark.parametrize("schedule", [0, 3, 6])
@pytest.mark.parametrize(
    "bug, places",
    [
        # without that barrier a warp may also be ahead with its sum where another still reads its maximum
        ("MISSING_BARRIER", r"row_max = largest|largest = row_max|of_warp\[lane\] : -INF|of_warp\[warp\] = sum"),
        ("SHUFFLE_FOR_BARRIER", r"of_warp\[warp\] = sum|of_warp\[warp\] \+= 0"),
        ("RACE_BETWEEN_BLOCKS", r"\*total \+= result"),
        ("COPIES_TOO_EARLY", r"cp_async16\(|_words\["),
    ],
)
def test_thread_sanitizer_names_both_lines_of_a_race(schedule, bug, places):
    status, output = sanitized("thread", bug, schedule)
    assert status != 0 and "ThreadSanitizer: data race" in output, output
    accesses = re.findall(r"(?:[Rr]ead|[Ww]rite) of size.*?(?=\n\n)", output, re.DOTALL)
    assert len(accesses) == 2, output
    for access in accesses:
        assert {int(line) for line in re.findall(r"example\.cuh:(\d+)", access)} & {*lines(places)}, output


@pytest.mark.parametrize(
    "bug, report, place",
    [
        ("READS_OUT_OF_BOUNDS", "AddressSanitizer: heap-buffer-overflow", r"fmaxf\(largest, row\[i\]\)"),
        ("WRITES_OUT_OF_BOUNDS", "AddressSanitizer: heap-buffer-overflow", r"warp \+ 1 : warp"),
        ("MISALIGNED", "runtime error: .*misaligned address", "float4 v ="),
    ],
)
def test_address_sanitizer_names_the_line(bug, report, place):
    status, output = sanitized("address", bug)
    assert status != 0 and re.search(report, output), output
    assert re.search(barriers(place), output), output


# ---- the intrinsics


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_shuffles(schedule):
    module = kernels(schedule)
    out = torch.full((module.SHUFFLES, 32), -1, dtype=torch.int32)
    module.shuffle(out)
    lanes = range(32)
    expected = [
        [5 for _ in lanes],
        [i // 8 * 8 + (i + 3) % 8 for i in lanes],
        [i - 3 if i >= 3 else i for i in lanes],
        [i - 2 if i % 8 >= 2 else i for i in lanes],
        [i + 3 if i + 3 < 32 else i for i in lanes],
        [i + 2 if i % 8 + 2 < 8 else i for i in lanes],
        [i ^ 21 for i in lanes],
        [i ^ 12 if (i ^ 12) < i // 8 * 8 + 8 else i for i in lanes],
        [i ^ 1 if i < 16 else i ^ 2 for i in lanes],
    ]
    assert out.tolist() == expected


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_thread_of_every_block_runs_once(schedule):
    out = torch.zeros(2 * 3 * 4 * 5 * 3 * 2, dtype=torch.int32)
    kernels(schedule).index(out, (2, 3, 4), (5, 3, 2))
    assert (out == 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_conversions_round_as_torch_does(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    step = torch.tensor([0.0, 0.25, 0.5, 0.75])  # between a number and the next: exact, and half way
    neighbours = torch.arange(-(2**15) + 1, 2**15 + 1, dtype=torch.int32).to(torch.int16).view(dtype)
    low, high = every.float()[:, None], neighbours.float()[:, None]
    x = torch.where(torch.isfinite(low) & torch.isfinite(high), low + (high - low) * step, low).flatten()
    x = torch.cat([x, torch.tensor([65519.9, 65520.0, 1e38, -1e38, 1e-40, -1e-40, NAN, float("inf")])])
    narrow, back = torch.empty(len(x), dtype=dtype), torch.empty(len(x))
    kernels().convert(x, narrow, back)
    right = x.to(dtype)
    assert torch.equal(narrow.isnan(), right.isnan())
    known = ~right.isnan()
    assert torch.equal(narrow[known].view(torch.int16), right[known].view(torch.int16))
    assert torch.equal(back[known], right[known].float())
    assert (narrow[~known].view(torch.int16) == 0x7FFF).all()


def triton_layout():
    """Functions (register, lane) -> (row, column) for the fragments of a, b and c, from Triton's layout algebra."""
    ir = pytest.importorskip("triton._C.libtriton", reason="triton is not installed").ir
    from triton._C.libtriton import gluon_ir
    from triton.experimental.gluon.language._layouts import DotOperandLayout, NVMMADistributedLayout

    context = ir.context()
    ir.load_dialects(context)
    builder = gluon_ir.GluonOpBuilder(context)
    result = NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])
    layouts = (DotOperandLayout(0, result, 2), [16, 16]), (DotOperandLayout(1, result, 2), [16, 8]), (result, [16, 8])

    def position(layout, register: int, lane: int) -> tuple[int, int]:
        row = column = 0
        for bases, number in ((layout.reg_bases, register), (layout.lane_bases, lane)):
            for bit, (row_base, column_base) in enumerate(bases):
                if number >> bit & 1:
                    row, column = row ^ row_base, column ^ column_base
        return row, column

    linear = [builder.to_linear_layout(layout._to_ir(builder), shape) for layout, shape in layouts]
    return [lambda register, lane, layout=layout: position(layout, register, lane) for layout in linear]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fragments_lie_as_triton_lays_them_out(schedule, dtype):
    a, b = normal(16, 16, dtype=dtype), normal(16, 8, dtype=dtype)
    a_at, b_at, c_at = triton_layout()
    a_registers = torch.stack([torch.stack([a[a_at(r, lane)] for r in range(8)]) for lane in range(32)])
    b_registers = torch.stack([torch.stack([b[b_at(r, lane)] for r in range(4)]) for lane in range(32)])
    c_registers = torch.full((32, 4), NAN)
    kernels(schedule).mma_registers(a_registers, b_registers, c_registers)
    c = torch.full((16, 8), NAN, dtype=torch.float64)
    for lane, r in product(range(32), range(4)):
        c[c_at(r, lane)] = c_registers[lane, r].item()
    torch.testing.assert_close(c, a.double() @ b.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", [0, 5])
@pytest.mark.parametrize(
    "kind, why, threads",
    [
        (0, "the mask lacks the lane that calls", 32),
        (1, "lanes of one warp meet with masks that overlap but differ", 32),
        (2, "the width is no power of two", 32),
        (2, "the width is no power of two", 20),
        (3, r"lanes of one mask meet in different places: \S*primitives\.cuh:\d+ and here", 32),
        (3, "the mask has lanes that the block has not", 20),
        (4, "cp.async of 16 bytes is misaligned", 32),
        (5, "cp.async writes outside shared memory", 32),
        (6, "misaligned atomic", 32),
        (7, "threads spin for ever", 32),
    ],
)
def test_misuse_of_an_intrinsic_is_an_error_with_its_place(schedule, kind, why, threads):
    memory = torch.zeros(16, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=rf"primitives\.cuh:\d+: {why}.* \(thread \(\d+, 0, 0\) of block"):
        kernels(schedule).misuse(memory, kind, threads)


# ---- the host's side


def test_large_shared_memory_must_be_asked_for():
    out = torch.zeros(32)
    with pytest.raises(RuntimeError, match="80000 bytes of dynamic shared memory; above 48 KiB"):
        kernels().large(out, 20000, False)
    kernels().large(out, 20000, True)
    assert (out == 7).all()
    with pytest.raises(RuntimeError, match="no GPU has that much shared memory: 240000 bytes"):
        kernels().large(out, 60000, True)


@pytest.mark.parametrize(
    "grid, block, why",
    [
        ((0, 1, 1), (32, 1, 1), "the grid or the block is empty"),
        ((1, 70000, 1), (32, 1, 1), "the grid is too large"),
        ((1, 1, 1), (32, 33, 1), "the block is too large"),
    ],
)
def test_launch_that_a_gpu_refuses_is_an_error(grid, block, why):
    with pytest.raises(RuntimeError, match=f"a GPU refuses this launch: {why}"):
        kernels().index(torch.zeros(1, dtype=torch.int32), grid, block)


@pytest.mark.parametrize(
    "tensor", [torch.zeros(8, dtype=torch.float64), torch.zeros(8, 2)[:, 0], torch.zeros(8, device="meta"), [0.0] * 8]
)
def test_tensor_that_a_kernel_cannot_take_is_refused(tensor):
    with pytest.raises(TypeError, match="incompatible function arguments"):
        kernels().sum4(tensor, torch.zeros(2), kernels().Bug.NONE)


# ---- the source


def test_nvcc_compiles_the_same_source(tmp_path):
    nvcc = shutil.which("nvcc")
    require_or_skip(nvcc, "nvcc is not installed")
    source = tmp_path / "example.cu"
    source.write_text(
        '#include "example.cuh"\n#include "primitives.cuh"\nusing namespace sslkernels;\n'
        + "".join(
            f"template void example::product<{T}>(const {T}*, const {T}*, float*, int, int, int, cudaStream_t, "
            f"example::Bug);\n"
            f"template __global__ void primitives::mma_registers_kernel<{T}>(const {T}*, const {T}*, float*);\n"
            for T in ("__nv_bfloat16", "__half")
        )
    )
    archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90, 100)]
    flags = ["-std=c++17", "-O3", "-Werror=all-warnings", "-Xcompiler=-Wall", "--expt-relaxed-constexpr"]
    command = [nvcc, *archs, *flags, *INCLUDES, "-c", str(source), "-o", str(tmp_path / "example.o")]
    status, output = run(command)
    assert status == 0, output
    tools = pytest.importorskip("triton", reason="triton, whose cuobjdump reads the object, is not installed")
    cuobjdump = Path(tools.__file__).parent / "backends/nvidia/bin/cuobjdump"
    _, sass = run([cuobjdump, "-sass", command[-1]])
    assert {"LDGSTS", "HMMA.16816.F32.BF16", "HMMA.16816.F32"} <= set(re.findall(r"LDGSTS|HMMA\.16816[.\w]+", sass))


def test_shared_memory_that_could_not_be_poisoned_does_not_compile(tmp_path):
    source = tmp_path / "plain.cpp"
    source.write_text('#include "cuda/platform.h"\n__global__ void kernel() { __shared__ float x[32]; x[0] = 1; }\n')
    status, output = run(["g++", "-std=c++17", "-fsyntax-only", *INCLUDES, source])
    assert status != 0 and "declare shared memory by SSLK_SHARED or SSLK_DYNAMIC_SHARED" in output


def test_stacks_can_be_switched_by_ucontext(tmp_path):
    """What processors get for which there is no switch in assembly."""
    source = Path(cuda_on_cpu.__file__).with_name("example_test.cpp")
    binary = tmp_path / "ucontext"
    flags = ["-std=c++17", "-fno-strict-aliasing", "-DCUDA_ON_CPU_UCONTEXT"]
    assert run(["g++", *flags, *INCLUDES, source, "-o", binary]) == (0, "")
    assert run([binary]) == (0, "0 failed\n")

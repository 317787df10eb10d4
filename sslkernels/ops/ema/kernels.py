"""The moving average in Triton, where the extension is built without CUDA: a launch for each kind of tensor."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sslkernels.ops.ema import reference
from sslkernels.philox import EMA_STREAM

BLOCK = 4096  # elements of one tensor that a program updates
NUM_WARPS = 8
STREAM = tl.constexpr(EMA_STREAM)
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
TABLES_KEPT = 16


@triton.jit
def _words(seed, counter, index, step):
    zero = counter * 0
    return tl.philox(seed, counter, zero + index, zero + step, zero + STREAM)


@triton.jit
def _bits_of_neighbours(first, index, seed, step, BLOCK: tl.constexpr):
    """16 random bits for each of BLOCK elements from `first` on, a multiple of 8: eight share a counter."""
    counter = (first // 8 + tl.arange(0, BLOCK // 8)).to(tl.uint32)
    a, b, c, d = _words(seed, counter, index, step)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK // 2,))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (BLOCK,))


@triton.jit
def _bits_of(element, index, seed, step):
    """16 random bits for each element, wherever it is."""
    a, b, c, d = _words(seed, (element // 8).to(tl.uint32), index, step)
    which = element % 8
    words = tl.where(which < 4, tl.where(which < 2, a, b), tl.where(which < 6, c, d))
    return tl.where(which % 2 == 0, words & 0xFFFF, words >> 16)


@triton.jit
def _round_stochastically(value, random, TEACHER: tl.constexpr):
    """The neighbour of fp32 `value` above or below, whose mean is the value."""
    bits = value.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if tl.bfloat16 == TEACHER:
        rounded = (bits + random) >> 16
    else:
        # below the normal numbers the distance of neighbours is 2^-24 throughout
        small = magnitude < 0x38800000
        units = tl.where(small, tl.abs(value) * 1099511627776.0, 0.0).to(tl.int32).to(tl.uint32)
        normal = tl.minimum((magnitude - 0x38000000 + (random >> 3)) >> 13, 0x7C00)
        rounded = tl.where(small, (units + random) >> 16, normal) | ((bits >> 16) & 0x8000)
    rounded = rounded.to(tl.uint16).to(TEACHER, bitcast=True)
    return tl.where(magnitude >= 0x7F800000, value.to(TEACHER), rounded)


@triton.jit
def _load(ptr, position, mask):
    if mask is None:  # noqa: SIM108  Triton compiles one branch
        x = tl.load(ptr + position)
    else:
        x = tl.load(ptr + position, mask=mask, other=0.0)
    return x.to(tl.float32)


@triton.jit
def _update(
    teacher_ptr, student_ptr, copy_ptr, position, mask, weight, random,
    HAS_COPY: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    TEACHER: tl.constexpr = teacher_ptr.dtype.element_ty
    value = _load(teacher_ptr, position, mask)
    if weight != 0:
        student = _load(student_ptr, position, mask)
        from_end = weight >= 0.5
        factor = tl.where(from_end, weight.to(tl.float32) - 1, weight.to(tl.float32))
        moved = tl.fma(tl.zeros_like(value) + factor, student - value, tl.where(from_end, student, value))
        value = tl.where(weight == 1, student, tl.where(student == value, value, moved))
        rounded = _round_stochastically(value, random, TEACHER) if STOCHASTIC else value.to(TEACHER)
        tl.store(teacher_ptr + position, rounded, mask=mask)
    if HAS_COPY:
        tl.store(copy_ptr + position, value.to(tl.bfloat16), mask=mask)


@triton.jit
def _ema_update_kernel(
    table_ptr, owner_ptr, momentum_ptr, found_inf_ptr, seed_ptr, step_ptr, TENSORS,
    TEACHER: tl.constexpr, STUDENT: tl.constexpr, ALIGNED: tl.constexpr, HAS_COPY: tl.constexpr,
    HAS_FOUND_INF: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of one tensor.

    ALIGNED: all tensors start at multiples of 16 bytes and, for STOCHASTIC, of 8 elements, and are row-major.
    """
    owner = tl.load(owner_ptr + tl.program_id(0))
    row = table_ptr + owner
    weight = 1 - tl.load(momentum_ptr)  # fp64
    if HAS_FOUND_INF:
        weight = tl.where(tl.load(found_inf_ptr) == 0, weight, 0.0)
    teacher_ptr = tl.load(row).to(tl.pointer_type(TEACHER))
    student_ptr = tl.load(row + TENSORS).to(tl.pointer_type(STUDENT))
    copy_ptr = tl.load(row + 2 * TENSORS).to(tl.pointer_type(tl.bfloat16))
    if ALIGNED:
        teacher_ptr = tl.multiple_of(teacher_ptr, 16)
        student_ptr = tl.multiple_of(student_ptr, 16)
        copy_ptr = tl.multiple_of(copy_ptr, 16)
    count = tl.load(row + 3 * TENSORS)
    start = (tl.program_id(0) - tl.load(row + 8 * TENSORS)) * BLOCK
    position = start + tl.arange(0, BLOCK)
    random = 0
    if STOCHASTIC:
        index, first = tl.load(row + 4 * TENSORS).to(tl.uint32), tl.load(row + 5 * TENSORS)
        seed, step = tl.load(seed_ptr), tl.load(step_ptr).to(tl.uint32)
        if ALIGNED:
            random = _bits_of_neighbours(first + start, index, seed, step, BLOCK)
        else:
            channels, spatial = tl.load(row + 6 * TENSORS), tl.load(row + 7 * TENSORS)
            inside = position % (channels * spatial)
            element = position - inside + inside % channels * spatial + inside // channels
            random = _bits_of(first + element, index, seed, step)
    if start + BLOCK <= count:  # whole blocks need no mask, and so move 16 bytes at a time
        _update(teacher_ptr, student_ptr, copy_ptr, position, None, weight, random, HAS_COPY, STOCHASTIC)
    else:
        mask = position < count
        _update(teacher_ptr, student_ptr, copy_ptr, position, mask, weight, random, HAS_COPY, STOCHASTIC)


@dataclass
class _Group:
    """Tensors of one kind, as the columns of a table."""

    columns: list[tuple[int, ...]]
    owners: list[int]

    def add(self, *fields: int) -> None:
        count = fields[3]
        self.columns.append((*fields, len(self.owners)))
        self.owners += triton.cdiv(count, BLOCK) * [len(self.columns) - 1]


_tables: OrderedDict[tuple, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()


def _on_device(group: _Group, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The table and the tensor that each program belongs to, uploaded once: a training run has one for all steps."""
    key = (device, *group.columns)
    if key not in _tables:
        table = torch.tensor(group.columns, dtype=torch.int64).T.contiguous().to(device)
        _tables[key] = table, torch.tensor(group.owners, dtype=torch.int64).to(device)
        if len(_tables) > TABLES_KEPT:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    return _tables[key]


def _layout(tensors: list[torch.Tensor]) -> tuple[int, int] | None:
    """(channels, spatial) of tensors that are dense in one order: memory holds (batch, spatial, channels) of them.

    (1, 1) is row-major; None is any other layout.
    """
    if all(tensor.is_contiguous() for tensor in tensors):
        return 1, 1
    first = tensors[0]
    if any(tensor.stride() != first.stride() for tensor in tensors):
        return None
    for split in range(first.dim() - 1):  # dimensions before `split` are the batch
        channels, spatial = first.shape[split], first.shape[split + 1 :].numel()
        moved = first.movedim(split, -1)
        if moved.is_contiguous():
            return channels, spatial
    return None


def ema_update_(teacher, student, momentum, found_inf, bf16_copy, seed, step, keys):
    """``sslkernels::ema_update_`` on a GPU. float64 and tensors that are not dense alike go to the definition."""
    groups: dict[tuple, _Group] = {}
    rest: list[int] = []
    seen: set[int] = set()  # a tensor that is listed twice is updated once
    # the parts of complex tensors are the last dimension of real ones
    keys = [key * (1 + part % 2) if teacher[part // 2].is_complex() else key for part, key in enumerate(keys)]
    teacher, student = ([reference.as_real(tensor) for tensor in tensors] for tensors in (teacher, student))
    for i, (target, source) in enumerate(zip(teacher, student, strict=True)):
        if not target.numel() or target.data_ptr() in seen:
            continue
        seen.add(target.data_ptr())
        written = bf16_copy[i : i + 1]
        layout = _layout([target, source, *written])
        if layout is None or target.dtype not in DTYPES or source.dtype not in DTYPES:
            rest.append(i)
            continue
        pointers = [target.data_ptr(), source.data_ptr(), written[0].data_ptr() if written else 0]
        draws = seed is not None and target.dtype != torch.float32
        index, first = keys[2 * i : 2 * i + 2] if draws else (0, 0)
        aligned = not any(pointer % 16 for pointer in pointers) and (not draws or (layout == (1, 1) and first % 8 == 0))
        group = groups.setdefault((target.dtype, source.dtype, aligned, draws), _Group([], []))
        group.add(*pointers, target.numel(), index, first, *layout)
    for kind, group in groups.items():
        _launch(*kind, group, momentum, found_inf, bool(bf16_copy), seed, step)
    if rest:
        chosen = [[tensors[i] for i in rest] if tensors else [] for tensors in (teacher, student, bf16_copy)]
        chosen_keys = [keys[2 * i + part] for i in rest for part in range(2)] if keys else []
        reference.ema_update_op_(chosen[0], chosen[1], momentum, found_inf, chosen[2], seed, step, chosen_keys)


def _launch(teacher_dtype, student_dtype, aligned, draws, group, momentum, found_inf, has_copy, seed, step) -> None:
    table, owners = _on_device(group, momentum.device)

    def grid(meta):
        return (len(group.owners),)

    with torch.cuda.device_of(momentum):
        _ema_update_kernel[grid](
            table_ptr=table, owner_ptr=owners, momentum_ptr=momentum,
            found_inf_ptr=momentum if found_inf is None else found_inf,
            seed_ptr=torch.full((), seed, dtype=torch.int64, device=momentum.device) if draws else table,
            step_ptr=step if draws else table, TENSORS=len(group.columns),
            TEACHER=DTYPES[teacher_dtype], STUDENT=DTYPES[student_dtype], ALIGNED=aligned, HAS_COPY=has_copy,
            HAS_FOUND_INF=found_inf is not None, STOCHASTIC=draws, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip

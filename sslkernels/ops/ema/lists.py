"""The arguments of the moving average: lists or modules become checked lists of tensors, one for each device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

NAME = "ema_update_"
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COMPLEX = (torch.complex64, torch.complex128, torch.complex32)


def pairs(teacher, student) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Teachers and students as lists; of modules the parameters, matched by name."""
    if not (isinstance(teacher, nn.Module) or isinstance(student, nn.Module)):
        return listed("teacher", teacher), listed("student", student)
    if not (isinstance(teacher, nn.Module) and isinstance(student, nn.Module)):
        given = f"{type(teacher).__name__} and {type(student).__name__}"
        raise TypeError(f"{NAME}: teacher and student must both be modules or both lists of tensors, got {given}")
    targets, sources = (dict(module.named_parameters()) for module in (teacher, student))
    for argument, ours, theirs in (("student", targets, sources), ("teacher", sources, targets)):
        missing = [name for name in ours if name not in theirs]
        if missing:
            raise ValueError(f"{NAME}: {argument} must have the parameters of the other module, lacks {missing[0]!r}")
    return list(targets.values()), [sources[name] for name in targets]


def listed(argument: str, tensors) -> list[torch.Tensor]:
    """Any iterable of tensors as a list; a list stays itself. A single tensor is iterable too, and a mistake."""
    if type(tensors) is list:
        return tensors
    if isinstance(tensors, (torch.Tensor, str, dict)) or not isinstance(tensors, Iterable):
        raise TypeError(f"{NAME}: {argument} must be a list of tensors or a module, got {type(tensors).__name__}")
    return list(tensors)


def check_momentum(momentum) -> None:
    if isinstance(momentum, torch.Tensor):
        _check_scalar("momentum", momentum)
    elif isinstance(momentum, bool) or not isinstance(momentum, (int, float)):
        raise TypeError(f"{NAME}: momentum must be a float or a tensor, got {type(momentum).__name__}")
    elif not 0 <= momentum <= 1:
        raise ValueError(f"{NAME}: momentum must lie in [0, 1], got {momentum}")


def check_rounding(seed, step) -> None:
    if seed is not None and not _is_64_bits(seed):
        raise ValueError(f"{NAME}: stochastic_rounding_seed must be None or an integer of 64 bits, got {seed!r}")
    if isinstance(step, torch.Tensor):
        if step.numel() != 1 or step.dtype != torch.int64:
            given = f"{step.dtype} of shape {tuple(step.shape)}"
            raise ValueError(f"{NAME}: step must be an int or an int64 tensor of one element, got {given}")
    elif isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"{NAME}: step must be an int or an int64 tensor, got {type(step).__name__}")


def _is_64_bits(seed) -> bool:
    if torch.compiler.is_compiling():  # which makes integers symbolic: those know no numbers past 64 bits
        return True
    return isinstance(seed, int) and not isinstance(seed, bool) and -(2**63) <= seed < 2**64


def check_found_inf(found_inf) -> None:
    if found_inf is None:
        return
    if not isinstance(found_inf, torch.Tensor):
        raise TypeError(f"{NAME}: found_inf must be None or a tensor, got {type(found_inf).__name__}")
    _check_scalar("found_inf", found_inf)


def _check_scalar(argument: str, tensor: torch.Tensor) -> None:
    if tensor.numel() != 1 or not tensor.is_floating_point():
        raise ValueError(
            f"{NAME}: {argument} must be a floating-point tensor of one element, "
            f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )


@dataclass
class Part:
    """What lies on one device."""

    teacher: list[torch.Tensor] = field(default_factory=list)
    student: list[torch.Tensor] = field(default_factory=list)
    bf16_copy: list[torch.Tensor] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)  # index of each tensor, and of its first element


def parts(
    teacher: list, student: list, bf16_copy: list | None, first_elements: Sequence[int] | None
) -> dict[torch.device, Part]:
    """The lists split by device, every tensor checked, repeated ones once."""
    if len(student) != len(teacher):
        raise ValueError(f"{NAME}: student must have {len(teacher)} tensors like teacher, got {len(student)}")
    for argument, others in (("bf16_copy", bf16_copy), ("first_elements", first_elements)):
        if others is not None and len(others) != len(teacher):
            raise ValueError(f"{NAME}: {argument} must have {len(teacher)} items like teacher, got {len(others)}")
    found: dict[torch.device, Part] = {}
    partners: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for index, (target, source) in enumerate(zip(teacher, student, strict=True)):
        copy = None if bf16_copy is None else bf16_copy[index]
        _check_pair(index, target, source, copy)
        # compiled code finds repetitions in the operator: here they would bind it to these very tensors
        if not torch.compiler.is_compiling() and _is_repeated(index, target, source, copy, partners):
            continue
        first = 0 if first_elements is None else _first_element(index, first_elements[index])
        part = found.setdefault(target.device, Part())
        part.teacher.append(target)
        part.student.append(source.resolve_conj().resolve_neg())
        part.bf16_copy += [] if copy is None else [copy]
        part.keys += [index, first]
    return found


def _is_repeated(index: int, teacher, student, bf16_copy, partners: dict) -> bool:
    """Whether this teacher was listed before, with the same student; all else that shares its memory is a mistake."""
    if student.numel():
        _place("student", index, student)
    for argument, tensor in (("teacher", teacher), ("bf16_copy", bf16_copy)):
        if tensor is None or not tensor.numel():
            continue
        place = _place(argument, index, tensor)
        if place not in partners:
            partners[place] = tensor, student
            continue
        earlier, partner = partners[place]
        if argument == "bf16_copy" or bf16_copy is not None or not _same(earlier, tensor):
            raise ValueError(f"{NAME}: {argument}[{index}] shares memory with another tensor that is written")
        if not _same(partner, student):
            raise ValueError(f"{NAME}: teacher[{index}] is listed before with another student")
        return True
    return False


def _place(argument: str, index: int, tensor: torch.Tensor) -> int:
    """What tells tensors in different memory apart."""
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.device.type == "meta":
        return id(tensor)  # fake tensors and their like have no address
    if not tensor.data_ptr():
        raise ValueError(f"{NAME}: {argument}[{index}] must have memory, but its storage is empty")
    return tensor.data_ptr()


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    layouts = ((tensor.dtype, tensor.shape, tensor.stride()) for tensor in (a, b))
    return a is b or (_place("", 0, a) == _place("", 0, b) and len(set(layouts)) == 1)


def _first_element(index: int, first) -> int:
    if isinstance(first, bool) or not isinstance(first, int) or not 0 <= first < 2**60:
        raise ValueError(f"{NAME}: first_elements[{index}] must be the index of an element, got {first!r}")
    return first


def _check_pair(index: int, teacher, student, bf16_copy) -> None:
    _check_tensor(f"teacher[{index}]", teacher)
    _check_tensor(f"student[{index}]", student)
    _check_written(f"teacher[{index}]", teacher)
    if teacher.is_complex() != student.is_complex():
        raise TypeError(
            f"{NAME}: student[{index}] must be complex where its teacher is, got {student.dtype} for {teacher.dtype}"
        )
    _check_like("student", index, student, teacher)
    if bf16_copy is None:
        return
    _check_tensor(f"bf16_copy[{index}]", bf16_copy)
    if bf16_copy.dtype != torch.bfloat16 or teacher.dtype != torch.float32:
        raise TypeError(
            f"{NAME}: bf16_copy[{index}] must be bfloat16 and its teacher float32, "
            f"got {bf16_copy.dtype} for {teacher.dtype}"
        )
    _check_like("bf16_copy", index, bf16_copy, teacher)
    _check_written(f"bf16_copy[{index}]", bf16_copy)


def _check_tensor(argument: str, tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{NAME}: {argument} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{NAME}: {argument} must be dense, got {tensor.layout}")
    if tensor.dtype not in FLOATING + COMPLEX:
        raise TypeError(f"{NAME}: {argument} must be floating-point or complex, got {tensor.dtype}")


def _check_written(argument: str, tensor: torch.Tensor) -> None:
    # the compiler cannot trace these two, nor does it let such views reach an operator
    if not torch.compiler.is_compiling() and (tensor.is_conj() or tensor.is_neg()):
        raise ValueError(f"{NAME}: {argument} must not be a conjugate or negative view, which cannot be written to")
    if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ValueError(f"{NAME}: {argument} must not be expanded: it holds one element several times")


def _check_like(argument: str, index: int, tensor: torch.Tensor, teacher: torch.Tensor) -> None:
    for what, expected, given in (
        ("shape", tuple(teacher.shape), tuple(tensor.shape)),
        ("device", teacher.device, tensor.device),
    ):
        if given != expected:
            raise ValueError(
                f"{NAME}: {argument}[{index}] must have the {what} of teacher[{index}], {expected}, got {given}"
            )

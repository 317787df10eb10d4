"""The exponential moving average of a momentum teacher, in one pass over all of its tensors."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from sslkernels import _library
from sslkernels.ops.ema import lists, reference
from sslkernels.ops.ema import op as _op  # noqa: F401  registers the operator
from sslkernels.philox import WORD

Tensors = Iterable[torch.Tensor] | nn.Module


def ema_update_(
    teacher: Tensors,
    student: Tensors,
    momentum: float | torch.Tensor,
    *,
    stochastic_rounding_seed: int | None = None,
    step: int | torch.Tensor = 0,
    first_elements: Sequence[int] | None = None,
    found_inf: torch.Tensor | None = None,
    bf16_copy: Iterable[torch.Tensor] | None = None,
    backend: str | None = None,
) -> None:
    r"""Moves every tensor of a teacher towards its student, in place and in one pass over all of them.

    .. math:: t \leftarrow t + (1 - m) (s - t)

    Equivalent PyTorch::

        for t, s in zip(teacher, student):
            t.lerp_(s.to(t.dtype), 1 - momentum)

    A teacher equal to its student stays as it is, bit for bit. Momentum 1 leaves the teacher alone, even where the
    student is NaN; momentum 0 copies the student.

    Args:
        teacher: tensors of any shape, strides and floating-point or complex dtype, or a module, whose parameters are
            taken. A tensor that is listed twice, with one student, is updated once. No two may share memory otherwise.
        student: as many tensors, each of its teacher's shape and device, of any floating-point dtype (complex where the
            teacher is), or a module whose parameters have the names of the teacher's.
        momentum: a float in [0, 1], or a floating-point tensor of one element, which is read on its device.
        stochastic_rounding_seed: a 64-bit integer: teachers in bfloat16 or float16 are then rounded up or down at
            random, so that on the average they move as float32 would, instead of standing still once a step is smaller
            than half a unit in the last place. The random bits are a pure function of the seed, ``step``, the tensor's
            index in the list and the element's row-major index: the same on every backend, device and process.
        step: counts the updates, for stochastic rounding; an int, or an int64 tensor of one element.
        first_elements: for each teacher that is part of a larger tensor, the row-major index of its first element
            there; for stochastic rounding only. None: zeros.
        found_inf: a float32 tensor of one element, as gradient scalers keep it: unless it is 0 the teacher stays as it
            is. Read on its device.
        bf16_copy: one bfloat16 tensor in the shape of each (float32) teacher. Receives the new teacher in the same
            pass, also where the teacher stays as it is.
        backend: None for the fastest one (see `sslkernels.backends`), or "cpp", "cuda", "triton", "reference".

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it. Nothing has been written then.
        RuntimeError: ``backend`` is not available here.

    Computes in float32, or float64 where teacher or student is float64. Gradients do not flow; the version counters of
    what is written are raised, so that autograd notices. Random numbers are those of Philox4x32-10.

    Source: Tarvainen and Valpola, Mean teachers are better role models (2017), equation 2.

    Cost: reads both and writes the teacher once: 12 bytes an element in float32. No extra memory.
    """
    targets, sources = lists.pairs(teacher, student)
    copies = None if bf16_copy is None else lists.listed("bf16_copy", bf16_copy)
    lists.check_momentum(momentum)
    lists.check_rounding(stochastic_rounding_seed, step)
    lists.check_found_inf(found_inf)
    seed = stochastic_rounding_seed
    plain = first_elements is None and backend is None
    if plain and _direct(targets, sources, momentum, found_inf, copies, seed, step):
        return
    firsts = None if first_elements is None else list(first_elements)
    parts = lists.parts(targets, sources, copies, firsts)
    runs = {device: _implementation(backend, device.type) for device in parts}
    still = isinstance(momentum, (int, float)) and momentum == 1
    if still and copies is None:
        return
    with torch.no_grad():
        for device, part in parts.items():
            runs[device](part.teacher, part.student, *_options(device, part, momentum, found_inf, seed, step))
            if not torch.compiler.is_compiling():
                torch.autograd.graph.increment_version([*([] if still else part.teacher), *part.bf16_copy])


@functools.cache
def _plain_lists():
    """The extension's way past the dispatcher, or None: a thousand tensors cost that more than the arithmetic does."""
    direct = _library.extension and _library.extension.EmaDirect(torch.Tensor, nn.Parameter)
    return direct if direct and direct.available else None


def _direct(teacher, student, momentum, found_inf, bf16_copy, seed, step) -> bool:
    """Update plain tensors of one device past the dispatcher; False, with nothing written, for other arguments.

    It checks tensors as strictly as `lists.parts` but leaves the errors to it.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    if not teacher or type(teacher[0]) not in (torch.Tensor, nn.Parameter):
        return False
    direct, device = _plain_lists(), teacher[0].device
    if direct is None or torch._C._get_tracing_state() is not None:
        return False
    if device.type == "cuda" and hasattr(direct, "update_on_gpu"):
        weight, found_inf, step = _numbers(device, momentum, found_inf, seed, step)
        done = direct.update_on_gpu(device.index, teacher, student, weight, found_inf, bf16_copy, _unsigned(seed), step)
    elif device.type == "cpu" and found_inf is None and not _any_tensor(momentum, step):
        done = direct.update_on_cpu(teacher, student, momentum, bf16_copy, _unsigned(seed), step & WORD)
    else:
        return False
    if done:
        still = not _any_tensor(momentum) and momentum == 1
        torch.autograd.graph.increment_version([*([] if still else teacher), *(bf16_copy or [])])
    return done


def _unsigned(seed: int | None) -> int | None:
    return None if seed is None else seed & (2**64 - 1)


def _any_tensor(*numbers) -> bool:
    return any(isinstance(number, torch.Tensor) for number in numbers)


def _options(device, part, momentum, found_inf, seed, step) -> tuple:
    """The operator's other arguments."""
    weight, found_inf, step = _numbers(device, momentum, found_inf, seed, step)
    if seed is not None and not torch.compiler.is_compiling() and seed >= 2**63:
        seed -= 2**64  # the same 64 bits
    return weight, found_inf, part.bf16_copy, seed, step, part.keys if seed is not None else []


def _numbers(device, momentum, found_inf, seed, step) -> tuple:
    """Momentum, found_inf and step as tensors on the device; no step where nothing is drawn."""
    if isinstance(momentum, torch.Tensor):
        momentum = momentum.detach().reshape(()).to(device, torch.float64)
    else:
        momentum = torch.full((), momentum, dtype=torch.float64, device=device)
    if found_inf is not None:
        found_inf = found_inf.detach().reshape(()).to(device, torch.float32)
    if seed is None:
        return momentum, found_inf, None
    if isinstance(step, torch.Tensor):
        return momentum, found_inf, step.detach().reshape(()).to(device)
    return momentum, found_inf, torch.full((), step & WORD, dtype=torch.int64, device=device)


def _implementation(backend: str | None, device: str):
    """What updates the tensors of one device: the operator, or what it hides on this device."""
    _library.check_backend(lists.NAME, backend, device)
    if backend == "reference":
        return reference.ema_update_op_
    if backend is None or backend == _library.backends()[lists.NAME][device].active:
        return torch.ops.sslkernels.ema_update_
    from sslkernels.ops.ema import kernels

    return kernels.ema_update_

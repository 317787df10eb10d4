"""How ops call their torch operators: with gradients, never with tangents, and the short way where nothing watches.

`torch.library` gives an operator its gradient on every way to it: compiled, traced, batched, under modes. That costs 50
to 150 us a call, and plain eager calls need none of it: for them the same functions serve a `torch.autograd.Function`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

_functions: dict[str, type[torch.autograd.Function]] = {}  # of the operators that have a gradient
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def register_autograd(torch_op: str, backward: Callable, *, save: Callable | None = None) -> None:
    """The gradient of an operator, as `torch.library.register_autograd` takes it; ``save`` is its ``setup_context``."""
    torch.library.register_autograd(f"sslkernels::{torch_op}", backward, setup_context=save)
    overload = getattr(torch.ops.sslkernels, torch_op).default

    def forward(ctx: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = overload(*args)
        if save:
            save(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    _functions[torch_op] = type(torch_op, (torch.autograd.Function,), members)


def refuse_double_backward(torch_op: str, op: str) -> None:
    """Makes the gradient of a backward operator an error that names ``op``."""

    def refuse(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"{op}: double backward is not supported; use backend='reference' to differentiate twice")

    register_autograd(torch_op, refuse)


def operator(torch_op: str, op: str) -> Callable:
    """The operator of that name, but for tangents an error that names ``op``: operators drop them without a word."""
    call = getattr(torch.ops.sslkernels, torch_op)
    overload = call.default

    @functools.wraps(call, assigned=(), updated=())
    def checked(*args: Any) -> Any:
        # the level costs nothing to ask for, and is negative wherever nothing is differentiated forward
        if forward_ad._current_level >= 0:
            if any(isinstance(x, torch.Tensor) and _has_tangent(x) for x in args):
                raise RuntimeError(f"{op}: forward-mode differentiation is not supported; use backend='reference'")
            return call(*args)
        if not is_eager(*args):
            return call(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return _functions[torch_op].apply(*args) if torch_op in _functions else call(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    return checked


def is_eager(*args: Any) -> bool:
    """Whether plain tensors meet no program that is compiled, traced or transformed, and no mode."""
    if torch.compiler.is_compiling():
        return False
    watched = (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()  # a mode that changes arguments must have its say before autograd
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )
    return not watched and all(type(x) in _PLAIN for x in args if isinstance(x, torch.Tensor))


def _has_tangent(x: torch.Tensor) -> bool:
    """Also in an outer transform of `torch.func`, each of which has a wrapper of its own around the tensor."""
    from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack

    functorch = torch._C._functorch
    transform = functorch.peek_interpreter_stack()
    may_have = transform is None or transform.key() == functorch.TransformType.Jvp
    if may_have and forward_ad.unpack_dual(x).tangent is not None:
        return True
    if transform is None:
        return False
    if functorch.maybe_get_level(x) == transform.level():
        x = functorch.get_unwrapped(x)
    with temporarily_pop_interpreter_stack():
        return _has_tangent(x)

"""Runs Triton launch code on CPU tensors: `interpret` executes the kernels, `capture` only compiles them.

Inside either context ``kernel[grid](...)`` of an ordinary ``@triton.jit`` kernel works on CPU tensors, without a GPU,
a driver or TRITON_INTERPRET, and so do our public functions: their operators go to the launchers in the slice's
``kernels.py`` and ``*_kernels.py``, as they do on a GPU. The interpreter is Triton's own, with what it lacks for a
proof:

- bfloat16 arithmetic: Triton's interpreter works on the bits as if they were integers;
- every pointer that is not masked off must lie in a tensor of the launch or, where a kernel reads addresses from a
  table, of the operator's arguments;
- programs run in an order drawn from a seed, as a GPU promises none;
- memory fresh from ``torch.empty`` is filled with NaN, so that what no kernel wrote shows.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import pkgutil
import types
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.language.semantic import TritonSemantic
from triton.runtime import driver, interpreter
from triton.runtime.interpreter import TensorHandle
from triton.runtime.jit import JITFunction

from sslkernels import registry
from sslkernels.ops.infonce import unit_rows_op

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Launch:
    """One ``kernel[grid](...)`` that took place, with the compiled kernel if it was captured."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict
    compiled: object = None


class _Driver:
    """Stands in for a GPU's driver as far as launch code and compiler ask."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device=None) -> int:
        return 0


@contextlib.contextmanager
def capture(target: str) -> Iterator[list[Launch]]:
    """Compile every launch for ``target``, specialised to its arguments as on a GPU, and run none."""
    launches: list[Launch] = []
    run = JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **kwargs):
        kernel.device_caches.clear()  # they are keyed by device, which is always 0 here
        compiled = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        launches.append(Launch(kernel, _grid(grid, kwargs), kwargs, compiled))

    with mock.patch.object(JITFunction, "run", compile_only), _active_driver(TARGETS[target]), _on_gpu(), _OnGPU():
        yield launches
    for launch in launches:
        launch.kernel.device_caches.clear()


@contextlib.contextmanager
def interpret(target: str = "sm_90", order_seed: int | None = None) -> Iterator[list[Launch]]:
    """Execute every launch on the CPU, with the configuration that the launch code chooses for ``target``."""
    machine = _Interpreter(order_seed)
    with (
        mock.patch.object(JITFunction, "run", lambda kernel, *args, **kwargs: machine.launch(kernel, *args, **kwargs)),
        mock.patch.object(
            JITFunction, "__call__", lambda kernel, *args, **kwargs: machine.call(kernel, *args, **kwargs)
        ),
        mock.patch.object(interpreter, "interpreter_builder", machine.builder),
        mock.patch.object(interpreter, "interpreter_semantic", machine.semantic),
        mock.patch.object(interpreter, "_get_np_dtype", _np_dtype),
        mock.patch.object(interpreter.ReduceOps, "generic_reduce", _generic_reduce),
        _active_driver(TARGETS[target]),
        _on_gpu(),
        _OnGPU(machine.reachable),
    ):
        yield machine.launches


@contextlib.contextmanager
def _active_driver(target: GPUTarget) -> Iterator[None]:
    before = driver._active
    driver.set_active(_Driver(target))
    try:
        yield
    finally:
        driver.set_active(before)


def _on_gpu():
    """What the losses run on a GPU alone, they run here."""
    return mock.patch.object(unit_rows_op, "_on_gpu", lambda x: True)


def _grid(grid, meta: dict) -> tuple[int, int, int]:
    sizes = tuple(grid(meta) if callable(grid) else grid)
    return sizes + (1,) * (3 - len(sizes))


class _OnGPU(TorchDispatchMode):
    """Sends our operators to their Triton launchers, which must not read the device's memory on the host.

    Fills fresh memory with NaN or the largest integer; where kernels are not run, with zeros, which are valid ids.
    """

    FRESH = (
        torch.ops.aten.empty,
        torch.ops.aten.empty_like,
        torch.ops.aten.empty_strided,
        torch.ops.aten.new_empty,
        torch.ops.aten.new_empty_strided,
    )

    def __init__(self, reachable: list | None = None):
        super().__init__()
        self.launchers = launchers()
        self.launching = False
        self.runs = reachable is not None
        self.reachable = reachable if self.runs else []  # the memory of the operator's arguments

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.launchers:
            self.launching = True
            leaves = torch.utils._pytree.tree_leaves(args)
            self.reachable[:] = [_span(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]
            try:
                with self:  # within a handler a mode is off
                    return self.launchers[func](*args, **(kwargs or {}))
            finally:
                self.launching = False
        if self.launching and func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a launcher reads a tensor's value on the host, which would wait for the GPU")
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in self.FRESH:
            if not self.runs:
                out.zero_()
            elif out.is_floating_point():
                out.fill_(torch.nan)
            else:
                out.fill_(True if out.dtype == torch.bool else torch.iinfo(out.dtype).max)
        return out


def kernel_modules() -> list[types.ModuleType]:
    """The modules ``kernels`` and ``*_kernels`` of every slice."""
    slices = [importlib.import_module(f"sslkernels.ops.{name}") for name in registry.SLICES]
    found = [(package.__name__, module.name) for package in slices for module in pkgutil.iter_modules(package.__path__)]
    return [importlib.import_module(f"{package}.{name}") for package, name in found if name.endswith("kernels")]


def launchers() -> dict:
    """The Triton implementation of every operator that has one."""
    modules = kernel_modules()
    names = [name for spec in registry.ops() for name in (*spec.torch_ops, *spec.gpu_ops)]
    found = {name: getattr(module, name) for module in modules for name in names if hasattr(module, name)}
    return {getattr(torch.ops.sslkernels, name).default: function for name, function in found.items()}


def kernels() -> set[str]:
    """The names of all Triton kernels that launchers can reach."""
    members = [member for module in kernel_modules() for member in vars(module).values()]
    return {member.__name__ for member in members if isinstance(member, JITFunction)}


class _Interpreter:
    """Runs kernels one program after another."""

    def __init__(self, order_seed: int | None):
        self.builder = _Builder()
        self.semantic = TritonSemantic(self.builder)
        self.order_seed = order_seed
        self.launches: list[Launch] = []
        self.rewritten: dict[types.FunctionType, types.FunctionType] = {}
        self.reachable: list[tuple[int, int]] = []

    def call(self, function: JITFunction, *args, **kwargs):
        """A kernel calls a helper that is jitted too: ours, or tl.sum and its like."""
        if function.fn not in self.rewritten:
            self.rewritten[function.fn] = self._bind(function.fn)
        return self.rewritten[function.fn](*args, **kwargs)

    def _bind(self, function: types.FunctionType) -> types.FunctionType:
        # outside the compiler a constexpr divided by a tensor would be a constexpr that holds a tensor
        constants = {n: v.value for n, v in function.__globals__.items() if isinstance(v, tl.constexpr)}
        namespace = {**function.__globals__, **constants, "interpreter_semantic": self.semantic}
        exec(_rewritten(function), namespace)
        return namespace[function.__name__]

    def launch(self, kernel: JITFunction, *args, grid, warmup=False, **kwargs) -> None:
        names = kernel.arg_names
        options = {name: kwargs.pop(name) for name in list(kwargs) if name not in names}
        arguments = inspect.getcallargs(kernel.fn, *args, **kwargs)
        sizes = _grid(grid, arguments)
        self.launches.append(Launch(kernel, sizes, arguments | options))
        own = [_span(value) for value in arguments.values() if isinstance(value, torch.Tensor)]
        self.builder.memory = own + self.reachable
        self.builder.set_grid_dim(*sizes)
        constexprs = {param.name for param in kernel.params if param.is_constexpr}
        # Triton patches the modules that it finds in a function's globals; these two are what kernels can reach
        scope = interpreter._patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        for name, module in product(("reduce", "associative_scan"), (tl, tl.core)):
            scope.set_attr(module, name, _in_fp32(getattr(module, name)))
        try:
            bound = {n: v if n in constexprs else interpreter._implicit_cvt(v) for n, v in arguments.items()}
            with np.errstate(all="ignore"):  # a GPU raises nothing either
                for program in self._programs(sizes):
                    self.builder.set_grid_idx(*program)
                    self.call(kernel, **bound)
        finally:
            scope.restore()

    def _programs(self, sizes: tuple[int, int, int]) -> list[tuple[int, int, int]]:
        programs = [tuple(map(int, index)) for index in np.ndindex(*sizes)]
        if self.order_seed is not None:
            np.random.default_rng(self.order_seed).shuffle(programs)
        return programs


class _Rewriter(interpreter.FunctionRewriter):
    """Triton's rewriting for the interpreter, which leaves the kernel's module as it was."""

    def _compile_and_exec(self, transformed_ast):
        return compile(transformed_ast, filename=self.filename, mode="exec")


@functools.cache  # it takes as long as a small launch
def _rewritten(function: types.FunctionType) -> types.CodeType:
    return _Rewriter(function).rewrite_ast()


_np_scalar = functools.cache(interpreter._get_np_dtype)  # which builds its table at every call


def _np_dtype(dtype: tl.dtype) -> np.dtype:
    scalar = dtype.scalar
    return np.dtype(np.uint64) if scalar.is_ptr() else _np_scalar(scalar)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses from the first to behind the last element."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def _in_fp32(reduce):
    """A reduction or scan of bfloat16: in fp32, rounded at the end."""

    def wrapped(inputs, *args, **kwargs):
        if not isinstance(inputs, tl.tensor) or inputs.dtype != tl.bfloat16:
            return reduce(inputs, *args, **kwargs)
        return reduce(inputs.to(tl.float32), *args, **kwargs).to(tl.bfloat16)

    return wrapped


_one_by_one = interpreter.ReduceOps.generic_reduce


def _generic_reduce(reduce, inputs):
    """A reduction that Triton's interpreter has no NumPy function for: tl.sort is made of exclusive ors."""
    if reduce.combine_fn is not tl.standard._xor_combine:
        return _one_by_one(reduce, inputs)
    results = [np.bitwise_xor.reduce(x.handle.data, axis=reduce.axis, keepdims=reduce.keep_dims) for x in inputs]
    return [reduce.to_tensor(result, x.dtype) for result, x in zip(results, inputs, strict=True)]


def _is_bf16(handle) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(values: np.ndarray) -> np.ndarray:
    """The bits, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _widen(handle):
    return TensorHandle(bf16_to_fp32(handle.data), tl.float32) if _is_bf16(handle) else handle


def _narrow(handle: TensorHandle) -> TensorHandle:
    if handle.data.dtype == np.bool_:  # a comparison
        return TensorHandle(handle.data, tl.bfloat16)
    return TensorHandle(fp32_to_bf16(handle.data), tl.bfloat16)


class _Builder(interpreter.InterpreterBuilder):
    """Triton's interpreter with bfloat16 computed in fp32 and rounded after every operation, and with bounds."""

    BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)

    def __init__(self):
        super().__init__()
        self.memory: list[tuple[int, int]] = []

    def get_bf16(self, value):
        return _narrow(self.get_fp32(value))

    def binary_op(self, lhs, rhs, op):
        if not _is_bf16(lhs) or op in self.BITWISE:
            return super().binary_op(lhs, rhs, op)
        return _narrow(super().binary_op(_widen(lhs), _widen(rhs), op))

    def unary_op(self, arg, op):
        return _narrow(super().unary_op(_widen(arg), op)) if _is_bf16(arg) else super().unary_op(arg, op)

    def ternary_op(self, lhs, rhs, other, op):
        if not _is_bf16(other) or op is np.where:  # a selection moves bits
            return super().ternary_op(lhs, rhs, other, op)
        return _narrow(super().ternary_op(_widen(lhs), _widen(rhs), _widen(other), op))

    def create_fma(self, x, y, z):
        if z.dtype.scalar == tl.float32:  # one rounding: the product of two fp32 numbers is exact in fp64
            exact = x.data.astype(np.float64) * y.data + z.data
            return TensorHandle(exact.astype(np.float32), tl.float32)
        result = super().create_fma(_widen(x), _widen(y), _widen(z))
        return _narrow(result) if _is_bf16(z) else result

    def create_rsqrt(self, arg):
        return _narrow(super().create_rsqrt(_widen(arg))) if _is_bf16(arg) else super().create_rsqrt(arg)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if a.dtype.scalar == tl.float32:
            # fused multiply-adds, one k after another, as a GPU does: the tiling leaves no trace in the result
            out = d.data
            for column, row in zip(a.data.T.astype(np.float64), b.data.astype(np.float64), strict=True):
                out = (column[:, None] * row + out).astype(np.float32)
            return TensorHandle(out, d.dtype.scalar)
        return super().create_dot(_widen(a), _widen(b), d, input_precision, max_num_imprecise_acc)

    def cast_impl(self, src, dst_type):
        to_bf16 = dst_type.scalar == tl.bfloat16
        if _is_bf16(src):
            return src if to_bf16 else super().cast_impl(_widen(src), dst_type)
        return (
            _narrow(TensorHandle(src.data.astype(np.float32), tl.float32))
            if to_bf16
            else super().cast_impl(src, dst_type)
        )

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if _is_bf16(src) or dst_type.scalar == tl.bfloat16:
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def create_masked_load(self, ptrs, mask, other, cache_modifier, eviction_policy, is_volatile):
        self._check(ptrs, mask, "load")
        return super().create_masked_load(ptrs, mask, other, cache_modifier, eviction_policy, is_volatile)

    def create_masked_store(self, ptrs, value, mask, cache_modifier, eviction_policy):
        self._check(ptrs, mask, "store")
        return super().create_masked_store(ptrs, value, mask, cache_modifier, eviction_policy)

    def create_atomic_rmw(self, op, ptr, val, mask, sem, scope):
        self._check(ptr, mask, "atomic")
        if _is_bf16(val):
            raise NotImplementedError("bfloat16 atomics are not interpreted")
        return super().create_atomic_rmw(op, ptr, val, mask, sem, scope)

    def _check(self, ptrs, mask, what: str) -> None:
        addresses = ptrs.data.astype(np.int64)
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        first, last = addresses.min(), addresses.max() + size
        if any(start <= first and last <= end for start, end in self.memory):
            return
        inside = np.zeros(addresses.shape, bool)
        for start, end in self.memory:
            inside |= (addresses >= start) & (addresses + size <= end)
        outside = np.broadcast_to(mask.data, addresses.shape) & ~inside
        if outside.any():
            raise IndexError(
                f"{what} out of bounds in program {self.grid_idx}: {outside.sum()} of {outside.size} pointers, "
                f"first at {np.argwhere(outside)[0].tolist()}"
            )

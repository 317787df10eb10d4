"""Which tensor of a teacher follows which of its student: found by name once, then only checked."""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

NAME = "EMATeacher"
# what torch.compile and activation checkpointing put into names, wherever they wrap a submodule
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
Pairs = tuple[list[torch.Tensor], list[torch.Tensor]]  # teachers and students
Owners = Iterable[tuple[str, dict[str, torch.Tensor | None]]]  # of tensors: the paths and dicts of modules


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile, DataParallel and DistributedDataParallel."""
    while True:
        if (compiled := model._modules.get("_orig_mod")) is not None:
            model = compiled
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def plain_names(names: list[str]) -> list[str]:
    """The names without what wrappers add, so that both sides of a pair agree."""
    for wrapper in WRAPPERS:
        names = [name.replace(wrapper, "") for name in names]
    while names and all(name.startswith("module.") for name in names):
        names = [name.removeprefix("module.") for name in names]
    return names


def sharded_modules(module: nn.Module) -> list[FSDPModule]:
    """The modules under fully_shard, whose parameters may be replaced by gathered ones for the time of a forward."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # where it was never imported, nothing is sharded
    kind = getattr(fsdp, "FSDPModule", ())
    return [each for each in module.modules() if isinstance(each, kind)]


def is_sharded(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    return hasattr(tensor, "to_local")  # the class is slow to import, and needless where nothing is sharded


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The shard of a DTensor that lies here; any other tensor as it is. To be called without grad."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def first_element(name: str, tensor: torch.Tensor) -> int:
    """The row-major index that the first element of a local shard has in the full tensor."""
    if not is_sharded(tensor):
        return 0
    split = [(axis, placement) for axis, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if not split:
        return 0
    axis, placement = split[0]
    if len(split) > 1 or not placement.is_shard(0) or type(placement).__name__ != "Shard":
        raise ValueError(
            f"{NAME}: stochastic_rounding_seed must be None unless parameters are sharded on dimension 0 alone, "
            f"got {tuple(tensor.placements)} for {name!r}"
        )
    rows, mesh = tensor.shape[0], tensor.device_mesh
    first_row = min(mesh.get_local_rank(axis) * -(-rows // mesh.size(axis)), rows)
    return first_row * (tensor.numel() // rows if rows else 0)


def same(now: Iterable, before: Iterable) -> bool:
    """The same objects, of two equally long lists; ``==`` would compare the tensors."""
    return all(map(operator.is_, now, before))


class Inventory:
    """The tensors of one module by name, and a cheap test whether it still holds the same ones."""

    def __init__(self, root: nn.Module):
        self.root = root
        self.sharded = sharded_modules(root)
        self.reshard()
        modules = list(root.named_modules())
        fixed = [d for _, module in modules for d in (module._modules, module._parameters)]
        buffers = [module._buffers for _, module in modules]
        self._empty_dicts = [d for d in fixed + buffers if not d]
        self._dicts = [d for d in fixed if d]
        self._buffer_dicts = [d for d in buffers if d]
        self._objects = list(self._now())
        self._buffer_count = sum(map(len, self._buffer_dicts))
        self.parameters = self._named((path, module._parameters) for path, module in modules)
        # a buffer may be a new tensor at every step, so what is kept is where it lies
        self._slots = self._located((path, module._buffers) for path, module in modules)
        transient = {(id(module._buffers), key) for _, module in modules for key in module._non_persistent_buffers_set}
        self.persistent = {name for name, (d, key) in self._slots.items() if (id(d), key) not in transient}

    @staticmethod
    def _located(owners: Owners) -> dict[str, tuple[dict, str]]:
        found = [(f"{path}.{key}" if path else key, d, key) for path, d in owners for key in d]
        names = plain_names([name for name, _, _ in found])
        return {name: (d, key) for name, (_, d, key) in zip(names, found, strict=True)}

    def _named(self, owners: Owners) -> dict[str, torch.Tensor]:
        located = self._located(owners)
        return {name: d[key] for name, (d, key) in located.items() if d[key] is not None}

    def _now(self) -> Iterator:
        return itertools.chain.from_iterable(map(dict.values, self._dicts))

    def reshard(self) -> None:
        for module in self.sharded:
            module.reshard()

    def current(self) -> bool:
        # once per update and entry: nothing but C loops
        return (
            not any(self._empty_dicts)
            and sum(map(len, self._dicts)) == len(self._objects)
            and sum(map(len, self._buffer_dicts)) == self._buffer_count
            and same(self._now(), self._objects)
        )

    def buffers(self) -> list[torch.Tensor | None]:
        return [d.get(key) for d, key in self._slots.values()]

    def named_buffers(self) -> dict[str, torch.Tensor]:
        found = zip(self._slots, self.buffers(), strict=True)
        return {name: buffer for name, buffer in found if buffer is not None}


class Plan:
    """Pairs of teacher and student tensors. Every list is of local shards, on whatever devices they are."""

    @torch.no_grad()
    def __init__(self, teacher: nn.Module, student: nn.Module):
        self.teacher, self.student = Inventory(teacher), Inventory(student)
        ours, theirs = self.teacher.parameters, self.student.parameters
        _check_names("parameter", ours, theirs)
        self._parameters: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._names: list[str] = []
        names: dict[int, str] = {}
        for name, target in ours.items():
            source = theirs[name]
            _check_alike("parameter", name, target, source)
            if id(target) not in names:
                names[id(target)] = name
                self._names.append(name)
                self._parameters.append((target, source))
            elif theirs[names[id(target)]] is not source:
                raise ValueError(
                    f"{NAME}: student must tie {name!r} to {names[id(target)]!r} as the teacher does, "
                    "got two different parameters"
                )
        self._has_shards = any(is_sharded(target) for target, _ in self._parameters)
        self._targets = [target for target, _ in self._parameters]
        self._sources = [source for _, source in self._parameters]
        self._several_devices = any(target.device != source.device for target, source in self._parameters)
        self._first_elements: list[int] | None = None
        self._known_buffers: tuple[str, list[torch.Tensor | None], tuple[Pairs, ...]] = ("", [], ())
        self.buffers("copy")

    def current(self) -> bool:
        """False once a module, parameter or buffer was added, removed or replaced: then a new plan is due."""
        for side in (self.teacher, self.student):
            side.reshard()
        return self.teacher.current() and self.student.current()

    @property
    def device(self) -> torch.device | None:
        """Of the teacher's first parameter or buffer."""
        tensors = [*self._targets, *self.teacher.named_buffers().values()]
        return tensors[0].device if tensors else None

    def parameters(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        if not self._has_shards:
            return self._targets, self._sources
        return [local(target) for target in self._targets], [local(source) for source in self._sources]

    def first_elements(self, averaged_buffers: int) -> list[int] | None:
        """For stochastic rounding of shards; None where every tensor is whole."""
        if not self._has_shards:
            return None
        if self._first_elements is None:
            pairs = zip(self._names, self._targets, strict=True)
            self._first_elements = [first_element(name, target) for name, target in pairs]
        return self._first_elements + [0] * averaged_buffers

    def buffers(self, mode: str) -> tuple[Pairs, ...]:
        """Those to average and those to copy, each as teachers and students; what to leave alone is in neither."""
        now = [*self.teacher.buffers(), *self.student.buffers()]
        known, before, pairs = self._known_buffers
        if mode != known or not same(now, before) or any(_shapes(ours) != _shapes(theirs) for ours, theirs in pairs):
            pairs = self._match_buffers(mode)
            self._known_buffers = (mode, now, pairs)
        return pairs

    def _match_buffers(self, mode: str) -> tuple[Pairs, Pairs]:
        averaged: Pairs = ([], [])
        copied: Pairs = ([], [])
        ours, theirs = self.teacher.named_buffers(), self.student.named_buffers()
        persistent = self.teacher.persistent & self.student.persistent
        if ours.keys() != theirs.keys():
            _check_names(
                "buffer",
                [name for name in ours if name in self.teacher.persistent],
                [name for name in theirs if name in self.student.persistent],
            )
        for name, target in ours.items():
            source = theirs.get(name)
            if source is None or (name not in persistent and source.shape != target.shape):
                continue  # a cache that each side keeps for itself
            _check_alike("buffer", name, target, source)
            if not target.is_floating_point() or mode == "copy" or name not in persistent:
                pairs = copied
            elif mode == "ema":
                pairs = averaged
            else:
                continue
            pairs[0].append(local(target))
            pairs[1].append(local(source))
        return averaged, copied

    def everything(self, mode: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """All parameters, and the buffers that are not left alone."""
        self.check_shapes()
        targets, sources = map(list, self.parameters())
        for ours, theirs in self.buffers(mode):
            targets += ours
            sources += theirs
        return targets, sources

    def several_devices(self) -> bool:
        # a module that is moved keeps its parameters: one of them tells, at no cost, that it was
        return self._several_devices or any(t.device != s.device for t, s in self._parameters[:1])

    def check_shapes(self) -> None:
        """Raise the error that names a parameter which was resized in place."""
        for name, (target, source) in zip(self._names, self._parameters, strict=True):
            _check_alike("parameter", name, target, source)


def _shapes(tensors: list[torch.Tensor]) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors]


def _check_names(kind: str, teacher: Iterable[str], student: Iterable[str]) -> None:
    lost = sorted(set(teacher) - set(student))
    gained = sorted(set(student) - set(teacher))
    if lost:
        raise ValueError(f"{NAME}: student must have every {kind} of the teacher, lacks {_some(lost)}")
    if gained:
        raise ValueError(f"{NAME}: student must have no {kind} that the teacher lacks, got {_some(gained)}")


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_alike(kind: str, name: str, teacher: torch.Tensor, student: torch.Tensor) -> None:
    for side, tensor in (("model", teacher), ("student", student)):
        if nn.parameter.is_lazy(tensor):
            raise ValueError(f"{NAME}: {side} must have run once, so that lazy {kind} {name!r} has a shape, got none")
    if teacher.shape != student.shape:
        raise ValueError(
            f"{NAME}: student {kind} {name!r} must have the teacher's shape {tuple(teacher.shape)}, "
            f"got {tuple(student.shape)}"
        )
    ours, theirs = (getattr(tensor, "placements", None) for tensor in (teacher, student))
    if ours != theirs:
        raise ValueError(f"{NAME}: student {kind} {name!r} must be sharded like the teacher's, {ours}, got {theirs}")

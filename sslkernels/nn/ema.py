"""The momentum teacher of self-supervised training: a copy of the student that follows it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from sslkernels.nn import ema_peers
from sslkernels.nn import momentum as schedules
from sslkernels.nn.ema_plan import NAME, Plan, sharded_modules, unwrapped
from sslkernels.ops.ema import ema_update_

BUFFERS = ("copy", "ema", "ignore")
MOMENTUM = 0.996


class EMATeacher(nn.Module):
    r"""A copy of a model whose weights are the exponential moving average of the model's.

    .. math:: t \leftarrow t + (1 - m) (s - t)

    Equivalent PyTorch, after every step of the optimiser::

        for t, s in zip(teacher.parameters(), model.parameters()):
            t.lerp_(s, 1 - momentum)
        for t, s in zip(teacher.buffers(), model.buffers()):
            t.copy_(s)

    The teacher, ``.module``, is in eval mode and requires no grad. Calling this module calls it. ``train`` and ``eval``
    of a surrounding model leave its mode alone; for a teacher with batch statistics of its own, as in BYOL, call
    ``teacher.module.train()``.

    Parameters and buffers are matched by name; the prefixes of ``torch.compile``, ``DataParallel``,
    ``DistributedDataParallel`` and activation checkpointing do not count. Tied parameters are updated once. Frozen
    parameters are averaged like the others: equal values are a fixed point, so that they stay what they are.

    Args:
        model: the student. ``teacher`` apart, it is copied; inside ``torch.compile`` and ``DistributedDataParallel``,
            the model that they wrap is.
        momentum: a float in [0, 1]; a floating-point tensor of one element, which is read on its device at every
            update; or a callable from the number of updates made before to one of these, such as `CosineMomentum`,
            `WarmupMomentum`, `PowerMomentum`, or ``array.__getitem__``.
        teacher: a module to be used as the teacher, with the weights it has, instead of a copy. Models under
            ``fully_shard`` cannot be copied: copy the model first and shard both alike.
        buffers: "copy" takes floating-point buffers from the student, "ema" averages them, "ignore" leaves them alone.
            Other buffers, and those that are not in the ``state_dict``, are always copied.
        stochastic_rounding_seed: an integer: bfloat16 and float16 values are rounded at random, see `ema_update_`. The
            bits depend on the seed and the number of updates alone, also where parameters are sharded on dimension 0.
        device: where the teacher is to be. The student is moved there at every update.
        dtype: of the teacher's floating-point tensors, for example float32 for a bfloat16 student.
        capturable: keep the number of updates and the momentum on the device, so that `update` can be captured in a
            CUDA graph; None: unless the teacher is on the CPU. Callables are then given an int64 tensor of one element.
        decay, min_decay, update_after_step, use_warmup, warmup_gamma, warmup_power, exclude_buffers, foreach: as
            in timm's ``ModelEmaV3``; ``decay`` is another name of ``momentum``. With any of them buffers are averaged
            unless ``exclude_buffers``. Updates without ``step`` are counted here; timm ignores warm-up and delay then.
        use_buffers, avg_fn, multi_avg_fn: as in ``torch.optim.swa_utils.AveragedModel``; of the functions, those that
            ``torch.optim.swa_utils`` makes.

    Raises:
        TypeError, ValueError: an argument is not as described, or the student has gained, lost or resized a parameter
            or buffer; the message names it. Nothing has been written then.

    The ``state_dict`` holds the teacher, the number of updates, the seed, the momentum or schedule and what becomes of
    buffers. Loading it resumes exactly: it wins over the arguments. A callable of the user's own is not saved. Those
    of the peers above can be loaded too. Copies and pickles know no student: the next `update` has to be given one.

    Source: Tarvainen and Valpola, Mean teachers are better role models (2017).

    Cost: one pass of `ema_update_` and one copy of the buffers per update. No extra memory.
    """

    n_averaged: torch.Tensor

    def __init__(
        self,
        model: nn.Module,
        momentum: float | torch.Tensor | Callable = MOMENTUM,
        *,
        teacher: nn.Module | None = None,
        buffers: str | None = None,
        stochastic_rounding_seed: int | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        capturable: bool | None = None,
        **peer_arguments: Any,
    ):
        super().__init__()
        self.momentum, self.buffer_mode = ema_peers.translate(momentum, MOMENTUM, buffers, peer_arguments)
        _check_arguments(model, teacher, self.momentum, self.buffer_mode, stochastic_rounding_seed)
        self.stochastic_rounding_seed = stochastic_rounding_seed
        self.module = copy.deepcopy(unwrapped(model)) if teacher is None else teacher
        if device is not None or dtype is not None:
            self.module.to(device=device, dtype=dtype)
        self._plan: Plan | None = Plan(self.module, unwrapped(model))
        self.module.eval().requires_grad_(False)
        self.register_buffer("n_averaged", torch.zeros((), dtype=torch.int64, device=self._plan.device))
        self.capturable = capturable

    @property
    def step(self) -> torch.Tensor:
        """The number of updates made: an int64 tensor without dimensions, in the state_dict as ``n_averaged``."""
        return self.n_averaged

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(
        self,
        model: nn.Module | None = None,
        step: int | torch.Tensor | None = None,
        *,
        found_inf: torch.Tensor | None = None,
    ) -> None:
        """Moves the teacher towards the student, once. Call it after the step of the optimiser.

        Args:
            model: the student, wrapped or not. None: the last one given.
            step: what a schedule is called with. None: the number of updates made before.
            found_inf: a float32 tensor of one element; unless it is 0 the teacher stays as it is, buffers included.
                The update counts nevertheless.
        """
        plan = self._plan_for(model)
        momentum = self.get_decay(step)
        averaged, copied = plan.buffers(self.buffer_mode)
        targets, sources = plan.parameters()
        if averaged[0]:
            targets, sources = targets + averaged[0], sources + averaged[1]
        if plan.several_devices():
            sources = _moved(targets, sources)
        options: dict[str, Any] = {}
        if self.stochastic_rounding_seed is not None:
            options["stochastic_rounding_seed"] = self.stochastic_rounding_seed
            options["step"] = self._count()
            options["first_elements"] = plan.first_elements(len(averaged[0]))
        try:
            ema_update_(targets, sources, momentum, found_inf=found_inf, **options)
        except ValueError:
            plan.check_shapes()  # its error has the name of the parameter
            raise
        _copy(copied[0], copied[1], found_inf)
        self.n_averaged.add_(1)

    def update_parameters(self, model: nn.Module) -> None:
        """`update`, by the name that ``AveragedModel`` gives it."""
        self.update(model)

    @torch.no_grad()
    def set(self, model: nn.Module) -> None:
        """Copies all parameters and buffers of ``model`` into the teacher."""
        _copy(*self._plan_for(model).everything("copy"))

    @torch.no_grad()
    def copy_to(self, model: nn.Module | None = None) -> None:
        """Copies the teacher into ``model``: parameters, and buffers unless they are ignored."""
        targets, sources = self._plan_for(model, keep=False).everything(self.buffer_mode)
        _copy(sources, targets)

    @contextlib.contextmanager
    def swap(self, model: nn.Module | None = None) -> Iterator[nn.Module]:
        """Within this context ``model`` has the teacher's weights; after it, bit for bit its own.

        What is written to the model inside is lost. Costs a copy of the model.
        """
        plan = self._plan_for(model, keep=False)
        with torch.no_grad():
            targets, sources = plan.everything(self.buffer_mode)
            own = [source.clone() for source in sources]
        try:
            with torch.no_grad():
                _copy(sources, targets)
            yield plan.student.root if model is None else model
        finally:
            plan.student.reshard()
            with torch.no_grad():
                _copy(sources, own)

    def get_decay(self, step: int | torch.Tensor | None = None) -> float | torch.Tensor:
        """The momentum of the next update, or of the one that is given this ``step``."""
        momentum = self.momentum
        if not callable(momentum):
            return momentum
        if step is None:
            step = self._count() + getattr(momentum, "first_step", 0)
        return momentum(step)

    def train(self, mode: bool = True) -> EMATeacher:
        self.training = mode  # the teacher's own mode is not that of the model around it
        return self

    def get_extra_state(self) -> dict:
        return {
            "momentum": schedules.encode(self.momentum),
            "buffers": self.buffer_mode,
            "seed": self.stochastic_rounding_seed,
        }

    def set_extra_state(self, state: dict) -> None:
        self.buffer_mode = state.get("buffers", self.buffer_mode)
        self.stochastic_rounding_seed = state.get("seed", self.stochastic_rounding_seed)
        momentum = schedules.decode(state.get("momentum"))
        if isinstance(momentum, torch.Tensor) and isinstance(self.momentum, torch.Tensor):
            self.momentum.data.copy_(momentum)  # others may hold this tensor, a CUDA graph for one
        elif momentum is not None:
            self.momentum = momentum

    def extra_repr(self) -> str:
        seed = self.stochastic_rounding_seed
        rounding = "" if seed is None else f", stochastic_rounding_seed={seed}"
        return f"momentum={self.momentum}, buffers={self.buffer_mode!r}{rounding}"

    def __getstate__(self) -> dict:
        # a copy that still followed the old student would do so silently
        return {**super().__getstate__(), "_plan": None}

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        # the peers know no extra state, and timm keeps no count
        state_dict.setdefault(prefix + "_extra_state", {})
        state_dict.setdefault(prefix + "n_averaged", self.n_averaged)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _count(self) -> int | torch.Tensor:
        capturable = self.n_averaged.device.type != "cpu" if self.capturable is None else self.capturable
        return self.n_averaged if capturable else int(self.n_averaged)

    def _plan_for(self, model: nn.Module | None, keep: bool = True) -> Plan:
        plan = self._plan
        if model is None:
            if plan is None:
                raise ValueError(f"{NAME}: model must be given, as this teacher was copied or loaded, got None")
            student = plan.student.root
        elif isinstance(model, nn.Module):
            student = unwrapped(model)
        else:
            raise TypeError(f"{NAME}: model must be a module, got {type(model).__name__}")
        if plan and plan.student.root is student and plan.teacher.root is self.module and plan.current():
            return plan
        plan = Plan(self.module, student)
        if keep:
            self._plan = plan
        return plan


def _check_arguments(
    model: nn.Module, teacher: nn.Module | None, momentum: object, buffers: object, seed: object
) -> None:
    for argument, module in (("model", model), ("teacher", teacher)):
        if not isinstance(module, nn.Module) and (argument == "model" or module is not None):
            raise TypeError(f"{NAME}: {argument} must be a module, got {type(module).__name__}")
    if teacher is not None and unwrapped(teacher) is unwrapped(model):
        raise ValueError(f"{NAME}: teacher must be another module than model, got the same")
    if teacher is None and sharded_modules(model):
        raise ValueError(
            f"{NAME}: model must not be under fully_shard, which cannot be copied: copy it before, shard both alike "
            "and give the copy as teacher, got teacher=None"
        )
    if buffers not in BUFFERS:
        raise ValueError(f"{NAME}: buffers must be one of {', '.join(map(repr, BUFFERS))}, got {buffers!r}")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64):
        raise ValueError(f"{NAME}: stochastic_rounding_seed must be None or an integer of 64 bits, got {seed!r}")
    if isinstance(momentum, torch.Tensor):
        if momentum.numel() != 1 or not momentum.is_floating_point():
            given = f"{momentum.dtype} of shape {tuple(momentum.shape)}"
            raise ValueError(f"{NAME}: momentum must be a floating-point tensor of one element, got {given}")
    elif not callable(momentum):
        if isinstance(momentum, bool) or not isinstance(momentum, (int, float)):
            raise TypeError(f"{NAME}: momentum must be a float, a tensor or a callable, got {type(momentum).__name__}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"{NAME}: momentum must lie in [0, 1], got {momentum}")


def _moved(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> list[torch.Tensor]:
    return [source.to(target.device) for target, source in zip(targets, sources, strict=True)]


def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor], found_inf: torch.Tensor | None = None) -> None:
    if not targets:
        return
    if found_inf is not None:
        stay = found_inf.reshape(()) != 0
        pairs = zip(targets, sources, strict=True)
        sources = [torch.where(stay.to(target.device), target, source.to(target)) for target, source in pairs]
    torch._foreach_copy_(targets, sources)

"""The arguments of other teachers, timm's ModelEmaV3 and torch's AveragedModel, in terms of ours."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass

from sslkernels.nn.ema_plan import NAME
from sslkernels.nn.momentum import ConstantMomentum, EqualMomentum, Momentum, TimmDecay


@dataclass(frozen=True)
class PeerArguments:
    """None: not given."""

    decay: float | None = None
    min_decay: float = 0.0
    update_after_step: int = 0
    use_warmup: bool = False
    warmup_gamma: float = 1.0
    warmup_power: float = 2 / 3
    foreach: bool = True  # there is one way to update, and it is faster than either
    exclude_buffers: bool | None = None
    use_buffers: bool | None = None
    avg_fn: Callable | None = None
    multi_avg_fn: Callable | None = None


def translate(
    momentum: Momentum | Callable, default: float, buffers: str | None, given: dict
) -> tuple[Momentum | Callable, str]:
    """Momentum and mode of the buffers that ``given``, the arguments of a peer, ask for."""
    known = [field.name for field in dataclasses.fields(PeerArguments)]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise TypeError(f"{NAME}: there is no argument {unknown[0]!r}; those of peers are {', '.join(known)}")
    peer = PeerArguments(**given)
    average = averaging(peer.avg_fn, peer.multi_avg_fn)
    timm = peer.decay is not None or peer.use_warmup or peer.update_after_step > 0
    ways = ["momentum"] if momentum is not default else []
    ways += ["decay"] if peer.decay is not None else ["use_warmup or update_after_step"] if timm and average else []
    ways += ["an averaging function"] if average else []
    if len(ways) > 1:
        raise ValueError(f"{NAME}: the momentum must be given in one way, got {' and '.join(ways)}")
    return (_timm_decay(peer, momentum) if timm else average or momentum), _buffers(peer, buffers, timm)


def averaging(avg_fn: Callable | None, multi_avg_fn: Callable | None) -> ConstantMomentum | EqualMomentum | None:
    """The schedule that one of the averaging functions of torch.optim.swa_utils stands for."""
    given = avg_fn if multi_avg_fn is None else multi_avg_fn
    if given is None:
        return None
    maker = getattr(given, "__qualname__", "").split(".")[0]
    if getattr(given, "__module__", None) == "torch.optim.swa_utils":
        if maker in ("get_ema_avg_fn", "get_ema_multi_avg_fn"):
            decay = inspect.getclosurevars(inspect.unwrap(given)).nonlocals["decay"]
            return ConstantMomentum(decay, copies=1)
        if maker in ("get_swa_avg_fn", "get_swa_multi_avg_fn"):
            return EqualMomentum()
    argument = "avg_fn" if multi_avg_fn is None else "multi_avg_fn"
    raise TypeError(
        f"{NAME}: {argument} must come from get_ema_{argument} or get_swa_{argument} of torch.optim.swa_utils, "
        f"got {given!r}; give a schedule as momentum instead"
    )


def _timm_decay(peer: PeerArguments, momentum: object) -> TimmDecay:
    decay = momentum if peer.decay is None else peer.decay
    if isinstance(decay, bool) or not isinstance(decay, (int, float)):
        raise TypeError(f"{NAME}: decay must be a float, got {type(decay).__name__}")
    if not 0 <= decay <= 1:
        raise ValueError(f"{NAME}: decay must lie in [0, 1], got {decay}")
    return TimmDecay(
        float(decay), peer.min_decay, peer.update_after_step, peer.use_warmup, peer.warmup_gamma, peer.warmup_power
    )


def _buffers(peer: PeerArguments, buffers: str | None, timm: bool) -> str:
    if buffers is not None:
        return buffers
    if peer.exclude_buffers is not None:
        return "copy" if peer.exclude_buffers else "ema"
    if peer.use_buffers is not None:
        return "ema" if peer.use_buffers else "copy"
    return "ema" if timm else "copy"

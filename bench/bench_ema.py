"""The moving average of whole models: torch's, timm's, ema-pytorch's, lightly's and ours, against lerp's bandwidth."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from runs import Run, runs
from timing import seconds_of
from torch import nn

from sslkernels import ema_update_
from sslkernels.nn import EMATeacher
from sslkernels.registry import ops

SPEC = next(spec for spec in ops() if spec.name == "ema_update_")
SPECS = {SPEC.name: SPEC}
RUNS = runs(SPECS, ("update",))
MOMENTUM = 0.996


class Weights(nn.Module):
    """A model of these parameters, for the peers that take modules."""

    def __init__(self, tensors):
        super().__init__()
        self.weights = nn.ParameterList(tensor.detach().clone() for tensor in tensors)


def swa_utils(teacher, student):
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    averaged = AveragedModel(Weights(teacher), multi_avg_fn=get_ema_multi_avg_fn(MOMENTUM))
    averaged.n_averaged.fill_(1)  # the first call copies
    return functools.partial(averaged.update_parameters, Weights(student))


def timm(teacher, student):
    from timm.utils import ModelEmaV3

    return functools.partial(ModelEmaV3(Weights(teacher), decay=MOMENTUM).update, Weights(student))


def ema_pytorch(teacher, student):
    from ema_pytorch import EMA

    online = Weights(student)
    ema = EMA(online, ema_model=Weights(teacher), beta=MOMENTUM, include_online_model=False, use_foreach=True)
    return lambda: ema.update_moving_average(ema.ema_model, online, current_decay=MOMENTUM)


def lightly(teacher, student):
    from lightly.models.utils import update_momentum

    return functools.partial(update_momentum, Weights(student), Weights(teacher), MOMENTUM)


def foreach(teacher, student):
    return torch.no_grad()(lambda: torch._foreach_lerp_(teacher, student, 1 - MOMENTUM))


def ours(teacher, student, **options):
    return functools.partial(ema_update_, teacher, student, MOMENTUM, **options)


def with_copy(teacher, student):
    return ours(teacher, student, bf16_copy=[torch.empty_like(tensor) for tensor in student])


def teacher_module(teacher, student):
    follower, online = EMATeacher(Weights(teacher), MOMENTUM), Weights(student)
    return functools.partial(follower.update, online)


def entrants(run: Run, device: str) -> dict[str, Callable]:
    """By label, what makes tensors for a contender and returns what is timed; of a curve those in fp32."""

    def made(follow, teacher_dtype, student_dtype, **options):
        teacher, student = (
            run.case.make(device, teacher_dtype)["teacher"],
            run.case.make(device, student_dtype)["student"],
        )
        return follow(teacher, student, **options)

    peers = {"lightly": lightly, "timm": timm, "ema_pytorch": ema_pytorch}
    peers = {"foreach": foreach, "swa_utils": swa_utils} | {n: peer for n, peer in peers.items() if find_spec(n)}
    fp32, bf16 = torch.float32, torch.bfloat16
    found = {f"{name} fp32": functools.partial(made, peer, fp32, fp32) for name, peer in peers.items()}
    found["ours fp32"] = functools.partial(made, ours, fp32, fp32)
    found["EMATeacher fp32"] = functools.partial(made, teacher_module, fp32, fp32)
    if run.curve:
        return found
    if "timm" in peers:
        found["timm stochastic bf16"] = functools.partial(made, timm, bf16, bf16)
    found["ours stochastic bf16"] = functools.partial(made, ours, bf16, bf16, stochastic_rounding_seed=1)
    found["ours bf16"] = functools.partial(made, ours, bf16, bf16)
    found["ours fp32 from bf16 with copy"] = functools.partial(made, with_copy, fp32, bf16)
    return found


def assert_right(case, device) -> None:
    """All that are in fp32 compute the same."""
    given = case.make(device, torch.float32)
    expected = [t.lerp(s, 1 - MOMENTUM) for t, s in zip(given["teacher"], given["student"], strict=True)]
    for update in (ours, foreach):
        teacher = [tensor.clone() for tensor in given["teacher"]]
        update(teacher, given["student"])()
        torch.testing.assert_close(teacher, expected)


BYTES = {
    "ours fp32": 12,
    "EMATeacher fp32": 12,
    "ours stochastic bf16": 6,
    "ours bf16": 6,
    "ours fp32 from bf16 with copy": 12,  # teacher twice 4, student 2, copy 2
}


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_ema_update(run, race_calls, device):
    assert_right(run.case, device)
    elements = run.case.cost.bytes / 12
    traffic = {label: count * elements for label, count in BYTES.items()}
    peers = {
        "over foreach": ("foreach fp32", "ours fp32"),
        "over swa_utils": ("swa_utils fp32", "ours fp32"),
        "over timm": ("timm fp32", "ours fp32"),
        "over ema_pytorch": ("ema_pytorch fp32", "ours fp32"),
        "over lightly": ("lightly fp32", "ours fp32"),
        "EMATeacher over timm": ("timm fp32", "EMATeacher fp32"),
        "stochastic over timm": ("timm stochastic bf16", "ours stochastic bf16"),
    }
    race_calls(run, entrants(run, device), {"lerp": lerp_rate(run.case, device)}, traffic, peers)


def lerp_rate(case, device) -> Callable[[], float]:
    """GB/s of one lerp_ over as many elements in one piece: what the memory gives this access pattern."""
    teacher, student = torch.randn(2, int(case.cost.bytes / 12), device=device)

    def rate():
        return case.cost.bytes / seconds_of(lambda: teacher.lerp_(student, 1 - MOMENTUM), 1, device) / 1e9

    return rate

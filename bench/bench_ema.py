"""The moving average of whole models: torch's, timm's, ema-pytorch's, lightly's and ours, against lerp's bandwidth."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec

import measure
import pytest
import torch
from torch import nn

from sslkernels import ema_update_
from sslkernels.nn import EMATeacher
from sslkernels.registry import ops

SPEC = next(spec for spec in ops() if spec.name == "ema_update_")
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


def teacher_module(teacher, student):
    follower, online = EMATeacher(Weights(teacher), MOMENTUM), Weights(student)
    return functools.partial(follower.update, online)


def runs(case, device) -> dict[str, Callable]:
    """What is timed, by name and dtype. Each has tensors of its own."""

    def tensors(teacher_dtype, student_dtype):
        return case.make(device, teacher_dtype)["teacher"], case.make(device, student_dtype)["student"]

    peers = {"lightly": lightly, "timm": timm, "ema_pytorch": ema_pytorch}
    peers = {"foreach": foreach, "swa_utils": swa_utils} | {n: peer for n, peer in peers.items() if find_spec(n)}
    fp32, bf16 = torch.float32, torch.bfloat16
    made = {f"{name} fp32": peer(*tensors(fp32, fp32)) for name, peer in peers.items()}
    made["ours fp32"] = ours(*tensors(fp32, fp32))
    made["EMATeacher fp32"] = teacher_module(*tensors(fp32, fp32))
    if "timm" in peers:
        made["timm stochastic bf16"] = timm(*tensors(bf16, bf16))
    made["ours stochastic bf16"] = ours(*tensors(bf16, bf16), stochastic_rounding_seed=1)
    made["ours bf16"] = ours(*tensors(bf16, bf16))
    copies = [torch.empty_like(tensor) for tensor in tensors(bf16, bf16)[0]]
    made["ours fp32 from bf16 with copy"] = ours(*tensors(fp32, bf16), bf16_copy=copies)
    return made


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


@pytest.mark.parametrize("case", SPEC.tagged("bench"), ids=lambda case: case.name)
def test_ema_update(case, race_calls, device):
    assert_right(case, device)
    elements = case.cost.bytes / 12
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
    race_calls(SPEC, case, runs(case, device), {"lerp": lerp_rate(case, device)}, traffic, peers)


def lerp_rate(case, device) -> Callable[[], float]:
    """GB/s of one lerp_ over as many elements in one piece: what the memory gives this access pattern."""
    teacher, student = torch.randn(2, int(case.cost.bytes / 12), device=device)

    def rate():
        seconds = measure.seconds_of(lambda: teacher.lerp_(student, 1 - MOMENTUM), 1, device)
        return case.cost.bytes / seconds / 1e9

    return rate

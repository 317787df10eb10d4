"""Schedules of the momentum, and EMATeacher in place of timm's ModelEmaV3 and torch's AveragedModel."""

import dataclasses
import math
import pickle

import pytest
import timm.utils
import torch
from ema_models import assert_equal_states, change, network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import swa_utils

from sslkernels import nn as ours
from sslkernels.nn.momentum import SCHEDULES, decode, encode

STEPS = 20
LAW = settings(max_examples=25, deadline=None)


# ---- schedules


@LAW
@given(st.integers(2, 50), st.floats(0, 1), st.floats(0, 1))
def test_cosine_is_that_of_lightly(max_steps, base, final):
    schedule = ours.CosineMomentum(max_steps - 1, base, final)
    for step in range(max_steps):
        expected = final - (final - base) * (math.cos(math.pi * step / (max_steps - 1)) + 1) / 2
        assert schedule(step) == pytest.approx(expected, abs=1e-15)
    assert schedule(max_steps) == schedule(10 * max_steps) == final


def test_cosine_is_that_of_dino():
    total, base, final = 37, 0.996, 1.0
    schedule = ours.CosineMomentum(total, base)
    for step in range(total):
        expected = final + 0.5 * (base - final) * (1 + math.cos(math.pi * step / total))
        assert schedule(step) == pytest.approx(expected, abs=1e-15)
    assert schedule(0) == base


@LAW
@given(st.integers(0, 10**6), st.floats(0.1, 100), st.floats(0.1, 1))
def test_warmup_is_that_of_timm(step, gamma, power):
    model = nn.Linear(1, 1)
    peer = timm.utils.ModelEmaV3(model, 0.9999, use_warmup=True, warmup_gamma=gamma, warmup_power=power)
    assert ours.WarmupMomentum(0.9999, gamma, power)(step) == peer.get_decay(step + 1)


@pytest.mark.parametrize("sigma_rel, gamma", [(0.05, 16.97), (0.10, 6.94)])
def test_the_widths_that_karras_gives(sigma_rel, gamma):
    schedule = ours.PowerMomentum.from_sigma_rel(sigma_rel)
    assert schedule.gamma == pytest.approx(gamma, abs=0.005)
    width = math.sqrt((schedule.gamma + 1) / ((schedule.gamma + 2) ** 2 * (schedule.gamma + 3)))
    assert width == pytest.approx(sigma_rel)


def test_the_power_average_weights_the_past_by_a_power():
    schedule, total = ours.PowerMomentum(3.0), 2000
    average = 0.0
    for step in range(total):
        average += (1 - schedule(step)) * ((step + 1) / total - average)
    assert average == pytest.approx((3 + 1) / (3 + 2), abs=1e-3)  # the mean of t with density proportional to t^3


def test_equal_momentum_is_the_mean():
    values, average = torch.randn(30, dtype=torch.float64), 0.0
    for step, value in enumerate(values):
        average += (1 - ours.EqualMomentum()(step)) * (value - average)
    torch.testing.assert_close(average, values.mean())


EVERY = [
    ours.ConstantMomentum(0.9, 3),
    ours.CosineMomentum(7, 0.3, 0.9),
    ours.WarmupMomentum(0.8, 2.0, 0.7),
    ours.PowerMomentum(6.94),
    ours.EqualMomentum(),
    SCHEDULES["TimmDecay"](0.8, 0.1, 2, True, 3.0, 0.5),
    SCHEDULES["TimmDecay"](0.8, update_after_step=3),
]


@pytest.mark.parametrize("schedule", EVERY, ids=repr)
def test_every_schedule_on_the_device_and_in_a_checkpoint(schedule):
    assert decode(encode(schedule)) == schedule == pickle.loads(pickle.dumps(schedule))
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.momentum = 0.5
    for step in range(12):
        number, tensor = schedule(step), schedule(torch.tensor(step))
        assert 0 <= number <= 1
        assert (tensor.dtype, tensor.shape) == (torch.float64, ())
        assert float(tensor) == pytest.approx(number, abs=1e-15)


BAD = {
    r"CosineMomentum: base must lie in \[0, 1\], got 2": lambda: ours.CosineMomentum(5, 2),
    "CosineMomentum: total_steps must be positive, got 0": lambda: ours.CosineMomentum(0),
    "WarmupMomentum: gamma must be positive, got 0": lambda: ours.WarmupMomentum(gamma=0),
    r"ConstantMomentum: momentum must lie in \[0, 1\], got nan": lambda: ours.ConstantMomentum(math.nan),
    "PowerMomentum: gamma must be more than -1, got -1": lambda: ours.PowerMomentum(-1),
    "PowerMomentum: sigma_rel must lie between 0 and": lambda: ours.PowerMomentum.from_sigma_rel(0.3),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_schedules(message):
    with pytest.raises(ValueError, match=f"^{message}"):
        BAD[message]()


# ---- timm


def untied(seed=0):
    model = network(seed)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    return model


OPTIONS = {
    "defaults": {},
    "decay": {"decay": 0.9},
    "warm-up": {"decay": 0.95, "use_warmup": True},
    "warm-up from a least decay": {"decay": 0.95, "min_decay": 0.6, "use_warmup": True, "warmup_gamma": 3.0},
    "power": {"decay": 0.95, "use_warmup": True, "warmup_power": 0.9},
    "later": {"decay": 0.9, "update_after_step": 5},
    "warm-up later": {"decay": 0.9, "update_after_step": 5, "use_warmup": True},
    "without buffers": {"decay": 0.9, "exclude_buffers": True},
    "one by one": {"decay": 0.9, "foreach": False},
}


@pytest.mark.parametrize("counted", [True, False], ids=["step", "no step"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_in_place_of_timm(options, counted):
    if not counted and (options.get("use_warmup") or options.get("update_after_step")):
        options = {"decay": options["decay"]}  # all that timm takes notice of then
    student = untied()
    mine, theirs = ours.ModelEmaV3(student, **options), timm.utils.ModelEmaV3(student, **options)
    plain = ours.EMATeacher(student, **{"decay": 0.9999, **options})
    for step in range(1, STEPS + 1):
        change(student, step)
        for each in (mine, theirs, plain):
            each.update(student, step) if counted else each.update(student)
        for name, tensor in theirs.module.state_dict().items():
            for each in (mine, plain):
                torch.testing.assert_close(each.module.state_dict()[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    for step in (0, 1, 2, 5, 6, 7, 8, 1000):
        assert mine.get_decay(step) == theirs.get_decay(step)
    change(student, 99)
    for each in (mine, theirs):
        each.set(student)
    assert_equal_states(mine.module, theirs.module)


def test_without_a_step_timms_warmup_counts_the_updates():
    student = untied()
    counted = ours.ModelEmaV3(student, 0.95, use_warmup=True, update_after_step=3)
    told = timm.utils.ModelEmaV3(student, 0.95, use_warmup=True, update_after_step=3)
    for step in range(1, STEPS + 1):
        change(student, step)
        counted.update(student)
        told.update(student, step)
    for name, tensor in told.module.state_dict().items():
        torch.testing.assert_close(counted.module.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


def test_timms_arguments_by_position():
    mine = ours.EMATeacher(untied(), 0.9, use_warmup=True, warmup_gamma=2.0)
    theirs = timm.utils.ModelEmaV3(untied(), 0.9, use_warmup=True, warmup_gamma=2.0)
    assert [mine.get_decay(step) for step in range(40)] == [theirs.get_decay(step) for step in range(40)]
    assert mine.buffer_mode == "ema"


def test_in_bfloat16_both_follow_on_the_average():
    student = nn.ParameterList([torch.ones(20_000).bfloat16()])
    mine, theirs = ours.ModelEmaV3(student, 0.999), timm.utils.ModelEmaV3(student, 0.999)
    student[0].data.fill_(2)
    for _ in range(STEPS):
        mine.update(student)
        theirs.update(student)
    expected = 2 - 0.999**STEPS
    for each in (mine, theirs):
        assert abs(each.module[0].float().mean() - expected) < 2e-3


def test_states_of_the_peers_can_be_loaded():
    source = untied(4)
    for peer, count in ((timm.utils.ModelEmaV3(source), 0), (swa_utils.AveragedModel(source), 1)):
        if count:
            peer.update_parameters(source)
        teacher = ours.EMATeacher(untied())
        teacher.load_state_dict(peer.state_dict())
        assert_equal_states(teacher.module, source)
        assert teacher.n_averaged == count
    with pytest.raises(RuntimeError, match="Missing key"):
        ours.EMATeacher(untied()).load_state_dict({})


# ---- AveragedModel

AVERAGES = {
    "mean": {},
    "mean with buffers": {"use_buffers": True},
    "exponential": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)},
    "exponential with buffers": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9), "use_buffers": True},
    "one by one": {"avg_fn": swa_utils.get_ema_avg_fn(0.8)},
    "mean by name": {"multi_avg_fn": swa_utils.get_swa_multi_avg_fn()},
    "mean by name, one by one": {"avg_fn": swa_utils.get_swa_avg_fn()},
}


@pytest.mark.parametrize("options", AVERAGES.values(), ids=AVERAGES)
def test_in_place_of_averaged_model(options):
    student = untied()
    del student.mask  # which the peer's mean of buffers cannot take
    mine, theirs = ours.AveragedModel(student, **options), swa_utils.AveragedModel(student, **options)
    for step in range(STEPS):
        change(student, step)
        for each in (mine, theirs):
            each.update_parameters(student)
        for name, tensor in theirs.module.state_dict().items():
            if tensor.is_floating_point():
                torch.testing.assert_close(mine.module.state_dict()[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
        assert torch.equal(mine.n_averaged, theirs.n_averaged)
    assert torch.equal(mine.module.body[1].num_batches_tracked, student.body[1].num_batches_tracked)


def test_the_teacher_takes_averaging_functions_too():
    options = {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9), "use_buffers": True}
    teacher = ours.EMATeacher(untied(), **options)
    assert teacher.momentum == ours.ConstantMomentum(0.9, copies=1)
    assert teacher.buffer_mode == "ema"
    assert ours.EMATeacher(untied(), avg_fn=swa_utils.get_swa_avg_fn()).momentum == ours.EqualMomentum()
    assert ours.EMATeacher(untied(), use_buffers=False).buffer_mode == "copy"
    with pytest.raises(ValueError, match="given in one way, got decay and an averaging function"):
        ours.EMATeacher(untied(), decay=0.9, **options)


def test_update_bn():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    mine, theirs = ours.AveragedModel(student), swa_utils.AveragedModel(student)
    loader = [torch.randn(8, 3) for _ in range(4)]
    for each in (mine, theirs):
        each.update_parameters(student)
        swa_utils.update_bn(loader, each)
        assert each.module.training
    assert_equal_states(mine.module, theirs.module)
    assert mine.module[1].num_batches_tracked == 4

"""EMATeacher: resuming, copies, evaluation, momentum on the device, and shards in several processes."""

import copy
import io
import pickle

import ema_children
import pytest
import torch
from ema_models import assert_equal_states, change, network, state, train
from torch import nn

from sslkernels.nn import CosineMomentum, EMATeacher, WarmupMomentum

# ---- resuming


def resumable(kind):
    student = network().bfloat16() if kind == "rounded" else network()
    options = {
        "constant": {"momentum": 0.9},
        "cosine": {"momentum": CosineMomentum(20, 0.5)},
        "timm": {"decay": 0.9, "use_warmup": True, "update_after_step": 2},
        "tensor": {"momentum": torch.tensor(0.9)},
        "rounded": {"momentum": 0.99, "stochastic_rounding_seed": 2**63 + 5},
    }
    return student, EMATeacher(student, **options[kind])


@pytest.mark.parametrize("kind", ["constant", "cosine", "timm", "tensor", "rounded"])
def test_resuming_is_bit_for_bit(kind):
    student, whole = resumable(kind)
    train(student, whole, 10)

    student, first = resumable(kind)
    train(student, first, 5)
    file = io.BytesIO()
    torch.save({"student": student.state_dict(), "teacher": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    student = network(8).to(student.head.weight.dtype)
    student.load_state_dict(saved["student"])
    second = EMATeacher(student, 0.1)  # everything comes from the checkpoint
    second.load_state_dict(saved["teacher"])
    train(student, second, 5, first=5)
    assert_equal_states(second, whole)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize("kind", ["cosine", "rounded"])
def test_copies_and_pickles_go_on_alike_and_alone(duplicate, kind):
    student, teacher = resumable(kind)
    train(student, teacher, 3)
    twin = duplicate(teacher)
    with pytest.raises(ValueError, match=r"^EMATeacher: model must be given, as this teacher was copied or loaded"):
        twin.update()
    before = state(twin)
    train(student, teacher, 3, first=3)
    assert_equal_states(twin, before)
    train(student, twin, 3, first=3)
    assert_equal_states(twin, teacher)


def test_stochastic_rounding_depends_on_the_seed_and_the_count_alone():
    def trained(seed, updates=3):
        student = network().bfloat16()
        teacher = EMATeacher(student, 0.999, stochastic_rounding_seed=seed)
        train(student, teacher, updates)
        return teacher.module.body[0].weight

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))

    student = nn.ParameterList([torch.ones(10_000).bfloat16()])
    teacher = EMATeacher(student, 0.999, stochastic_rounding_seed=1)
    student[0].data.fill_(2)
    for _ in range(50):
        teacher.update()
    assert abs(teacher.module[0].float().mean() - (2 - 0.999**50)) < 2e-3  # to nearest it would still be 1


def test_the_state_of_a_momentum_tensor_is_loaded_in_place():
    momentum = torch.tensor(0.9)
    teacher = EMATeacher(network(), momentum)
    saved = copy.deepcopy(teacher.state_dict())
    momentum.fill_(0.1)
    teacher.load_state_dict(saved)
    assert teacher.momentum is momentum
    assert momentum == torch.tensor(0.9)


def test_a_callable_of_the_users_stays_when_a_state_is_loaded():
    teacher = EMATeacher(network(), [0.1, 0.2, 0.3].__getitem__)
    teacher.update()
    other = EMATeacher(network(), [0.1, 0.5, 0.3].__getitem__)
    other.load_state_dict(teacher.state_dict())
    assert other.get_decay() == 0.5


# ---- evaluation


def test_copy_to():
    student, other = network(), network(5)
    teacher = EMATeacher(student, 0.5)
    train(student, teacher, 2)
    teacher.copy_to(other)
    assert_equal_states(other, teacher.module)
    teacher.copy_to()
    assert_equal_states(student, teacher.module)


def test_set():
    student, other = network(), network(5)
    change(other, 2)
    teacher = EMATeacher(student, buffers="ignore")
    teacher.set(other)
    assert_equal_states(teacher.module, other)


@pytest.mark.parametrize("fails", [False, True])
def test_swap_restores_every_bit(fails):
    student = network().bfloat16()
    teacher = EMATeacher(student, 0.5, dtype=torch.float32)
    train(student, teacher, 2)
    with torch.no_grad():
        student.head.bias[0] = torch.nan
    own, averaged = state(student), state(teacher)
    bits = student.head.bias.detach().view(torch.int16).clone()

    def evaluate():
        with teacher.swap(torch.compile(student, backend="eager")):
            for name, tensor in student.state_dict().items():
                assert torch.equal(tensor, teacher.module.state_dict()[name].to(tensor.dtype)), name
            change(student, 77)
            if fails:
                raise KeyError("evaluation")

    if fails:
        with pytest.raises(KeyError, match="evaluation"):
            evaluate()
    else:
        evaluate()
    assert torch.equal(student.head.bias.detach().view(torch.int16), bits)
    own.pop("head.bias")
    assert_equal_states(own, {name: tensor for name, tensor in state(student).items() if name != "head.bias"})
    assert_equal_states(teacher, averaged)
    assert student.head.weight.requires_grad


def test_ignored_buffers_are_not_swapped():
    student = network()
    teacher = EMATeacher(student, buffers="ignore")
    change(student, 1)
    mean = student.body[1].running_mean.clone()
    with teacher.swap():
        assert torch.equal(student.body[1].running_mean, mean)


def test_autograd_notices_an_update():
    student = nn.Linear(2, 2)
    teacher = EMATeacher(student, 0.5)
    x = torch.ones(1, 2, requires_grad=True)
    value = teacher(x).sum()
    change(student, 1)
    teacher.update()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


# ---- on the device


@pytest.mark.parametrize("momentum", [0.9, CosineMomentum(10, 0.5), WarmupMomentum(0.9)], ids=repr)
def test_capturable_updates_are_the_same_and_read_nothing(momentum, monkeypatch):
    students = network(), network()
    plain, capturable = EMATeacher(students[0], momentum), EMATeacher(students[1], momentum, capturable=True)
    for step in range(5):
        for student, teacher in zip(students, (plain, capturable), strict=True):
            change(student, step)
            with monkeypatch.context() as patch:
                if teacher is capturable:
                    for read in ("item", "__int__", "__float__", "__bool__", "tolist"):
                        patch.setattr(torch.Tensor, read, None)
                teacher.update()
    for one, other in zip(plain.state_dict().values(), capturable.state_dict().values(), strict=True):
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, other)


def test_a_momentum_tensor_is_read_at_every_update():
    student = network()
    momentum = torch.tensor(1.0)
    teacher = EMATeacher(student, momentum)
    change(student, 1)
    teacher.update()
    assert not torch.equal(teacher.module.head.bias, student.head.bias)
    momentum.fill_(0)
    teacher.update()
    assert torch.equal(teacher.module.head.bias, student.head.bias)


# ---- several processes


@pytest.mark.parametrize("mesh_shape", [(2,), (1, 2), (2, 1)], ids=["sharded", "hybrid", "replicated"])
@pytest.mark.parametrize("dtype, seed", [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, 7)])
def test_a_sharded_teacher_equals_that_of_one_process(dtype, seed, mesh_shape):
    ema_children.run(ema_children.fully_sharded, 2, dtype, seed, mesh_shape)


@pytest.mark.parametrize(
    "target",
    [ema_children.sharded_otherwise, ema_children.cannot_be_copied, ema_children.wrapped_for_data_parallelism],
)
def test_in_two_processes(target):
    ema_children.run(target, 2)

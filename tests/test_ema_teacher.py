"""EMATeacher: what follows what, buffers, wrappers, a student that changes, and every error."""

import copy

import pytest
import torch
from ema_models import Network, assert_equal_states, change, network, state, train
from torch import nn

from sslkernels.nn import CosineMomentum, EMATeacher

# ---- what follows what


def test_every_parameter_moves_once_and_by_the_momentum():
    student = network()
    teacher = EMATeacher(student, 0.75)
    expected = {name: tensor.detach().clone() for name, tensor in teacher.module.named_parameters()}
    for step in range(3):
        change(student, step)
        teacher.update(student)
        for name, parameter in student.named_parameters():
            expected[name].lerp_(parameter.detach(), 0.25)
    for name, parameter in teacher.module.named_parameters():
        torch.testing.assert_close(parameter, expected[name])
        assert not parameter.requires_grad
    assert teacher.module.head.weight is teacher.module.embed.weight
    assert teacher.step == teacher.n_averaged == 3


def test_one_call_of_the_op_per_update(monkeypatch):
    calls = []
    monkeypatch.setattr("sslkernels.nn.ema.ema_update_", lambda *args, **_: calls.append(args))
    student = network()
    EMATeacher(student, buffers="ema").update()
    ((targets, sources, momentum),) = calls
    assert len(targets) == len(sources) == 6 + 2  # parameters, one of them tied; mean and variance
    assert momentum == 0.996


@pytest.mark.parametrize("mode", ["copy", "ema", "ignore"])
def test_buffers(mode):
    student = network()
    teacher = EMATeacher(student, 0.5, buffers=mode)
    before = state(teacher.module)
    change(student, 1)
    student.body[1].num_batches_tracked.fill_(7)
    teacher.update()
    ours, theirs = teacher.module, student
    mean = before["body.1.running_mean"]
    expected = {"copy": theirs.body[1].running_mean, "ema": mean.lerp(theirs.body[1].running_mean, 0.5), "ignore": mean}
    torch.testing.assert_close(ours.body[1].running_mean, expected[mode])
    assert ours.body[1].num_batches_tracked == 7
    assert torch.equal(ours.mask, theirs.mask)
    assert torch.equal(ours.cache, theirs.cache)


def test_a_buffer_that_is_a_new_tensor_at_every_step():
    student = network()
    teacher = EMATeacher(student)
    for step in range(3):
        student.mask = torch.tensor([step == 1, step == 2])
        student.cache = torch.full((2,), float(step))
        plan = teacher._plan
        teacher.update()
        assert torch.equal(teacher.module.mask, student.mask)
        assert torch.equal(teacher.module.cache, student.cache)
        assert teacher._plan is plan


def test_a_cache_that_grows_in_one_of_them_is_left_alone():
    student = network()
    teacher = EMATeacher(student)
    student.cache = torch.ones(5)
    teacher.update()
    assert torch.equal(teacher.module.cache, torch.zeros(2))


def test_frozen_parameters_are_a_fixed_point_and_followed_when_they_change():
    student = network()
    student.body[0].weight.requires_grad_(False)
    teacher = EMATeacher(student, 0.9)
    frozen = student.body[0].weight.clone()
    for _ in range(100):
        teacher.update()
    assert torch.equal(teacher.module.body[0].weight, frozen)
    student.body[0].weight.fill_(1)
    teacher.update()
    torch.testing.assert_close(teacher.module.body[0].weight, frozen.lerp(torch.ones(()), 0.1))


def test_a_nan_student_leaves_a_teacher_at_momentum_1_alone():
    student = network()
    teacher = EMATeacher(student, 1.0)
    before = [parameter.clone() for parameter in teacher.parameters()]
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(torch.nan)
    teacher.update()
    assert all(torch.equal(*pair) for pair in zip(before, teacher.parameters(), strict=True))


def test_found_inf_leaves_parameters_and_buffers_alone():
    student = network()
    teacher = EMATeacher(student, 0.5)
    before = state(teacher.module)
    change(student, 1)
    teacher.update(found_inf=torch.ones(1))
    assert_equal_states(teacher.module, before)
    teacher.update(found_inf=torch.zeros(1))
    assert torch.equal(teacher.module.body[1].running_mean, student.body[1].running_mean)
    assert not torch.equal(teacher.module.head.weight, before["head.weight"])
    assert teacher.step == 2


def test_parametrised_models():
    student = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    teacher = EMATeacher(student, 0.5)
    direction = teacher.module.parametrizations.weight.original1.clone()
    change(student, 1)
    teacher.update()
    expected = direction.lerp(student.parametrizations.weight.original1.detach(), 0.5)
    torch.testing.assert_close(teacher.module.parametrizations.weight.original1, expected)
    assert teacher(torch.ones(1, 3)).shape == (1, 2)


def test_complex_empty_and_no_parameters():
    student = nn.ParameterList([torch.ones(2, dtype=torch.complex64), torch.zeros(0)])
    teacher = EMATeacher(student, 0.5)
    student[0].data.fill_(3 + 2j)
    teacher.update()
    torch.testing.assert_close(teacher.module[0].data, torch.full((2,), 2 + 1j))
    EMATeacher(nn.ReLU()).update()


def test_the_teacher_keeps_its_mode():
    student = network()
    both = nn.ModuleDict({"student": student, "teacher": EMATeacher(student)})
    both.train()
    assert student.training
    assert not both["teacher"].module.training
    both["teacher"].module.train()
    both.eval()
    assert both["teacher"].module.training


def test_dtype_and_device():
    student = network().bfloat16()
    teacher = EMATeacher(student, 0.9, dtype=torch.float32)
    before = teacher.module.head.bias.clone()
    change(student, 1)
    teacher.update()
    torch.testing.assert_close(teacher.module.head.bias, before.lerp(student.head.bias.detach().float(), 0.1))
    elsewhere = EMATeacher(network(), device="meta")
    elsewhere.update()
    assert {parameter.device.type for parameter in elsewhere.parameters()} == {"meta"}


def test_a_student_that_moves_away_is_fetched():
    student = network()
    teacher = EMATeacher(student)
    teacher.module.to("meta")
    teacher.update()
    assert {parameter.device.type for parameter in teacher.module.parameters()} == {"meta"}


# ---- wrappers


class Wrapper(nn.Module):
    """Like DistributedDataParallel, of another library."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def compiled_inside(model):
    model.body = torch.compile(model.body, backend="eager")
    return model


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled inside": compiled_inside,
    "data parallel": nn.DataParallel,
    "prefixed": Wrapper,
    "prefixed and compiled": lambda model: Wrapper(torch.compile(model, backend="eager")),
    "compiled twice wrapped": lambda model: torch.compile(nn.DataParallel(Wrapper(model)), backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_students_match(wrap):
    student, plain = network(), network()
    teacher, expected = EMATeacher(student, 0.5), EMATeacher(plain, 0.5)
    wrapped = wrap(student)
    train(plain, expected, 2)
    for step in range(2):
        change(plain, step)
        with torch.no_grad():
            for mine, theirs in zip(student.state_dict().values(), plain.state_dict().values(), strict=True):
                mine.copy_(theirs)
        teacher.update(wrapped)
    assert_equal_states(teacher.module, expected.module)


def test_the_teacher_of_a_wrapped_student_is_not_wrapped():
    student = network()
    teacher = EMATeacher(torch.compile(nn.DataParallel(student), backend="eager"))
    assert_equal_states(teacher.module, student)
    assert type(teacher.module) is Network
    torch.testing.assert_close(teacher(torch.ones(2, 3, 8, 8)), student.eval()(torch.ones(2, 3, 8, 8)))


def test_a_model_with_a_part_named_module_stays_itself():
    class Doubled(Wrapper):
        def forward(self, x):
            return 2 * self.module(x)

    teacher = EMATeacher(Doubled(nn.Linear(2, 2)))
    assert type(teacher.module) is Doubled
    teacher.update()


# ---- a student that changes


def test_a_replaced_parameter_or_module_is_followed():
    student = network()
    teacher = EMATeacher(student, 0.0)
    for replace in (
        lambda: setattr(student.head, "bias", nn.Parameter(torch.full((4,), 5.0))),
        lambda: setattr(student, "body", copy.deepcopy(student.body)),
        lambda: student.load_state_dict(network(3).state_dict(), assign=True),
        lambda: teacher.module.load_state_dict(network(4).state_dict(), assign=True),
    ):
        replace()
        student.head.weight = student.embed.weight
        teacher.module.head.weight = teacher.module.embed.weight
        change(student, 9)
        teacher.update()
        assert torch.equal(teacher.module.head.bias, student.head.bias)
        assert torch.equal(teacher.module.body[0].weight, student.body[0].weight)


def resize(owner, name, *shape):
    setattr(owner, name, nn.Parameter(torch.zeros(shape)))


CHANGES = {
    "student must have no parameter that the teacher lacks, got 'extra.bias', 'extra.weight'": lambda m: m.add_module(
        "extra", nn.Linear(1, 1)
    ),
    "student must have no parameter that the teacher lacks, got 'embed.bias'": lambda m: resize(m.embed, "bias", 4),
    "student must have no parameter that the teacher lacks, got 'body.scale'": lambda m: m.body.register_parameter(
        "scale", nn.Parameter(torch.ones(1))
    ),
    "student must have every parameter of the teacher, lacks 'head.bias'": lambda m: setattr(m.head, "bias", None),
    "student must have every parameter of the teacher, lacks 'body.0.bias', 'body.0.weight'": lambda m: setattr(
        m.body, "0", nn.Identity()
    ),
    "student must have every buffer of the teacher, lacks 'mask'": lambda m: delattr(m, "mask"),
    "student must have every buffer of the teacher, lacks 'body.1.running_mean'": lambda m: setattr(
        m.body[1], "running_mean", None
    ),
    "student must have no buffer that the teacher lacks, got 'new'": lambda m: m.register_buffer("new", torch.ones(1)),
    r"student parameter 'head.bias' must have the teacher's shape \(4,\), got \(4, 4\)": lambda m: resize(
        m.head, "bias", 4, 4
    ),
    r"student parameter 'body.0.bias' must have the teacher's shape \(4,\), got \(1,\)": lambda m: setattr(
        m.body[0].bias, "data", torch.zeros(1)
    ),
    r"student buffer 'mask' must have the teacher's shape \(2,\), got \(1,\)": lambda m: setattr(
        m, "mask", torch.ones(1, dtype=torch.bool)
    ),
    r"student buffer 'body.1.running_var' must have the teacher's shape \(4,\), got \(1,\)": lambda m: m.body[
        1
    ].running_var.resize_(1),
    "student must tie 'head.weight' to 'embed.weight' as the teacher does, got two": lambda m: resize(
        m.head, "weight", 4, 4
    ),
}


@pytest.mark.parametrize("message", CHANGES)
def test_a_student_that_gained_lost_or_resized_something_is_an_error(message):
    student = network()
    teacher = EMATeacher(student)
    teacher.update()
    before = state(teacher)
    change(student, 1)
    CHANGES[message](student)
    for use in (teacher.update, teacher.copy_to):
        with pytest.raises(ValueError, match=f"^EMATeacher: {message}") as raised:
            use(student)
        assert "\n" not in str(raised.value)
    assert_equal_states(teacher, before)


def test_no_broadcasting():
    teacher = EMATeacher(nn.ParameterList([torch.zeros(3, 3)]))
    with pytest.raises(ValueError, match=r"'0' must have the teacher's shape \(3, 3\), got \(3,\)"):
        teacher.update(nn.ParameterList([torch.zeros(3)]))


# ---- errors


def bad_arguments():
    model = nn.Linear(1, 1)
    return {
        "model must be a module, got list": (TypeError, ([],), {}),
        "teacher must be a module, got str": (TypeError, (model,), {"teacher": "copy"}),
        "teacher must be another module than model, got the same": (ValueError, (model,), {"teacher": model}),
        r"momentum must lie in \[0, 1\], got 1.5": (ValueError, (model, 1.5), {}),
        r"momentum must lie in \[0, 1\], got nan": (ValueError, (model, float("nan")), {}),
        "momentum must be a float, a tensor or a callable, got str": (TypeError, (model, "cpu"), {}),
        r"tensor of one element, got torch.float32 of shape \(2,\)": (ValueError, (model, torch.ones(2)), {}),
        "buffers must be one of 'copy', 'ema', 'ignore', got 'swa'": (ValueError, (model,), {"buffers": "swa"}),
        "must be None or an integer of 64 bits, got 0.5": (ValueError, (model,), {"stochastic_rounding_seed": 0.5}),
        "must have run once, so that lazy parameter 'weight' has a shape": (ValueError, (nn.LazyLinear(2),), {}),
        "there is no argument 'decai'; those of peers are decay, min_decay": (TypeError, (model,), {"decai": 0.9}),
        "given in one way, got momentum and decay": (ValueError, (model, 0.9), {"decay": 0.9}),
        "decay must be a float, got CosineMomentum": (TypeError, (model, CosineMomentum(5)), {"use_warmup": True}),
        r"decay must lie in \[0, 1\], got 2": (ValueError, (model,), {"decay": 2}),
        "avg_fn must come from get_ema_avg_fn or get_swa_avg_fn": (TypeError, (model,), {"avg_fn": min}),
    }


@pytest.mark.parametrize("message", bad_arguments())
def test_bad_arguments_are_one_clear_error(message):
    error, args, options = bad_arguments()[message]
    with pytest.raises(error, match=f"^EMATeacher: .*{message}") as raised:
        EMATeacher(*args, **options)
    assert "\n" not in str(raised.value)


def test_a_model_that_is_none():
    with pytest.raises(TypeError, match=r"^EMATeacher: model must be a module, got dict"):
        EMATeacher(network()).update({})


def test_a_schedule_that_leaves_the_range_writes_nothing():
    student = network()
    teacher = EMATeacher(student, lambda step: 2.0)
    before = state(teacher)
    change(student, 1)
    with pytest.raises(ValueError, match=r"^ema_update_: momentum must lie in \[0, 1\], got 2.0"):
        teacher.update()
    assert_equal_states(teacher, before)

"""The moving average among torch and Python: autograd, the compiler, threads, what may be given, every error."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from conftest import require_or_skip
from test_ema import tensors
from torch import nn

from sslkernels import _library, ema_update_


def test_gradients_do_not_flow_and_autograd_notices():
    for dtype in (torch.float32, torch.complex64):  # past the dispatcher, and through it
        teacher, weight = (
            torch.zeros(3, requires_grad=True, dtype=dtype),
            torch.ones(3, requires_grad=True, dtype=dtype),
        )
        product = (teacher * weight).abs().sum()
        ema_update_([teacher], [torch.ones(3, dtype=dtype)], 0.5)
        assert teacher.requires_grad and teacher.grad_fn is None and teacher[0] == 0.5
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


@pytest.mark.parametrize("call", ["float", "tensor", "stochastic"])
def test_compiles_whole_with_at_most_one_recompilation(call):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    momentum = torch.tensor(0.9) if call == "tensor" else 0.9
    seed = 5 if call == "stochastic" else None

    def update(teacher, student):
        ema_update_(teacher, student, momentum, stochastic_rounding_seed=seed, step=3)

    compiled = torch.compile(update, fullgraph=True, dynamic=True, backend=counter)
    for rows in (64, 96, 33):
        teacher, student = (tensors((rows, 3), (rows,), seed=s, dtype=torch.bfloat16) for s in (0, 1))
        expected = [t.clone() for t in teacher]
        update(expected, student)
        compiled(teacher, student)
        assert all(torch.equal(t, e) for t, e in zip(teacher, expected, strict=True))
    assert counter.frame_count <= 2
    once, expected = tensors((5,))[0], tensors((5,))[0].lerp(torch.ones(5), 0.1)
    compiled([once, once], 2 * [torch.ones(5)])
    if call != "stochastic":
        torch.testing.assert_close(once, expected)


def test_operators_that_are_called_directly_check_too():
    weight = torch.full((), 0.5, dtype=torch.float64)
    update = torch.ops.sslkernels.ema_update_
    require_or_skip(_library.extension, _library.extension_error)
    with pytest.raises(RuntimeError, match="one shape"):
        update([torch.zeros(3, 3)], [torch.zeros(3)], weight, None, [], None, None, [])
    with pytest.raises(RuntimeError, match="as many students"):
        update([torch.zeros(3)], [], weight, None, [], None, None, [])
    with pytest.raises(RuntimeError, match="two keys"):
        update([torch.zeros(3)], [torch.zeros(3)], weight, None, [], 1, torch.zeros((), dtype=torch.int64), [])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same(threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        teacher, student = (
            tensors((300001,), (70000,), (13,), dtype=torch.bfloat16),
            tensors((300001,), (70000,), (13,), seed=1),
        )
        expected = [t.clone() for t in teacher]
        ema_update_(teacher, student, 0.9, stochastic_rounding_seed=1)
        torch.set_num_threads(1)
        ema_update_(expected, student, 0.9, stochastic_rounding_seed=1)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(t, e) for t, e in zip(teacher, expected, strict=True))


# ---- what may be given


def test_modules_are_matched_by_name_and_tied_parameters_updated_once():
    class Tied(nn.Module):
        def __init__(self, reverse=False):
            super().__init__()
            for name in ("b", "a") if reverse else ("a", "b"):
                setattr(self, name, nn.Linear(4, 4))
            self.tied = nn.Linear(4, 4)
            self.tied.weight = self.a.weight

    torch.manual_seed(0)
    teacher, student = Tied(), Tied(reverse=True)
    expected = {
        name: p.detach().lerp(dict(student.named_parameters())[name], 0.25) for name, p in teacher.named_parameters()
    }
    ema_update_(teacher, student, 0.75)
    torch.testing.assert_close({n: p.detach() for n, p in teacher.named_parameters()}, expected)


def test_a_tensor_that_is_listed_twice_is_updated_once():
    (teacher, other), (student, source) = tensors((50,), (3,)), tensors((50,), (3,), seed=1)
    expected = teacher.lerp(student, 0.5)
    ema_update_([teacher, other, teacher], [student, source, student], 0.5)
    torch.testing.assert_close(teacher, expected)


def test_any_iterable_will_do():
    teacher, student = nn.Linear(3, 3), nn.Linear(3, 3)
    ema_update_(teacher.parameters(), tuple(student.parameters()), 0.0)
    assert torch.equal(teacher.weight, student.weight)
    ema_update_([], [], 0.5)


class Subclass(torch.Tensor):
    pass


def test_subclasses_go_through_the_dispatcher():
    teacher, student = torch.zeros(3).as_subclass(Subclass), torch.ones(3)
    ema_update_([teacher], [student], 0.5)
    assert torch.equal(teacher.as_subclass(torch.Tensor), torch.full((3,), 0.5))


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return [torch.zeros(shape, dtype=dtype, device=device)]


Z = zeros(3)
LINEAR = nn.Linear(3, 3)
SHARED, PAIR, COPY = torch.zeros(5), [*zeros(3), *zeros(3)], zeros(3, dtype=torch.bfloat16)
NARROW_Z, SHORT = zeros(3, dtype=torch.bfloat16), zeros(2, dtype=torch.bfloat16)
ERRORS = [
    # teacher, student, momentum, options, the error
    (zeros(3, 3), Z, 0.5, {}, "ValueError: student[0] must have the shape of teacher[0], (3, 3), got (3,)"),
    (Z, [], 0.5, {}, "ValueError: student must have 1 tensors like teacher, got 0"),
    (Z[0], Z, 0.5, {}, "TypeError: teacher must be a list of tensors or a module, got Tensor"),
    ([1.0], Z, 0.5, {}, "TypeError: teacher[0] must be a tensor, got float"),
    (
        LINEAR,
        Z,
        0.5,
        {},
        "TypeError: teacher and student must both be modules or both lists of tensors, got Linear and",
    ),
    (
        LINEAR,
        nn.Linear(3, 3, bias=False),
        0.5,
        {},
        "ValueError: student must have the parameters of the other module, ",
    ),
    (
        zeros(3, dtype=torch.int64),
        Z,
        0.5,
        {},
        "TypeError: teacher[0] must be floating-point or complex, got torch.int64",
    ),
    (Z, zeros(3, dtype=torch.complex64), 0.5, {}, "TypeError: student[0] must be complex where its teacher is, got "),
    (Z, [Z[0].to_sparse()], 0.5, {}, "TypeError: student[0] must be dense, got torch.sparse_coo"),
    (Z, zeros(3, device="meta"), 0.5, {}, "ValueError: student[0] must have the device of teacher[0], cpu, got meta"),
    ([torch.zeros(1).expand(3)], Z, 0.5, {}, "ValueError: teacher[0] must not be expanded"),
    (2 * Z, [*zeros(3), *zeros(3)], 0.5, {}, "ValueError: teacher[1] is listed before with another student"),
    (Z, zeros(3), 1.5, {}, "ValueError: momentum must lie in [0, 1], got 1.5"),
    (Z, zeros(3), torch.nan, {}, "ValueError: momentum must lie in [0, 1], got nan"),
    (Z, zeros(3), "0.5", {}, "TypeError: momentum must be a float or a tensor, got str"),
    (Z, zeros(3), torch.ones(2), {}, "ValueError: momentum must be a floating-point tensor of one element, got "),
    (Z, zeros(3), 0.5, {"stochastic_rounding_seed": 2**64}, "ValueError: stochastic_rounding_seed must be None or an "),
    (Z, zeros(3), 0.5, {"step": 0.5}, "TypeError: step must be an int or an int64 tensor, got float"),
    (
        Z,
        zeros(3),
        0.5,
        {"step": torch.ones(1)},
        "ValueError: step must be an int or an int64 tensor of one element, got ",
    ),
    (Z, zeros(3), 0.5, {"found_inf": True}, "TypeError: found_inf must be None or a tensor, got bool"),
    (Z, zeros(3), 0.5, {"bf16_copy": []}, "ValueError: bf16_copy must have 1 items like teacher, got 0"),
    (
        Z,
        zeros(3),
        0.5,
        {"bf16_copy": zeros(3)},
        "TypeError: bf16_copy[0] must be bfloat16 and its teacher float32, got ",
    ),
    (
        NARROW_Z,
        zeros(3),
        0.5,
        {"bf16_copy": NARROW_Z},
        "TypeError: bf16_copy[0] must be bfloat16 and its teacher float32",
    ),
    (
        Z,
        zeros(3),
        0.5,
        {"bf16_copy": SHORT},
        "ValueError: bf16_copy[0] must have the shape of teacher[0], (3,), got (2,)",
    ),
    (Z, zeros(3), 0.5, {"first_elements": [0, 1]}, "ValueError: first_elements must have 1 items like teacher, got 2"),
    (
        Z,
        zeros(3),
        0.5,
        {"first_elements": [0.5]},
        "ValueError: first_elements[0] must be the index of an ",
    ),
    ([SHARED, SHARED[:3]], [*zeros(5), *zeros(3)], 0.5, {}, "ValueError: teacher[1] shares memory with another tensor"),
    (zeros(3), zeros(3), 0.5, {"bf16_copy": 2 * SHORT}, "ValueError: bf16_copy must have 1 items like teacher, got 2"),
    (PAIR, PAIR, 0.5, {"bf16_copy": 2 * COPY}, "ValueError: bf16_copy[1] shares memory with another tensor"),
    (Z, zeros(3), 1.0, {"backend": "cuda"}, "RuntimeError: backend 'cuda' is not available on cpu"),
    (Z, zeros(3), 0.5, {"backend": "triton"}, "RuntimeError: backend 'triton' is not available on cpu"),
]


@pytest.mark.parametrize("teacher, student, momentum, options, error", ERRORS, ids=[error for *_, error in ERRORS])
def test_errors_name_what_is_wrong(teacher, student, momentum, options, error):
    kind, message = error.split(": ", 1)
    with pytest.raises((TypeError, ValueError, RuntimeError)) as raised:
        ema_update_(teacher, student, momentum, **options)
    assert type(raised.value).__name__ == kind
    assert str(raised.value).startswith(f"ema_update_: {message}")


def test_nothing_is_written_when_one_tensor_is_wrong():
    teacher, student = tensors((5,), (3, 3)), tensors((5,), (3,), seed=1)
    before = [t.clone() for t in teacher]
    with pytest.raises(ValueError, match="shape"):
        ema_update_(teacher, student, 0.5)
    assert all(torch.equal(t, b) for t, b in zip(teacher, before, strict=True))


def test_nothing_is_written_where_one_device_lacks_the_backend():
    teacher, student = [torch.zeros(3), torch.zeros(3, device="meta")], [torch.ones(3), torch.ones(3, device="meta")]
    with pytest.raises(RuntimeError, match="backend 'cpp' is not available on meta"):
        ema_update_(teacher, student, 0.5, backend="cpp")
    assert not teacher[0].any()


@pytest.mark.parametrize("backend", [None, "reference"])
def test_tied_weights_in_a_state_dict_are_updated_once(backend):
    """There they are two tensors with one memory."""
    model = nn.Module()
    model.a, model.b = nn.Linear(3, 3), nn.Linear(3, 3)
    model.b.weight = model.a.weight
    student = copy.deepcopy(model)
    nn.init.zeros_(model.a.weight)
    nn.init.ones_(student.a.weight)
    ema_update_(list(model.state_dict().values()), list(student.state_dict().values()), 0.75, backend=backend)
    assert torch.equal(model.a.weight, torch.full((3, 3), 0.25))


def test_memory_that_is_not_there_is_an_error():
    freed = torch.ones(4)
    freed.untyped_storage().resize_(0)
    for backend in (None, "cpp") if _library.extension else ():
        with pytest.raises(ValueError, match=r"^ema_update_: student\[0\] must have memory"):
            ema_update_([torch.ones(4)], [freed], 0.5, backend=backend)
    with pytest.raises((ValueError, RuntimeError)):  # its tensors have none that a kernel could read
        torch.func.functionalize(lambda t, s: ema_update_([t], [s], 0.5))(torch.zeros(3), torch.ones(3))


def test_lists_may_change_while_their_tensors_are_updated():
    program = """
import threading, torch
from sslkernels import ema_update_
torch.set_num_threads(1)
teacher, student = ([torch.full((20_000_000,), x) for _ in range(2)] for x in (0.0, 1.0))
first = teacher[0]
thread = threading.Thread(target=ema_update_, args=(teacher, student, 0.5))
thread.start()
while not first[0]:
    pass
teacher.clear(), student.clear()
thread.join()
assert first.eq(0.5).all()
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_function_mode_sees_the_operator():
    class Mode(torch.overrides.TorchFunctionMode):
        seen = ()

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.seen += (getattr(func, "__name__", ""),)
            return func(*args, **(kwargs or {}))

    with Mode() as mode:
        ema_update_([torch.zeros(3)], [torch.ones(3)], 0.5)
    assert any("ema_update_" in name for name in mode.seen)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_denormal_float16_survives_where_denormals_are_flushed(dtype):
    values = torch.tensor([3e-5, -6e-8, 5.96e-8, 6.0e-5], dtype=torch.float16)
    teacher = torch.zeros(4, dtype=dtype)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush denormals")
    try:
        ema_update_([teacher], [values], 0.0)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(teacher, values.to(dtype))


def test_complex_tensors_compile():
    def update(teacher, student):
        ema_update_([teacher], [student], 0.5)
        return teacher * 1

    teacher, student = torch.zeros(4, dtype=torch.complex64), torch.full((4,), 1 + 1j)
    out = torch.compile(update, fullgraph=True, backend="aot_eager")(teacher, student)
    assert torch.equal(out, student / 2) and torch.equal(teacher, student / 2)

"""The named inputs of the moving average, with what each costs."""

from __future__ import annotations

import dataclasses

import torch

from sslkernels.ops import ema
from sslkernels.ops.ema import reference
from sslkernels.registry import Case, Cost, OpSpec

VIT_B = [
    (768, 3, 16, 16), (768,), (1, 1, 768), (1, 197, 768),
    *12 * [(768,), (768,), (2304, 768), (2304,), (768, 768), (768,), (768,), (768,), (3072, 768), (3072,), (768, 3072),
           (768,)],
    (768,), (768,), (1000, 768), (1000,),
]  # fmt: skip


def _bottleneck(width: int, inputs: int, downsample: bool) -> list[tuple[int, ...]]:
    outputs = 4 * width
    shapes = [(width, inputs, 1, 1), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
    shapes += [(outputs, width, 1, 1), (outputs,), (outputs,)]
    return shapes + ([(outputs, inputs, 1, 1), (outputs,), (outputs,)] if downsample else [])


RESNET_50 = [(64, 3, 7, 7), (64,), (64,)]
for _width, _inputs, _blocks in ((64, 64, 3), (128, 256, 4), (256, 512, 6), (512, 1024, 3)):
    RESNET_50 += _bottleneck(_width, _inputs, True) + (_blocks - 1) * _bottleneck(_width, 4 * _width, False)
RESNET_50 += [(1000, 2048), (1000,)]


def ema_cost(elements: int) -> Cost:
    """Two flops an element; reads teacher and student and writes the teacher, in fp32."""
    return Cost(2.0 * elements, 0.0, 0.0, 0.0, 12.0 * elements)


def updated(teacher, student, momentum, *, function=ema.ema_update_, **options):
    """The op without its side effect: a flat tensor of all elements that the teachers have afterwards."""
    teacher = [tensor.clone(memory_format=torch.preserve_format) for tensor in teacher]
    function(teacher, student, momentum, **options)
    flat = [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in teacher]
    return torch.cat([tensor.reshape(-1) for tensor in flat])


def defined(teacher, student, momentum, **options):
    """The same by the definition."""
    return updated(teacher, student, momentum, function=reference.ema_update_, **options)


def tensors(shapes, device, dtype, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def _case(name: str, shapes, momentum: float, tags=("verify",), transform=None) -> Case:
    def make(device, dtype):
        teacher, student = (tensors(shapes, device, dtype, seed) for seed in (0, 1))
        if transform is not None:
            teacher, student = transform(teacher, student)
        return {"teacher": teacher, "student": student, "momentum": momentum}

    return Case(name, make, ema_cost(sum(torch.Size(shape).numel() for shape in shapes)), frozenset(tags))


def _channels_last(teacher, student):
    return [t.to(memory_format=torch.channels_last) for t in teacher], student


def _both_channels_last(teacher, student):
    return tuple([t.to(memory_format=torch.channels_last) for t in tensors] for tensors in (teacher, student))


def _strided(teacher, student):
    return [t[:, ::2].T for t in teacher], [s[:, 1::2].T for s in student]


def _student_bf16(teacher, student):
    return teacher, [s.bfloat16() for s in student]


def _all_options(device, dtype) -> dict:
    """What else a kernel is compiled for."""
    options = {"found_inf": torch.zeros((), device=device)}
    if dtype == torch.float32:
        return {**options, "bf16_copy": tensors([(64, 32), (100,)], device, torch.bfloat16, 2)}
    return {**options, "stochastic_rounding_seed": 5, "step": 3}


def _with_options(name: str, transform=None) -> Case:
    plain = _case(name, [(64, 32), (100,)], 0.9, ("aot",), transform)
    return dataclasses.replace(
        plain, make=lambda device, dtype: plain.make(device, dtype) | _all_options(device, dtype)
    )


def _misaligned(teacher, student):
    return teacher, [torch.cat([s.flatten()[:1], s.flatten()])[1:].view(s.shape) for s in student]


EMA_CASES = (
    _case("three", [(64, 32), (100,), (3, 5, 7)], 0.99, ("verify", "aot")),
    _case("tiny", [()] + 20 * [(1,), (3,)] + [(0,), (2, 0, 3)], 0.9, ("verify", "edge")),
    _case("momentum_0.3", [(1000,), (77,)], 0.3, ("verify", "edge")),
    _case("momentum_0", [(1000,), (77,)], 0.0, ("verify", "edge")),
    _case("momentum_1", [(1000,), (77,)], 1.0, ("verify", "edge")),
    _case("momentum_0.9999", [(300, 300)], 0.9999, ("verify", "edge")),
    _case("channels_last", [(8, 5, 3, 3), (4, 16, 1, 1)], 0.9, ("verify", "edge"), _both_channels_last),
    _case("mixed_formats", [(8, 5, 3, 3), (4, 16, 1, 1)], 0.9, ("verify", "edge"), _channels_last),
    _case("strided", [(13, 20), (7, 6)], 0.9, ("verify", "edge"), _strided),
    _case("bf16_student", [(33, 77), (5,)], 0.9, ("verify", "edge"), _student_bf16),
    _with_options("all_options"),
    _with_options("all_options_misaligned", _misaligned),
    _case("vit_b", VIT_B, 0.996, ("bench",)),
    _case("resnet50", RESNET_50, 0.996, ("bench",)),
    _case("thousand", 1000 * [(64,)], 0.996, ("bench",)),
)

OPS = (
    OpSpec(
        name="ema_update_",
        function=updated,
        reference=defined,
        torch_ops=("ema_update_",),
        grad_args=(),
        dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
        cases=EMA_CASES,
        has_cuda=True,
    ),
)

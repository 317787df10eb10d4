"""The mask makers on every backend: the same bits, however they are called, and one clear error for each mistake."""

from __future__ import annotations

import functools

import pytest
import torch
import torch._dynamo.testing
from conftest import require_or_skip
from cuda_on_cpu import SCHEDULES
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_makers import OnCuda
from numerics import assert_op_close

import sslkernels
from sslkernels import _library, block_mask, multi_block_mask, multi_block_sizes, span_mask, tube_mask
from sslkernels.ops.patch_mask import mask_makers_op
from sslkernels.ops.patch_mask.mask_maker_cases import OPS

SPECS = {spec.name: spec for spec in OPS}
MAKERS = ("block_mask", "multi_block_mask", "span_mask")
CASES = [pytest.param(SPECS[op], case, id=f"{op}-{case.name}") for op in SPECS for case in SPECS[op].tagged("verify")]


def call(spec, case, **options) -> torch.Tensor:
    """The op's results as one tensor."""
    return spec.function(**{**case.make("cpu", torch.float64), **options})


# a call of each op that takes a seed and the samples' numbers, for four samples
CALLS = {
    "block_mask": functools.partial(block_mask, 4, (9, 11), torch.tensor([40, 0, 99, 7])),
    "multi_block_mask": functools.partial(multi_block_mask, 4, (9, 11), target_size=(3, 4), context_size=(8, 9)),
    "span_mask": functools.partial(span_mask, 4, 70, lengths=torch.tensor([70, 50, 9, 33])),
    "tube_mask": functools.partial(tube_mask, 4, (3, 4, 5)),
}


def flat(masks) -> torch.Tensor:
    """What an op returned, as (N, ...) numbers."""
    masks = masks if isinstance(masks, tuple) else (masks,)
    return torch.cat([mask.flatten(1) if mask.dim() > 1 else mask[:, None] for mask in masks], dim=1).long()


def test_the_compiled_kernels_are_there():
    require_or_skip(_library.extension, _library.extension_error)
    report = sslkernels.backends()
    assert all(report[op]["cpu"] == sslkernels.Backend("cpp") for op in MAKERS)


@pytest.mark.parametrize("spec, case", CASES)
def test_every_backend_gives_the_definition(spec, case):
    assert_op_close(spec, case, torch.float64)
    assert torch.equal(call(spec, case), call(spec, case, backend="reference"))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("op", MAKERS)
def test_cuda_gives_the_bits_of_the_cpu_under_every_schedule(op, schedule, monkeypatch):
    spec = SPECS[op]
    expected = {case.name: call(spec, case) for case in spec.tagged("verify")}
    monkeypatch.setattr(mask_makers_op, "family", lambda backend: OnCuda(schedule))
    for case in spec.tagged("verify"):
        assert torch.equal(call(spec, case), expected[case.name]), case.name


def test_cuda_brings_into_range_what_nobody_checked(monkeypatch):
    monkeypatch.setattr(mask_makers_op, "family", lambda backend: OnCuda())
    masks = block_mask(3, (4, 5), torch.tensor([-1, 7, 21]), seed=1)
    assert masks.sum(dim=(1, 2)).tolist() == [0, 7, 20]
    masks = span_mask(3, 20, 1.0, span_length=1, lengths=torch.tensor([-5, 6, 99]), seed=1)
    assert masks.sum(1).tolist() == [0, 6, 20]
    assert span_mask(2, 20, span_length=1, num_spans=torch.tensor([-5, 99]), seed=1).sum(1).tolist() == [0, 20]


@pytest.mark.parametrize("op", MAKERS)
def test_cuda_has_compiled_kernels_or_the_definition_but_no_triton(op):
    report = sslkernels.backends()[op]["cuda"]
    built = _library.extension is not None and _library.extension.build_info()["cuda"] == "built"
    assert (report.active, report.besides) == ("cuda" if built else "reference", ())


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_a_sample_has_one_mask_in_any_batch(data):
    op = data.draw(st.sampled_from(sorted(CALLS)))
    seed = data.draw(st.integers(-(2**63), 2**64 - 1))
    ids = torch.tensor(data.draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=4, max_size=4)))
    whole = flat(CALLS[op](seed=seed, sample_ids=ids))
    order = torch.tensor(data.draw(st.permutations(range(4))))
    cut = data.draw(st.integers(0, 4))
    maker, given_size = CALLS[op].func, CALLS[op].args
    per_sample = {key: value for key, value in CALLS[op].keywords.items() if isinstance(value, torch.Tensor)}
    for part in (order[:cut], order[cut:]):
        arguments = [x[part] if isinstance(x, torch.Tensor) else x for x in given_size]
        options = {**CALLS[op].keywords, **{key: value[part] for key, value in per_sample.items()}}
        masks = maker(len(part), *arguments[1:], **options, seed=seed, sample_ids=ids[part])
        assert torch.equal(flat(masks), whole[part])


@pytest.mark.parametrize("op", CALLS)
def test_samples_and_seeds_differ_and_are_those_of_their_numbers(op):
    maker = CALLS[op] if op in ("multi_block_mask", "tube_mask") else functools.partial(
        CALLS[op].func, 4, *([(9, 11), 40] if op == "block_mask" else [70])
    )  # fmt: skip
    masks = flat(maker(seed=1))
    assert torch.equal(masks, flat(maker(seed=1, sample_ids=torch.arange(4, dtype=torch.int32))))
    assert torch.equal(masks, flat(maker(seed=torch.tensor([1]))))
    assert torch.equal(flat(maker(seed=-1)), flat(maker(seed=2**64 - 1)))
    for other in (masks[[1, 2, 3, 0]], flat(maker(seed=2)), flat(maker(seed=1 + 2**32))):
        assert (other != masks).any(dim=1).all()
    high = flat(maker(seed=1, sample_ids=torch.arange(4) + 2**32))
    assert (high != masks).any(dim=1).all()


@pytest.mark.parametrize("op", CALLS)
def test_without_a_seed_one_is_drawn_from_the_generator(op):
    torch.manual_seed(5)
    first, second = flat(CALLS[op]()), flat(CALLS[op]())
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(first, flat(CALLS[op]()))
    state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(5)
    one = flat(CALLS[op](generator=generator))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, flat(CALLS[op](generator=torch.Generator().manual_seed(5))))


def test_the_sizes_of_a_batch_come_from_its_one_seed():
    generator = torch.Generator().manual_seed(3)
    seed = int(torch.randint(-(2**63), 2**63 - 1, (), generator=generator))
    after, generator = generator.get_state(), torch.Generator().manual_seed(3)
    masks = multi_block_mask(2, 14, generator=generator)
    assert torch.equal(generator.get_state(), after)
    assert all(torch.equal(a, b) for a, b in zip(masks, multi_block_mask(2, 14, seed=seed), strict=True))
    sizes = multi_block_sizes(14, seed=seed)
    same = multi_block_mask(2, 14, target_size=sizes.target_size, context_size=sizes.context_size, seed=seed)
    assert all(torch.equal(a, b) for a, b in zip(masks, same, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same(threads):
    before = torch.get_num_threads()
    calls = {
        "block_mask": functools.partial(block_mask, 300, 14, 70),
        "multi_block_mask": functools.partial(multi_block_mask, 300, 14, target_size=(5, 6), context_size=(13, 12)),
        "span_mask": functools.partial(span_mask, 300, 200),
    }
    for maker in calls.values():
        try:
            torch.set_num_threads(threads)
            masks = flat(maker(seed=1))
            torch.set_num_threads(1)
            assert torch.equal(masks, flat(maker(seed=1)))
        finally:
            torch.set_num_threads(before)


# ---- among torch


@pytest.mark.parametrize("op", MAKERS)
def test_the_operators_pass_opcheck(op):
    spec = SPECS[op]
    for case in spec.tagged("verify")[:2]:
        seen = []

        class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None, seen=seen):
                if func.namespace == "sslkernels":
                    seen.append((func, args))
                return func(*args, **(kwargs or {}))

        with Recorder():
            call(spec, case)
        ((operator, arguments),) = seen
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("op", CALLS)
def test_compiles_whole_without_recompiling_for_the_last_batch(op):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    options = {
        "block_mask": lambda x: block_mask(x.shape[0], (9, 11), 40, seed=x.sum().long()),
        "multi_block_mask": lambda x: multi_block_mask(
            x.shape[0], (9, 11), target_size=(3, 4), context_size=(8, 9), seed=x.sum().long()
        ),
        "span_mask": lambda x: span_mask(x.shape[0], 70, lengths=x.long(), overlap=False, seed=x.sum().long()),
        "tube_mask": lambda x: tube_mask(x.shape[0], (3, 4, 5), 0.7, seed=x.sum().long()),
    }
    compiled = torch.compile(options[op], fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for samples in (8, 6, 5):
        lengths = torch.arange(samples) + 40
        assert torch.equal(flat(compiled(lengths)), flat(options[op](lengths)))
        counts.append(counter.frame_count)
    assert counts[2] == counts[0]


@pytest.mark.parametrize("op", CALLS)
def test_a_compiled_call_draws_its_seed_as_an_eager_one(op):
    torch._dynamo.reset()
    compiled = torch.compile(CALLS[op], fullgraph=True, backend="aot_eager")
    torch.manual_seed(7)
    expected = flat(CALLS[op]()), flat(CALLS[op]())
    torch.manual_seed(7)
    assert torch.equal(flat(compiled()), expected[0]) and torch.equal(flat(compiled()), expected[1])


def test_what_the_operators_are_told_is_checked():
    require_or_skip(_library.extension, _library.extension_error)
    ops, seed, counts = torch.ops.sslkernels, torch.tensor(1), torch.tensor([3, 4])
    with pytest.raises(RuntimeError, match=r"block_mask: num_masked must be in \[0, 12\], got 13 in row 1"):
        ops.block_mask_fwd(seed, None, torch.tensor([3, 13]), 3, 4, 1, 12, [65536, 65536], 10)
    with pytest.raises(RuntimeError, match=r"block_mask: height \* width must be in \[0, 65536\], got 90000"):
        ops.block_mask_fwd(seed, None, counts, 300, 300, 1, 12, [65536, 65536], 10)
    with pytest.raises(RuntimeError, match="block_mask: sample_ids must have 2 elements in int64"):
        ops.block_mask_fwd(seed, torch.arange(3), counts, 3, 4, 1, 12, [65536, 65536], 10)
    with pytest.raises(RuntimeError, match=r"the number of aspects must be in \[1, 128\], got 0"):
        ops.block_mask_fwd(seed, None, counts, 3, 4, 1, 12, [], 10)
    with pytest.raises(RuntimeError, match=r"multi_block_mask: target_width must be in \[1, 4\], got 5"):
        ops.multi_block_mask_fwd(seed, None, 2, 3, 4, 1, 5, 1, 1, 1, 0, False)
    with pytest.raises(RuntimeError, match=r"span_mask: span_length must be in \[1, 65536\], got 0"):
        ops.span_mask_fwd(seed, None, counts, None, 9, 0, 0, 0, True)


# ---- errors


def ids(*values, **options):
    return torch.tensor(values, **options)


blocks, spans = functools.partial(block_mask, 2, (3, 4)), functools.partial(span_mask, 2, 9)
multi = functools.partial(multi_block_mask, 2, (8, 9), target_size=(2, 3), context_size=(7, 7))
ERRORS = [
    (lambda: block_mask(-1, 4), "ValueError: block_mask: batch_size must be at least 0, got -1"),
    (lambda: block_mask(2.0, 4), "TypeError: block_mask: batch_size must be an int, got float"),
    (lambda: block_mask(2, 4.0), "TypeError: block_mask: grid_size must be two ints, height and width, got 4.0"),
    (lambda: block_mask(2, (0, 3)), "ValueError: block_mask: grid_size must be positive, got (0, 3)"),
    (lambda: block_mask(2, 300), "ValueError: block_mask: grid_size must be of at most 65536 patches, got (300, 300)"),
    (lambda: blocks(13), "ValueError: block_mask: num_masked must be in [0, 12], got 13"),
    (lambda: blocks(0.5), "TypeError: block_mask: num_masked must be an int, got float"),
    (lambda: blocks(ids(1, 2, 3)), "ValueError: block_mask: num_masked must be (2,), got (3,)"),
    (
        lambda: blocks(ids(1.0, 2.0)),
        "TypeError: block_mask: num_masked must be a tensor of integers, got torch.float32",
    ),
    (lambda: blocks(ids(1, 13)), "RuntimeError: block_mask: num_masked must be in [0, 12], got 13 in row 1"),
    (
        lambda: blocks(ids(1, -1), backend="reference"),
        "RuntimeError: block_mask: num_masked must be in [0, 12], got -1 in row 1",
    ),
    (lambda: blocks(mask_ratio=1.5), "ValueError: block_mask: mask_ratio must be in [0, 1], got 1.5"),
    (lambda: blocks(3, mask_ratio=1.5), "ValueError: block_mask: mask_ratio must be in [0, 1], got 1.5"),
    (lambda: blocks(min_patches=0), "ValueError: block_mask: min_patches must be at least 1, got 0"),
    (lambda: blocks(max_patches=3), "ValueError: block_mask: max_patches must be at least 4, got 3"),
    (lambda: blocks(max_patches=70000), "ValueError: block_mask: max_patches must be in [0, 65536], got 70000"),
    (lambda: blocks(min_aspect=0.001), "ValueError: block_mask: min_aspect must be in [1/256, 256], got 0.001"),
    (lambda: blocks(max_aspect=0.2), "ValueError: block_mask: max_aspect must be at least min_aspect, 0.3, got 0.2"),
    (lambda: blocks(min_aspect="1"), "TypeError: block_mask: min_aspect must be a number, got str"),
    (lambda: blocks(3, seed=0.5), "TypeError: block_mask: seed must be an int or a tensor of one integer, got float"),
    (lambda: blocks(3, sample_ids=ids(1)), "ValueError: block_mask: sample_ids must be (2,), got (1,)"),
    (lambda: blocks(3, backend="triton"), "RuntimeError: block_mask: backend 'triton' is not available on cpu"),
    (lambda: multi(num_targets=-1), "ValueError: multi_block_mask: num_targets must be in [0, 65536], got -1"),
    (lambda: multi(min_context=0.5), "TypeError: multi_block_mask: min_context must be an int, got float"),
    (
        lambda: multi(target_size=(2, 10)),
        "ValueError: multi_block_mask: target_size must fit into the grid, (8, 9), got (2, 10)",
    ),
    (lambda: multi(context_size=(0, 1)), "ValueError: multi_block_mask: context_size must be positive, got (0, 1)"),
    (
        lambda: multi_block_mask(2, 8, target_scale=(0.3, 0.2), seed=1),
        "ValueError: multi_block_mask: target_scale must be in order and in [0, 1], got (0.3, 0.2)",
    ),
    (
        lambda: multi_block_mask(2, 8, seed=torch.tensor(1)),
        "ValueError: multi_block_mask: target_size and context_size must be given where seed is a tensor, got None",
    ),
    (
        lambda: multi_block_mask(2, 8, seed="1"),
        "TypeError: multi_block_mask: seed must be an int or a tensor of one integer, got str",
    ),
    (
        lambda: multi_block_mask(2, 8, seed=1, generator=torch.Generator()),
        "ValueError: multi_block_mask: seed and generator must not both be given",
    ),
    (
        lambda: multi(target_size=0),
        "TypeError: multi_block_mask: target_size must be two ints, height and width, got 0",
    ),
    (
        lambda: multi_block_mask(2, 8, target_size=(), seed=1),
        "TypeError: multi_block_mask: target_size must be two ints, height and width, got ()",
    ),
    (
        lambda: multi_block_mask(2, 8, context_size=ids(2, 3), seed=1),
        "TypeError: multi_block_mask: context_size must be two ints, height and width, got tensor([2, 3])",
    ),
    (lambda: multi(allow_overlap=1), "TypeError: multi_block_mask: allow_overlap must be a bool, got int"),
    (lambda: multi_block_mask(2, 8, seed=2**80), "ValueError: multi_block_mask: seed must be in [-2**63, 2**64), got"),
    (lambda: multi_block_sizes(8, seed=2**80), "ValueError: multi_block_sizes: seed must be in [-2**63, 2**64), got"),
    (lambda: multi().truncated(50), "ValueError: multi_block_mask: num_context must be in [0, 49], got 50"),
    (lambda: multi_block_sizes(8, seed=None), "TypeError: multi_block_sizes: seed must be an int, got NoneType"),
    (
        lambda: multi_block_sizes(8, seed=1, target_aspect=1.0),
        "TypeError: multi_block_sizes: target_aspect must be two numbers, got 1.0",
    ),
    (lambda: span_mask(2, 70000), "ValueError: span_mask: num_tokens must be in [0, 65536], got 70000"),
    (lambda: spans(1.5), "ValueError: span_mask: mask_prob must be in [0, 1], got 1.5"),
    (lambda: spans(span_length=0), "ValueError: span_mask: span_length must be at least 1, got 0"),
    (lambda: spans(num_spans=-1), "ValueError: span_mask: num_spans must be at least 0, got -1"),
    (lambda: spans(num_spans=2**70), "ValueError: span_mask: num_spans must be less than 2**63, got 118059162071741"),
    (lambda: spans(overlap=None), "TypeError: span_mask: overlap must be a bool, got NoneType"),
    (lambda: spans(num_spans=ids(1, -1)), "RuntimeError: span_mask: num_spans must be at least 0, got -1 in row 1"),
    (lambda: spans(lengths=ids(1, 10)), "RuntimeError: span_mask: lengths must be in [0, 9], got 10 in row 1"),
    (lambda: spans(lengths=9), "TypeError: span_mask: lengths must be a tensor of integers, got int"),
    (lambda: tube_mask(2, (3, 4)), "TypeError: tube_mask: grid_size must be three ints, frames, height and width, got"),
    (lambda: tube_mask(2, (3, 0, 4)), "ValueError: tube_mask: the frame of grid_size must be positive, got (0, 4)"),
    (lambda: tube_mask(2, (3, 4, 4), ordered="no"), "TypeError: tube_mask: ordered must be a bool, got str"),
    (lambda: tube_mask(2, (3, 4, 4), num_keep=17), "ValueError: tube_mask: num_keep must be in [0, 16], got 17"),
]


@pytest.mark.parametrize("mistaken, error", ERRORS, ids=[error for _, error in ERRORS])
def test_errors_name_what_is_wrong(mistaken, error):
    kind, message = error.split(": ", 1)
    with pytest.raises((TypeError, ValueError, RuntimeError)) as raised:
        mistaken()
    assert type(raised.value).__name__ == kind
    # errors of the compiled kernels begin with their place in the source
    assert message in str(raised.value) if kind == "RuntimeError" else str(raised.value).startswith(message)

"""What only a GPU shows beside `sslkernels verify`: CUDA graphs, compiled code, streams, trainers on the device."""

from __future__ import annotations

import pytest
import torch

from sslkernels import _library, cli, ema_update_, nt_xent, random_masking, registry
from sslkernels.ops.ema import lists

pytestmark = [pytest.mark.hardware, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
SPECS = {spec.name: spec for spec in registry.ops() if spec.name != "ema_update_"}
METHODS = ("simclr", "moco", "clip", "mae")


def call_of(spec, case):
    """The value of a case and its gradients, as a function without arguments."""
    arguments = case.make("cuda", spec.dtypes[0])
    leaves = {
        name: arguments[name].requires_grad_() for name in spec.grad_args if isinstance(arguments[name], torch.Tensor)
    }

    def call():
        value = spec.function(**arguments)
        return (value.detach(), *(torch.autograd.grad(value.square().sum(), list(leaves.values())) if leaves else ()))

    return call


def captured(call):
    """A graph of the call, and where it leaves its results."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


@pytest.mark.parametrize("name", SPECS)
def test_a_cuda_graph_replays_forward_and_backward(name):
    call = call_of(SPECS[name], SPECS[name].tagged("verify")[0])
    expected = call()
    graph, results = captured(call)
    for result in results:
        result.zero_()
    graph.replay()
    torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["nt_xent", "info_nce", "clip_loss", "random_masking", "masked_patch_loss"])
def test_inductor_computes_the_same(name):
    spec = SPECS[name]
    arguments = spec.tagged("verify")[0].make("cuda", torch.float32)
    compiled = torch.compile(spec.function, fullgraph=True)
    torch.testing.assert_close(compiled(**arguments), spec.function(**arguments), rtol=1e-4, atol=1e-5)


def test_a_seed_in_memory_is_read_when_a_graph_is_replayed():
    x, seed = torch.randn(4, 64, 8, device="cuda"), torch.tensor(1, device="cuda")
    graph, results = captured(lambda: random_masking(x, 0.75, seed=seed))
    for value in (1, 2):
        seed.fill_(value)
        graph.replay()
        assert torch.equal(results[1].cpu(), random_masking(x.cpu(), 0.75, seed=value)[1])


def test_the_kernels_run_on_the_current_stream():
    views = [torch.randn(2048, 512, device="cuda") for _ in range(2)]
    teacher, stream = [torch.zeros(1000, device="cuda")], torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(20):  # long enough for a kernel on another stream to come too early
            views[0] @ views[0].T
        student = [torch.ones(1000, device="cuda")]
        for view in views:
            view.fill_(1)
        ema_update_(teacher, student, 0.5)
        loss = nt_xent(*views)
    stream.synchronize()
    assert teacher[0].eq(0.5).all()
    torch.testing.assert_close(loss.item(), torch.tensor(4095.0).log().item(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("seed", [None, 7])
def test_teachers_are_updated_past_the_dispatcher_to_the_same_bits(monkeypatch, seed):
    if _library.backends()["ema_update_"]["cuda"].active != "cuda":
        pytest.skip("the extension was built without nvcc")
    teacher, student = ([torch.randn(n).bfloat16() for n in (1, 77, 5000)] for _ in range(2))
    there, student_there = ([tensor.cuda() for tensor in tensors] for tensors in (teacher, student))
    options = {"stochastic_rounding_seed": seed, "step": 3}
    ema_update_(teacher, student, 0.9, **options)
    monkeypatch.setattr(lists, "parts", None)  # the other way would call it
    for momentum in (0.9, torch.tensor(1.0)):
        ema_update_(there, student_there, momentum, **options)
    assert all(torch.equal(one, other.cpu()) for one, other in zip(teacher, there, strict=True))


def test_a_graph_updates_a_teacher():
    teacher, student = [torch.zeros(100, device="cuda")], [torch.ones(100, device="cuda")]
    graph, _ = captured(lambda: ema_update_(teacher, student, 0.5))
    before = teacher[0].clone()
    graph.replay()
    assert torch.equal(teacher[0], (before + 1) / 2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_trainer_runs(method, precision, tmp_path):
    command = ["train", method, "--device", "cuda", "--steps", "3", "--warmup", "1", "--precision", precision]
    assert cli.main([*command, "--out", str(tmp_path)]) == 0

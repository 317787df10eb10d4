"""One of several processes that train a sharded model and its teacher, and compare with a process of its own."""

from __future__ import annotations

import copy
import multiprocessing

import torch
import torch.distributed as dist
from torch import nn

from sslkernels.nn import CosineMomentum, EMATeacher

# children are forked from a server that has imported what takes seconds and has no threads yet
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["sslkernels.nn", "torch.distributed.fsdp", "pytest"])
PATIENCE = 120  # seconds before a child counts as hung
STEPS = 5


def run(target, size: int, *args) -> None:
    """Call ``target(rank, *args)`` in that many processes of one gloo group; raise what the first of them raised."""
    store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
    results = CONTEXT.SimpleQueue()
    children = [
        CONTEXT.Process(target=_child, args=(target, rank, size, store.port, results, *args), daemon=True)
        for rank in range(size)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(PATIENCE)
    hung = [child for child in children if child.exitcode is None]
    for child in hung:
        child.kill()
    errors = [results.get() for _ in children if not results.empty()]
    assert not hung, f"{len(hung)} children were still running after {PATIENCE} s"
    assert [child.exitcode for child in children] == size * [0], "\n".join(filter(None, errors))


def _child(target, rank, size, port, results, *args) -> None:
    import traceback

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, size, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    try:
        target(rank, *args)
    except BaseException:
        results.put(f"rank {rank}: {traceback.format_exc()}")
        raise
    finally:
        dist.destroy_process_group()


def network(dtype: torch.dtype) -> nn.Module:
    """Rows that two processes cannot share evenly, one of them with nothing at all of the last layer."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 13), nn.BatchNorm1d(13), nn.ReLU(), nn.Linear(13, 5), nn.Linear(5, 1)).to(dtype)


def gather(whole: nn.Module, sharded: nn.Module) -> None:
    """The sharded model's values in a model of one process."""
    for name, parameter in sharded.named_parameters():
        whole.get_parameter(name).data.copy_(parameter.full_tensor())
    for name, buffer in sharded.named_buffers():
        whole.get_buffer(name).copy_(buffer)


def assert_same_values(whole: nn.Module, sharded: nn.Module) -> None:
    for name, parameter in sharded.named_parameters():
        value, expected = parameter.full_tensor(), whole.get_parameter(name)
        assert torch.equal(value, expected), f"{name}: {value} is not {expected}"
    for name, buffer in sharded.named_buffers():
        assert torch.equal(buffer, whole.get_buffer(name)), name


def fully_sharded(rank: int, dtype: torch.dtype, seed: int | None, mesh_shape: tuple[int, ...]) -> None:
    """The teacher of a sharded student has the bits of one that follows the same student in one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :])
    options = {"momentum": CosineMomentum(STEPS, 0.7), "stochastic_rounding_seed": seed}
    whole = network(dtype)
    expected = EMATeacher(whole, **options)
    student = network(dtype)
    copied = copy.deepcopy(student)
    for model in (student, copied):
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    teacher = EMATeacher(student, teacher=copied, **options)
    plan = teacher._plan
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(8, 6, generator=generator).to(dtype)
        with torch.no_grad():
            target = teacher(x)  # gathers the parameters, and leaves those of the root gathered
        (student(x) - target - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        gather(whole, student)
        teacher.update()
        expected.update()
        assert_same_values(expected.module, teacher.module)
    assert teacher._plan is plan, "gathered parameters count as new ones"
    assert not torch.equal(expected.module[0].weight, network(dtype)[0].weight)

    own = {name: parameter.full_tensor() for name, parameter in student.named_parameters()}
    with teacher.swap():
        x = torch.ones(3, 6, dtype=dtype)
        with torch.no_grad():
            assert torch.equal(student.eval()(x), teacher(x))
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter.full_tensor(), own[name]), name


def sharded_otherwise(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))

    def distributed(placement):
        model = nn.Linear(4, 4, bias=False).bfloat16()
        model.weight = nn.Parameter(distribute_tensor(torch.ones(4, 4).bfloat16(), mesh, [placement]))
        return model

    columns = EMATeacher(distributed(Shard(1)), teacher=distributed(Shard(1)), stochastic_rounding_seed=1)
    assert "sharded on dimension 0 alone" in message(columns.update)
    columns.stochastic_rounding_seed = None
    columns.update()
    mixed = message(lambda: EMATeacher(distributed(Shard(1)), teacher=distributed(Shard(0))))
    assert "must be sharded like the teacher's" in mixed
    EMATeacher(distributed(Replicate()), teacher=distributed(Replicate()), stochastic_rounding_seed=1).update()


def cannot_be_copied(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    assert "must not be under fully_shard" in message(lambda: EMATeacher(fully_shard(nn.Linear(2, 2))))


def wrapped_for_data_parallelism(rank: int) -> None:
    student = network(torch.float32)
    teacher = EMATeacher(student, 0.5)
    wrapped = nn.parallel.DistributedDataParallel(student)
    with torch.no_grad():
        student[0].weight.fill_(2.0)
    before = teacher.module[0].weight.clone()
    teacher.update(wrapped)
    assert torch.equal(teacher.module[0].weight, before.lerp(student[0].weight, 0.5))
    assert EMATeacher(wrapped).module.state_dict().keys() == student.state_dict().keys()


def message(call) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    raise AssertionError("no error was raised")

"""The loss modules: arguments and attributes of what they replace, torch.compile, autocast, copies, errors."""

import copy
import inspect

import loss_forms as forms
import pytest
import torch
from loss_cases import BIAS, LABELS, MASK, PAIRS, SCALE, D, N, pair, rows

from sslkernels import nn as ours
from sslkernels import ops

SIGNATURES = {
    "NTXentLoss": "temperature=0.5, memory_bank_size=0, gather_distributed=False",
    "DCLLoss": "temperature=0.1, weight_fn=None, gather_distributed=False",
    "DCLWLoss": "temperature=0.1, sigma=0.5, gather_distributed=False",
    "MemoryBank": "size, gather_distributed=False, feature_dim_first=True",
    "InfoNCELoss": "temperature=0.1, reduction='mean', negative_mode='unpaired'",
    "ClipLoss": "local_loss=False, gather_with_grad=False, cache_labels=False, rank=0, world_size=1, use_horovod=False",
    "SigLipLoss": "cache_labels=False, rank=0, world_size=1, dist_impl=None",
    "SupConLoss": "temperature=0.07, contrast_mode='all', base_temperature=0.07",
}
FORWARDS = {
    "NTXentLoss": "out0, out1",
    "DCLLoss": "out0, out1",
    "DCLWLoss": "out0, out1",
    "MemoryBank": "output, labels=None, update=False",
    "InfoNCELoss": "query, positive_key, negative_keys=None",
    "ClipLoss": "image_features, text_features, logit_scale, logit_bias=None, output_dict=False",
    "SigLipLoss": "image_features, text_features, logit_scale, logit_bias, output_dict=False",
    "SupConLoss": "features, labels=None, mask=None",
}


def shown(function):
    """The positional arguments and their defaults."""
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return ", ".join(
        p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters if p.name != "self"
    )


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_are_those_of_what_is_replaced(name):
    kind = getattr(ours, name)
    assert shown(kind.__init__) == SIGNATURES[name]
    assert shown(kind.forward) == FORWARDS[name]


def test_attributes_are_those_of_what_is_replaced():
    module = ours.NTXentLoss(0.3, (8, 4))
    assert (module.temperature, module.gather_distributed, module.eps) == (0.3, False, 1e-8)
    bank = module.memory_bank
    assert (bank.size, bank.gather_distributed, bank.feature_dim_first) == ((8, 4), False, True)
    assert (bank.bank.shape, bank.bank_ptr.shape) == ((8, 4), (1,))
    weighted = ours.DCLWLoss(0.3, sigma=0.7)
    assert (weighted.temperature, weighted.gather_distributed, weighted.weight_fn.keywords) == (
        0.3,
        False,
        {"sigma": 0.7},
    )
    module = ours.InfoNCELoss(0.3, "sum", "paired")
    assert (module.temperature, module.reduction, module.negative_mode) == (0.3, "sum", "paired")
    module = ours.ClipLoss(True, True, True, 1, 2)
    names = ("local_loss", "gather_with_grad", "cache_labels", "rank", "world_size", "use_horovod")
    assert [getattr(module, name) for name in names] == [True, True, True, 1, 2, False]
    module = ours.SigLipLoss(True, 1, 2, "shift")
    assert [getattr(module, name) for name in ("cache_labels", "rank", "world_size", "dist_impl")] == [
        True,
        1,
        2,
        "shift",
    ]
    assert ours.SigLipLoss().dist_impl == "bidir"
    module = ours.SupConLoss(0.3, "one", 0.2)
    assert (module.temperature, module.contrast_mode, module.base_temperature) == (0.3, "one", 0.2)


@pytest.mark.parametrize("module", [ours.ClipLoss(), ours.SigLipLoss()], ids=["clip", "siglip"])
def test_output_dict(module):
    inputs = (*pair(unit=True), SCALE, BIAS)
    found = module(*inputs, output_dict=True)
    assert list(found) == ["contrastive_loss"]
    assert torch.equal(found["contrastive_loss"], module(*inputs))


def test_logits():
    images, texts = rows(4, D), rows(3, D, seed=1)
    expected = 9 * images @ texts.T - 4
    per_image, per_text = ours.ClipLoss().get_logits(images, texts, SCALE, BIAS)
    torch.testing.assert_close((per_image, per_text), (expected, expected.T))
    torch.testing.assert_close(ours.SigLipLoss().get_logits(images, texts, SCALE, BIAS), expected)
    torch.testing.assert_close(ours.SigLipLoss().get_logits(images, texts, SCALE), expected + 4)


def test_siglip_without_a_bias():
    images, texts = pair(unit=True)
    torch.testing.assert_close(ours.SigLipLoss()(images, texts, SCALE, None), forms.siglip(images, texts, SCALE))


def test_hard_negatives():
    out0, out1 = pair()
    module = ours.HardNegativeNTXentLoss(0.3, beta=0.5, tau_plus=0.05)
    assert torch.equal(module(out0, out1), ops.hard_nt_xent(out0, out1, 0.3, beta=0.5, tau_plus=0.05))
    plain = ours.HardNegativeNTXentLoss(0.3, beta=0.0, tau_plus=0.0)
    torch.testing.assert_close(plain(out0, out1), forms.nt_xent(out0, out1, 0.3))


@pytest.mark.parametrize(
    "kind", [ours.NTXentLoss, ours.DCLLoss, ours.DCLWLoss, ours.InfoNCELoss, ours.HardNegativeNTXentLoss]
)
def test_a_temperature_that_learns(kind):
    out0, out1 = pair()
    fixed, module = kind(0.2), kind(torch.nn.Parameter(torch.tensor(0.2)))
    loss = module(out0, out1)
    torch.testing.assert_close(loss, fixed(out0, out1))
    loss.backward()
    assert [name for name, _ in module.named_parameters()] == ["temperature"]
    step = 1e-2
    change = (kind(0.2 + step)(out0, out1) - kind(0.2 - step)(out0, out1)) / (2 * step)
    torch.testing.assert_close(module.temperature.grad, change, rtol=0.02, atol=0)


def test_one_pair_has_no_negatives():
    out0, out1 = rows(1, D).requires_grad_(), rows(1, D, seed=1)
    loss = ours.DCLLoss(0.5)(out0, out1)
    loss.backward()
    torch.testing.assert_close(loss, -(forms.unit(out0) * forms.unit(out1)).sum() / 0.5)
    assert out0.grad.isfinite().all()


def test_repr_names_the_arguments():
    assert "temperature=0.3" in repr(ours.NTXentLoss(0.3, (8, 4))) and "size=(8, 4)" in repr(
        ours.NTXentLoss(0.3, (8, 4))
    )
    assert "reduction='sum', negative_mode='paired'" in repr(ours.InfoNCELoss(reduction="sum", negative_mode="paired"))
    assert "beta=0.5, tau_plus=0.2" in repr(ours.HardNegativeNTXentLoss(0.5, 0.5, 0.2))
    assert "contrast_mode='one', base_temperature=0.2" in repr(
        ours.SupConLoss(contrast_mode="one", base_temperature=0.2)
    )
    assert "rank=1, world_size=2" in repr(ours.ClipLoss(rank=1, world_size=2))


# ---- torch


MODULES = {name: (module, inputs) for name, module, _, inputs in PAIRS}
MODULES["sup_con"] = (ours.SupConLoss(), (rows(N, 2, D, unit=True), LABELS))
MODULES["sup_con mask"] = (ours.SupConLoss(), (rows(N, 2, D, unit=True), None, MASK))
MODULES["hard negatives"] = (ours.HardNegativeNTXentLoss(), pair())


@pytest.mark.parametrize("name", MODULES)
def test_compiles_whole(name):
    torch._dynamo.reset()
    module, inputs = MODULES[name]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = [run_with_grad(call, inputs) for call in (compiled, module)]
    torch.testing.assert_close(*found)


def test_compiles_whole_with_a_bank():
    torch._dynamo.reset()
    module = ours.NTXentLoss(0.2, (25, D))
    eager = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for step in range(4):
        inputs = rows(N, D, seed=step), rows(N, D, seed=step + 9)
        torch.testing.assert_close(run_with_grad(compiled, inputs), run_with_grad(eager, inputs))
    torch.testing.assert_close(module.memory_bank.bank, eager.memory_bank.bank)
    assert torch.equal(module.memory_bank.bank_ptr, eager.memory_bank.bank_ptr)


def run_with_grad(call, inputs):
    leaf = inputs[0].detach().clone().requires_grad_()
    loss = call(leaf, *inputs[1:])
    loss.backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("name", MODULES)
def test_autocast_changes_nothing(name):
    """The losses choose the precision of their arithmetic by the dtype of their inputs alone."""
    module, inputs = MODULES[name]
    expected = run_with_grad(module, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        leaf = inputs[0].detach().clone().requires_grad_()
        loss = module(leaf, *inputs[1:])
    loss.backward()
    assert torch.equal(loss.detach(), expected[0])
    assert torch.equal(leaf.grad, expected[1])


@pytest.mark.parametrize("function, last", [(ops.info_nce, 0.2), (ops.clip_loss, 9.0)])
def test_autocast_does_not_change_smoothed_labels(function, last):
    inputs = *pair(unit=True), *((None,) if function is ops.info_nce else ()), last
    with torch.autocast("cpu", torch.bfloat16):
        loss = function(*inputs, label_smoothing=0.1)
    assert torch.equal(loss, function(*inputs, label_smoothing=0.1))


@pytest.mark.parametrize("name", MODULES)
def test_copies_give_the_same(name):
    module, inputs = MODULES[name]
    assert torch.equal(copy.deepcopy(module)(*inputs), module(*inputs))


# ---- errors


@pytest.mark.parametrize(
    "name", ["NTXentLoss", "DCLLoss", "DCLWLoss", "InfoNCELoss", "SupConLoss", "HardNegativeNTXentLoss"]
)
@pytest.mark.parametrize(
    "temperature, error, message",
    [
        (0, ValueError, "temperature must be finite and at least 1e-08 in size, got 0"),
        (-1e-9, ValueError, "temperature must be finite and at least 1e-08 in size, got -1e-09"),
        (float("nan"), ValueError, "temperature must be finite and at least 1e-08 in size, got nan"),
        (float("inf"), ValueError, "temperature must be finite and at least 1e-08 in size, got inf"),
        ("0.1", TypeError, "temperature must be a float or a tensor, got str"),
        (True, TypeError, "temperature must be a float or a tensor, got bool"),
        (
            torch.ones(2),
            ValueError,
            "temperature must be a float or a floating-point tensor of one element, got torch.float32 of shape (2,)",
        ),
    ],
)
def test_errors_of_temperatures(name, temperature, error, message):
    with pytest.raises(error) as raised:
        getattr(ours, name)(temperature)
    assert str(raised.value) == f"{name}: {message}"


@pytest.mark.parametrize(
    "make, error, message",
    [
        (
            lambda: ours.NTXentLoss(memory_bank_size=8),
            ValueError,
            "MemoryBank: size must be (K, D), or 0 for no bank, got 8",
        ),
        (
            lambda: ours.NTXentLoss(exchange="star"),
            ValueError,
            "NTXentLoss: exchange must be one of 'gather', 'ring', got 'star'",
        ),
        (
            lambda: ours.InfoNCELoss(group=3),
            TypeError,
            "InfoNCELoss: group must be a torch.distributed.ProcessGroup that has this rank, got 3",
        ),
        (lambda: ours.DCLLoss(weight_fn=2), TypeError, "DCLLoss: weight_fn must be callable or None, got int"),
        (
            lambda: ours.DCLWLoss(sigma=0),
            ValueError,
            "DCLWLoss: sigma must be finite and at least 1e-08 in size, got 0",
        ),
        (
            lambda: ours.InfoNCELoss(reduction="max"),
            ValueError,
            "InfoNCELoss: reduction must be one of 'mean', 'sum', 'none', got 'max'",
        ),
        (
            lambda: ours.InfoNCELoss(negative_mode="all"),
            ValueError,
            "InfoNCELoss: negative_mode must be 'unpaired' or 'paired', got 'all'",
        ),
        (
            lambda: ours.SupConLoss(contrast_mode="two"),
            ValueError,
            "SupConLoss: contrast_mode must be 'all' or 'one', got 'two'",
        ),
        (
            lambda: ours.ClipLoss(use_horovod=True),
            ValueError,
            "ClipLoss: use_horovod must be False: processes are those of torch.distributed",
        ),
        (lambda: ours.ClipLoss(world_size=0), ValueError, "ClipLoss: world_size must be at least 1, got 0"),
        (lambda: ours.ClipLoss(rank=-1), ValueError, "ClipLoss: rank must be at least 0, got -1"),
        (lambda: ours.ClipLoss(world_size=2.0), TypeError, "ClipLoss: world_size must be an int, got float"),
        (
            lambda: ours.SigLipLoss(rank=2, world_size=2),
            ValueError,
            "SigLipLoss: rank must be less than world_size 2, got 2",
        ),
        (
            lambda: ours.SigLipLoss(dist_impl="ring"),
            ValueError,
            "SigLipLoss: dist_impl must be one of 'bidir', 'shift', 'reduce', 'gather', or None, got 'ring'",
        ),
    ],
)
def test_errors_of_constructors(make, error, message):
    with pytest.raises(error) as raised:
        make()
    assert str(raised.value) == message


ONES = torch.ones(3, 4)


@pytest.mark.parametrize(
    "module, inputs, error, message",
    [
        (ours.NTXentLoss(), (ONES, ONES[:2]), ValueError, "nt_xent: z1 must be (N, D) like z0 (3, 4), got (2, 4)"),
        (
            ours.NTXentLoss(memory_bank_size=(5, 4)),
            ([1.0], ONES),
            TypeError,
            "info_nce: query must be a tensor, got list",
        ),
        (
            ours.NTXentLoss(memory_bank_size=(5, 6)),
            (ONES, ONES),
            ValueError,
            "info_nce: negative_keys must be (K, 4) like query (3, 4), got (5, 6)",
        ),
        (
            ours.DCLLoss(weight_fn=lambda a, b: a),
            (ONES, ONES),
            ValueError,
            "DCLLoss: weight_fn must give (3,) weights, got (3, 4)",
        ),
        (
            ours.DCLLoss(weight_fn=lambda a, b: 1.0),
            (ONES, ONES),
            ValueError,
            "DCLLoss: weight_fn must give (3,) weights, got float",
        ),
        (ours.DCLWLoss(), (ONES, None), TypeError, "DCLWLoss: out1 must be a tensor, got NoneType"),
        (
            ours.InfoNCELoss(negative_mode="paired"),
            (ONES, ONES, ONES),
            ValueError,
            "info_nce: negative_keys must be (3, M, 4), got (3, 4)",
        ),
        (
            ours.ClipLoss(world_size=2),
            (ONES, ONES, 1.0),
            ValueError,
            "ClipLoss: world_size must be that of the process group, 1, got 2",
        ),
        (
            ours.SupConLoss(),
            (ONES,),
            ValueError,
            "SupConLoss: features must be (N, V, ...), at least 3 dimensions, got (3, 4)",
        ),
        (
            ours.SupConLoss(),
            (ONES[:, None], torch.zeros(3), ONES),
            ValueError,
            "SupConLoss: labels and mask must not both be given",
        ),
        (
            ours.SupConLoss(),
            (ONES[:, None], torch.zeros(2, dtype=torch.int64)),
            ValueError,
            "SupConLoss: labels must be (3,), got (2,)",
        ),
        (
            ours.SupConLoss(),
            (ONES[:, None], torch.zeros(3)),
            TypeError,
            "SupConLoss: labels must be a tensor of integers (int64, int32, int16, int8, uint8), got torch.float32",
        ),
        (
            ours.SupConLoss(),
            (ONES[:, None], None, ONES),
            ValueError,
            "masked_sup_con: mask must be (3, 3), got (3, 4)",
        ),
        (
            ours.SupConLoss(),
            (ONES[:, None], None, [1]),
            TypeError,
            "masked_sup_con: mask must be a tensor, got list",
        ),
        (
            ours.SupConLoss(),
            (ONES[:, None], None, torch.ones(3, 3, requires_grad=True)),
            ValueError,
            "masked_sup_con: mask must hold real numbers and require no grad",
        ),
    ],
)
def test_errors_of_inputs(module, inputs, error, message):
    with pytest.raises(error) as raised:
        module(*inputs)
    assert str(raised.value) == message

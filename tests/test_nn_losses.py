"""The loss modules: values and gradients of what they replace, the memory bank, laws."""

import copy

import loss_forms as forms
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import LABELS, MASK, PAIRS, D, N, pair, rows
from numerics import assert_as_exact_as_eager

from sslkernels import nn as ours


def gradients(function, *inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    value.sum().backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]


def assert_same(module, form, *inputs, dtype=torch.float32):
    """Value and gradients as exact as those of the form in ``dtype``; scalars stay float32."""
    inputs = [x if x.dim() == 0 else x.to(dtype) for x in inputs]
    actual = gradients(module, *inputs)
    eager = gradients(form, *inputs)
    exact = gradients(form, *(x.double() for x in inputs))
    names = ["loss", *(f"gradient {index}" for index in range(len(inputs)))]
    for name, *tensors in zip(names, actual, eager, exact, strict=True):
        assert_as_exact_as_eager(name, *tensors, dtype=dtype, floor=0 if name == "loss" else 1 / N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name, module, form, inputs", PAIRS, ids=[name for name, *_ in PAIRS])
def test_values_and_gradients_of_what_is_replaced(name, module, form, inputs, dtype):
    assert_same(module, form, *inputs, dtype=dtype)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("temperature", [0.1, 0.7])
def test_reductions_of_info_nce(reduction, temperature):
    module = ours.InfoNCELoss(temperature, reduction)
    assert_same(module, lambda *inputs: forms.info_nce(*inputs, temperature=temperature, reduction=reduction), *pair())


# ---- the memory bank of NTXentLoss


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [22, 25, 4])
def test_steps_with_a_bank(size, dtype, storage):
    """Each loss sees the keys of the steps before, whether N divides the size, or exceeds it, or neither."""
    module = ours.NTXentLoss(0.2, (size, D), memory_bank_dtype=storage)
    seen = module.memory_bank.bank.float().clone()
    came = 0
    for step in range(5):
        out0, out1 = rows(N, D, seed=step).to(dtype), rows(N, D, seed=step + 50).to(dtype)
        expected = seen.clone()
        assert_same_step(module, out0, out1, forms.unit(expected) if storage == torch.bfloat16 else expected, dtype)
        for key in forms.unit(out1):
            seen[came % size] = key.to(storage).float()
            came += 1
        torch.testing.assert_close(module.memory_bank.bank.float(), seen, rtol=0, atol=0)
        assert module.memory_bank.bank_ptr.item() == came % size


def assert_same_step(module, out0, out1, bank, dtype):
    actual = gradients(module, out0, out1)
    exact = gradients(lambda a, b: forms.moco(a, b, bank, 0.2), out0.double(), out1.double())
    eager = gradients(lambda a, b: forms.moco(a, b, bank, 0.2), out0, out1)
    for name, *tensors in zip(("loss", "grad_out0", "grad_out1"), actual, eager, exact, strict=True):
        assert_as_exact_as_eager(name, *tensors, dtype=dtype, floor=0 if name == "loss" else 1 / N)


def test_the_bank_is_updated_only_where_the_queries_learn():
    module = ours.NTXentLoss(memory_bank_size=(20, D))
    out0, out1 = pair()
    module(out0, out1.requires_grad_())
    with torch.no_grad():
        module(out0 * torch.ones(1, requires_grad=True), out1)
    assert module.memory_bank.bank_ptr.tolist() == [0]
    module(out0.requires_grad_(), out1)
    assert module.memory_bank.bank_ptr.tolist() == [N]


def test_the_bank_holds_unit_rows():
    module = ours.NTXentLoss(memory_bank_size=(20, D))
    module(rows(N, D).requires_grad_(), 5 * rows(N, D, seed=1))
    torch.testing.assert_close(module.memory_bank.bank.norm(dim=1), torch.ones(20))


def test_two_losses_before_their_backward():
    module = ours.NTXentLoss(0.2, (20, D))
    alone = copy.deepcopy(module)
    out0, out1 = pair()
    leaf, other = out0.clone().requires_grad_(), out0.clone().requires_grad_()
    (module(leaf, out1) + module(leaf, out1)).backward()
    for _ in range(2):
        alone(other, out1).backward()
    torch.testing.assert_close(leaf.grad, other.grad)


def test_a_loss_with_a_bank_resumes():
    module, resumed = (ours.NTXentLoss(0.2, (15, D)) for _ in range(2))
    out0, out1 = pair()
    module(out0.requires_grad_(), out1)
    resumed.load_state_dict(module.state_dict())
    for _ in range(2):
        assert torch.equal(module(out0, out1), resumed(out0, out1))


def test_what_has_no_state_saves_none():
    assert ours.NTXentLoss().state_dict() == {}
    assert ours.ClipLoss().state_dict() == {}


# ---- SupConLoss


SUP_CON = {
    "labels": {"labels": LABELS},
    "labels (N, 1)": {"labels": LABELS[:, None]},
    "views alone": {},
    "mask": {"mask": MASK},
    "boolean mask": {"mask": LABELS[:, None] == LABELS},
}


@pytest.mark.parametrize("given", SUP_CON.values(), ids=SUP_CON)
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("mode", ["all", "one"])
def test_sup_con(mode, views, given):
    features = rows(N, views, D, unit=True)
    module = ours.SupConLoss(0.2, mode, 0.1)
    form = {"temperature": 0.2, "contrast_mode": mode, "base_temperature": 0.1, **given}
    assert_same(lambda x: module(x, **given), lambda x: forms.sup_con(x, **form), features)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("given", [{"labels": LABELS.int()}, {"mask": MASK}], ids=["labels", "mask"])
def test_sup_con_dtypes_and_more_dimensions(given, dtype):
    features = rows(N, 2, 2, 3).to(dtype) / 3
    module = ours.SupConLoss()
    assert_same(lambda x: module(x, **given), lambda x: forms.sup_con(x, **given), features, dtype=dtype)


def test_without_a_label_only_the_views_are_positives():
    labels = LABELS.clone()
    labels[[1, 4, 6]] = -1
    own = labels.clone()
    own[[1, 4, 6]] = torch.tensor([100, 101, 102])
    features = rows(N, 2, D, unit=True)
    torch.testing.assert_close(ours.SupConLoss()(features, labels), forms.sup_con(features, own))


@pytest.mark.parametrize("given", [{"labels": torch.zeros(1, dtype=torch.int64)}, {"mask": torch.ones(1, 1)}])
def test_sup_con_of_one_row_is_zero(given):
    features = rows(1, 1, D).requires_grad_()
    loss = ours.SupConLoss()(features, **given)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(features.grad, torch.zeros_like(features))


def test_sup_con_of_nothing_is_zero():
    assert ours.SupConLoss()(torch.zeros(0, 2, D), torch.zeros(0, dtype=torch.int64)).item() == 0
    assert ours.SupConLoss()(torch.zeros(0, 2, D), mask=torch.zeros(0, 0)).item() == 0


@settings(deadline=None, max_examples=30)
@given(order=st.permutations(range(N)), views=st.integers(1, 3), by_mask=st.booleans())
def test_sup_con_does_not_see_the_order_of_samples(order, views, by_mask):
    features, order = rows(N, views, D, unit=True), torch.tensor(order)
    first = {"mask": MASK} if by_mask else {"labels": LABELS}
    second = {"mask": MASK[order][:, order]} if by_mask else {"labels": LABELS[order]}
    module = ours.SupConLoss()
    torch.testing.assert_close(module(features[order], **second), module(features, **first))


def test_without_labels_two_views_are_nt_xent():
    out0, out1 = pair(unit=True)
    loss = ours.SupConLoss(0.3, base_temperature=0.3)(torch.stack([out0, out1], dim=1))
    torch.testing.assert_close(loss, ours.NTXentLoss(0.3)(out0, out1))

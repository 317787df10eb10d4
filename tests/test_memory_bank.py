"""The memory bank: laws of the ring, losses that read it while it is written, storage, resuming, errors."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import sslkernels
from sslkernels.nn import MemoryBank


def keys_of(count, dim=4, first=0):
    """Rows that say when they came."""
    return torch.arange(first, first + count, dtype=torch.float32)[:, None].expand(count, dim)


def test_a_new_bank_holds_random_unit_vectors():
    torch.manual_seed(0)
    bank = MemoryBank((50, 8))
    torch.testing.assert_close(bank.bank.norm(dim=1), torch.ones(50))
    assert bank.bank.unique(dim=0).shape == (50, 8)
    assert bank.bank_ptr.tolist() == [0]


@settings(deadline=None, max_examples=200)
@given(rows=st.integers(1, 9), batches=st.lists(st.integers(0, 23), max_size=8))
def test_the_last_keys_stay_however_they_are_split(rows, batches):
    bank, by_one = MemoryBank((rows, 4)), MemoryBank((rows, 4))
    by_one.load_state_dict(bank.state_dict())
    total = 0
    for count in batches:
        bank.enqueue(keys_of(count, first=total))
        total += count
    for key in range(total):
        by_one.enqueue(keys_of(1, first=key))
    assert torch.equal(bank.bank, by_one.bank)
    assert bank.bank_ptr.tolist() == by_one.bank_ptr.tolist() == [total % rows]
    kept = min(total, rows)
    assert set(range(total - kept, total)) <= set(bank.bank[:, 0].tolist())


def test_nothing_else_is_written():
    bank = MemoryBank((6, 4))
    before = bank.bank.clone()
    bank.enqueue(keys_of(2))
    assert torch.equal(bank.bank[:2], keys_of(2))
    assert torch.equal(bank.bank[2:], before[2:])


def test_enqueue_writes_in_place():
    bank = MemoryBank((6, 4))
    place, seen = bank.bank.data_ptr(), bank.keys
    for _ in range(5):
        bank.enqueue(keys_of(4))
    assert bank.bank.data_ptr() == place == seen.data_ptr()
    assert torch.equal(seen, bank.bank)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_storage_has_its_own_dtype(dtype):
    bank = MemoryBank((6, 4), dtype=dtype)
    keys = torch.randn(3, 4)
    bank.enqueue(keys)
    assert bank.bank.dtype == bank.keys.dtype == dtype
    assert torch.equal(bank.bank[:3], keys.to(dtype))


def test_keys_of_any_dtype_and_strides():
    bank = MemoryBank((6, 4))
    keys = torch.randn(4, 3).bfloat16().T
    bank.enqueue(keys)
    assert torch.equal(bank.bank[:3], keys.float())


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("learned", ["query", "temperature", "both"])
def test_keys_may_be_enqueued_between_loss_and_backward(storage, learned):
    torch.manual_seed(0)
    bank = MemoryBank((20, 8), dtype=storage)
    values = torch.randn(5, 8), torch.tensor(0.2)
    results = []
    for early in (True, False):
        query, temperature = (value.clone() for value in values)
        query.requires_grad_(learned != "temperature")
        temperature.requires_grad_(learned != "query")
        queue = copy.deepcopy(bank)
        loss = sslkernels.info_nce(query, values[0].roll(1, 0), queue.keys, temperature)
        if early:
            queue.enqueue(torch.randn(13, 8))
        loss.backward()
        results.append([loss.detach(), query.grad, temperature.grad])
    for early, late in zip(*results, strict=True):
        assert (early is None and late is None) or torch.equal(early, late)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_late_backward_is_right_or_an_error(dtype, normalize, backend):
    torch.manual_seed(0)
    gradients = []
    bank = MemoryBank((20, 8), dtype=dtype)
    for early in (False, True):
        query = torch.arange(40, dtype=dtype).reshape(5, 8).sin().requires_grad_()
        loss = sslkernels.info_nce(query, query.detach(), bank.keys, 0.2, normalize=normalize, backend=backend)
        if early:
            bank.enqueue(torch.randn(13, 8, dtype=dtype))
        keeps_the_bank = not normalize and dtype == torch.float64  # else it is a copy that is kept
        if early and keeps_the_bank:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
            return
        loss.backward()
        gradients.append(query.grad)
    assert torch.equal(*gradients)


def test_plain_products_with_the_bank_notice_a_late_key():
    bank = MemoryBank((6, 4))
    query = torch.randn(2, 4, requires_grad=True)
    loss = (query @ bank.keys.T).sum()
    bank.enqueue(torch.randn(2, 4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_keys_with_grad_leave_no_graph_behind():
    bank = MemoryBank((6, 4))
    bank.enqueue(torch.randn(2, 4, requires_grad=True) * 2)
    assert not bank.bank.requires_grad and not bank.keys.requires_grad


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("update", [True, False])
def test_forward_gives_the_bank_without_the_output(first, update):
    bank = MemoryBank((6, 4), feature_dim_first=first)
    before, output = bank.bank.clone(), torch.randn(2, 4)
    same, seen = bank(output, labels=torch.zeros(2), update=update)
    assert same is output
    assert torch.equal(seen, before.T if first else before)
    assert torch.equal(bank.bank[:2], output if update else before[:2])


@pytest.mark.parametrize("size", [0, (0,), (0, 4), [0, 4]])
def test_no_bank(size):
    bank = MemoryBank(size)
    output = torch.randn(2, 4)
    assert not bank.enabled
    assert bank(output, update=True) == (output, None)
    bank.enqueue(output)
    assert bank.state_dict() == {}


def test_state_resumes_exactly():
    torch.manual_seed(0)
    bank = MemoryBank((7, 4), dtype=torch.bfloat16)
    bank.enqueue(torch.randn(5, 4))
    file = io.BytesIO()
    torch.save(bank.state_dict(), file)
    file.seek(0)
    resumed = MemoryBank((7, 4), dtype=torch.bfloat16)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    later = torch.randn(4, 4)
    for each in (bank, resumed):
        each.enqueue(later)
    assert torch.equal(bank.bank, resumed.bank)
    assert bank.bank_ptr.tolist() == resumed.bank_ptr.tolist() == [2]


def test_a_copy_is_on_its_own():
    bank = MemoryBank((6, 4))
    other = copy.deepcopy(bank)
    other.enqueue(keys_of(2))
    assert bank.bank_ptr.tolist() == [0]
    assert not torch.equal(bank.bank, other.bank)


def test_the_bank_goes_where_the_keys_are():
    bank = MemoryBank((6, 4))
    bank.enqueue(torch.empty(2, 4, device="meta"))
    assert bank.bank.is_meta and bank.bank_ptr.is_meta


def test_compiles_whole():
    torch._dynamo.reset()
    bank = MemoryBank((7, 4))
    eager = copy.deepcopy(bank)
    step = torch.compile(bank.enqueue, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        keys = F.normalize(torch.randn(3, 4), dim=1)
        step(keys)
        eager.enqueue(keys)
    assert torch.equal(bank.bank, eager.bank)
    assert torch.equal(bank.bank_ptr, eager.bank_ptr)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"size": 8}, ValueError, "size must be (K, D), or 0 for no bank, got 8"),
        ({"size": (8,)}, ValueError, "size must be (K, D), or 0 for no bank, got (8,)"),
        ({"size": (8, 4, 2)}, ValueError, "size must be (K, D), or 0 for no bank, got (8, 4, 2)"),
        ({"size": (8, -4)}, ValueError, "size must not be negative, got (8, -4)"),
        ({"size": -1}, ValueError, "size must not be negative, got -1"),
        ({"size": (8, 0)}, ValueError, "size must have at least one feature, got (8, 0)"),
        ({"size": (8, 4.0)}, TypeError, "size must be (K, D) of integers, or 0, got (8, 4.0)"),
        ({"size": True}, TypeError, "size must be (K, D) of integers, or 0, got True"),
        ({"size": (8, 4), "dtype": torch.int64}, TypeError, "dtype must be a floating-point dtype, got torch.int64"),
    ],
)
def test_errors_of_the_constructor(arguments, error, message):
    with pytest.raises(error) as raised:
        MemoryBank(**arguments)
    assert str(raised.value) == f"MemoryBank: {message}"


@pytest.mark.parametrize(
    "keys, error, message",
    [
        (torch.zeros(3, 5), ValueError, "keys must be (B, 4), got (3, 5)"),
        (torch.zeros(4), ValueError, "keys must be (B, 4), got (4,)"),
        (torch.zeros(3, 4, dtype=torch.int64), TypeError, "keys must be a floating-point tensor, got torch.int64"),
        ([1.0], TypeError, "keys must be a floating-point tensor, got list"),
    ],
)
def test_errors_of_keys_leave_the_bank_alone(keys, error, message):
    bank = MemoryBank((6, 4))
    before = copy.deepcopy(bank.state_dict())
    with pytest.raises(error) as raised:
        bank.enqueue(keys)
    assert str(raised.value) == f"MemoryBank: {message}"
    assert all(torch.equal(bank.state_dict()[name], value) for name, value in before.items())

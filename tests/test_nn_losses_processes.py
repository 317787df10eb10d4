"""The loss modules and the memory bank in several processes."""

import ema_children
import loss_children
import pytest


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_learn_as_one(size, exchange):
    ema_children.run(loss_children.as_one_process, size, exchange)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_one_bank_for_all(size):
    ema_children.run(loss_children.one_bank, size)


def test_copies_errors_and_ranks_without_rows():
    ema_children.run(loss_children.odds_and_ends, 2)

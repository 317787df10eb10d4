"""Losses over the batch of several processes, by gloo: as exact as one process, and no hang where one is lost."""

import distributed_children as children
import pytest
from ema_children import run


@pytest.mark.parametrize("size", children.ROWS)
def test_as_one_process_with_the_whole_batch(size):
    run(children.agree_with_one_process, size)


@pytest.mark.parametrize("moment", ["forward", "backward"])
@pytest.mark.parametrize("exchange", children.EXCHANGES)
def test_a_rank_that_dies_is_an_error_for_the_others(exchange, moment):
    run(children.left_by_one, 3, exchange, moment)

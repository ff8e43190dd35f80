"""Every window is in one batch, with windows of its length, and batches hold what they may."""

from __future__ import annotations

import numpy as np
import pytest

from fac_ray.features.batching import Limits, num_windows, plan_batches
from fac_ray.features.chat import Window

NO_HEADER = np.zeros(0, np.int64)


def window(*token_ids, first_pooled=0):
    return Window(np.array(token_ids), np.arange(first_pooled, len(token_ids)), np.arange(first_pooled, len(token_ids)))


def window_of(length):
    return window(*range(length))


@pytest.mark.parametrize(
    ("lengths", "num"),
    [
        ([100] * 50, 40),  # 4,096 tokens hold 40 of 100 tokens
        ([100] * 5, 5),
        ([5000, 5000], 1),  # a window above the budget goes alone
        ([100, 90, 80, 70, 10], 4),  # padding of 10 + 20 + 30 = 60 tokens; with the fifth 150
        ([100, 10, 10], 1),
    ],
)
def test_a_batch_holds_what_budget_and_padding_allow(lengths, num):
    assert num_windows(lengths, Limits(4096, 64)) == num


def test_every_window_is_in_one_batch_with_those_of_its_length():
    lengths = np.random.default_rng(0).integers(1, 60, 50).tolist()
    owned = [(number, window_of(length)) for number, length in enumerate(lengths)]
    batches = plan_batches(owned, NO_HEADER, Limits(200, 30))
    assert sorted(number for batch in batches for number, _ in batch.windows) == list(range(50))
    assert all(lengths[number] == len(one.token_ids) for batch in batches for number, one in batch.windows)
    in_order = [len(one.token_ids) for batch in batches for _, one in batch.windows]
    assert in_order == sorted(lengths, reverse=True)
    for batch in batches:
        longest = len(batch.windows[0][1].token_ids)
        assert longest * len(batch.windows) <= 200
        assert sum(longest - len(one.token_ids) for _, one in batch.windows) <= 30
        assert batch.num_shared == 0


def test_windows_with_the_header_come_first_and_their_budget_is_without_it():
    header = np.array([7, 8, 9])
    with_header = window(7, 8, 9, 1, 2, first_pooled=3)
    pools_it, lacks_it = window(7, 8, 9, 1, 2, first_pooled=2), window(7, 8, 1, 1, 2, first_pooled=3)
    owned = list(enumerate([pools_it, with_header, lacks_it, with_header, with_header]))
    batches = plan_batches(owned, header, Limits(4, 64))
    found = [([number for number, _ in batch.windows], batch.num_shared) for batch in batches]
    assert found == [([1, 3], 3), ([4], 3), ([0], 0), ([2], 0)]

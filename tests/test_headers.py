"""What all texts start with goes through the model once, and nothing of it shows in the result."""

from __future__ import annotations

import numpy as np
import pytest

from fac_ray.features.chat import Window
from fac_ray.features.headers import has_header, pays, shared_header


def window(token_ids, first_pooled):
    places = np.arange(first_pooled, len(token_ids))
    return Window(np.array(token_ids), places, places)


@pytest.mark.parametrize(
    ("windows", "header"),
    [
        ([([1, 2, 3, 4], 3), ([1, 2, 3, 9, 9], 3)], [1, 2, 3]),
        ([([1, 2, 3, 4], 3), ([1, 2, 3, 4], 3)], [1, 2, 3]),  # what is pooled is not shared, equal or not
        ([([1, 2, 3, 4], 3), ([1, 5, 3, 4], 3)], [1]),
        ([([1, 2, 3, 4], 3), ([1, 2, 3], 1)], [1]),
        ([([1, 2], 1), ([2, 2], 1)], []),
        ([([1, 2], 0), ([1, 2], 1)], []),
        ([([1, 2, 3], 2)], [1, 2]),
        ([], []),
    ],
)
def test_the_header_is_what_all_windows_start_with_and_none_pools(windows, header):
    windows = [window(*one) for one in windows]
    found = shared_header(windows)
    assert found.tolist() == header
    assert all(has_header(one, found) for one in windows)


def test_a_window_has_a_header_only_if_it_starts_with_all_of_it_unpooled():
    header = np.array([1, 2])
    assert has_header(window([1, 2, 3], 2), header)
    assert not has_header(window([1, 2, 3], 1), header)
    assert not has_header(window([1, 3, 3], 2), header)


def test_a_header_pays_from_one_token_in_sixty_four_on():
    texts = [window(list(range(64)), 2)] * 10
    for is_kept in (False, True):
        assert pays(np.arange(1), texts, is_kept)
        assert not pays(np.arange(1), [*texts, window(list(range(65)), 2)], is_kept)
        assert not pays(np.arange(0), texts, is_kept)
        assert not pays(np.arange(0), [], is_kept)


def test_for_fewer_than_eight_windows_a_header_pays_only_if_it_is_kept_already():
    texts = [window(list(range(64)), 2)] * 8
    assert pays(np.arange(2), texts, is_kept=False)
    assert not pays(np.arange(2), texts[1:], is_kept=False)
    assert pays(np.arange(2), texts[:1], is_kept=True)

"""Windows of many samples come in, batches of windows of similar length go out, as few as budget and padding allow."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fac_ray.features.chat import Window
from fac_ray.features.headers import has_header


class Batch(NamedTuple):
    """Windows that go through the model at once, longest first."""

    windows: list[tuple[int, Window]]
    """Each with the number of the sample that it comes from."""
    num_shared: int
    """First tokens that are the same in all windows and pooled in none."""


class Limits(NamedTuple):
    """What one batch may hold."""

    num_tokens: int
    """Padding included."""
    padding_tokens: int


def plan_batches(windows: Sequence[tuple[int, Window]], header: Int[np.ndarray, " P"], limits: Limits) -> deque[Batch]:
    """Batches of all windows, each with the number of its sample: those with the header first, then the others."""
    groups: tuple[list[tuple[int, Window]], list[tuple[int, Window]]] = ([], [])
    for owned in windows:
        groups[len(header) == 0 or not has_header(owned[1], header)].append(owned)
    batches: deque[Batch] = deque()
    for group, num_shared in zip(groups, (len(header), 0), strict=True):
        longest_first = sorted(group, key=lambda owned: -len(owned[1].token_ids))
        first = 0
        while first < len(group):
            lengths = (len(window.token_ids) - num_shared for _, window in islice(longest_first, first, None))
            num = num_windows(lengths, limits)
            batches.append(Batch(longest_first[first : first + num], num_shared))
            first += num
    return batches


def num_windows(lengths: Iterable[int], limits: Limits) -> int:
    """How many windows of those lengths, longest first, make the next batch; one at least."""
    longest = padding = num = 0
    for length in lengths:
        longest = longest or length
        padding += longest - length
        if num and ((num + 1) * longest > limits.num_tokens or padding > limits.padding_tokens):
            break
        num += 1
    return num


def padded_ids(windows: Sequence[Window]) -> Int[Tensor, "B T"]:
    """The windows' token ids, padded on the right with id 0 to the longest."""
    token_ids = torch.zeros(len(windows), max(len(window.token_ids) for window in windows), dtype=torch.long)
    for row, window in zip(token_ids, windows, strict=True):
        row[: len(window.token_ids)] = torch.from_numpy(window.token_ids)
    return token_ids

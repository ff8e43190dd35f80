"""Tokens that all texts start with go through the model once: the header that a chat template writes, or BOS.

Their keys and values are kept, and stand before those of whatever follows. A short text after a long header, such as
the system message that a template adds by itself, then costs little more than its own tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from fac_ray.features.chat import Window

MIN_FRACTION = 1 / 64
"""Of all tokens, headers must be so many to be worth the mask that attention then needs."""
MIN_WINDOWS = 8
"""Windows that must share a header for it to be worth a pass of its own."""


class Header:
    """Some first tokens, and the keys and values that they leave in each block."""

    def __init__(self, token_ids: Int[Tensor, " P"], run: Callable[..., Any]) -> None:
        """`run(token_ids, past)` is the forward pass of the model."""
        self.token_ids = token_ids
        cache = DynamicCache()
        run(token_ids[None], cache)
        layers: list[Any] = cache.layers
        self._kept = [(layer.keys, layer.values) for layer in layers]

    def cache(self) -> Cache:
        """What the model takes as the past of any number of rows."""
        return Cache(layers=[_KeptLayer(keys, values) for keys, values in self._kept])


class _KeptLayer(DynamicLayer):
    """Keys and values of the header: those of a batch are put after them, and are not kept."""

    def __init__(self, keys: Float[Tensor, "1 heads P d_head"], values: Float[Tensor, "1 heads P d_head"]) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        pairs: list[tuple[Any, Tensor]] = [(self.keys, key_states), (self.values, value_states)]
        keys, values = (torch.cat([kept.expand(len(new), -1, -1, -1), new], dim=-2) for kept, new in pairs)
        return keys, values


def shared_header(windows: Sequence[Window]) -> Int[np.ndarray, " P"]:
    """The longest run of tokens that all windows start with and none of them pools."""
    if not windows:
        return np.zeros(0, np.int64)
    reach = min(int(window.pooled[0]) for window in windows)
    first_tokens = np.stack([window.token_ids[:reach] for window in windows])
    is_shared = np.append((first_tokens == first_tokens[0]).all(axis=0), False)
    return first_tokens[0][: is_shared.argmin()]


def has_header(window: Window, header: Int[np.ndarray, " P"]) -> bool:
    """Whether a window starts with the header's tokens, none of which it pools."""
    return bool(window.pooled[0] >= len(header)) and np.array_equal(window.token_ids[: len(header)], header)


def pays(header: Int[np.ndarray, " P"], windows: Sequence[Window], is_kept: bool) -> bool:
    """Whether a header, which may be kept already, saves enough of the windows' tokens."""
    num_tokens = sum(len(window.token_ids) for window in windows)
    saves = len(header) * len(windows) >= max(MIN_FRACTION * num_tokens, 1)
    return saves and (is_kept or len(windows) >= MIN_WINDOWS)

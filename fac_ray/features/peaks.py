"""Maximum over tokens: activations of tokens in, the largest of each feature and sample out, with where it is.

Tokens come in runs, one for each sample, and a sample may come in several parts: `merge_peaks` puts them together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor


class Peaks(NamedTuple):
    """Features of one sample over some of its tokens: the largest activation of each, and where; n features > 0.

    NaN is kept, so that whoever reads the peaks can see it.
    """

    feature_ids: Int64[np.ndarray, " n"]
    """Ascending."""
    activations: Float32[np.ndarray, " n"]
    tokens: Int64[np.ndarray, " n"]
    """The first token with that activation."""


def sparse_peaks(
    values: Float[Tensor, "N k"], feature_ids: Int[Tensor, "N k"], bounds: Sequence[int], d_sae: int
) -> Iterator[Peaks]:
    """Peaks of each run of tokens, where only k features of a token are known and the others are 0.

    Run r has the tokens from bounds[r] to bounds[r + 1]; `Peaks.tokens` count from the first token of all.
    """
    runs = torch.arange(len(bounds) - 1, device=values.device)
    runs = runs.repeat_interleave(torch.tensor(bounds, device=values.device).diff())
    tokens = torch.arange(len(values), device=values.device)[:, None].expand_as(values)
    kept = ~(values <= 0)
    keys, values, tokens = (runs[:, None] * d_sae + feature_ids)[kept], values[kept], tokens[kept]
    order = values.argsort(descending=True, stable=True)
    order = order[keys[order].argsort(stable=True)]
    keys, values, tokens = keys[order], values[order], tokens[order]
    first = torch.ones_like(keys, dtype=torch.bool)
    first[1:] = keys[1:] != keys[:-1]
    return _split(keys[first] // d_sae, keys[first] % d_sae, values[first], tokens[first], num_runs=len(bounds) - 1)


def dense_peaks(activations: Float[Tensor, "N d_sae"], bounds: Sequence[int]) -> Iterator[Peaks]:
    """Peaks of each run of tokens, where every feature of a token is known; arguments as in `sparse_peaks`."""
    parts = [activations[first:stop] for first, stop in pairwise(bounds)]
    largest = torch.stack([part.amax(dim=0) for part in parts])
    runs, feature_ids = (~(largest <= 0)).nonzero(as_tuple=True)
    found = feature_ids.split(runs.bincount(minlength=len(parts)).tolist())
    tokens = [first + _first_of_largest(part, ids) for part, ids, first in zip(parts, found, bounds, strict=False)]
    return _split(runs, feature_ids, largest[runs, feature_ids], torch.cat(tokens), num_runs=len(parts))


def merge_peaks(parts: Sequence[Peaks]) -> Peaks:
    """Peaks over all tokens of a sample from those over some of them, whatever their order.

    Associative, commutative and idempotent: the larger activation stands, and of equals the earlier token.
    """
    if len(parts) == 1:
        return parts[0]
    feature_ids, activations, tokens = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((tokens, -activations, feature_ids))
    order = order[np.diff(feature_ids[order], prepend=-1) > 0]
    return Peaks(feature_ids[order], activations[order], tokens[order])


def _first_of_largest(activations: Float[Tensor, "N d_sae"], feature_ids: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """First token with the largest activation of each of these features; searched in their columns alone if few."""
    if 2 * len(feature_ids) > activations.shape[1]:
        return activations.max(dim=0).indices[feature_ids]
    return activations[:, feature_ids].max(dim=0).indices


def _split(runs: Tensor, feature_ids: Tensor, values: Tensor, tokens: Tensor, num_runs: int) -> Iterator[Peaks]:
    """Columns that are ordered by run and then by feature, as one `Peaks` for each run."""
    bounds = np.searchsorted(runs.cpu().numpy(), np.arange(num_runs + 1))
    columns = [column.cpu().numpy() for column in (feature_ids, values, tokens)]
    return (Peaks(*(column[first:stop] for column in columns)) for first, stop in pairwise(bounds))

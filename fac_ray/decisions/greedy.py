"""Maximum coverage: candidate samples with their features and a limit come in, the samples that cover most go out.

The value of a set of samples is the weight of the features that any of them has: monotone and submodular, so what a
sample adds can only fall as others are taken. `lazy_greedy` uses that to look at few samples in each step and takes
exactly what a greedy search over all of them would take. Weights are whole numbers, so that sums are exact, equal gains
are equal, and nothing depends on the order of candidates. numpy and pyarrow only.

Candidates are CANDIDATES rows in the order of `in_order`: of equals the shorter, then the smaller id comes first.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int

from fac_ray.coverage.counts import flat_values, is_active, sparse_rows

CANDIDATES = pa.schema([("sample_id", pa.string()), ("num_tokens", pa.int64()), ("feature_ids", pa.list_(pa.int32()))])


class Limit(NamedTuple):
    """What may be taken; None: no limit of that kind."""

    num_samples: int | None = None
    num_tokens: int | None = None


class Pick(NamedTuple):
    """A sample that was taken."""

    row: int
    """In the candidates."""
    gain: int
    """Weight of the features that it added."""


def candidates_of(rows: pa.Table, weights: Int[np.ndarray, " d_sae"], threshold: float) -> pa.Table:
    """CANDIDATES for ACTIVATIONS rows: of each measured sample the features that are active and have a weight.

    Raises:
        ValueError: the lists do not fit together, or a feature_id lies outside [0, d_sae).
    """
    rows = rows.filter(pc.is_null(rows["error"]))
    pairs = sparse_rows(rows, len(weights))
    kept = is_active(pairs.activations, threshold) & (weights[pairs.feature_ids] > 0)
    ends = np.bincount(pairs.row[kept], minlength=len(rows)).cumsum()
    offsets = pa.array(np.concatenate([[0], ends]), pa.int32())
    ids = pa.ListArray.from_arrays(offsets, pa.array(pairs.feature_ids[kept], pa.int32()))
    table = {"sample_id": rows["sample_id"], "num_tokens": rows["num_tokens"], "feature_ids": ids}
    return pa.table(table).cast(CANDIDATES)


def in_order(candidates: pa.Table) -> pa.Table:
    """The candidates with the shortest first, and of equally long ones the smallest sample_id."""
    return candidates.sort_by([("num_tokens", "ascending"), ("sample_id", "ascending")])


def distinct_candidates(candidates: pa.Table) -> pa.Table:
    """Of candidates with equal features the first in order, and none without features.

    No greedy search takes any of those that are left out: the first is as good and no longer.
    """
    candidates = in_order(candidates)
    features = _Features.of(candidates)
    first: dict[bytes, int] = {}
    for row in np.flatnonzero(np.diff(features.offsets)):
        first.setdefault(features.row(row).tobytes(), int(row))
    return candidates.take(pa.array(list(first.values()), pa.int64()))


def best_cover(candidates: pa.Table, weights: Int[np.ndarray, " d_sae"], limit: Limit) -> list[Pick]:
    """The picks of the greedy search; with a token limit, the better of two, by gain and by gain per token.

    Value at least (1 - 1/e) of the optimum under a limit on samples (Nemhauser, Wolsey and Fisher 1978), and half of
    that under a limit on tokens (Leskovec et al. 2007).
    """
    by_gain = lazy_greedy(candidates, weights, limit)
    if limit.num_tokens is None:
        return by_gain
    per_token = lazy_greedy(candidates, weights, limit, per_token=True)
    return max(by_gain, per_token, key=value_of)


def lazy_greedy(
    candidates: pa.Table, weights: Int[np.ndarray, " d_sae"], limit: Limit, per_token: bool = False
) -> list[Pick]:
    """In each step the sample with the largest gain (or gain per token) among those that fit, of equals the first.

    Gains that were computed in earlier steps are upper bounds, so the largest of them is computed anew, and taken if
    it stays the largest (Minoux 1978; "CELF", Leskovec et al. 2007). It ends when nothing fits or nothing adds.
    """
    features, left = _Features.of(candidates), weights.copy()
    tokens = np.maximum(candidates["num_tokens"].to_numpy(), 1)
    gains = features.gains(left)
    keys = gains / tokens if per_token else gains
    heap = [(-key, row) for row, key in enumerate(keys.tolist()) if key > 0]
    heapq.heapify(heap)
    picks: list[Pick] = []
    room_tokens = math.inf if limit.num_tokens is None else limit.num_tokens
    while heap and (limit.num_samples is None or len(picks) < limit.num_samples):
        key, row = heapq.heappop(heap)
        if tokens[row] > room_tokens:
            continue
        gain = int(left[features.row(row)].sum())
        fresh = -(gain / int(tokens[row]) if per_token else gain)
        if fresh == key:
            picks.append(Pick(row, gain))
            room_tokens -= int(tokens[row])
            left[features.row(row)] = 0
        elif gain > 0:
            heapq.heappush(heap, (fresh, row))
    return picks


def value_of(picks: Sequence[Pick]) -> int:
    """Weight of everything that the picks cover."""
    return sum(pick.gain for pick in picks)


def best_gains(candidates: pa.Table, left: Int[np.ndarray, " d_sae"], limit: Limit) -> Int[np.ndarray, "2 n"]:
    """Gains and tokens of the samples that `optimum_bound` needs of these candidates; `left`: weights not yet covered.

    Of the samples that fit: the `num_samples` with the largest gains, and as many by gain per token as fill the token
    limit. What is needed of all parts of a pool together is among what is needed of each.
    """
    gains = _Features.of(candidates).gains(left)
    tokens = np.maximum(candidates["num_tokens"].to_numpy(), 1)
    fits = (gains > 0) & (tokens <= (math.inf if limit.num_tokens is None else limit.num_tokens))
    gains, tokens = gains[fits], tokens[fits]
    needed = np.zeros(len(gains), bool)
    if limit.num_samples is not None:
        needed[np.argsort(-gains, kind="stable")[: limit.num_samples]] = True
    if limit.num_tokens is not None:
        order = np.argsort(-gains / tokens, kind="stable")
        needed[order[tokens[order].cumsum() - tokens[order] < limit.num_tokens]] = True
    return np.stack([gains[needed], tokens[needed]])


def optimum_bound(value: int, best: Int[np.ndarray, "2 n"], left: Int[np.ndarray, " d_sae"], limit: Limit) -> float:
    """A value that no set of samples within the limit exceeds, from any set that was found.

    value(S) plus the largest gains that fit after S: by submodularity the optimum adds to S no more than its members
    add one by one (Leskovec et al. 2007, section 3.2); under a token limit the last one may be cut. And never more
    than the weight that is left. `best`: `best_gains` of the whole pool after S.
    """
    gains, tokens = best
    bounds = [float(left.sum())]
    if limit.num_samples is not None:
        bounds.append(float(np.sort(gains)[::-1][: limit.num_samples].sum()))
    if limit.num_tokens is not None:
        order = np.argsort(-gains / tokens, kind="stable")
        before = tokens[order].cumsum() - tokens[order]
        parts = np.clip((limit.num_tokens - before) / tokens[order], 0, 1)
        bounds.append(float((gains[order] * parts).sum()))
    return value + min(bounds)


def guaranteed_fraction(limit: Limit, num_partitions: int) -> float | None:
    """Share of the optimum that `best_cover` reaches on any data; None where nothing is known beforehand.

    With m partitions: one of them holds a part of the best k samples worth 1/m of the optimum, of which its own search
    reaches (1 - 1/e); and the first pick of the best search alone is worth 1/k. The final set is no worse than either.
    """
    if limit.num_tokens is None and limit.num_samples is not None:
        exact = 1 - 1 / math.e
        return exact if num_partitions == 1 else max(exact / num_partitions, 1 / limit.num_samples)
    if limit.num_samples is None and num_partitions == 1:
        return (1 - 1 / math.e) / 2
    return None


class _Features(NamedTuple):
    """The features of candidates, flat."""

    ids: Int[np.ndarray, " pairs"]
    offsets: Int[np.ndarray, " bounds"]

    @classmethod
    def of(cls, candidates: pa.Table) -> _Features:
        lengths = pc.list_value_length(candidates["feature_ids"]).to_numpy()
        return cls(flat_values(candidates, "feature_ids"), np.concatenate([[0], lengths.cumsum()]).astype(np.int64))

    def row(self, row: int) -> Int[np.ndarray, " n"]:
        return self.ids[self.offsets[row] : self.offsets[row + 1]]

    def gains(self, left: Int[np.ndarray, " d_sae"]) -> Int[np.ndarray, " rows"]:
        """Weight that each row would add."""
        sums = np.concatenate([[0], left[self.ids].cumsum()])
        return sums[self.offsets[1:]] - sums[self.offsets[:-1]]

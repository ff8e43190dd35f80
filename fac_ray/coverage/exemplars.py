"""The samples on which each feature is strongest: ACTIVATIONS rows come in, the top few per feature go out, with spans.

`TopExemplars` is a commutative monoid like the counts: the strongest k of a merge are the strongest k of all rows,
whatever the parts. Activations that agree to the eight bits of a bfloat16 are equals here and are ordered by sample_id:
the result depends neither on the order of rows nor on the last bits, which a matrix product of another size may change.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int, UInt32, UInt64

from fac_ray.coverage.counts import flat_values, sparse_rows

PEAKS = pa.schema(
    [
        ("feature_id", pa.int32()),
        ("activation", pa.float32()),
        ("sample_id", pa.string()),
        ("peak_start", pa.int32()),
        ("peak_end", pa.int32()),
    ]
)

KEY_BITS = np.uint64(16)
"""Bits of a sort key that hold the activation; above them stands the feature."""
MIN_WAITING = 1 << 18
"""Pairs that wait for a merge, if there are not more than that among the strongest."""

WORD = re.compile(r"\S{1,40}")  # a run without spaces is cut into pieces, so that no span grows without bound


@dataclass(frozen=True)
class TopExemplars:
    """The `num_kept` strongest (activation, sample, peak token) of each feature; `rows` is a PEAKS table, sorted by
    feature_id ascending, activation rounded to bfloat16 descending, sample_id ascending."""

    num_kept: int
    rows: pa.Table

    @classmethod
    def empty(cls, num_kept: int) -> TopExemplars:
        """The identity of `merge`."""
        return cls(num_kept, PEAKS.empty_table())

    @classmethod
    def from_rows(cls, rows: pa.Table, num_kept: int, d_sae: int) -> TopExemplars:
        """The strongest of some ACTIVATIONS rows.

        Raises:
            ValueError: the lists do not fit together, or a feature_id lies outside [0, d_sae).
        """
        fold = ExemplarsFold(num_kept, d_sae)
        fold.fold(rows)
        return fold.result()

    @classmethod
    def merge_all(cls, parts: Sequence[TopExemplars]) -> TopExemplars:
        """The strongest of the rows of all parts. The order of the parts does not matter.

        Raises:
            ValueError: no part, or the parts keep different numbers.
        """
        if len({part.num_kept for part in parts}) != 1:
            raise ValueError(f"parts that keep {sorted({p.num_kept for p in parts})} exemplars do not merge")
        rows = pa.concat_tables([part.rows for part in parts])
        return cls(parts[0].num_kept, strongest(rows, parts[0].num_kept))

    def merge(self, other: TopExemplars) -> TopExemplars:
        """The strongest of the rows of both.

        Raises:
            ValueError: the two keep different numbers.
        """
        return self.merge_all([self, other])

    def to_bytes(self) -> bytes:
        """The rows as an Arrow IPC stream."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, PEAKS) as writer:
            writer.write_table(self.rows)
        return sink.getvalue().to_pybytes()

    @classmethod
    def from_bytes(cls, num_kept: int, data: bytes) -> TopExemplars:
        """What `to_bytes` wrote."""
        return cls(num_kept, pa.ipc.open_stream(data).read_all())


class ExemplarsFold:
    """The strongest of many ACTIVATIONS rows, some rows at a time.

    Nearly all pairs of a large corpus are weaker than the `num_kept`-th strongest of their feature so far, and are
    dropped by one comparison. The others wait, until they are as many as those kept, for a merge.
    """

    def __init__(self, num_kept: int, d_sae: int) -> None:
        self._num_kept = num_kept
        self._top, self._waiting = _Peaks.empty(), [_Peaks.empty()]
        self._sample_ids: list[pa.ChunkedArray] = []
        self._num_samples = 0
        self._bar = np.full(d_sae, -np.inf, np.float32)  # what is below cannot be kept

    def fold(self, rows: pa.Table) -> None:
        """Add ACTIVATIONS rows.

        Raises:
            ValueError: the lists do not fit together, or a feature_id lies outside [0, d_sae).
        """
        pairs = sparse_rows(rows, len(self._bar))
        at = np.flatnonzero(pairs.activations >= self._bar[pairs.feature_ids])
        start, end = (flat_values(rows, name)[at] for name in ("peak_start", "peak_end"))
        sample = pairs.row[at] + self._num_samples
        self._waiting.append(_Peaks(pairs.feature_ids[at], pairs.activations[at], sample, start, end))
        self._sample_ids.append(rows["sample_id"])
        self._num_samples += len(rows)
        if sum(len(part.sample) for part in self._waiting) > max(MIN_WAITING, len(self._top.sample)):
            self._merge()

    def result(self) -> TopExemplars:
        """The strongest of all rows so far."""
        self._merge()
        columns = {**self._top._asdict(), "sample_id": self._ids_of(self._top.sample)}
        return TopExemplars(self._num_kept, pa.table({name: columns[name] for name in PEAKS.names}).cast(PEAKS))

    def _merge(self) -> None:
        parts = [self._top, *self._waiting]
        joined = _Peaks(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
        key = _sort_key(joined.feature_id, joined.activation)
        kept = _strongest(key, lambda at: self._ids_of(joined.sample[at]), self._num_kept)
        self._top, self._waiting = _Peaks(*(column[kept] for column in joined)), []
        last = _rank_in_group(self._top.feature_id) == self._num_kept - 1
        self._bar[self._top.feature_id[last]] = weakest_equal(self._top.activation[last])

    def _ids_of(self, samples: Int[np.ndarray, " some"]) -> pa.ChunkedArray:
        self._sample_ids = [pa.chunked_array(self._sample_ids, pa.string()).combine_chunks()]
        return pa.chunked_array(self._sample_ids, pa.string()).take(pa.array(samples, pa.int64()))


class _Peaks(NamedTuple):
    """The columns of PEAKS, samples by their number in the fold: strings are slow to move."""

    feature_id: Int[np.ndarray, " pairs"]
    activation: Float[np.ndarray, " pairs"]
    sample: Int[np.ndarray, " pairs"]
    peak_start: Int[np.ndarray, " pairs"]
    peak_end: Int[np.ndarray, " pairs"]

    @classmethod
    def empty(cls) -> _Peaks:
        none = np.zeros(0, np.int32)
        return cls(none, np.zeros(0, np.float32), np.zeros(0, np.int64), none, none)


def strongest(rows: pa.Table, num_kept: int) -> pa.Table:
    """The first `num_kept` rows of each feature, in the order of `TopExemplars.rows`.

    The rows have at least the columns feature_id, activation and sample_id.
    """
    rows = rows.combine_chunks()
    key = _sort_key(rows["feature_id"].to_numpy(), rows["activation"].to_numpy())
    kept = _strongest(key, lambda at: rows["sample_id"].take(pa.array(at)), num_kept)
    return rows.take(pa.array(kept))


def strengths(activations: Float[np.ndarray, " n"]) -> UInt32[np.ndarray, " n"]:
    """The bits of the nearest bfloat16, ordered as the activations are, which equals share; negative ones count as 0.

    The bits of floats that are not negative are ordered as the floats are; the upper half of them is the bfloat16.
    """
    bits = (np.maximum(activations, np.float32(0)) + np.float32(0)).view(np.uint32)
    return (bits + np.uint32(0x8000)) >> np.uint32(16)


def weakest_equal(activations: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The smallest float32 that has the strength of each activation."""
    bits = strengths(activations) << np.uint32(16)
    return (np.maximum(bits, np.uint32(0x8000)) - np.uint32(0x8000)).view(np.float32)


def span_of(text: str, peak_start: int, peak_end: int, span_words: int) -> str:
    """About `span_words` words of a text around its peak token, cut at word boundaries.

    The span holds the characters [peak_start, peak_end) whatever the number of words, save for white space at its
    own ends. Words are runs without white space; of a run longer than 40 characters, pieces count as words.
    """
    peak_start = min(max(peak_start, 0), len(text))
    peak_end = min(max(peak_end, peak_start), len(text))
    words, first, last = _words_around(text, peak_start, peak_end, span_words)
    spare = max(span_words - (last - first), 0)
    before = min(first, max(spare // 2, spare - (len(words) - last)))
    chosen = words[first - before : last + spare - before]
    if not chosen:
        return text[peak_start:peak_end].strip()
    return text[min(peak_start, chosen[0][0]) : max(peak_end, chosen[-1][1])].strip()


def _words_around(text: str, peak_start: int, peak_end: int, span_words: int) -> tuple[list[tuple[int, int]], int, int]:
    """Words near the peak as (start, end), and the half-open range [first, last) of those that the peak touches."""
    reach = 41 * (span_words + 1)
    low, high = max(0, peak_start - reach), min(len(text), peak_end + reach)
    words = [(low + m.start(), low + m.end()) for m in WORD.finditer(text[low:high])]
    if low > 0 and words and words[0][0] == low and words[0][1] <= peak_start:
        del words[0]  # perhaps the end of a longer word
    if high < len(text) and words and words[-1][1] == high and words[-1][0] >= peak_end:
        del words[-1]
    first = sum(end <= peak_start for _, end in words)
    last = max(first, sum(start < peak_end for start, _ in words))
    return words, first, last


def _strongest(
    key: UInt64[np.ndarray, " pairs"], ids_at: Callable[[Int[np.ndarray, " some"]], pa.ChunkedArray], num_kept: int
) -> Int[np.ndarray, " kept"]:
    """Where the first `num_kept` pairs of each feature stand: rounded activation descending, then sample_id ascending.

    Only pairs with an equal need their sample_id, and strings are slow to sort, so they are looked up for these alone.
    """
    order = _order(key)
    by_key = key[order]
    place = np.arange(len(order))
    last = place - _rank_in_group(_features_of(by_key)) + num_kept - 1  # beyond a shorter group all keys are larger
    order = order[by_key <= by_key[np.minimum(last, len(order) - 1)]]
    equals_next = np.diff(key[order]) == 0
    tied = np.append(equals_next, False) | np.append(False, equals_next)
    if len(order) and tied.any():
        at = order[tied]
        order[tied] = at[np.lexsort((_ranks(ids_at(at)), key[at]))]
    return order[_rank_in_group(_features_of(key[order])) < num_kept]


def _order(key: UInt64[np.ndarray, " pairs"]) -> Int[np.ndarray, " pairs"]:
    """argsort, 16 bits at a time from the lowest: numpy sorts so short integers by radix, which is twice as fast."""
    order = np.argsort(key.astype(np.uint16), kind="stable")
    for shift in range(16, int(key.max(initial=0)).bit_length(), 16):
        digit = (key >> np.uint64(shift)).astype(np.uint16)
        order = order[np.argsort(digit[order], kind="stable")]
    return order


def _ranks(texts: pa.ChunkedArray) -> Int[np.ndarray, " texts"]:
    """Integers that sort as the texts do: only the distinct ones are compared."""
    encoded = texts.combine_chunks().dictionary_encode()
    ranks = np.empty(len(encoded.dictionary), np.int64)
    ranks[pc.sort_indices(encoded.dictionary).to_numpy()] = np.arange(len(ranks))
    return ranks[encoded.indices.to_numpy()]


def _sort_key(
    feature_ids: Int[np.ndarray, " pairs"], activations: Float[np.ndarray, " pairs"]
) -> UInt64[np.ndarray, " pairs"]:
    """One integer that sorts by feature ascending, then by strength descending."""
    return (feature_ids.astype(np.uint64) << KEY_BITS) | (np.uint32(0xFFFF) - strengths(activations))


def _features_of(key: UInt64[np.ndarray, " pairs"]) -> Int[np.ndarray, " pairs"]:
    return (key >> KEY_BITS).astype(np.int64)


def _rank_in_group(sorted_ids: Int[np.ndarray, " pairs"]) -> Int[np.ndarray, " pairs"]:
    """Position of each element among its equals, from 0, in a sorted array."""
    if not len(sorted_ids):
        return np.zeros(0, np.int64)
    new_group = np.flatnonzero(np.diff(sorted_ids, prepend=sorted_ids[0] - 1))
    sizes = np.diff(new_group, append=len(sorted_ids))
    return np.arange(len(sorted_ids)) - np.repeat(new_group, sizes)

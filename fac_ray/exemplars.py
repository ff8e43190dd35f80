"""The samples on which each feature is strongest: ACTIVATIONS rows come in, the top few per feature go out, with spans.

`TopExemplars` is a commutative monoid like the counts: the strongest k of a merge are the strongest k of all rows,
whatever the parts. Activations that agree to the eight bits of a bfloat16 are equals here and are ordered by sample_id:
the result depends neither on the order of rows nor on the last bits, which a matrix product of another size may change.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int, UInt64

from fac_ray.coverage import flat_values, sparse_rows

PEAKS = pa.schema(
    [
        ("feature_id", pa.int32()),
        ("activation", pa.float32()),
        ("sample_id", pa.string()),
        ("peak_start", pa.int32()),
        ("peak_end", pa.int32()),
    ]
)

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
        pairs = sparse_rows(rows, d_sae)
        ids = rows["sample_id"]
        kept = _strongest(pairs.feature_ids, pairs.activations, lambda at: ids.take(pa.array(pairs.row[at])), num_kept)
        return cls(
            num_kept,
            pa.table(
                {
                    "feature_id": pairs.feature_ids[kept],
                    "activation": pairs.activations[kept],
                    "sample_id": rows["sample_id"].take(pa.array(pairs.row[kept])),
                    "peak_start": flat_values(rows, "peak_start")[kept],
                    "peak_end": flat_values(rows, "peak_end")[kept],
                }
            ).cast(PEAKS),
        )

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


def strongest(rows: pa.Table, num_kept: int) -> pa.Table:
    """The first `num_kept` rows of each feature, in the order of `TopExemplars.rows`.

    The rows have at least the columns feature_id, activation and sample_id.
    """
    rows = rows.combine_chunks()
    ids, activations = rows["feature_id"].to_numpy(), rows["activation"].to_numpy()
    kept = _strongest(ids, activations, lambda at: rows["sample_id"].take(pa.array(at)), num_kept)
    return rows.take(pa.array(kept))


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
    feature_ids: Int[np.ndarray, " pairs"],
    activations: Float[np.ndarray, " pairs"],
    sample_ids_at: Callable[[Int[np.ndarray, " some"]], pa.ChunkedArray],
    num_kept: int,
) -> Int[np.ndarray, " kept"]:
    """Where the first `num_kept` pairs of each feature stand: rounded activation descending, then sample_id ascending.

    Only pairs with an equal need their sample_id, and strings are slow to sort, so they are looked up for these alone.
    """
    key = _sort_key(feature_ids, activations)
    order = np.argsort(key, kind="stable")
    equals_next = np.diff(key[order], append=0) == 0 if len(order) else np.zeros(0, bool)
    equals_next[-1:] = False
    tied = equals_next | np.roll(equals_next, 1)
    if tied.any():
        at = order[tied]
        order[tied] = at[np.lexsort((_ranks(sample_ids_at(at)), key[at]))]
    return order[_rank_in_group(feature_ids[order]) < num_kept]


def _ranks(texts: pa.ChunkedArray) -> Int[np.ndarray, " texts"]:
    """Integers that sort as the texts do: only the distinct ones are compared."""
    encoded = texts.combine_chunks().dictionary_encode()
    ranks = np.empty(len(encoded.dictionary), np.int64)
    ranks[pc.sort_indices(encoded.dictionary).to_numpy()] = np.arange(len(ranks))
    return ranks[encoded.indices.to_numpy()]


def _sort_key(
    feature_ids: Int[np.ndarray, " pairs"], activations: Float[np.ndarray, " pairs"]
) -> UInt64[np.ndarray, " pairs"]:
    """One integer that sorts by feature ascending, then by activation, rounded to the nearest bfloat16, descending.

    The bits of floats that are not negative are ordered as the floats are; the upper half of them is the bfloat16.
    """
    bits = (np.maximum(activations, np.float32(0)) + np.float32(0)).view(np.uint32)
    rounded = (bits + np.uint32(0x8000)) >> np.uint32(16)
    return (feature_ids.astype(np.uint64) << np.uint64(32)) | (np.uint64(0xFFFFFFFF) - rounded)


def _rank_in_group(sorted_ids: Int[np.ndarray, " pairs"]) -> Int[np.ndarray, " pairs"]:
    """Position of each element among its equals, from 0, in a sorted array."""
    if not len(sorted_ids):
        return np.zeros(0, np.int64)
    new_group = np.flatnonzero(np.diff(sorted_ids, prepend=sorted_ids[0] - 1))
    sizes = np.diff(new_group, append=len(sorted_ids))
    return np.arange(len(sorted_ids)) - np.repeat(new_group, sizes)

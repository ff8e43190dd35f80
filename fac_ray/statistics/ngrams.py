"""How often n-grams occur: lists of words come in, mergeable counts by 64-bit hash go out.

An n-gram is n neighbouring words of one text. Counts of parts merge to those of the whole, in any order; a corpus's
n-grams are split over `bucket`s, each small enough for one process, and the totals of the buckets add up.
Two n-grams share a hash with a chance of about (distinct n-grams)^2 / 2^65.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt64

WORD = re.compile(r"\w+|[^\w\s]")
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def words_of(text: str) -> list[str]:
    """The words of a text in lower case: runs of letters, digits and underscores, and every other sign by itself."""
    return WORD.findall(text.lower())


class NgramCounts(NamedTuple):
    """Occurrences of each n-gram."""

    hashes: UInt64[np.ndarray, " distinct"]
    """Ascending."""
    counts: Int[np.ndarray, " distinct"]

    def bucket(self, number: int, num_buckets: int) -> NgramCounts:
        """Those whose hash leaves the rest `number`: the buckets 0 to `num_buckets` - 1 hold each n-gram once."""
        mine = self.hashes % np.uint64(num_buckets) == number
        return NgramCounts(self.hashes[mine], self.counts[mine])


class NgramTotals(NamedTuple):
    """What Distinct-n and the entropy are made of; totals of disjoint buckets add up."""

    num_ngrams: int
    num_distinct: int
    count_log_count: float
    """Sum over the distinct n-grams of c ln c."""

    @classmethod
    def of(cls, counts: NgramCounts) -> NgramTotals:
        values = counts.counts.astype(float)
        return cls(int(counts.counts.sum()), len(values), float(values @ np.log(values)))

    def add(self, other: NgramTotals) -> NgramTotals:
        """Totals of two buckets together."""
        return NgramTotals(
            self.num_ngrams + other.num_ngrams,
            self.num_distinct + other.num_distinct,
            self.count_log_count + other.count_log_count,
        )

    @property
    def distinct_fraction(self) -> float | None:
        """Distinct-n: distinct n-grams / n-grams, in (0, 1] (Li et al. 2016). None where there is no n-gram."""
        return self.num_distinct / self.num_ngrams if self.num_ngrams else None

    @property
    def entropy(self) -> float | None:
        """-sum p ln p over the n-grams' shares, in [0, ln distinct] nats: ln N - (sum c ln c) / N."""
        if not self.num_ngrams:
            return None
        return max(0.0, math.log(self.num_ngrams) - self.count_log_count / self.num_ngrams)


def count_ngrams(texts: Sequence[Sequence[str]], length: int) -> NgramCounts:
    """Occurrences of the n-grams of `length` words in the texts; none crosses from one text to the next."""
    lengths = np.array([len(words) for words in texts], np.int64)
    names: dict[str, int] = {}
    numbers = np.array([names.setdefault(word, len(names)) for words in texts for word in words], np.int64)
    hashes = np.array([_hash_word(word) for word in names], np.uint64)[numbers]
    ngrams = np.zeros(max(len(hashes) - length + 1, 0), np.uint64)
    for place in range(length):
        ngrams = _mix(ngrams * MULTIPLIER + hashes[place : place + len(ngrams)])
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(hashes))  # words from here to the end of the text
    return NgramCounts(*np.unique(ngrams[left[: len(ngrams)] >= length], return_counts=True))


def merge_ngrams(parts: Sequence[NgramCounts]) -> NgramCounts:
    """Counts of all parts together; of no part, none."""
    hashes = np.concatenate([np.zeros(0, np.uint64), *(part.hashes for part in parts)])
    counts = np.concatenate([np.zeros(0, np.int64), *(part.counts for part in parts)])
    distinct, places = np.unique(hashes, return_inverse=True)
    merged = np.zeros(len(distinct), np.int64)
    np.add.at(merged, places, counts)
    return NgramCounts(distinct, merged)


def _hash_word(word: str) -> int:
    digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _mix(values: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """The finalising step of SplitMix64: every input bit moves about half of the output bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

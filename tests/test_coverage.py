"""Counting: equal to loops, a commutative monoid, independent of the partition, unmoved by replays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fac_ray.coverage.counts import (
    NEGATIVE,
    POSITIVE,
    UNLABELLED,
    CorpusCoverage,
    CountsFold,
    FeatureCounter,
    FeatureCounts,
    coverage_fraction,
    is_active,
    missing_coverage_fraction,
)
from fac_ray.schema import ACTIVATIONS

D_SAE = 5
GRID = (0.0, 0.5, 2.0)
ROWS = [  # (feature -> activation, label, error)
    ({0: 0.5, 2: 3.0}, POSITIVE, None),
    ({0: 2.0}, NEGATIVE, None),
    ({}, POSITIVE, None),
    ({0: 0.1, 4: 2.5}, UNLABELLED, None),
    ({}, POSITIVE, "too long"),
]


def table_of(rows):
    records = [
        {
            "sample_id": f"{number:032x}",
            "feature_ids": sorted(features),
            "activations": [features[i] for i in sorted(features)],
            "peak_start": [0] * len(features),
            "peak_end": [1] * len(features),
            "num_tokens": 0 if error else 10,
            "truncated": False,
            "error": error,
        }
        for number, (features, _, error) in enumerate(rows)
    ]
    return pa.Table.from_pylist(records, ACTIVATIONS)


def counts_of(rows, threshold=0.5):
    labels = np.array([label for _, label, _ in rows], np.int8)
    return FeatureCounts.from_rows(table_of(rows), labels, GRID, threshold, D_SAE)


def same(a, b):
    return a.to_bytes() == b.to_bytes()


activation = st.floats(0, 4, width=32, exclude_min=True) | st.sampled_from([0.5, 2.0])
row: Any = st.tuples(
    st.dictionaries(st.integers(0, D_SAE - 1), activation),
    st.sampled_from([POSITIVE, NEGATIVE, UNLABELLED]),
    st.just(None),
) | st.tuples(st.just({}), st.just(POSITIVE), st.just("failed"))
rows = st.lists(row, max_size=8)


def test_active_means_strictly_above_the_threshold_in_float32():
    assert is_active(np.array([0.0, 1e-30, 0.5, 0.50001]), 0.0).tolist() == [False, True, True, True]
    assert is_active(np.array([0.0, 0.5, 0.50001]), 0.5).tolist() == [False, False, True]
    assert not is_active(np.array([0.1], np.float32), np.float64(0.1)).any()


def test_counts_of_five_rows_by_hand():
    counts = counts_of(ROWS)
    assert counts.num_samples.tolist() == [[3, 0, 1, 0, 1], [1, 0, 1, 0, 1], [0, 0, 1, 0, 1]]
    assert counts.max_activation.tolist() == [2.0, 0.0, 3.0, 0.0, 2.5]
    assert counts.labelled.tolist() == [1, 0, 1, 0, 0]  # at 0.5: feature 0 in row 1 alone, 0.5 is not above 0.5
    assert counts.positive.tolist() == [0, 0, 1, 0, 0]
    assert (counts.num_rows, counts.num_tokens, counts.num_errors) == (4, 40, 1)
    assert (counts.num_labelled_rows, counts.num_positive_rows) == (3, 2)  # the failed row was not measured


@settings(max_examples=60, deadline=None)
@given(rows)
def test_counts_equal_loops_over_dense_rows(rows):
    counts = counts_of(rows)
    measured = [(np.array([f.get(i, 0.0) for i in range(D_SAE)], np.float32), y) for f, y, e in rows if e is None]
    for t, threshold in enumerate(GRID):
        assert counts.num_samples[t].tolist() == [sum(a[i] > threshold for a, _ in measured) for i in range(D_SAE)]
    assert counts.max_activation.tolist() == [max([a[i] for a, _ in measured], default=0) for i in range(D_SAE)]
    assert counts.positive.tolist() == [sum(a[i] > 0.5 and y == POSITIVE for a, y in measured) for i in range(D_SAE)]
    assert counts.num_rows + counts.num_errors == len(rows)


@settings(max_examples=40, deadline=None)
@given(rows, st.integers(1, 4))
def test_counting_a_few_rows_at_a_time_equals_counting_them_all(rows, num_at_once):
    counter = FeatureCounter(GRID, 0.5, D_SAE)
    for first in range(0, len(rows), num_at_once):
        some = rows[first : first + num_at_once]
        counter.count(table_of(some), np.array([label for _, label, _ in some], np.int8))
    assert same(counter.result(), counts_of(rows))


def test_a_result_stays_as_it_is_when_more_rows_are_counted():
    counter = FeatureCounter(GRID, 0.5, D_SAE)
    counter.count(table_of(ROWS[:2]), np.array([POSITIVE, NEGATIVE], np.int8))
    result = counter.result()
    before = result.to_bytes()
    counter.count(table_of(ROWS[2:4]), np.array([POSITIVE, UNLABELLED], np.int8))
    assert result.to_bytes() == before


def test_thousands_of_pairs_equal_a_dense_matrix():
    random = np.random.default_rng(1)
    dense = np.where(random.random((300, 400)) < 0.2, random.gamma(2, 0.7, (300, 400)), 0).astype(np.float32)
    labels = random.integers(-1, 2, 300).astype(np.int8)
    rows = [({int(i): float(row[i]) for i in np.flatnonzero(row)}, None, None) for row in dense]
    counts = FeatureCounts.from_rows(table_of(rows), labels, GRID, 0.5, 400)
    assert np.array_equal(counts.num_samples, [(dense > t).sum(axis=0) for t in GRID])
    assert np.array_equal(counts.max_activation, dense.max(axis=0))
    assert np.array_equal(counts.labelled, (dense[labels != UNLABELLED] > 0.5).sum(axis=0))
    assert np.array_equal(counts.positive, (dense[labels == POSITIVE] > 0.5).sum(axis=0))


@settings(max_examples=40, deadline=None)
@given(rows, rows, rows)
def test_merging_is_associative_and_commutative_and_has_an_identity(a, b, c):
    a, b, c = counts_of(a), counts_of(b), counts_of(c)
    empty = FeatureCounts.empty(GRID, 0.5, D_SAE)
    assert same(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert same(a.merge(b), b.merge(a))
    assert same(a.merge(empty), a)
    assert same(empty.merge(a), a)


@settings(max_examples=40, deadline=None)
@given(rows, st.lists(st.integers(0, 3), min_size=8, max_size=8))
def test_no_partition_shows_in_the_counts(rows, part_of_row):
    fold = CountsFold(FeatureCounts.empty(GRID, 0.5, D_SAE))
    for part in range(4):
        fold.fold(str(part), counts_of([r for r, p in zip(rows, part_of_row, strict=False) if p == part]))
    assert same(fold.total, counts_of(rows))


def test_a_replayed_part_changes_nothing():
    fold = CountsFold(FeatureCounts.empty(GRID, 0.5, D_SAE))
    assert fold.fold("a", counts_of(ROWS[:2]))
    assert fold.fold("b", counts_of(ROWS[2:]))
    assert not fold.fold("a", counts_of(ROWS[:2]))
    assert same(fold.total, counts_of(ROWS))


def test_counts_survive_bytes():
    counts = counts_of(ROWS)
    read = FeatureCounts.from_bytes(counts.to_bytes())
    assert same(read, counts)
    assert read.thresholds == GRID
    assert type(read.num_rows) is int


def test_counts_on_another_grid_or_dictionary_do_not_merge():
    with pytest.raises(ValueError, match="do not merge"):
        counts_of(ROWS).merge(counts_of(ROWS, threshold=2.0))
    with pytest.raises(ValueError, match="do not merge"):
        counts_of(ROWS).merge(FeatureCounts.empty(GRID, 0.5, D_SAE + 1))


def test_rows_of_another_sae_are_refused():
    with pytest.raises(ValueError, match="d_sae = 5"):
        counts_of([({D_SAE: 1.0}, POSITIVE, None)])


def test_a_corpus_is_active_where_one_sample_is():
    corpus = CorpusCoverage.from_counts(counts_of(ROWS))
    assert corpus.active(0.0).tolist() == [True, False, True, False, True]
    assert corpus.active(2.0).tolist() == [False, False, True, False, True]
    with pytest.raises(ValueError, match=r"threshold 0\.7 was not counted"):
        corpus.active(0.7)


def test_coverage_is_the_share_of_the_target():
    target = np.array([True, True, True, True, False])
    seed = np.array([True, False, False, False, True])
    added = np.array([True, True, False, False, True])
    assert coverage_fraction(seed, target) == 0.25
    assert missing_coverage_fraction(added, seed, target) == pytest.approx(1 / 3)
    assert missing_coverage_fraction(added, target, target) is None
    with pytest.raises(ValueError, match="selects no feature"):
        coverage_fraction(seed, np.zeros(5, bool))

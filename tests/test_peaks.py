"""Maxima over tokens: sparse equals dense equals brute force, and parts may be merged in any grouping and order."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fac_ray.features.peaks import Peaks, dense_peaks, merge_peaks, sparse_peaks

# Two runs of three features: tokens 0 and 1, and token 2.
#   run 0: feature 0 has 2 at token 1, feature 1 has 3 at token 0 (and again at 1: the first counts), feature 2 nothing
#   run 1: feature 2 has 1 at token 2
ACTIVATIONS = torch.tensor([[1.0, 3.0, 0.0], [2.0, 3.0, 0.0], [0.0, 0.0, 1.0]])
BY_HAND = [([0, 1], [2.0, 3.0], [1, 0]), ([2], [1.0], [2])]


def as_lists(found):
    return [tuple(column.tolist() for column in peaks) for peaks in found]


def test_peaks_are_as_worked_out_by_hand():
    values, feature_ids = ACTIVATIONS.topk(3)
    assert as_lists(dense_peaks(ACTIVATIONS, [0, 2, 3])) == BY_HAND
    assert as_lists(sparse_peaks(values, feature_ids, [0, 2, 3], d_sae=3)) == BY_HAND


def test_a_run_without_active_features_has_no_peaks():
    zeros = torch.zeros(2, 3)
    assert as_lists(dense_peaks(zeros, [0, 1, 2])) == [([], [], [])] * 2
    assert as_lists(sparse_peaks(zeros, torch.zeros_like(zeros).long(), [0, 1, 2], d_sae=3)) == [([], [], [])] * 2


def test_not_a_number_is_kept_to_be_seen():
    activations = torch.tensor([[float("nan"), 1.0], [1.0, 0.0]])
    values, feature_ids = activations.topk(2)
    for found in (dense_peaks(activations, [0, 2]), sparse_peaks(values, feature_ids, [0, 2], d_sae=2)):
        [peaks] = found
        assert np.isnan(peaks.activations).any()


lengths = st.lists(st.integers(1, 6), min_size=1, max_size=5)


@settings(max_examples=50, deadline=None)
@given(lengths=lengths, d_sae=st.integers(1, 7), seed=st.integers(0, 10**6), data=st.data())
def test_sparse_equals_dense_equals_brute_force(lengths, d_sae, seed, data):
    k = data.draw(st.integers(1, d_sae))
    bounds = np.cumsum([0, *lengths]).tolist()
    h = torch.randn(bounds[-1], d_sae, generator=torch.Generator().manual_seed(seed))
    values, feature_ids = h.topk(k)
    activations = torch.zeros_like(h).scatter(1, feature_ids, values.relu())
    expected = []
    for start, stop in pairwise(bounds):
        rows = []
        for feature in range(d_sae):
            column = activations[start:stop, feature].tolist()
            if max(column) > 0:
                rows.append((feature, max(column), start + column.index(max(column))))
        expected.append(tuple(list(column) for column in zip(*rows, strict=True)) if rows else ([], [], []))
    assert as_lists(sparse_peaks(values.relu(), feature_ids, bounds, d_sae)) == expected
    assert as_lists(dense_peaks(activations, bounds)) == expected


@st.composite
def peaks(draw):
    feature_ids = sorted(draw(st.sets(st.integers(0, 4))))
    activations = draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=len(feature_ids), max_size=len(feature_ids)))
    tokens = draw(st.lists(st.integers(0, 9), min_size=len(feature_ids), max_size=len(feature_ids)))
    return Peaks(np.array(feature_ids, np.int64), np.array(activations, np.float32), np.array(tokens, np.int64))


@settings(max_examples=100, deadline=None)
@given(a=peaks(), b=peaks(), c=peaks())
def test_merging_is_associative_commutative_and_idempotent(a, b, c):
    merged = as_lists([merge_peaks([a, b, c])])
    assert as_lists([merge_peaks([merge_peaks([c, b]), a])]) == merged
    assert as_lists([merge_peaks([b, merge_peaks([a, c]), c, b])]) == merged


@pytest.mark.parametrize("active_fraction", [0.01, 0.9])
def test_few_and_many_active_features_have_the_same_first_tokens(active_fraction):
    """Whole numbers, so that several tokens share the largest activation."""
    generator = torch.Generator().manual_seed(0)
    activations = torch.randint(1, 4, (12, 200), generator=generator).float()
    activations *= torch.rand(12, 200, generator=generator) < active_fraction
    found = [*dense_peaks(activations, [0, 5, 12])]
    for peaks, (start, stop) in zip(found, pairwise([0, 5, 12]), strict=True):
        columns = activations[start:stop].numpy()
        kept = np.flatnonzero(columns.max(axis=0) > 0)
        assert peaks.feature_ids.tolist() == kept.tolist()
        assert peaks.tokens.tolist() == (start + columns[:, kept].argmax(axis=0)).tolist()

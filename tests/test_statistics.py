"""Closed forms against enumeration, hand cases and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fac_ray.coverage import CorpusCoverage
from fac_ray.statistics import (
    chao2,
    coverage_interval,
    matched_coverage,
    random_feature_null,
    rarefaction,
    rarefaction_std,
)


def corpus(counts, num_samples, num_tokens=100):
    counts = np.array([counts], np.int64)
    zeros = np.zeros(counts.shape[1], np.int64)
    return CorpusCoverage((0.0,), 0.0, counts, zeros.astype(np.float32), num_samples, num_tokens, 0, 0, 0, zeros, zeros)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sets(st.integers(0, 4)), min_size=1, max_size=6))
def test_rarefaction_is_the_mean_over_all_subsets(samples):
    counts = np.array([sum(feature in sample for sample in samples) for feature in range(5)])
    for size in range(len(samples) + 1):
        subsets = list(itertools.combinations(samples, size))
        mean = sum(len(set().union(*subset)) for subset in subsets) / len(subsets)
        assert rarefaction(counts, len(samples), [size])[0] == pytest.approx(mean, abs=1e-12)


def test_rarefaction_runs_from_nothing_to_all_that_was_seen():
    counts = np.array([0, 1, 3, 400_000, 1_000_000, 1])
    curve = rarefaction(counts, 1_000_000, [0, 1, 10, 1000, 999_999, 1_000_000])
    assert curve[0] == 0
    assert curve[1] == pytest.approx(counts.sum() / 1_000_000, rel=1e-6)
    assert curve[-1] == 5
    assert (np.diff(curve) > 0).all()


def test_rarefaction_of_many_samples_agrees_with_exact_integers():
    counts, num_samples, size = [1, 17, 900], 5000, 700
    exact = sum(1 - math.comb(num_samples - n, size) / math.comb(num_samples, size) for n in counts)
    assert rarefaction(np.array(counts), num_samples, [size])[0] == pytest.approx(exact, rel=1e-9)


def test_sizes_and_counts_outside_the_corpus_are_refused():
    with pytest.raises(ValueError, match=r"\[0, 3\], got 4 to 4"):
        rarefaction(np.array([1]), 3, [4])
    with pytest.raises(ValueError, match="num_samples = 3"):
        rarefaction(np.array([4]), 3, [1])
    with pytest.raises(ValueError, match="num_samples = 0"):
        chao2(np.array([0]), 0)


def test_chao2_by_hand():
    # N = 10, Q1 = 4, Q2 = 2, three more: S_obs = 9, S_est = 9 + 0.9 * 16 / 4 = 12.6
    counts = np.array([1, 1, 1, 1, 2, 2, 5, 6, 10, 0, 0])
    result = chao2(counts, 10)
    assert (result.observed, result.estimate) == (9, pytest.approx(12.6))
    # A = 0.9, r = 2: var = 2 (0.45 * 4 + 0.81 * 8 + 0.2025 * 16) = 23.04
    assert result.std == pytest.approx(4.8)
    stretch = math.exp(1.959963984540054 * math.sqrt(math.log(1 + 23.04 / 3.6**2)))
    assert result.low == pytest.approx(9 + 3.6 / stretch)
    assert result.high == pytest.approx(9 + 3.6 * stretch)


def test_chao2_without_doubletons_uses_the_bias_corrected_form():
    # Q1 = 3, Q2 = 0: S_est = 4 + 0.75 * 3 = 6.25; var = 2.25 + 0.5625 * 3 * 25 / 4 - 0.5625 * 81 / 25
    result = chao2(np.array([1, 1, 1, 4]), 4)
    assert result.estimate == pytest.approx(6.25)
    assert result.std**2 == pytest.approx(2.25 + 10.546875 - 1.8225)


@pytest.mark.parametrize("counts", [[0, 0], [3, 4, 0], [1, 4]])
def test_chao2_adds_nothing_where_nothing_is_rare(counts):
    result = chao2(np.array(counts), 4)
    observed = sum(count > 0 for count in counts)
    assert result == (observed, observed, 0, observed, observed)


def test_chao2_finds_features_that_are_all_equally_rare():
    rng = np.random.default_rng(5)
    results = [chao2(rng.binomial(300, 0.005, size=400), 300) for _ in range(300)]
    assert np.mean([r.estimate for r in results]) == pytest.approx(400, rel=0.02)
    assert np.mean([r.low <= 400 <= r.high for r in results]) == pytest.approx(0.95, abs=0.04)
    assert np.mean([r.std for r in results]) == pytest.approx(np.std([r.estimate for r in results]), rel=0.15)


def test_chao2_is_a_lower_bound_where_rarities_differ():
    rng = np.random.default_rng(5)
    rates = rng.beta(0.5, 20, size=400)
    results = [chao2(rng.binomial(300, rates), 300) for _ in range(100)]
    assert np.mean([r.observed for r in results]) < np.mean([r.estimate for r in results]) < 400


def test_the_standard_error_is_that_of_redrawn_corpora():
    rng = np.random.default_rng(3)
    probabilities = np.repeat([0.02, 0.1, 0.5], 100)
    draws = rng.binomial(50, probabilities, size=(2000, 300))
    simulated = (draws > 0).sum(axis=1).std()
    estimated = np.mean([rarefaction_std(d, 50, [50])[0] for d in draws[:200]])
    assert estimated == pytest.approx(simulated, rel=0.15)
    assert rarefaction_std(draws[0], 50, [0])[0] == 0
    assert rarefaction_std(np.zeros(3, int), 50, [0, 50]).tolist() == [0, 0]


def test_the_interval_holds_the_coverage_and_stays_within_bounds():
    counts = np.array([1, 1, 2, 30, 0, 0, 0, 50])
    target = np.array([True] * 6 + [False] * 2)
    low, high = coverage_interval(counts, 50, target)
    assert 0 <= low < 4 / 6 < high <= 1
    assert coverage_interval(np.array([30, 40]), 50, np.array([True, True])) == (1.0, 1.0)
    assert coverage_interval(np.array([0, 40]), 50, np.array([True, False])) == (0.0, 0.0)
    with pytest.raises(ValueError, match="selects no feature"):
        coverage_interval(counts, 50, ~target & target)


def test_matched_coverage_cuts_all_corpora_down_to_the_smallest():
    small = corpus([1, 0, 2, 0], num_samples=2, num_tokens=100)
    large = corpus([2, 2, 4, 0], num_samples=4, num_tokens=100)
    target = np.array([True, True, True, False])
    matched = matched_coverage([small, large], target, 0.0)
    # of 4 samples, 2 with the feature, 2 drawn: it is missed with 1/6; 4 of 4 is never missed
    assert matched.num_samples == 2
    assert matched.at_samples == [pytest.approx(2 / 3), pytest.approx((5 / 6 + 5 / 6 + 1) / 3)]
    assert matched.num_tokens == 100
    assert matched.at_tokens == [pytest.approx(2 / 3), pytest.approx(1.0)]
    with pytest.raises(ValueError, match="at least one measured sample"):
        matched_coverage([small, corpus([0] * 4, 0)], target, 0.0)


def test_coverage_of_a_part_of_a_corpus_is_no_news_at_matched_size():
    rng = np.random.default_rng(0)
    active = rng.random((400, 300)) < rng.beta(0.3, 10, size=300)
    part = active[:100]
    whole, half = corpus(active.sum(0), 400, 4000), corpus(part.sum(0), 100, 1000)
    matched = matched_coverage([whole, half], np.asarray(active.any(axis=0)), 0.0)
    assert matched.at_samples[0] == pytest.approx(matched.at_samples[1], abs=0.05)
    assert whole.active(0.0).sum() > 1.2 * half.active(0.0).sum()


def test_the_null_has_the_mean_of_the_strata_and_repeats_with_its_seed():
    # stratum "1": 4 features, 1 covered; stratum "8 to 15": 2 features, both covered. The target takes 2 and 1.
    anchor_counts = np.array([1, 1, 1, 1, 8, 15, 0])
    covered = np.array([True, False, False, False, True, True, True])
    target = np.array([False, True, True, False, True, False, False])
    null = random_feature_null(covered, target, anchor_counts, seed=1, num_sets=4000)
    assert null.mean == pytest.approx((2 * 1 / 4 + 1) / 3, abs=0.02)
    assert (null.low, null.high) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert null.fraction_at_most == pytest.approx(1 / 2, abs=0.04)  # the target has 1 of 3; a set has it half the time
    assert null == random_feature_null(covered, target, anchor_counts, seed=1, num_sets=4000)
    assert null != random_feature_null(covered, target, anchor_counts, seed=2, num_sets=4000)


def test_a_target_that_the_anchor_lacks_has_no_null():
    with pytest.raises(ValueError, match="active in the anchor"):
        random_feature_null(np.array([True]), np.array([True]), np.array([0]))

"""Closed forms against enumeration, hand cases and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fac_ray.coverage.counts import CorpusCoverage
from fac_ray.statistics.intervals import coverage_interval, matched_coverage, random_feature_null
from fac_ray.statistics.richness import (
    chao2,
    extrapolation,
    extrapolation_std,
    rarefaction,
    rarefaction_std,
    richness_curve,
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


# ---- against published implementations ----
# Ants of three Costa Rican elevations (Longino and Colwell, Ecosphere 2 (2011) art29; data set `ant` of the R package
# iNEXT, revision 27ac034): plots, and how many species occur in so many plots; the species data of Colwell et al. 2012.
# Figures by vegan 2.6-4 (`specpool`; `specaccum(method = "exact", conditioned = FALSE, gamma = "chao")`) and, beyond
# the sample, by iNEXT (`TD.m.est_inc` at order 0; `ChaoRichness` for the interval, which it prints with 3 decimals).
ANTS = {
    "1500 m": (
        200,
        {1: 13, 2: 4, 3: 2, 4: 2, 5: 4, 6: 2, 9: 4, 11: 2, 17: 2, 23: 2, 25: 3}
        | dict.fromkeys([18, 19, 24, 29, 30, 32, 33, 43, 50, 53, 73, 74, 76, 79, 113, 144], 1),
    ),
    "2000 m": (200, {1: 1, 2: 2, 8: 2} | dict.fromkeys([3, 4, 13, 15, 19, 23, 34, 59, 80], 1)),
}
SIZES = [1, 10, 50, 100, 150, 200]
VEGAN = {
    "1500 m": (
        [5.85, 24.45947295, 40.87553404, 47.98264313, 52.46306525, 56],
        [1.174250294, 3.120902730, 3.671659416, 3.689373904, 3.744081584, 3.909344271],
        (77.019375, 16.35285034),
    ),
    "2000 m": (
        [1.355, 6.480085118, 11.167298127, 12.811923359, 13.608381496, 14],
        [0.4280418639, 1.2226183436, 1.0337360147, 0.7046020971, 0.5387806636, 0.4943757722],
        (14.24875, 0.7260816285),
    ),
}
INEXT = {
    "1500 m": ([61.58367065, 65.68407275, 67.60097574], (61.458, 136.949)),
    "2000 m": ([14.21475094, 14.24410302, 14.24734203], (14.013, 18.716)),
}


def ants(site):
    num_samples, frequencies = ANTS[site]
    return np.repeat(list(frequencies), list(frequencies.values())), num_samples


@pytest.mark.parametrize("site", ANTS)
def test_rarefaction_and_its_error_are_those_of_vegan(site):
    expected, errors, _ = VEGAN[site]
    assert rarefaction(*ants(site), SIZES) == pytest.approx(expected, rel=1e-8)
    assert rarefaction_std(*ants(site), SIZES) == pytest.approx(errors, rel=1e-8)


@pytest.mark.parametrize("site", ANTS)
def test_chao2_is_that_of_vegan_and_its_interval_that_of_inext(site):
    result = chao2(*ants(site))
    assert (result.estimate, result.std) == pytest.approx(VEGAN[site][2], rel=1e-8)
    assert (result.low, result.high) == pytest.approx(INEXT[site][1], abs=5e-4)


@pytest.mark.parametrize("site", ANTS)
def test_extrapolation_is_that_of_inext(site):
    assert extrapolation(*ants(site), [300, 400, 460]) == pytest.approx(INEXT[site][0], rel=1e-8)


# ---- extrapolation by its own laws ----


def test_extrapolation_by_hand():
    # N = 10, Q1 = 4, Q2 = 2: Q0 = 0.9 * 16 / 4 = 3.6, w = 1 - 4 / (36 + 4) = 0.9; one more sample adds 0.36
    counts = np.array([1, 1, 1, 1, 2, 2, 5, 6, 10])
    assert extrapolation(counts, 10, [10, 11, 12, 10_000]) == pytest.approx([9, 9.36, 9 + 3.6 * 0.19, 12.6])
    with pytest.raises(ValueError, match="at least num_samples = 10, got 9"):
        extrapolation(counts, 10, [9])


@pytest.mark.parametrize("rare", [(9, 4), (5, 0)])
def test_the_error_of_extrapolation_follows_the_delta_method(rare):
    """Equation 19 with the derivatives taken numerically, Q1 and Q2 as real numbers."""
    (q1, q2), num_samples, rest, added = rare, 40, 7, 25

    def expected(a, b, others):
        unseen = 39 / 40 * (a * a / (2 * b) if q2 else a * (a - 1) / 2)
        return a + b + others + unseen * (1 - (1 - a / (num_samples * unseen + a)) ** added)

    frequencies, step = np.array([q1, q2, rest], float), 1e-5
    slopes = np.array(
        [(expected(*(frequencies + step * e)) - expected(*(frequencies - step * e))) / (2 * step) for e in np.eye(3)]
        if q2
        else [
            (expected(q1 + step, 0, rest) - expected(q1 - step, 0, rest)) / (2 * step),
            0,
            1,
        ]
    )
    counts = np.repeat([1, 2, 20], [q1, q2, rest])
    estimate = chao2(counts, num_samples).estimate
    variance = slopes**2 @ frequencies - (slopes @ frequencies) ** 2 / estimate
    error = extrapolation_std(counts, num_samples, [num_samples + added])[0]
    assert error == pytest.approx(math.sqrt(variance), rel=1e-6)


def test_a_corpus_without_rare_features_does_not_grow():
    assert extrapolation(np.array([4, 5]), 5, [5, 50]).tolist() == [2, 2]
    assert extrapolation_std(np.array([4, 5]), 5, [5, 50]).tolist() == [0, 0]
    assert extrapolation_std(np.array([0, 0]), 5, [5, 50]).tolist() == [0, 0]


def test_the_curve_goes_on_smoothly_where_it_is_extrapolated_and_stays_below_the_number_of_features():
    counts, num_samples = ants("1500 m")
    curve = richness_curve(np.r_[counts, [0] * 10], num_samples, [199, 200, 201, 100_000])
    steps = np.diff(curve.expected[:3])
    assert steps[1] == pytest.approx(steps[0], rel=0.02)
    assert (curve.low <= curve.expected).all()
    assert curve.expected[-1] == curve.high[-1] == 66
    inside = rarefaction_std(counts, num_samples, [200])
    assert extrapolation_std(counts, num_samples, [200]) == pytest.approx(inside)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=30), st.integers(12, 60))
def test_a_curve_never_falls_and_its_band_holds_it(counts, num_samples):
    curve = richness_curve(np.array(counts), num_samples, range(0, 3 * num_samples, 5))
    assert (np.diff(curve.expected) >= -1e-9).all()
    assert (curve.low <= curve.expected + 1e-9).all()
    assert (curve.expected <= curve.high + 1e-9).all()


def test_extrapolation_foretells_the_larger_corpus_of_equally_rare_features():
    rng = np.random.default_rng(2)
    draws = rng.random((200, 300, 200)) < 0.004  # corpora, features, samples
    seen = draws[:, :, :100].sum(axis=2)
    foretold = [extrapolation(counts, 100, [200])[0] for counts in seen]
    assert np.mean(foretold) == pytest.approx(draws.any(axis=2).sum(axis=1).mean(), rel=0.03)


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

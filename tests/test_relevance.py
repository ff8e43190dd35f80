"""The test of each feature against scipy's own, the correction against a hand case, and which labels are compared."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fac_ray.config import ConfigError, RelevanceConfig
from fac_ray.coverage.counts import CorpusCoverage
from fac_ray.coverage.relevance import fisher_p_values, log2_odds_ratio, relevance_from_coverage, relevant_features
from fac_ray.schema import FEATURES

LOOSE = RelevanceConfig(max_q_value=1.0, min_effect=-99, min_samples=1)


def corpus(active, num_samples, labelled=None, positive=None, num_labelled=0, num_positive=0):
    active = np.array(active, np.int64)
    zeros = np.zeros(len(active), np.int64)
    return CorpusCoverage(
        thresholds=(0.0, 1.0),
        threshold=0.0,
        num_samples_active=np.stack([active, active // 2]),
        max_activation=zeros.astype(np.float32),
        num_samples=num_samples,
        num_tokens=0,
        num_errors=0,
        num_labelled=num_labelled,
        num_positive=num_positive,
        labelled_active=zeros if labelled is None else np.array(labelled),
        positive_active=zeros if positive is None else np.array(positive),
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_p_values_are_those_of_fisher_s_exact_test(num_positive, num_negative, data):
    active = data.draw(
        st.lists(st.tuples(st.integers(0, num_positive), st.integers(0, num_negative)), min_size=1, max_size=5)
    )
    positive, negative = np.array(active).T
    expected = [
        stats.fisher_exact([[a, num_positive - a], [b, num_negative - b]], alternative="greater").pvalue
        for a, b in active
    ]
    assert fisher_p_values(positive, num_positive, negative, num_negative) == pytest.approx(expected, rel=1e-9)


def test_effect_is_the_corrected_log2_odds_ratio():
    # (3.5 / 1.5) / (1.5 / 3.5) = 49 / 9; nothing anywhere with equal numbers gives 0
    effect = log2_odds_ratio(np.array([3, 0, 4]), 4, np.array([1, 0, 0]), 4)
    assert effect[:2] == pytest.approx([np.log2(49 / 9), 0])
    assert np.isfinite(effect).all()


def test_q_values_are_benjamini_hochberg_over_the_active_features():
    # 5 + 5 samples: all five, none is 1 of C(10, 5) ways; four, none is 5 of C(10, 4); feature 3 is active nowhere
    table = relevant_features(np.array([5, 4, 3, 0]), 5, np.array([0, 0, 3, 0]), 5, LOOSE)
    p = [1 / 252, 5 / 210, stats.fisher_exact([[3, 2], [3, 2]], alternative="greater").pvalue]
    assert table["p_value"].to_pylist() == pytest.approx([*p, 1.0])
    assert table["q_value"].to_pylist() == pytest.approx([3 * p[0], 3 / 2 * p[1], p[2], 1.0])


def test_each_criterion_alone_can_refuse_a_feature():
    positive, negative = np.array([90, 90, 4, 30]), np.array([10, 85, 0, 25])

    def relevant(**criteria):
        table = relevant_features(positive, 100, negative, 100, RelevanceConfig(**criteria))
        return np.flatnonzero(table["relevant"].to_numpy()).tolist()

    loose = {"max_q_value": 1.0, "min_effect": -9.0, "min_samples": 1}
    assert relevant(**loose) == [0, 1, 2, 3]
    assert relevant(**{**loose, "max_q_value": 0.01}) == [0]
    assert relevant(**{**loose, "min_effect": 1.0}) == [0, 2]
    assert relevant(**{**loose, "min_samples": 5}) == [0, 1, 3]


def test_the_table_has_one_row_for_each_feature():
    table = relevant_features(np.array([5, 4]), 5, np.array([0, 0]), 5, LOOSE)
    assert table.schema == FEATURES
    assert table["feature_id"].to_pylist() == [0, 1]
    assert table["method"].to_pylist() == ["statistical"] * 2
    assert table["explanation"].null_count == table["judgement"].null_count == 2
    assert table["num_positive"].to_pylist() == [5, 4]


def test_labels_that_say_nothing_make_few_features_relevant():
    rng = np.random.default_rng(0)
    rates = rng.beta(0.5, 5, size=3000)
    positive, negative = rng.binomial(500, rates), rng.binomial(500, rates)
    table = relevant_features(positive, 500, negative, 500, RelevanceConfig(max_q_value=0.05, min_effect=0))
    assert table["relevant"].to_numpy().sum() <= 3


def test_large_counts_stay_probabilities():
    p = fisher_p_values(np.array([0, 600_000, 10**6]), 10**6, np.array([10**6, 599_000, 0]), 10**6)
    assert ((p >= 0) & (p <= 1)).all()
    assert p[0] == 1
    assert p[2] == 0
    z = 1000 / np.sqrt(2e6 * 0.5995 * 0.4005)
    assert p[1] == pytest.approx(stats.norm.sf(z), rel=0.02)


def test_labels_of_the_anchor_come_before_the_background():
    anchor = corpus([30, 30], 100, labelled=[25, 20], positive=[20, 2], num_labelled=60, num_positive=30)
    background = corpus([1, 1], 100)
    table = relevance_from_coverage(anchor, background, 0.0, LOOSE)
    assert table.equals(relevant_features(np.array([20, 2]), 30, np.array([5, 18]), 30, LOOSE))


def test_an_anchor_without_other_labels_is_compared_with_the_background():
    background = corpus([1, 8], 50)
    unlabelled = corpus([30, 30], 100)
    expected = relevant_features(np.array([30, 30]), 100, np.array([1, 8]), 50, LOOSE)
    assert relevance_from_coverage(unlabelled, background, 0.0, LOOSE).equals(expected)
    at_one = relevant_features(np.array([15, 15]), 100, np.array([0, 4]), 50, LOOSE)
    assert relevance_from_coverage(unlabelled, background, 1.0, LOOSE).equals(at_one)
    all_positive = replace(
        unlabelled, num_labelled=40, num_positive=40, labelled_active=np.array([9, 9]), positive_active=np.array([9, 9])
    )
    expected = relevant_features(np.array([9, 9]), 40, np.array([1, 8]), 50, LOOSE)
    assert relevance_from_coverage(all_positive, background, 0.0, LOOSE).equals(expected)


def test_without_anything_to_compare_with_the_config_is_at_fault():
    labelled = corpus([3], 10, labelled=[3], positive=[2], num_labelled=10, num_positive=5)
    with pytest.raises(ConfigError, match="add a corpus named background"):
        relevance_from_coverage(corpus([3], 10), None, 0.0, LOOSE)
    with pytest.raises(ConfigError, match=r"relevance\.positive: none of the 10 labels"):
        relevance_from_coverage(replace(labelled, num_positive=0), corpus([3], 10), 0.0, LOOSE)
    with pytest.raises(ConfigError, match=r"counted at threshold 0\.0, not 1\.0"):
        relevance_from_coverage(labelled, None, 1.0, LOOSE)


def test_impossible_counts_are_refused():
    with pytest.raises(ValueError, match="0 negative samples"):
        relevant_features(np.array([1]), 5, np.array([0]), 0, LOOSE)
    with pytest.raises(ValueError, match="6 of 5 positive"):
        relevant_features(np.array([6]), 5, np.array([0]), 5, LOOSE)

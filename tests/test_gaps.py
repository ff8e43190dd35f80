"""Missing features: exactly the relevant ones that the anchor has and the seed lacks, in a stated order."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fac_ray.coverage.counts import CorpusCoverage, coverage_fraction
from fac_ray.coverage.gaps import covered_features, find_gaps, relevant_mask, target_features
from fac_ray.schema import FEATURES, GAPS


def corpus(counts, num_samples=10):
    counts = np.array([counts], np.int64)
    zeros = np.zeros(counts.shape[1], np.int64)
    return CorpusCoverage((0.0,), 0.0, counts, zeros.astype(np.float32), num_samples, 0, 0, 0, 0, zeros, zeros)


def features(relevant, effect):
    num = len(relevant)
    return pa.table(
        {
            "feature_id": range(num),
            "relevant": relevant,
            "method": ["statistical"] * num,
            "effect": effect,
            "p_value": [0.0] * num,
            "q_value": [0.0] * num,
            "num_positive": [0] * num,
            "num_negative": [0] * num,
            "explanation": [f"about {i}" for i in range(num)],
            "judgement": pa.nulls(num, pa.string()),
        }
    ).cast(FEATURES)


RELEVANT = [True, True, True, True, True, False]
EFFECT = [1.0, 2.0, 4.0, 2.0, 9.0, 9.0]
ANCHOR = corpus([8, 4, 2, 4, 0, 9])
SEED = corpus([3, 0, 0, 0, 0, 0])


def test_gaps_by_hand():
    # feature 0 is in the seed, 4 is not in the anchor, 5 is not relevant; 1, 2 and 3 all score 0.8
    gaps = find_gaps(features(RELEVANT, EFFECT), ANCHOR, SEED, {2: ["strong", "weak"], 9: ["other"]}, 0.0)
    assert gaps.schema == GAPS
    assert gaps["feature_id"].to_pylist() == [1, 2, 3]
    assert gaps["rank"].to_pylist() == [0, 1, 2]
    assert gaps["score"].to_pylist() == pytest.approx([0.8, 0.8, 0.8])
    assert gaps["anchor_fraction"].to_pylist() == pytest.approx([0.4, 0.2, 0.4])
    assert gaps["exemplars"].to_pylist() == [[], ["strong", "weak"], []]
    assert gaps["explanation"].to_pylist() == ["about 1", "about 2", "about 3"]


def test_the_score_decides_the_order():
    gaps = find_gaps(features(RELEVANT, [1.0, 1.0, 9.0, 5.0, 0.0, 0.0]), ANCHOR, SEED, {}, 0.0)
    assert gaps["feature_id"].to_pylist() == [3, 2, 1]


def test_the_order_of_the_features_table_does_not_matter():
    table = features(RELEVANT, [1.0, 1.0, 9.0, 5.0, 0.0, 0.0])
    backwards = table.take(pa.array(range(5, -1, -1)))
    assert find_gaps(backwards, ANCHOR, SEED, {}, 0.0).equals(find_gaps(table, ANCHOR, SEED, {}, 0.0))


def test_a_seed_that_has_everything_leaves_no_gap():
    gaps = find_gaps(features(RELEVANT, EFFECT), ANCHOR, ANCHOR, {}, 0.0)
    assert gaps.schema == GAPS
    assert len(gaps) == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12))
def test_covered_and_missing_features_part_the_target(rows):
    relevant, anchor_counts, seed_counts = zip(*rows, strict=True)
    table, anchor, seed = features(relevant, [1.0] * len(rows)), corpus(anchor_counts), corpus(seed_counts)
    covered = np.flatnonzero(covered_features(table, anchor, seed, 0.0)).tolist()
    missing = find_gaps(table, anchor, seed, {}, 0.0)["feature_id"].to_pylist()
    target = target_features(table, anchor, 0.0)
    assert sorted(covered + missing) == np.flatnonzero(target).tolist()
    if target.any():
        assert coverage_fraction(seed.active(0.0), target) == len(covered) / (len(covered) + len(missing))


def test_a_features_table_of_another_sae_is_refused():
    with pytest.raises(ValueError, match="6 rows do not hold each of the 5 features"):
        relevant_mask(features(RELEVANT, EFFECT), 5)
    with pytest.raises(ValueError, match="relevant"):
        relevant_mask(features(RELEVANT, EFFECT).drop(["relevant"]), 6)

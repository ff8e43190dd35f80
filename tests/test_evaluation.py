"""Laws of the held-out metrics, with curves worked out by hand."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import average_precision_score

from fac_ray.artifacts import Stage, write_json, write_table
from fac_ray.evaluation import average_precision, summarise_arms
from fac_ray.evaluation.metrics import bootstrap_weights, resampled_average_precision

LABELS = [1, 0, 1, 0]


def finished_fit(folder, arm, seed, scores, labels=LABELS, ids="abcd"):
    stage = Stage(folder / f"{arm}-seed{seed}", "identity")
    stage.begin()
    columns = {"sample_id": list(ids), "label": np.array(labels, np.int8), "score": np.array(scores, np.float32)}
    write_table(stage.folder / "scores.parquet", pa.table(columns))
    metrics = {"arm": arm, "seed": seed, "auprc": average_precision(labels, scores), "num_samples": 7}
    write_json(stage.folder / "metrics.json", metrics)
    stage.finish()


def test_average_precision_by_hand():
    assert average_precision(LABELS, [4, 3, 2, 1]) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert average_precision(LABELS, [4, 2, 3, 1]) == 1.0
    assert average_precision(LABELS, [0, 0, 0, 0]) == 0.5  # no order: the share of positives


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([1, 1], [0.1, 0.2], "of one class"),
        ([1, 0], [0.1], "each sample needs one of both"),
        ([1, 0], [0.1, float("nan")], "1 of 2 scores are not finite"),
    ],
)
def test_average_precision_refuses_what_has_no_curve(labels, scores, message):
    with pytest.raises(ValueError, match=message):
        average_precision(labels, scores)


def test_resampled_average_precision_is_that_of_the_repeated_rows():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 40), rng.integers(0, 9, 40) / 4.0  # with ties
    weights = bootstrap_weights(labels, 20, seed=1)
    expected = [average_precision_score(np.repeat(labels, w), np.repeat(scores, w)) for w in weights]
    np.testing.assert_allclose(resampled_average_precision(labels, scores, weights), expected)


def test_replicates_keep_the_number_of_each_class():
    labels = np.array([1, 0, 0, 1, 0])
    weights = bootstrap_weights(labels, 50, seed=3)
    assert (weights[:, labels == 1].sum(axis=1) == 2).all()
    assert (weights[:, labels == 0].sum(axis=1) == 3).all()
    np.testing.assert_array_equal(weights, bootstrap_weights(labels, 50, seed=3))


def test_summary_gives_means_over_seeds_and_paired_differences(tmp_path):
    for seed in (2, 10):  # 10 comes before 2 by name
        finished_fit(tmp_path, "seed", seed, [4, 3, 2, 1])  # 5/6
        finished_fit(tmp_path, "anchor", seed, [4, 2, 3, 1])
    finished_fit(tmp_path, "targeted", 2, [4, 2, 3, 1])  # 1
    finished_fit(tmp_path, "targeted", 10, [4, 3, 2, 1])  # 5/6
    summary = summarise_arms(tmp_path)
    assert list(summary["arms"]) == ["seed", "targeted", "anchor"]
    targeted = summary["arms"]["targeted"]
    assert targeted["num_samples"] == 7
    assert targeted["seeds"] == [2, 10]
    assert targeted["auprc"]["values"] == pytest.approx([1, 5 / 6])
    assert targeted["auprc"]["mean"] == pytest.approx(11 / 12)
    assert targeted["auprc"]["std"] == pytest.approx(1 / 6 / np.sqrt(2))  # ddof 1 over two values 1/6 apart
    (comparison,) = summary["comparisons"]
    assert (comparison["arm"], comparison["baseline"]) == ("targeted", "seed")
    assert comparison["difference"]["values"] == pytest.approx([1 / 6, 0])
    low, high = comparison["interval"]
    assert 0 <= low <= 1 / 12 <= high <= 1
    assert summary == summarise_arms(tmp_path)


def test_summary_of_one_seed_has_no_std_and_is_json(tmp_path):
    finished_fit(tmp_path, "seed", 0, [4, 3, 2, 1])
    summary = summarise_arms(tmp_path)
    assert summary["arms"]["seed"]["auprc"]["std"] is None
    assert summary["comparisons"] == []
    json.dumps(summary, allow_nan=False)


def test_arms_without_a_common_seed_are_not_compared(tmp_path):
    finished_fit(tmp_path, "seed", 0, [4, 3, 2, 1])
    finished_fit(tmp_path, "targeted", 1, [4, 3, 2, 1])
    assert summarise_arms(tmp_path)["comparisons"] == []


def test_summary_ignores_unfinished_fits_and_needs_a_finished_one(tmp_path):
    Stage(tmp_path / "seed-seed0", "identity").begin()
    with pytest.raises(ValueError, match="no finished fit"):
        summarise_arms(tmp_path)


def test_fits_scored_on_different_samples_are_refused(tmp_path):
    finished_fit(tmp_path, "seed", 0, [4, 3, 2, 1])
    finished_fit(tmp_path, "targeted", 0, [4, 3, 2, 1], ids="abce")
    with pytest.raises(ValueError, match="different held-out samples"):
        summarise_arms(tmp_path)

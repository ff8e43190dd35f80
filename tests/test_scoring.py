"""What a text brings to a finished run, on six features whose sets are written out.

feature     0  1  2  3  4  5
relevant    x  x  x  x  x  .
anchor      x  x  x  x  .  x
seed        x  .  .  x  .  x
so: covered {0, 3}, missing {1, 2}; feature 4 is relevant but out of the anchor's reach
"""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest

from fac_ray.artifacts import MARKER, write_json, write_table
from fac_ray.config import ConfigError, config_from_tree
from fac_ray.coverage.counts import CorpusCoverage, FeatureCounts
from fac_ray.coverage.gaps import find_gaps
from fac_ray.coverage.reduction import save_coverage
from fac_ray.schema import ACTIVATIONS, FEATURES
from fac_ray.scoring import load_finished_run, score_sample, score_together

THRESHOLD = 0.5
CONFIG = {
    "name": "hand-made",
    "model": {"path": "m", "hook_layer": 1},
    "sae": {"path": "s"},
    "corpora": {"anchor": {"path": "a"}, "seed": {"path": "b"}},
    "measure": {"threshold": THRESHOLD, "thresholds": [0.0, 0.5]},
}


class Measured(NamedTuple):
    """The fields of the extractor's result that scoring reads."""

    feature_ids: np.ndarray
    activations: np.ndarray
    num_tokens: int = 4
    truncated: bool = False
    error: str | None = None


def measured(activations: dict[int, float]) -> Measured:
    return Measured(np.array(list(activations), np.int32), np.array(list(activations.values()), np.float32))


def coverage(*samples: set[int]) -> CorpusCoverage:
    """The coverage of samples that switch these features on, each at activation 1."""
    rows = [
        {"sample_id": str(i), "feature_ids": sorted(ids), "activations": [1.0] * len(ids), "num_tokens": 3}
        for i, ids in enumerate(samples)
    ]
    table = pa.Table.from_pylist(rows, schema=ACTIVATIONS)
    unlabelled = np.full(len(rows), -1)
    return CorpusCoverage.from_counts(FeatureCounts.from_rows(table, unlabelled, (0.0, 0.5), THRESHOLD, 6))


@pytest.fixture
def folder(tmp_path):
    """A run folder that has come to its gaps. Feature 2 is in two anchor samples and so wanted more than feature 1."""
    anchor, seed = coverage({0, 1, 2, 3}, {2, 5}), coverage({0, 3, 5})
    features = pa.Table.from_pylist(
        [{"feature_id": i, "relevant": i != 5, "method": "statistical", "effect": 2.0} for i in range(6)],
        schema=FEATURES,
    )
    save_coverage(tmp_path / "coverage" / "anchor", anchor)
    save_coverage(tmp_path / "coverage" / "seed", seed)
    write_table(tmp_path / "relevance" / "features.parquet", features)
    write_table(tmp_path / "gaps" / "gaps.parquet", find_gaps(features, anchor, seed, {}, THRESHOLD))
    write_json(tmp_path / "gaps" / MARKER, {"fingerprint": "x", "facts": {}})
    write_json(tmp_path / "config.json", config_from_tree(CONFIG).model_dump(mode="json"))
    return tmp_path


def test_a_text_is_scored_by_the_sets_of_the_run(folder):
    score = score_sample(load_finished_run(folder), measured({0: 0.9, 1: 0.6, 2: 2.0, 4: 3.0, 5: 1.0}))
    assert score == {
        "num_tokens": 4,
        "truncated": False,
        "num_relevant_features": 4,
        "covered_features": [0],
        "missing_features": [
            {"feature_id": 2, "activation": 2.0, "gap_rank": 0},
            {"feature_id": 1, "activation": pytest.approx(0.6), "gap_rank": 1},
        ],
        "novelty": 2,
    }


def test_an_activation_at_the_threshold_is_not_active(folder):
    score = score_sample(load_finished_run(folder), measured({0: 0.5, 1: 0.5}))
    assert (score["num_relevant_features"], score["novelty"]) == (0, 0)


def test_a_text_that_was_not_measured_has_its_error_and_no_numbers(folder):
    run = load_finished_run(folder)
    failed = measured({})._replace(error="no pooled token")
    assert score_sample(run, failed) == {"error": "no pooled token"}


def test_a_gap_that_two_texts_close_counts_once(folder):
    run = load_finished_run(folder)
    scores = [score_sample(run, measured({2: 1.0})), score_sample(run, measured({2: 3.0, 0: 1.0})), {"error": "bad"}]
    assert score_together(run, scores) == {"num_measured": 2, "num_errors": 1, "num_gaps_hit": 1, "fac_missing": 0.5}


def test_no_text_closes_no_gap(folder):
    together = score_together(load_finished_run(folder), [])
    assert (together["num_gaps_hit"], together["fac_missing"]) == (0, 0.0)


def test_scores_are_json(folder):
    run = load_finished_run(folder)
    assert json.loads(json.dumps({**run.identity, **score_sample(run, measured({1: 1.0}))}))["num_gaps"] == 2


def test_a_folder_without_gaps_is_refused_with_what_to_run(folder):
    (folder / "gaps" / MARKER).unlink()
    with pytest.raises(ConfigError, match="fac-ray gaps"):
        load_finished_run(folder)

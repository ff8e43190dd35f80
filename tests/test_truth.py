"""Laws of the check against truth, on cases worked out by hand."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import roc_auc_score

from fac_ray.artifacts import write_table
from fac_ray.reference.truth import concept_auc, score_truth
from fac_ray.schema import ACTIVATIONS, GAPS

CONCEPTS = {
    "s0": ["lie"],
    "s1": ["lie", "chat"],
    "s2": ["steal"],
    "s3": ["chat"],
    "s4": ["steal", "chat"],
    "s5": ["chat"],
}

ROWS = {
    "s0": {3: 2.0, 11: 1.0},
    "s1": {3: 1.5, 9: 1.0},
    "s2": {7: 3.0, 11: 1.0},
    "s3": {5: 1.0, 9: 1.0},
    "s4": {7: 1.0},
    "s5": {},
}


@pytest.fixture
def folders(tmp_path):
    write_table(
        tmp_path / "samples" / "a.parquet", pa.table({"sample_id": list(ROWS), "content_id": [f"c{s}" for s in ROWS]})
    )
    rows = [
        {
            "sample_id": sample,
            "feature_ids": list(found),
            "activations": list(found.values()),
            "peak_start": [0] * len(found),
            "peak_end": [1] * len(found),
            "num_tokens": 4,
            "truncated": False,
            "error": None,
        }
        for sample, found in reversed(ROWS.items())
    ]
    write_table(tmp_path / "activations" / "a.parquet", pa.Table.from_pylist(rows, schema=ACTIVATIONS))
    return tmp_path


def _truth(folder, withheld, anchor=None):
    path = folder / "truth.json"
    known = anchor or {f"c{sample}": names for sample, names in CONCEPTS.items()}
    truth = {"concepts": ["chat", "lie", "steal"], "policy": ["lie", "steal"], "withheld": withheld, "anchor": known}
    path.write_text(json.dumps(truth))
    return path


def _gaps(*feature_ids):
    rows = [
        {"feature_id": f, "rank": i, "score": 1.0, "anchor_fraction": 0.3, "explanation": "", "exemplars": []}
        for i, f in enumerate(feature_ids)
    ]
    return pa.Table.from_pylist(rows, schema=GAPS)


def _score(folder, gaps, withheld=("lie", "steal"), threshold=0.0, anchor=None):
    truth = _truth(folder, list(withheld), anchor)
    return score_truth(truth, folder / "samples", folder / "activations", gaps, threshold)


def test_a_feature_stands_for_the_concept_of_most_samples_it_is_active_in(folders):
    # feature 7 is active in s2 and s4, which both steal; feature 3 in s0 and s1, which both lie (and s1 chats)
    result = _score(folders, _gaps(7, 3))
    assert result["features"] == {7: {"concept": "steal", "purity": 1.0}, 3: {"concept": "lie", "purity": 1.0}}
    assert (result["precision"], result["recall"]) == (1.0, 1.0)
    assert result["found"] == ["lie", "steal"]


def test_a_feature_without_a_majority_stands_for_nothing_and_costs_precision(folders):
    # feature 11 is active in s0, which lies, and in s2, which steals: half is no majority
    result = _score(folders, _gaps(3, 11))
    assert result["features"][11] == {"concept": None, "purity": 0.5}
    assert (result["precision"], result["recall"]) == (0.5, 0.5)


def test_only_withheld_concepts_count(folders):
    result = _score(folders, _gaps(3, 7), withheld=["lie"])
    assert (result["precision"], result["recall"], result["num_withheld"]) == (0.5, 1.0, 1)


def test_an_activation_that_is_not_active_counts_as_none(folders):
    # at threshold 1.0, feature 7 is left with s2, and feature 11 with nothing
    result = _score(folders, _gaps(7, 11), threshold=1.0)
    assert result["features"] == {7: {"concept": "steal", "purity": 1.0}, 11: {"concept": None, "purity": 0.0}}


def test_without_missing_features_there_is_no_precision(folders):
    result = _score(folders, _gaps())
    assert (result["precision"], result["recall"], result["num_missing"]) == (None, 0.0, 0)


def test_truth_of_another_corpus_is_refused(folders):
    with pytest.raises(ValueError, match="belongs to another corpus"):
        _score(folders, _gaps(3), anchor={"elsewhere": ["lie"]})


def test_auc_equals_that_of_scikit_learn_with_ties():
    rng = np.random.default_rng(0)
    activations = rng.integers(0, 4, size=(60, 5)).astype(np.float32)
    present = rng.random((3, 60)) < 0.3
    auc = concept_auc(activations, present)
    for concept in range(3):
        for feature in range(5):
            assert auc[concept, feature] == pytest.approx(roc_auc_score(present[concept], activations[:, feature]))


def test_auc_of_a_concept_that_is_everywhere_or_nowhere_is_chance():
    present = np.array([[True, True], [False, False]])
    assert concept_auc(np.array([[1.0], [2.0]]), present).tolist() == [[0.5], [0.5]]

"""How well missing features name what is truly missing: truth and gaps in, precision and recall out.

A feature stands for a concept if most of the anchor's samples in which it is active hold that concept. (Not by
ROC-AUC: a feature may stand for one way of asking, be silent in the others, and so name its concept without ever being
wrong at an AUC of 0.6.) This is a check on data whose concepts are known; no stage but the report reads it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata

from fac_ray.artifacts import read_table
from fac_ray.coverage.counts import is_active, sparse_rows

MIN_PURITY = 0.5
"""A feature stands for a concept that more than this share of its active samples hold, else for none."""


def score_truth(
    truth_path: Path, samples_folder: Path, activations_folder: Path, gaps: pa.Table, threshold: float
) -> dict[str, Any]:
    """Precision and recall of the missing features (GAPS rows) against the withheld concepts.

    `precision`: share of the missing features that stand for a withheld concept. `recall`: share of the withheld
    concepts that a missing feature stands for. Either is None where its denominator is 0. `features` tells for each
    missing feature the concept it stands for, if any, and the purity: the largest share of its active samples that hold
    one concept. `found` lists the withheld concepts that count for recall.

    Raises:
        ValueError: the truth knows none of the anchor's samples.
    """
    truth = json.loads(Path(truth_path).read_text(encoding="utf-8"))
    feature_ids = gaps["feature_id"].to_numpy()
    activations, present = _anchor(truth, samples_folder, activations_folder, feature_ids)
    purity = concept_purity(is_active(activations, threshold), present)
    features: dict[int, dict[str, Any]] = {}
    for column, feature_id in enumerate(feature_ids.tolist()):
        best = int(purity[:, column].argmax())
        share = float(purity[best, column])
        name = truth["concepts"][best] if share > MIN_PURITY else None
        features[feature_id] = {"concept": name, "purity": round(share, 4)}
    withheld = set(truth["withheld"])
    hits = [entry["concept"] for entry in features.values() if entry["concept"] in withheld]
    found = sorted(set(hits))
    return {
        "precision": len(hits) / len(features) if features else None,
        "recall": len(found) / len(withheld) if withheld else None,
        "num_missing": len(features),
        "num_withheld": len(withheld),
        "num_found": len(found),
        "found": found,
        "features": features,
    }


def concept_purity(
    active: Bool[np.ndarray, "samples features"], present: Bool[np.ndarray, "concepts samples"]
) -> Float[np.ndarray, "concepts features"]:
    """Share of a feature's active samples that hold a concept, in [0, 1]; 0 where it is active in none."""
    together = present.astype(np.float64) @ active.astype(np.float64)
    num_active = active.sum(axis=0)
    return np.divide(together, num_active, out=np.zeros_like(together), where=num_active > 0)


def concept_auc(
    activations: Float[np.ndarray, "samples features"], present: Bool[np.ndarray, "concepts samples"]
) -> Float[np.ndarray, "concepts features"]:
    """ROC-AUC of each feature's activation for the presence of each concept, ties counted half, in [0, 1].

    0.5 where a concept is in none or in all of the samples.
    """
    ranks = rankdata(activations, axis=0)
    num_samples = len(activations)
    num_with = present.sum(axis=1, keepdims=True).astype(np.float64)
    num_pairs = num_with * (num_samples - num_with)
    above = present.astype(np.float64) @ ranks - num_with * (num_with + 1) / 2
    return np.divide(above, num_pairs, out=np.full(above.shape, 0.5), where=num_pairs > 0)


def _anchor(
    truth: dict[str, Any], samples_folder: Path, activations_folder: Path, feature_ids: Int[np.ndarray, " features"]
) -> tuple[Float[np.ndarray, "samples features"], Bool[np.ndarray, "concepts samples"]]:
    """Activations of the features, and presence of the concepts, in each anchor sample that the truth knows."""
    samples = read_table(samples_folder, columns=["sample_id", "content_id"])
    contents = dict(zip(samples["sample_id"].to_pylist(), samples["content_id"].to_pylist(), strict=True))
    rows = read_table(activations_folder, columns=["sample_id", "feature_ids", "activations"])
    sample_ids = rows["sample_id"].to_pylist()
    known = [row for row, sample_id in enumerate(sample_ids) if contents.get(sample_id) in truth["anchor"]]
    if not known:
        raise ValueError("evaluation.truth: it knows none of the anchor's samples; it belongs to another corpus")
    place = {name: number for number, name in enumerate(truth["concepts"])}
    present = np.zeros((len(place), len(known)), dtype=bool)
    for column, row in enumerate(known):
        for concept in truth["anchor"][contents[sample_ids[row]]]:
            present[place[concept], column] = True
    return _dense(rows.take(known), feature_ids), present


def _dense(rows: pa.Table, feature_ids: Int[np.ndarray, " features"]) -> Float[np.ndarray, "samples features"]:
    """Activations [rows, features] of the wanted features, 0 where a row lists none."""
    pairs = sparse_rows(rows, d_sae=np.iinfo(np.int32).max)
    highest = max(pairs.feature_ids.max(initial=0), feature_ids.max(initial=0))
    columns = np.full(highest + 1, -1)
    columns[feature_ids] = np.arange(len(feature_ids))
    wanted = columns[pairs.feature_ids] >= 0
    dense = np.zeros((len(rows), len(feature_ids)), dtype=np.float32)
    dense[pairs.row[wanted], columns[pairs.feature_ids[wanted]]] = pairs.activations[wanted]
    return dense

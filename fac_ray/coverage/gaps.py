"""Which relevant features the seed corpus lacks: FEATURES and two coverages come in, ranked GAPS rows go out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Bool

from fac_ray.coverage.counts import CorpusCoverage
from fac_ray.schema import FEATURES, GAPS, require_columns


def relevant_mask(features: pa.Table, d_sae: int) -> Bool[np.ndarray, " d_sae"]:
    """The relevant features of a FEATURES table.

    Raises:
        ValueError: a column is missing, or the table does not hold each of the d_sae features once.
    """
    features = require_columns(features, FEATURES, "features")
    ids = features["feature_id"].to_numpy()
    if not np.array_equal(np.sort(ids), np.arange(d_sae)):
        raise ValueError(f"features: {len(ids)} rows do not hold each of the {d_sae} features of the coverage once")
    mask = np.zeros(d_sae, bool)
    mask[ids] = features["relevant"].to_numpy()
    return mask


def target_features(features: pa.Table, anchor: CorpusCoverage, threshold: float) -> Bool[np.ndarray, " d_sae"]:
    """The features that FAC is about: relevant AND active in the anchor (paper: F(P_Z))."""
    return relevant_mask(features, anchor.d_sae) & anchor.active(threshold)


def covered_features(
    features: pa.Table, anchor: CorpusCoverage, seed: CorpusCoverage, threshold: float
) -> Bool[np.ndarray, " d_sae"]:
    """The target features that the seed has: relevant AND active(anchor) AND active(seed)."""
    return target_features(features, anchor, threshold) & seed.active(threshold)


def find_gaps(
    features: pa.Table,
    anchor: CorpusCoverage,
    seed: CorpusCoverage,
    exemplars: Mapping[int, Sequence[str]],
    threshold: float,
) -> pa.Table:
    """GAPS rows: the missing features, relevant AND active(anchor) AND NOT active(seed), most wanted first.

    The score is `anchor_fraction * effect`: how often the anchor shows the feature times how strongly it marks the
    task (log2 odds ratio). Ties go to the smaller feature_id. The paper takes the missing set without an order.

    Raises:
        ValueError: the threshold was not counted, or the tables belong to another SAE.
    """
    missing = target_features(features, anchor, threshold) & ~seed.active(threshold)
    ids = features["feature_id"].to_numpy()
    rows = np.flatnonzero(missing[ids])
    ids = ids[rows]
    anchor_fraction = anchor.counts(threshold)[ids] / max(anchor.num_samples, 1)
    score = anchor_fraction * features["effect"].to_numpy()[rows]
    order = np.lexsort((ids, -score))
    return pa.table(
        {
            "feature_id": ids[order],
            "rank": np.arange(len(order)),
            "score": score[order],
            "anchor_fraction": anchor_fraction[order],
            "explanation": features["explanation"].take(pa.array(rows[order], pa.int64())),
            "exemplars": pa.array([list(exemplars.get(int(i), ())) for i in ids[order]], pa.list_(pa.string())),
        }
    ).cast(GAPS)

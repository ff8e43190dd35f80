"""Area under the precision-recall curve, and how sure its differences are: labels and scores in, numbers out."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from sklearn.metrics import average_precision_score


def average_precision(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the precision-recall curve: sum over thresholds of (R_n - R_n-1) P_n, in [0, 1] (AUPRC).

    Raises:
        ValueError: the labels are of one class, the lengths differ, or a score is not finite.
    """
    truth, values = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if truth.shape != values.shape:
        raise ValueError(f"{truth.shape} labels and {values.shape} scores; each sample needs one of both")
    if not np.isfinite(values).all():
        raise ValueError(
            f"{int((~np.isfinite(values)).sum())} of {values.size} scores are not finite; "
            "the training diverged, a lower training.learning_rate may help"
        )
    if len(np.unique(truth)) != 2:
        raise ValueError("the labels are of one class; precision and recall need both")
    return float(average_precision_score(truth, values))


def resampled_average_precision(
    labels: Int[np.ndarray, " N"], scores: Float[np.ndarray, " N"], weights: Int[np.ndarray, "replicates N"]
) -> Float[np.ndarray, " replicates"]:
    """`average_precision` of resampled data: `weights[b, i]` says how often replicate b holds sample i.

    Every replicate must hold a positive sample.
    """
    order = np.argsort(-scores, kind="stable")
    weights, positive, values = weights[:, order], np.asarray(labels)[order] == 1, scores[order]
    last_of_tie = np.append(values[1:] != values[:-1], True)
    num_found = np.cumsum(weights * positive, axis=1)[:, last_of_tie]
    num_taken = np.cumsum(weights, axis=1)[:, last_of_tie]
    gained = np.diff(num_found, axis=1, prepend=0)
    return (gained * (num_found / np.maximum(num_taken, 1))).sum(axis=1) / num_found[:, -1]


def bootstrap_weights(labels: Int[np.ndarray, " N"], num_replicates: int, seed: int) -> Int[np.ndarray, "replicates N"]:
    """How often each sample is drawn in each replicate; positives and negatives are redrawn apart, so none is lost."""
    rng = np.random.default_rng(seed)
    weights = np.zeros((num_replicates, len(labels)), np.int64)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        weights[:, rows] = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=num_replicates)
    return weights

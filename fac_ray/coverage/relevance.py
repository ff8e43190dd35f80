"""Which features matter for the task: counts of active positive and other samples come in, FEATURES rows go out.

A feature is relevant if it is active more often in samples of the task than in the others: a one-sided Fisher exact
test for each feature, the false discovery rate held by Benjamini-Hochberg, and a smallest effect and count besides,
because with many samples the least difference is significant.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int
from scipy import stats

from fac_ray.config import ConfigError, RelevanceConfig
from fac_ray.coverage.counts import CorpusCoverage
from fac_ray.schema import FEATURES


def relevance_from_coverage(
    anchor: CorpusCoverage, background: CorpusCoverage | None, threshold: float, relevance: RelevanceConfig
) -> pa.Table:
    """FEATURES of an anchor corpus: its positive against its other labelled samples, else all of it against background.

    Raises:
        ConfigError: the anchor holds no positive or no other label and there is no background corpus, no label is
            among `relevance.positive`, or the threshold is not the one at which labels were counted.
    """
    if anchor.num_labelled == 0:
        num_positive, positive = anchor.num_samples, anchor.counts(threshold)
    else:
        _require_positive(anchor, threshold, relevance)
        num_positive, positive = anchor.num_positive, anchor.positive_active
    num_negative = anchor.num_labelled - anchor.num_positive
    if num_negative > 0:
        negative = anchor.labelled_active - anchor.positive_active
    elif background is not None:
        num_negative, negative = background.num_samples, background.counts(threshold)
    else:
        raise ConfigError(
            "relevance needs samples outside the task: give corpora.anchor a `label` column with other values than "
            f"relevance.positive = {list(relevance.positive)}, or add a corpus named background"
        )
    return relevant_features(positive, num_positive, negative, num_negative, relevance)


def relevant_features(
    positive_active: Int[np.ndarray, " d_sae"],
    num_positive: int,
    negative_active: Int[np.ndarray, " d_sae"],
    num_negative: int,
    relevance: RelevanceConfig,
) -> pa.Table:
    """FEATURES rows, one for each feature, from the number of positive and negative samples in which it is active.

    relevant = q_value <= max_q_value AND effect >= min_effect AND positive_active >= min_samples.
    Features that are active nowhere are not tested: their p and q values are 1.

    Raises:
        ValueError: a count is negative or larger than its number of samples, or a number of samples is 0.
    """
    _check_counts("positive", positive_active, num_positive)
    _check_counts("negative", negative_active, num_negative)
    effect = log2_odds_ratio(positive_active, num_positive, negative_active, num_negative)
    p_value = fisher_p_values(positive_active, num_positive, negative_active, num_negative)
    tested = (positive_active + negative_active) > 0
    q_value = np.ones(len(p_value))
    if tested.any():
        q_value[tested] = stats.false_discovery_control(p_value[tested], method="bh")
    significant = (q_value <= relevance.max_q_value) & (effect >= relevance.min_effect)
    num_features = len(p_value)
    return pa.table(
        {
            "feature_id": np.arange(num_features),
            "relevant": significant & (positive_active >= relevance.min_samples),
            "method": pa.array([relevance.method] * num_features, pa.string()),
            "effect": effect,
            "p_value": p_value,
            "q_value": q_value,
            "num_positive": positive_active,
            "num_negative": negative_active,
            "explanation": pa.nulls(num_features, pa.string()),
            "judgement": pa.nulls(num_features, pa.string()),
        }
    ).cast(FEATURES)


def fisher_p_values(
    positive_active: Int[np.ndarray, " d_sae"],
    num_positive: int,
    negative_active: Int[np.ndarray, " d_sae"],
    num_negative: int,
) -> Float[np.ndarray, " d_sae"]:
    """One-sided Fisher exact p-values: P[at least that many positive samples active | margins], in [0, 1].

    The number of active positive samples is hypergeometric when labels say nothing about activity (Fisher 1922).
    """
    total = num_positive + num_negative
    tables, where = np.unique(np.stack([positive_active, negative_active]), axis=1, return_inverse=True)
    upper_tail = stats.hypergeom.sf(tables[0] - 1, total, tables.sum(axis=0), num_positive)
    return np.clip(upper_tail, 0.0, 1.0)[where.reshape(-1)]


def log2_odds_ratio(
    positive_active: Int[np.ndarray, " d_sae"],
    num_positive: int,
    negative_active: Int[np.ndarray, " d_sae"],
    num_negative: int,
) -> Float[np.ndarray, " d_sae"]:
    """log2 of the odds ratio of being active, positive over negative, each cell + 0.5 (Haldane-Anscombe): finite."""
    odds_positive = (positive_active + 0.5) / (num_positive - positive_active + 0.5)
    odds_negative = (negative_active + 0.5) / (num_negative - negative_active + 0.5)
    return np.log2(odds_positive / odds_negative)


def _require_positive(anchor: CorpusCoverage, threshold: float, relevance: RelevanceConfig) -> None:
    if anchor.num_positive == 0:
        raise ConfigError(
            f"relevance.positive: none of the {anchor.num_labelled} labels of the anchor corpus is among "
            f"{list(relevance.positive)}; name the labels that mean 'belongs to the task'"
        )
    if threshold != anchor.threshold:
        raise ConfigError(
            f"labelled samples were counted at threshold {anchor.threshold}, not {threshold}; "
            "set measure.threshold and reduce again (the model does not run again)"
        )


def _check_counts(name: str, active: Int[np.ndarray, " d_sae"], num_samples: int) -> None:
    if num_samples <= 0:
        raise ValueError(f"relevance: there are {num_samples} {name} samples; at least one is needed")
    if len(active) and (active.min() < 0 or active.max() > num_samples):
        raise ValueError(f"relevance: counts from {active.min()} to {active.max()} of {num_samples} {name} samples")

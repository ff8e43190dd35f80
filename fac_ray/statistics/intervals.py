"""What sampling does to a coverage: coverages of corpora come in; intervals, matched and null values go out.

FAC grows with the number and the length of the samples (`fac_ray.statistics.richness`). So it is compared at equal size
(`matched_coverage`), with its sampling error (`coverage_interval`), and with what features drawn at random would give
(`random_feature_null`). docs/statistics.md explains each on one page. Everything is closed form but the null, which is
seeded; what needs the samples themselves is in `fac_ray.statistics.resampling`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from fac_ray.coverage.counts import CorpusCoverage
from fac_ray.statistics.richness import Z_95, chao2, rarefaction


def coverage_std(num_samples_active: Int[np.ndarray, " target"], num_samples: int) -> float:
    """Standard error of the covered share of the features given, for redrawn corpora of the same size.

    sqrt(S_obs (1 - S_obs / S_est)) / |target|: `rarefaction_std` at the full size, S_est of `chao2` at most |target|.
    Features are taken as independent.

    Raises:
        ValueError: no feature is given, or a count lies outside [0, num_samples].
    """
    num_target = len(num_samples_active)
    if num_target == 0:
        raise ValueError("the target selects no feature, so its coverage is undefined")
    observed, estimate = chao2(num_samples_active, num_samples)[:2]
    return math.sqrt(observed * (1 - observed / min(estimate, num_target))) / num_target if observed else 0.0


def coverage_interval(
    num_samples_active: Int[np.ndarray, " d_sae"], num_samples: int, target: Bool[np.ndarray, " d_sae"]
) -> tuple[float, float]:
    """95 % interval of the coverage of `target`, for redrawn corpora of the same size, within [0, 1].

    fac +- 1.96 `coverage_std` over the target's features. Features never seen carry no sampling error of their own, so
    a corpus that has every feature of its S_est has an interval of width 0.

    Raises:
        ValueError: `target` selects no feature, or a count lies outside [0, num_samples].
    """
    counts = num_samples_active[target]
    error = coverage_std(counts, num_samples)
    coverage = float((counts > 0).mean())
    return max(0.0, coverage - Z_95 * error), min(1.0, coverage + Z_95 * error)


class MatchedCoverage(NamedTuple):
    """Expected coverages of several corpora, each cut down to the same size; in the order given."""

    num_samples: int
    """Size at which `at_samples` holds: that of the smallest corpus."""
    at_samples: list[float]
    num_tokens: int
    """Size at which `at_tokens` holds: that of the corpus with the fewest pooled tokens."""
    at_tokens: list[float]


def matched_coverage(
    corpora: Sequence[CorpusCoverage], target: Bool[np.ndarray, " d_sae"], threshold: float
) -> MatchedCoverage:
    """Expected share of the target features that random subsets of equal size switch on, in [0, 1].

    Equal numbers of samples are exact (`rarefaction`). Equal numbers of tokens are met by as many samples as hold
    them on average in that corpus, so they are exact only if length and features are unrelated within a corpus.

    Raises:
        ValueError: no corpus, a corpus without samples, an empty target, or a threshold that was not counted.
    """
    if not corpora or any(c.num_samples == 0 for c in corpora):
        raise ValueError("matched coverage needs corpora with at least one measured sample each")
    num_target = int(target.sum())
    if num_target == 0:
        raise ValueError("the target selects no feature, so its coverage is undefined")
    num_samples = min(c.num_samples for c in corpora)
    num_tokens = min(c.num_tokens for c in corpora)

    def share(corpus: CorpusCoverage, size: int) -> float:
        return float(rarefaction(corpus.counts(threshold)[target], corpus.num_samples, [size])[0]) / num_target

    token_sizes = [round(c.num_samples * num_tokens / max(c.num_tokens, 1)) for c in corpora]
    return MatchedCoverage(
        num_samples,
        [share(c, num_samples) for c in corpora],
        num_tokens,
        [share(c, size) for c, size in zip(corpora, token_sizes, strict=True)],
    )


class NullCoverage(NamedTuple):
    """Coverage of random feature sets that are as large and as frequent in the anchor as the target."""

    mean: float
    std: float
    low: float
    """2.5 % quantile over the random sets."""
    high: float
    """97.5 % quantile."""
    fraction_at_most: float
    """Share of the random sets whose coverage is at most the target's; near 0, the target is covered worse."""
    num_sets: int


def random_feature_null(
    covered: Bool[np.ndarray, " d_sae"],
    target: Bool[np.ndarray, " d_sae"],
    anchor_counts: Int[np.ndarray, " d_sae"],
    seed: int = 0,
    num_sets: int = 1000,
) -> NullCoverage:
    """Coverage of random sets of anchor-active features, in [0, 1]: what FAC says when relevance says nothing.

    Each set has |target| features. Anchor-active features are put into strata by floor(log2(anchor count)), and a
    set takes from each stratum as many as the target has there, without replacement: a permutation test within
    strata. The number of covered ones per stratum is hypergeometric, so it is drawn directly.

    Raises:
        ValueError: `target` selects no feature, or one that is not active in the anchor.
    """
    if not target.any() or (target & (anchor_counts == 0)).any():
        raise ValueError("the target must select features that are active in the anchor, at least one")
    active = anchor_counts > 0
    stratum = np.frexp(anchor_counts[active].astype(float))[1]
    in_stratum, of_target, of_covered = (
        np.bincount(stratum, weights=weights[active]).astype(np.int64) for weights in (active, target, covered)
    )
    draws = np.random.default_rng(seed).hypergeometric(
        of_covered, in_stratum - of_covered, of_target, size=(num_sets, len(in_stratum))
    )
    num_target = int(target.sum())
    shares = draws.sum(axis=1) / num_target
    low, high = np.quantile(shares, [0.025, 0.975])
    at_most = np.mean(shares <= (covered & target).sum() / num_target)
    return NullCoverage(float(shares.mean()), float(shares.std()), float(low), float(high), float(at_most), num_sets)

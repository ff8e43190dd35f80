"""What sampling does to a coverage: per-feature sample counts come in; curves, bounds and null values go out.

A corpus's number of active features is a species richness: samples are sampling units, features are species, and it
grows with the number and the length of the samples. So a coverage is compared at equal size (`rarefaction`,
`matched_coverage`), with what is still unseen (`chao2`), with its sampling error (`coverage_interval`), and with
what features drawn at random would give (`random_feature_null`). docs/statistics.md explains each on one page.

Everything is closed form but the null, which is seeded. Counts are incidences: `num_samples_active[i]` samples hold
feature i, out of `num_samples`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import gammaln

from fac_ray.coverage import CorpusCoverage

Z_95 = 1.959963984540054


def rarefaction(
    num_samples_active: Int[np.ndarray, " features"], num_samples: int, sizes: Sequence[int] | Int[np.ndarray, " sizes"]
) -> Float[np.ndarray, " sizes"]:
    """Expected number of active features in a random subset of n samples, for each n of `sizes`.

    E[S(n)] = sum_i [1 - C(N - N_i, n) / C(N, n)], with N = num_samples and N_i = num_samples_active[i]
    (Colwell et al. 2012, equation 4, after Hurlbert 1971). Drawn without replacement; exact up to rounding of the
    log-gamma function.

    Raises:
        ValueError: a count lies outside [0, N], or a size does (a larger corpus is not extrapolated).
    """
    counts, multiplicity = _distinct_counts(num_samples_active, num_samples)
    return np.array([multiplicity @ -np.expm1(_log_absent(counts, num_samples, n)) for n in _sizes(sizes, num_samples)])


def rarefaction_std(
    num_samples_active: Int[np.ndarray, " features"], num_samples: int, sizes: Sequence[int] | Int[np.ndarray, " sizes"]
) -> Float[np.ndarray, " sizes"]:
    """Standard error of `rarefaction`, for a corpus that is itself a sample of many more like it.

    var(n) = sum_i (1 - a_i(n))^2 - E[S(n)]^2 / S_est, with a_i(n) = C(N - N_i, n) / C(N, n) and S_est from Chao2
    (Colwell et al. 2012, equation 5). At n = N it is S_obs (1 - S_obs / S_est).

    Raises:
        ValueError: as `rarefaction`.
    """
    counts, multiplicity = _distinct_counts(num_samples_active, num_samples)
    estimate = chao2(num_samples_active, num_samples).estimate
    if estimate == 0:
        return np.zeros(len(sizes))
    present = [-np.expm1(_log_absent(counts, num_samples, n)) for n in _sizes(sizes, num_samples)]
    variances = [multiplicity @ p**2 - (multiplicity @ p) ** 2 / estimate for p in present]
    return np.sqrt(np.maximum(variances, 0.0))


class Chao2(NamedTuple):
    """A lower bound of the number of features that would be active in an endless corpus of the same kind."""

    observed: int
    estimate: float
    std: float
    low: float
    """95 % confidence interval; never below `observed`."""
    high: float


def chao2(num_samples_active: Int[np.ndarray, " features"], num_samples: int) -> Chao2:
    """Chao2 estimate of the number of active features, seen and unseen.

    With Q1 features active in exactly one sample, Q2 in exactly two, and A = (N - 1) / N:
    S_est = S_obs + A Q1^2 / (2 Q2), or S_obs + A Q1 (Q1 - 1) / 2 where Q2 = 0 (Chao 1987; Colwell et al. 2012,
    equations 9 and 10). The estimate knows no dictionary size; clip it by d_sae or by the size of the target.

    Raises:
        ValueError: a count lies outside [0, num_samples].
    """
    counts, multiplicity = _distinct_counts(num_samples_active, num_samples)
    observed = int(multiplicity.sum())
    q1, q2 = (int(multiplicity[counts == n].sum()) for n in (1, 2))
    shrink = (num_samples - 1) / num_samples
    unseen = shrink * (q1 * q1 / (2 * q2) if q2 else q1 * (q1 - 1) / 2)
    if unseen == 0:
        return Chao2(observed, float(observed), 0.0, float(observed), float(observed))
    variance = _chao2_variance(q1, q2, shrink, observed + unseen)
    stretch = math.exp(Z_95 * math.sqrt(math.log1p(variance / unseen**2)))
    return Chao2(
        observed, observed + unseen, math.sqrt(variance), observed + unseen / stretch, observed + unseen * stretch
    )


def coverage_interval(
    num_samples_active: Int[np.ndarray, " d_sae"], num_samples: int, target: Bool[np.ndarray, " d_sae"]
) -> tuple[float, float]:
    """95 % interval of the coverage of `target`, for redrawn corpora of the same size, within [0, 1].

    fac +- 1.96 sqrt(S_obs (1 - S_obs / S_est)) / |target|: `rarefaction_std` at the full size over the target's
    features, S_est at most |target|. Features never seen carry no sampling error of their own, so a corpus that has
    every feature of its S_est has an interval of width 0.

    Raises:
        ValueError: `target` selects no feature, or a count lies outside [0, num_samples].
    """
    num_target = int(target.sum())
    if num_target == 0:
        raise ValueError("the target selects no feature, so its coverage is undefined")
    counts = num_samples_active[target]
    observed = int((counts > 0).sum())
    estimate = min(chao2(counts, num_samples).estimate, num_target)
    error = math.sqrt(observed * (1 - observed / estimate)) if observed else 0.0
    return max(0.0, (observed - Z_95 * error) / num_target), min(1.0, (observed + Z_95 * error) / num_target)


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


def _distinct_counts(
    num_samples_active: Int[np.ndarray, " features"], num_samples: int
) -> tuple[Int[np.ndarray, " counts"], Int[np.ndarray, " counts"]]:
    """The distinct counts above 0 and how many features have each: the only thing these statistics depend on."""
    counts = np.asarray(num_samples_active, np.int64)
    if num_samples < 1 or (len(counts) and (counts.min() < 0 or counts.max() > num_samples)):
        raise ValueError(f"per-feature sample counts must lie in [0, num_samples = {num_samples}], num_samples >= 1")
    return np.unique(counts[counts > 0], return_counts=True)


def _sizes(sizes: Sequence[int] | Int[np.ndarray, " sizes"], num_samples: int) -> list[int]:
    checked = [int(size) for size in sizes]
    if checked and (min(checked) < 0 or max(checked) > num_samples):
        raise ValueError(f"subset sizes must lie in [0, {num_samples}], got {min(checked)} to {max(checked)}")
    return checked


def _log_absent(counts: Int[np.ndarray, " counts"], num_samples: int, size: int) -> Float[np.ndarray, " counts"]:
    """log of C(N - N_i, n) / C(N, n): that none of the N_i samples with the feature is among the n drawn."""
    rest = num_samples - counts
    fits = rest >= size  # else fewer than n samples lack the feature, and the subset must hold it
    rest = np.where(fits, rest, size)
    log_ratio = (
        gammaln(rest + 1) - gammaln(rest - size + 1) - gammaln(num_samples + 1) + gammaln(num_samples - size + 1)
    )
    return np.where(fits, np.minimum(log_ratio, 0.0), -np.inf)


def _chao2_variance(q1: int, q2: int, shrink: float, estimate: float) -> float:
    """Chao 1987, equation 13; where Q2 = 0, of the bias-corrected form (Colwell, EstimateS, appendix B)."""
    if q2:
        ratio = q1 / q2
        return q2 * (shrink / 2 * ratio**2 + shrink**2 * ratio**3 + shrink**2 / 4 * ratio**4)
    return shrink * q1 * (q1 - 1) / 2 + shrink**2 * q1 * (2 * q1 - 1) ** 2 / 4 - shrink**2 * q1**4 / (4 * estimate)

"""How many features a corpus of another size would show: per-feature sample counts come in, richness curves go out.

A corpus's number of active features is a species richness: samples are sampling units, features are species. Counts
are incidences: `num_samples_active[i]` samples hold feature i, out of N = `num_samples`. Smaller corpora are
interpolated exactly (`rarefaction`), larger ones extrapolated from an estimate of the unseen (`chao2`); together they
are one curve with its 95 % band (`richness_curve`). Everything is closed form. docs/statistics.md explains it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.special import gammaln

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


def extrapolation(
    num_samples_active: Int[np.ndarray, " features"], num_samples: int, sizes: Sequence[int] | Int[np.ndarray, " sizes"]
) -> Float[np.ndarray, " sizes"]:
    """Expected number of active features in a corpus grown to n >= N samples of the same kind, for each n of `sizes`.

    E[S(N + m)] = S_obs + Q0 (1 - w^m), with Q0 = S_est - S_obs of `chao2` and w = 1 - Q1 / (N Q0 + Q1)
    (Colwell et al. 2012, equation 18). A lower bound on average, as Q0 is; reliable to about n = 2 N.

    Raises:
        ValueError: a count lies outside [0, N], or a size is below N.
    """
    observed, unseen, keep, _ = _tail(num_samples_active, num_samples)
    return observed + unseen * (1 - keep ** _added(sizes, num_samples))


def extrapolation_std(
    num_samples_active: Int[np.ndarray, " features"], num_samples: int, sizes: Sequence[int] | Int[np.ndarray, " sizes"]
) -> Float[np.ndarray, " sizes"]:
    """Standard error of `extrapolation`; at n = N that of `rarefaction_std`.

    Delta method on the frequencies Q_k of features with count k, whose covariance is Q_k (1 - Q_k / S_est) and
    -Q_j Q_k / S_est: var = sum_k d_k^2 Q_k - (sum_k d_k Q_k)^2 / S_est, where d_k is the derivative of E[S(n)] by Q_k
    (Colwell et al. 2012, equation 19). d_k = 1 for k > 2; `_tail_slopes` has d_1 - 1 and d_2 - 1.

    Raises:
        ValueError: as `extrapolation`.
    """
    observed, unseen, keep, (q1, q2) = _tail(num_samples_active, num_samples)
    if observed == 0:
        return np.zeros(len(sizes))
    slopes = _tail_slopes(q1, q2, num_samples, unseen, keep, _added(sizes, num_samples))
    first, second = 1 + slopes[0], 1 + slopes[1]
    rest = observed - q1 - q2
    squares = first**2 * q1 + second**2 * q2 + rest
    total = first * q1 + second * q2 + rest
    return np.sqrt(np.maximum(squares - total**2 / (observed + unseen), 0.0))


class RichnessCurve(NamedTuple):
    """Expected number of active features by corpus size, with its band."""

    num_samples: Int[np.ndarray, " sizes"]
    expected: Float[np.ndarray, " sizes"]
    low: Float[np.ndarray, " sizes"]
    """95 % band: 1.96 standard errors to both sides, within [0, num_features]."""
    high: Float[np.ndarray, " sizes"]


def richness_curve(
    num_samples_active: Int[np.ndarray, " features"], num_samples: int, sizes: Sequence[int] | Int[np.ndarray, " sizes"]
) -> RichnessCurve:
    """`rarefaction` up to N and `extrapolation` beyond, for sizes in any order.

    There are no more features than counts given, so nothing exceeds their number.

    Raises:
        ValueError: a count lies outside [0, N], or a size is negative.
    """
    at = np.asarray(sizes, np.int64)
    inside = at <= num_samples
    expected, errors = np.zeros(len(at)), np.zeros(len(at))
    for part, mean, error in (
        (inside, rarefaction, rarefaction_std),
        (~inside, extrapolation, extrapolation_std),
    ):
        expected[part] = mean(num_samples_active, num_samples, at[part])
        errors[part] = error(num_samples_active, num_samples, at[part])
    most = len(num_samples_active)
    low, high = (np.clip(expected + sign * Z_95 * errors, 0, most) for sign in (-1, 1))
    return RichnessCurve(at, np.minimum(expected, most), low, high)


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


def _tail(
    num_samples_active: Int[np.ndarray, " features"], num_samples: int
) -> tuple[int, float, float, tuple[int, int]]:
    """S_obs, Q0, w and (Q1, Q2): the terms of `extrapolation`. Q0 = 0 where nothing is rare; then w = 0."""
    counts, multiplicity = _distinct_counts(num_samples_active, num_samples)
    observed, estimate = chao2(num_samples_active, num_samples)[:2]
    q1, q2 = (int(multiplicity[counts == n].sum()) for n in (1, 2))
    unseen = estimate - observed
    keep = 1 - q1 / (num_samples * unseen + q1) if unseen else 0.0
    return observed, unseen, keep, (q1, q2)


def _tail_slopes(
    q1: int, q2: int, num_samples: int, unseen: float, keep: float, added: Float[np.ndarray, " sizes"]
) -> tuple[Float[np.ndarray, " sizes"], Float[np.ndarray, " sizes"]]:
    """Derivatives of Q0 (1 - w^m) by Q1 and by Q2."""
    if unseen == 0:
        return np.zeros_like(added), np.zeros_like(added)
    grown = 1 - keep**added
    turned = unseen * added * keep**added  # Q0 m w^m: what a relative change of w takes away
    if q2:  # Q0 ~ Q1^2 / Q2 and w = r / (r + 2) with r = (N - 1) Q1 / Q2
        common = turned * (1 - keep)
        return (2 * unseen * grown - common) / q1, -(unseen * grown - common) / q2
    # Q0 = A Q1 (Q1 - 1) / 2 and w = r / (r + 2) with r = (N - 1) (Q1 - 1); Q2 itself has no part in it
    rise = (num_samples - 1) / num_samples * (2 * q1 - 1) / 2
    return rise * grown - turned * (1 - keep) / (q1 - 1), np.zeros_like(added)


def _added(sizes: Sequence[int] | Int[np.ndarray, " sizes"], num_samples: int) -> Float[np.ndarray, " sizes"]:
    added = np.asarray(sizes, np.int64) - num_samples
    if len(added) and added.min() < 0:
        raise ValueError(
            f"extrapolated sizes must be at least num_samples = {num_samples}, got {added.min() + num_samples}"
        )
    return added.astype(float)

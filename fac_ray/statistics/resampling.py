"""Coverage under redrawn samples: which sample holds which feature comes in, intervals and p-values go out.

Features that occur together in one sample come and go together, which per-feature counts cannot show. So here whole
samples are drawn again: with replacement (`bootstrap_coverage`), or between two corpora (`permutation_test`). An
incidence matrix has one row for each measured sample and one column for each feature that counts. Both are seeded.
docs/statistics.md says what they can and cannot do.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array, vstack
from scipy.stats import permutation_test as scipy_permutation_test

from fac_ray.coverage.counts import is_active, sparse_rows
from fac_ray.statistics.intervals import coverage_std
from fac_ray.statistics.richness import Z_95

NUM_REPLICATES = 1000
BATCH_CELLS = 1 << 24
"""Cells (replicates x samples) that are in memory at once."""


class BootstrapCoverage(NamedTuple):
    """Coverage of a corpus with a sampling error that knows which features come together."""

    coverage: float
    std: float
    """Standard error: `coverage_std` times the design effect."""
    low: float
    """95 % interval: 1.96 standard errors to both sides, within [0, 1]."""
    high: float
    design_effect: float
    """Spread of the replicates / what it would be, were features independent; 1 where all are frequent."""
    num_replicates: int


class PermutationTest(NamedTuple):
    """Whether two corpora cover differently, were their samples exchangeable."""

    difference: float
    """Coverage of the first less that of the second, as they are."""
    null_mean: float
    """Mean difference of random divisions into the same two sizes: not 0 where the sizes differ."""
    p_value: float
    """Two-sided: twice the smaller tail, (1 + as extreme) / (1 + permutations) each, at most 1."""
    num_permutations: int


def incidence(
    rows: pa.Table, features: Bool[np.ndarray, " d_sae"], threshold: float
) -> Bool[csr_array, "samples features"]:
    """Which of the selected features each measured ACTIVATIONS row has active; rows with an error are left out.

    Raises:
        ValueError: a feature_id lies outside [0, d_sae).
    """
    measured = rows.filter(pa.compute.is_null(rows["error"]))
    pairs = sparse_rows(measured, len(features))
    keep = features[pairs.feature_ids] & is_active(pairs.activations, threshold)
    column = np.cumsum(features) - 1
    indices = (pairs.row[keep], column[pairs.feature_ids[keep]])
    return csr_array((np.ones(keep.sum(), bool), indices), shape=(len(measured), int(features.sum())))


def bootstrap_coverage(
    samples: Bool[csr_array, "samples features"], seed: int = 0, num_replicates: int = NUM_REPLICATES
) -> BootstrapCoverage:
    """Sampling error of the share of features that are active in at least one sample; whole samples are redrawn.

    A replicate draws N of the N samples with replacement (Efron 1979). Its spread alone is wrong: a replicate cannot
    hold what the corpus lacks (too narrow where much is unseen) and leaves out 37 % of the samples (too wide where
    little is). So the bootstrap is asked only how much wider it is than for independent features, whose variance is
    sum_i q_i (1 - q_i) with q_i = (1 - N_i / N)^N: a design effect on the closed form `coverage_std`.

    Raises:
        ValueError: there is no sample or no feature.
    """
    num_samples, num_features = samples.shape
    if not num_samples or not num_features:
        raise ValueError(f"bootstrap: needs samples and features, got {num_samples} and {num_features}")
    counts = np.asarray(samples.sum(axis=0, dtype=np.int64))
    absent = (1 - counts / num_samples) ** num_samples
    independent = math.sqrt(float(absent @ (1 - absent))) / num_features
    spread = float(_replicates(samples, seed, num_replicates).std())
    effect = spread / independent if independent else 1.0
    coverage, error = float((counts > 0).mean()), effect * coverage_std(counts, num_samples)
    low, high = max(0.0, coverage - Z_95 * error), min(1.0, coverage + Z_95 * error)
    return BootstrapCoverage(coverage, error, low, high, effect, num_replicates)


def permutation_test(
    first: Bool[csr_array, "first features"],
    second: Bool[csr_array, "second features"],
    seed: int = 0,
    num_permutations: int = NUM_REPLICATES,
) -> PermutationTest:
    """Test of the difference in coverage between two corpora; scipy.stats.permutation_test over their samples.

    Null hypothesis: which samples are in which corpus is chance, the sizes given. Two corpora of different size are
    thus tested fairly. Where there are fewer divisions than `num_permutations`, each is taken once and p is exact.

    Raises:
        ValueError: a corpus has fewer than two samples, or there is no feature.
    """
    if min(first.shape[0], second.shape[0]) < 2 or not first.shape[1]:
        raise ValueError(
            f"permutation test: needs two samples of each and a feature, got {first.shape} and {second.shape}"
        )
    pooled = csr_array(vstack([first, second]))
    numbers = np.arange(pooled.shape[0])

    def difference(mine: Int[np.ndarray, "*n first"], others: Int[np.ndarray, "*n second"], axis: int) -> np.ndarray:
        assert axis == -1, "scipy moves the samples to the last axis"
        return _share_of(pooled, mine) - _share_of(pooled, others)

    found = scipy_permutation_test(
        (numbers[: first.shape[0]], numbers[first.shape[0] :]),
        difference,
        vectorized=True,
        n_resamples=num_permutations,
        batch=max(1, BATCH_CELLS // len(numbers)),
        rng=np.random.default_rng(seed),
    )
    null = found.null_distribution
    return PermutationTest(float(found.statistic), float(null.mean()), float(found.pvalue), len(null))


def _replicates(
    samples: Bool[csr_array, "samples features"], seed: int, num_replicates: int
) -> Float[np.ndarray, " replicates"]:
    """Coverage of each corpus drawn with replacement."""
    num_samples, rng, shares = samples.shape[0], np.random.default_rng(seed), []
    batch = max(1, BATCH_CELLS // num_samples)
    for start in range(0, num_replicates, batch):
        sizes = min(batch, num_replicates - start)
        draws = rng.multinomial(num_samples, np.full(num_samples, 1 / num_samples), sizes)
        shares.append(_covered_share(samples, draws > 0))
    return np.concatenate(shares)


def _share_of(samples: Bool[csr_array, "samples features"], drawn: Int[np.ndarray, "*n draws"]) -> np.ndarray:
    """Covered share of each set of row numbers along the last axis."""
    sets = drawn.reshape(-1, drawn.shape[-1])
    chosen = np.zeros((len(sets), samples.shape[0]), bool)
    np.put_along_axis(chosen, sets, True, axis=1)
    return _covered_share(samples, chosen).reshape(drawn.shape[:-1])


def _covered_share(
    samples: Bool[csr_array, "samples features"], chosen: Bool[np.ndarray, "sets samples"]
) -> Float[np.ndarray, " sets"]:
    """Share of the features that are active in a chosen sample, for each set of samples."""
    held = samples.T.astype(np.float32) @ chosen.T.astype(np.float32)
    return (held > 0).mean(axis=0)

"""What a corpus has to offer a selection: its coverage and the weights of features come in, the worth of samples out.

numpy and pyarrow only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int

from fac_ray.coverage.counts import CorpusCoverage, flat_values
from fac_ray.coverage.gaps import relevant_mask
from fac_ray.statistics.intervals import rarefaction

WEIGHT_UNIT = 1 << 20
"""A weight of 1 as a whole number: exact sums, whatever their order."""


class Pool(NamedTuple):
    """The corpus that is selected from, and what its features are worth."""

    activations: Path
    samples: Path
    coverage: CorpusCoverage
    threshold: float
    weights: Int[np.ndarray, " d_sae"]
    """In units of 1 / WEIGHT_UNIT."""
    base: Bool[np.ndarray, " d_sae"] | None = None
    """Features that are covered beforehand."""

    @property
    def left(self) -> Int[np.ndarray, " d_sae"]:
        """Weights of the features that are not covered beforehand."""
        return self.weights if self.base is None else np.where(self.base, 0, self.weights)

    @property
    def base_weight(self) -> int:
        """Weight of what is covered beforehand."""
        return int(self.weights.sum() - self.left.sum())

    @property
    def reach(self) -> Int[np.ndarray, " d_sae"]:
        """Weights of those of them that the corpus has."""
        return np.where(self.coverage.active(self.threshold), self.left, 0)

    def row(self, method: str, equal: str | None, num_samples: int, num_tokens: int, value: float) -> dict[str, Any]:
        """One way to take samples, and the share of all weight that is then covered, in [0, 1]."""
        return {
            "method": method,
            "equal": equal,
            "num_samples": num_samples,
            "num_tokens": num_tokens,
            "gain": value / WEIGHT_UNIT,
            "coverage": (self.base_weight + value) / int(self.weights.sum()),
        }

    def random_row(self, equal: str, num_samples: int) -> dict[str, Any]:
        """Random samples, as many: the expected gain, sum_i w_i [1 - C(N - N_i, n) / C(N, n)]."""
        num_all, counts = self.coverage.num_samples, self.coverage.counts(self.threshold)
        levels, level = np.unique(counts, return_inverse=True)
        seen = np.array([rarefaction(np.array([c]), num_all, [num_samples])[0] for c in levels])
        num_tokens = round(self.coverage.num_tokens * num_samples / num_all)
        return self.row("random", equal, num_samples, num_tokens, float(self.left @ seen[level]))

    def chosen_row(self, method: str, equal: str, candidates: pa.Table) -> dict[str, Any]:
        """Exactly these samples."""
        ids = np.unique(flat_values(candidates, "feature_ids"))
        num_tokens = pc.sum(candidates["num_tokens"]).as_py() or 0
        return self.row(method, equal, len(candidates), num_tokens, int(self.left[ids].sum()))


def feature_weights(features: pa.Table | None, kind: str, d_sae: int) -> Int[np.ndarray, " d_sae"]:
    """What covering each feature is worth, in units of 1 / WEIGHT_UNIT, >= 0.

    `relevant`: 1 for a relevant feature; `effect`: its log2 odds ratio, 0 where it is negative; `all`: 1 for every
    feature. FEATURES rows are needed but for `all`.
    """
    if kind == "all":
        return np.full(d_sae, WEIGHT_UNIT, np.int64)
    assert features is not None, "weights by relevance need FEATURES"
    weights = relevant_mask(features, d_sae).astype(float)
    if kind == "effect":
        weights[features["feature_id"].to_numpy()] *= np.maximum(features["effect"].to_numpy(), 0)
    return np.rint(weights * WEIGHT_UNIT).astype(np.int64)

"""What one text brings to a finished run: its features come in, what they cover and which gaps they close goes out.

Neither a model nor a running Ray is needed: the features come from the one `FeatureExtractor`, the sets from the run
folder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int

from fac_ray.artifacts import MARKER, read_table
from fac_ray.config import ConfigError, RunConfig, config_from_tree
from fac_ray.coverage.counts import is_active, missing_coverage_fraction
from fac_ray.coverage.gaps import relevant_mask, target_features
from fac_ray.coverage.reduction import load_coverage

if TYPE_CHECKING:
    from fac_ray.features.extractor import SampleFeatures


@dataclass(frozen=True)
class FinishedRun:
    """The sets of a run that has its gaps, by feature id."""

    config: RunConfig
    relevant: Bool[np.ndarray, " d_sae"]
    target: Bool[np.ndarray, " d_sae"]
    """Relevant and active in the anchor."""
    seed: Bool[np.ndarray, " d_sae"]
    """Active in the seed."""
    gap_ranks: Int[np.ndarray, " d_sae"]
    """Rank of a missing feature, 0 first; -1 for a feature that is not missing."""
    gaps: pa.Table
    """GAPS rows."""

    @property
    def identity(self) -> dict[str, Any]:
        """What every score must say of its origin: the run, the threshold and the switches of the measurement."""
        measure = self.config.measure
        return {
            "run": self.config.name,
            "model": self.config.model.path,
            "sae": self.config.sae.path,
            "preset": measure.preset,
            "threshold": measure.threshold,
            "num_relevant_features": int(self.relevant.sum()),
            "num_gaps": self.gaps.num_rows,
        }


def load_finished_run(folder: str | Path) -> FinishedRun:
    """The sets of a run folder.

    Raises:
        ConfigError: there is no run in the folder, or it has not come to its gaps.
    """
    folder = Path(folder)
    for needed in ("config.json", f"gaps/{MARKER}"):
        if not (folder / needed).is_file():
            raise ConfigError(
                f"{folder}: {needed} is missing; `fac-ray gaps` brings a run to the point that scoring needs"
            )
    config = config_from_tree(json.loads((folder / "config.json").read_text()), source=str(folder / "config.json"))
    anchor, seed = (load_coverage(folder / "coverage" / name) for name in ("anchor", "seed"))
    features, gaps = read_table(folder / "relevance" / "features.parquet"), read_table(folder / "gaps" / "gaps.parquet")
    ranks = np.full(anchor.d_sae, -1, np.int32)
    ranks[gaps["feature_id"].to_numpy()] = gaps["rank"].to_numpy()
    threshold = config.measure.threshold
    return FinishedRun(
        config=config,
        relevant=relevant_mask(features, anchor.d_sae),
        target=target_features(features, anchor, threshold),
        seed=seed.active(threshold),
        gap_ranks=ranks,
        gaps=gaps,
    )


def score_sample(run: FinishedRun, features: SampleFeatures) -> dict[str, Any]:
    """What a measured text covers of the run, JSON-ready.

    Returns:
        "num_tokens", "truncated"; "num_relevant_features" that it switches on; the "covered_features" among them that
        the seed has, ascending; the "missing_features" that it switches on, each with "feature_id", "activation" and
        "gap_rank", the most wanted first; "novelty": their number. For a text that could not be measured: "error".
    """
    if features.error is not None:
        return {"error": features.error}
    active = is_active(features.activations, run.config.measure.threshold)
    ids, activations = features.feature_ids[active], features.activations[active]
    missing = np.flatnonzero(run.gap_ranks[ids] >= 0)
    missing = missing[np.argsort(run.gap_ranks[ids[missing]])]
    return {
        "num_tokens": features.num_tokens,
        "truncated": features.truncated,
        "num_relevant_features": int(run.relevant[ids].sum()),
        "covered_features": ids[run.target[ids] & run.seed[ids]].tolist(),
        "missing_features": [
            {"feature_id": int(ids[i]), "activation": float(activations[i]), "gap_rank": int(run.gap_ranks[ids[i]])}
            for i in missing
        ],
        "novelty": len(missing),
    }


def score_together(run: FinishedRun, scores: list[dict[str, Any]]) -> dict[str, Any]:
    """What the scored texts bring as a set: the missing features that any of them switches on.

    Returns:
        "num_measured" texts, "num_errors", "num_gaps_hit", and "fac_missing": the share of the run's missing features
        that they switch on, in [0, 1]; None if nothing is missing.
    """
    measured = [score for score in scores if "error" not in score]
    added = np.zeros(run.target.shape, bool)
    added[[one["feature_id"] for score in measured for one in score["missing_features"]]] = True
    return {
        "num_measured": len(measured),
        "num_errors": len(scores) - len(measured),
        "num_gaps_hit": int(added.sum()),
        "fac_missing": missing_coverage_fraction(added, run.seed, run.target),
    }

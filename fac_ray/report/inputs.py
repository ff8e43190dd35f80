"""What a run folder holds so far: the finished stages' markers, tables and JSON files; missing ones are None."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool

from fac_ray.artifacts import current_marker, parquet_files, read_table
from fac_ray.config import RunConfig
from fac_ray.coverage.reduction import CorpusCoverage, load_coverage

SYNTHETIC_CORPORA = ("targeted", "untargeted")
CORPUS_STAGES = ("samples", "activations", "coverage", "diversity")
BEFORE_SYNTHESIS = ("relevance", "gaps", "truth", "synthesis")
AFTER_SYNTHESIS = ("training", "evaluation", "resampling")
CANDIDATE_COLUMNS = ["candidate_id", "feature_id", "step", "attempt", "text", "activation", "status", "reason"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunInputs:
    """Everything that the report reads, in memory."""

    folder: Path
    config: RunConfig
    markers: dict[str, dict[str, Any]]
    """Stage name (`coverage/anchor`, `gaps`) to its `_SUCCESS.json`, in the order of the pipeline."""
    coverage: dict[str, CorpusCoverage]
    """Corpus to coverage; the config's corpora first, then `targeted` and `untargeted`."""
    relevant: Bool[np.ndarray, " d_sae"] | None
    features: pa.Table | None
    gaps: pa.Table | None
    targeted: pa.Table | None
    candidates: pa.Table | None
    evaluation: dict[str, Any]
    truth: dict[str, Any] | None
    diversity: dict[str, dict[str, Any]]
    """Corpus to its diversity measures, in the order of `markers`."""
    resampling: dict[str, Any]
    """The sections `bootstrap` and `permutation`, as far as they are there."""
    manifest: dict[str, Any]

    @property
    def threshold(self) -> float:
        """The threshold of every headline number."""
        return self.config.measure.threshold


def read_inputs(folder: Path, config: RunConfig) -> RunInputs:
    """Everything in the run folder that belongs to a finished stage.

    Raises:
        ValueError: a finished stage's table lacks a column.
    """
    markers = _markers(folder, config)
    names = [name.removeprefix("coverage/") for name in markers if name.startswith("coverage/")]
    features = _table(folder / "relevance" / "features.parquet", "relevance" in markers)
    synthesis = "synthesis" in markers
    return RunInputs(
        folder=folder,
        config=config,
        markers=markers,
        coverage=_coverage(folder, names, config),
        relevant=None if features is None else relevant_mask(features),
        features=features,
        gaps=_table(folder / "gaps" / "gaps.parquet", "gaps" in markers),
        targeted=_table(folder / "synthesis" / "targeted.parquet", synthesis),
        candidates=_table(folder / "synthesis" / "candidates", synthesis, CANDIDATE_COLUMNS),
        evaluation=_json(folder / "evaluation" / "arms.json", "evaluation" in markers) or {},
        truth=_json(folder / "truth" / "truth.json", "truth" in markers),
        diversity=_diversity(folder, markers),
        resampling=_json(folder / "resampling" / "resampling.json", "resampling" in markers) or {},
        manifest=_json(folder / "manifest.json") or {},
    )


def relevant_mask(features: pa.Table) -> Bool[np.ndarray, " d_sae"]:
    """Whether each feature is relevant, by feature id."""
    mask = np.zeros(features.num_rows, dtype=bool)
    mask[features["feature_id"].to_numpy()] = features["relevant"].to_numpy()
    return mask


def _markers(folder: Path, config: RunConfig) -> dict[str, dict[str, Any]]:
    """Markers of the finished stages that are still made from what lies before them."""
    corpora, synthetic = (
        [f"{stage}/{name}" for name in names for stage in CORPUS_STAGES]
        for names in (config.corpora, SYNTHETIC_CORPORA)
    )
    names = (*corpora, *BEFORE_SYNTHESIS, *synthetic, *AFTER_SYNTHESIS)
    found = {name: current_marker(folder / name) for name in names}
    return {name: marker for name, marker in found.items() if marker is not None}


def _coverage(folder: Path, names: list[str], config: RunConfig) -> dict[str, CorpusCoverage]:
    loaded = {name: load_coverage(folder / "coverage" / name) for name in names}
    current = {name: one for name, one in loaded.items() if tuple(one.thresholds) == config.measure.grid}
    for name in sorted(set(loaded) - set(current)):
        logger.warning("report: coverage/%s was counted at other thresholds and is left out", name)
    return current


def _diversity(folder: Path, markers: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    names = [name for name in markers if name.startswith("diversity/")]
    found = {name.removeprefix("diversity/"): _json(folder / name / "diversity.json") for name in names}
    return {name: numbers for name, numbers in found.items() if numbers is not None}


def _table(path: Path, finished: bool, columns: list[str] | None = None) -> pa.Table | None:
    return read_table(path, columns) if finished and parquet_files(path) else None


def _json(path: Path, finished: bool = True) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if finished and path.is_file() else None

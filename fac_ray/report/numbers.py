"""All numbers of a run in one JSON-ready dictionary: what `report.json` holds and the page shows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from fac_ray.config import PRESETS, RunConfig
from fac_ray.report.fac import fac_numbers, threshold_sweep
from fac_ray.report.inputs import SYNTHETIC_CORPORA, RunInputs, read_inputs
from fac_ray.report.richness import richness_numbers
from fac_ray.report.synthetic import candidate_numbers, gap_rows

SWITCHES = (*PRESETS["corrected"], "window_tokens")


def build_report(run_folder: Path, config: RunConfig) -> dict[str, Any]:
    """Every number of the run folder that a finished stage supports; a section without its stage is left out.

    Numbers that are not defined are None, never NaN; shares are in [0, 1].

    Raises:
        ValueError: a finished stage's table lacks a column.
    """
    inputs = read_inputs(Path(run_folder), config)
    optional = {
        "corpora": _corpora(inputs) or None,
        "sweep": threshold_sweep(inputs) or None,
        "gaps": gap_rows(inputs),
        "candidates": candidate_numbers(inputs),
        "arms": inputs.evaluation.get("arms"),
        "comparisons": inputs.evaluation.get("comparisons"),
        "truth": inputs.truth,
        "diversity": inputs.diversity or None,
        **inputs.resampling,
    }
    present = {name: section for name, section in optional.items() if section is not None}
    numbers = {**_identity(inputs), **fac_numbers(inputs), **richness_numbers(inputs), **present}
    return plain({**numbers, "stages": _stages(inputs), "config": _config(config)})


def plain(value: Any) -> Any:
    """The value with Python numbers only, and None for every number that is not finite."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _identity(inputs: RunInputs) -> dict[str, Any]:
    measure = inputs.config.measure.resolved()
    manifest = inputs.manifest
    return {
        "name": inputs.config.name,
        "started_at": manifest.get("started_at"),
        "threshold": inputs.threshold,
        "preset": measure.preset,
        "measure": measure.model_dump(mode="json", include=set(SWITCHES)),
        "seed": inputs.config.run.seed,
        **{name: manifest[name] for name in ("versions", "machine", "model", "sae") if name in manifest},
    }


def _corpora(inputs: RunInputs) -> dict[str, dict[str, Any]]:
    names = [*inputs.config.corpora, *SYNTHETIC_CORPORA]
    rows = {name: _corpus(inputs, name) for name in names}
    return {name: row for name, row in rows.items() if row}


def _corpus(inputs: RunInputs, name: str) -> dict[str, Any]:
    """Facts of ingestion, extraction and reduction, as far as they are finished, and the mean length."""
    facts: dict[str, Any] = {}
    for stage in ("samples", "activations"):
        facts |= inputs.markers.get(f"{stage}/{name}", {}).get("facts", {})
    if name in inputs.coverage:
        one = inputs.coverage[name]
        facts |= {key: getattr(one, key) for key in ("num_samples", "num_tokens", "num_labelled", "num_positive")}
        facts["mean_tokens"] = one.num_tokens / one.num_samples if one.num_samples else None
        facts["d_sae"] = one.max_activation.size
        facts["num_active_features"] = int(one.active(inputs.threshold).sum())
    facts.pop("seconds", None)
    return facts


def _stages(inputs: RunInputs) -> dict[str, dict[str, Any]]:
    return {
        name: {"seconds": marker["facts"].get("seconds"), "finished_at": marker.get("finished_at")}
        for name, marker in inputs.markers.items()
    }


def _config(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json") | {"measure": config.measure.resolved().model_dump(mode="json")}

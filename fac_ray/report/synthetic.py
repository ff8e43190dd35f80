"""Synthesis numbers: what became of every candidate, and what filled each missing feature."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int

from fac_ray.artifacts import parquet_files, read_table
from fac_ray.report.inputs import RunInputs

NUM_EXEMPLARS = 4


def candidate_numbers(inputs: RunInputs) -> dict[str, Any] | None:
    """Counts of the targeted candidates (`accepted`, `rejected`, `scored` in step 1 and not needed, `by_reason`), and
    the same of the `untargeted` ones. None as long as nothing was generated."""
    if inputs.candidates is None:
        return None
    untargeted = pc.is_null(inputs.candidates["feature_id"])
    return {
        **_outcomes(inputs.candidates.filter(pc.invert(untargeted))),
        "untargeted": _outcomes(inputs.candidates.filter(untargeted)),
    }


def gap_rows(inputs: RunInputs) -> list[dict[str, Any]] | None:
    """One row for each missing feature by rank: how the anchor shows it, and what synthesis did about it.

    None as long as gaps were not looked for; an empty list says that nothing is missing.
    """
    if inputs.gaps is None:
        return None
    effects, attempts, samples = _effects(inputs), _attempts(inputs), _accepted(inputs)
    switched_on = _switched_on(inputs)
    return [
        {
            "rank": row["rank"],
            "feature_id": row["feature_id"],
            "score": row["score"],
            "anchor_fraction": row["anchor_fraction"],
            "effect": effects.get(row["feature_id"]),
            "explanation": row["explanation"],
            "exemplars": (row["exemplars"] or [])[:NUM_EXEMPLARS],
            "status": _status(inputs, attempts.get(row["feature_id"], 0), samples.get(row["feature_id"], [])),
            "switched_on": None if switched_on is None else row["feature_id"] in switched_on,
            "attempts": attempts.get(row["feature_id"], 0),
            "samples": samples.get(row["feature_id"], []),
        }
        for row in inputs.gaps.sort_by("rank").to_pylist()
    ]


def _outcomes(candidates: pa.Table) -> dict[str, Any]:
    """Counts by status; errors are counted by their kind, which stands before the colon."""
    status = Counter(candidates["status"].to_pylist())
    reasons = candidates.filter(pc.equal(candidates["status"], "rejected"))["reason"].to_pylist()
    return {
        "total": candidates.num_rows,
        **{name: status.get(name, 0) for name in ("accepted", "rejected", "scored")},
        "by_reason": dict(Counter((reason or "not stated").partition(":")[0] for reason in reasons).most_common()),
    }


def _status(inputs: RunInputs, attempts: int, samples: list[dict[str, Any]]) -> str | None:
    if "synthesis" not in inputs.markers or inputs.config.synthesis is None:
        return None
    if len(samples) >= inputs.config.synthesis.samples_per_feature:
        return "filled"
    return "exhausted" if attempts else "not attempted"


def _effects(inputs: RunInputs) -> dict[int, float]:
    if inputs.features is None:
        return {}
    return dict(zip(inputs.features["feature_id"].to_pylist(), inputs.features["effect"].to_pylist(), strict=True))


def _attempts(inputs: RunInputs) -> dict[int, int]:
    if inputs.candidates is None:
        return {}
    last = inputs.candidates.group_by("feature_id").aggregate([("attempt", "max")]).to_pylist()
    return {row["feature_id"]: row["attempt_max"] + 1 for row in last if row["feature_id"] is not None}


def _accepted(inputs: RunInputs) -> dict[int, list[dict[str, Any]]]:
    """Accepted samples of each feature, strongest first; `peak` is the place of the strongest token in the text."""
    if inputs.targeted is None:
        return {}
    peaks, found = _peaks(inputs), defaultdict(list)
    for row in inputs.targeted.to_pylist():
        one = {name: row[name] for name in ("sample_id", "text", "activation", "attempt")}
        found[row["feature_id"]].append(one | {"peak": peaks.get((row["content_id"], row["feature_id"]))})
    return {feature: sorted(rows, key=lambda row: -row["activation"]) for feature, rows in found.items()}


def _peaks(inputs: RunInputs) -> dict[tuple[str, int], list[int]]:
    """Characters of the peak token, by content and feature, from the measured targeted corpus."""
    samples, activations = inputs.folder / "samples" / "targeted", inputs.folder / "activations" / "targeted"
    if inputs.targeted is None or "targeted" not in inputs.coverage or not parquet_files(activations):
        return {}
    wanted = defaultdict(list)
    for row in inputs.targeted.select(["content_id", "feature_id"]).to_pylist():
        wanted[row["content_id"]].append(row["feature_id"])
    ids = read_table(samples, ["sample_id", "content_id"])
    content_of = dict(zip(ids["sample_id"].to_pylist(), ids["content_id"].to_pylist(), strict=True))
    columns = ["sample_id", "feature_ids", "peak_start", "peak_end"]
    found = {}
    for sample, features, starts, ends in zip(*read_table(activations, columns).columns, strict=True):
        content = content_of.get(sample.as_py(), "")
        for feature, at in _places(features.values.to_numpy(), wanted.get(content, [])):
            found[content, feature] = [starts[at].as_py(), ends[at].as_py()]
    return found


def _places(feature_ids: Int[np.ndarray, " features"], wanted: list[int]) -> list[tuple[int, int]]:
    """Each wanted feature that is among the ascending ids, with its place there."""
    places = np.searchsorted(feature_ids, wanted).tolist()
    pairs = zip(wanted, places, strict=True)
    return [(feature, at) for feature, at in pairs if at < len(feature_ids) and feature_ids[at] == feature]


def _switched_on(inputs: RunInputs) -> set[int] | None:
    if "targeted" not in inputs.coverage:
        return None
    return set(inputs.coverage["targeted"].active(inputs.threshold).nonzero()[0].tolist())

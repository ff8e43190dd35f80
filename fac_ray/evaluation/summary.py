"""The arms compared: folders of finished fits come in, one JSON-ready dictionary of means and differences goes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from fac_ray.artifacts import MARKER, read_table
from fac_ray.evaluation.metrics import bootstrap_weights, resampled_average_precision

ARMS = ("seed", "untargeted", "targeted", "anchor")
"""Every arm, in the order in which they are shown."""
COMPARED = (("targeted", "seed"), ("targeted", "untargeted"))
"""Arm and baseline whose difference is the experiment's answer."""
NUM_REPLICATES = 1000
CONFIDENCE = 0.95
BOOTSTRAP_SEED = 0


class FinishedFit(NamedTuple):
    """Metrics of one fit, and its held-out rows in the order of `sample_id`."""

    metrics: dict[str, Any]
    sample_ids: list[str]
    labels: Int[np.ndarray, " N"]
    scores: Float[np.ndarray, " N"]


def summarise_arms(folder: Path) -> dict[str, Any]:
    """Held-out AUPRC of each arm, and what targeting changes, with its uncertainty.

    Returns:
        "arms": by name, "auprc" with "mean", "std" (over seeds, ddof 1; None for one seed), "values" in the order of
        "seeds"; and "num_samples".
        "comparisons": of targeted with seed and with untargeted, where both exist: the paired "difference" over their
        common "seeds" (mean, std, values), and the "interval" of its mean at "confidence": percentiles of a bootstrap
        that redraws the held-out samples, alike for both arms and all seeds, positives and negatives apart.

    Raises:
        ValueError: no finished fit is in the folder, or two were scored on different held-out samples.
    """
    fits = _finished_fits(Path(folder))
    return {
        "arms": {name: _arm(by_seed) for name, by_seed in fits.items()},
        "comparisons": [
            _comparison(arm, baseline, fits)
            for arm, baseline in COMPARED
            if set(fits.get(arm, ())) & set(fits.get(baseline, ()))
        ],
    }


def _finished_fits(folder: Path) -> dict[str, dict[int, FinishedFit]]:
    """By arm and seed, in the order of `ARMS` and ascending seeds."""
    found = [_read(marker.parent) for marker in sorted(folder.glob(f"*-seed*/{MARKER}"))]
    if not found:
        raise ValueError(f"{folder}: no finished fit here; train first")
    if any(fit.sample_ids != found[0].sample_ids for fit in found):
        raise ValueError(f"{folder}: its fits were scored on different held-out samples; train them again")
    fits: dict[str, dict[int, FinishedFit]] = {}
    for fit in sorted(found, key=lambda fit: (ARMS.index(fit.metrics["arm"]), fit.metrics["seed"])):
        fits.setdefault(fit.metrics["arm"], {})[fit.metrics["seed"]] = fit
    return fits


def _read(folder: Path) -> FinishedFit:
    rows = read_table(folder / "scores.parquet").sort_by("sample_id")
    metrics = json.loads((folder / "metrics.json").read_text())
    return FinishedFit(
        metrics, rows["sample_id"].to_pylist(), rows["label"].to_numpy(), rows["score"].to_numpy().astype(np.float64)
    )


def _arm(by_seed: dict[int, FinishedFit]) -> dict[str, Any]:
    fits = list(by_seed.values())
    return {
        "auprc": _spread([fit.metrics["auprc"] for fit in fits]),
        "seeds": list(by_seed),
        "num_samples": fits[0].metrics["num_samples"],
    }


def _comparison(arm: str, baseline: str, fits: dict[str, dict[int, FinishedFit]]) -> dict[str, Any]:
    seeds = [seed for seed in fits[arm] if seed in fits[baseline]]
    pairs = [(fits[arm][seed], fits[baseline][seed]) for seed in seeds]
    weights = bootstrap_weights(pairs[0][0].labels, NUM_REPLICATES, BOOTSTRAP_SEED)
    replicates = np.mean([_resampled(one, weights) - _resampled(other, weights) for one, other in pairs], axis=0)
    tail = (1 - CONFIDENCE) / 2
    return {
        "arm": arm,
        "baseline": baseline,
        "seeds": seeds,
        "difference": _spread([one.metrics["auprc"] - other.metrics["auprc"] for one, other in pairs]),
        "interval": [float(np.quantile(replicates, at)) for at in (tail, 1 - tail)],
        "confidence": CONFIDENCE,
        "num_replicates": NUM_REPLICATES,
    }


def _resampled(fit: FinishedFit, weights: Int[np.ndarray, "replicates N"]) -> Float[np.ndarray, " replicates"]:
    return resampled_average_precision(fit.labels, fit.scores, weights)


def _spread(values: list[float]) -> dict[str, Any]:
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "values": values}

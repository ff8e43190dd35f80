"""Coverage numbers: FAC before and after, the missing features switched on, and all of it at every threshold."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from fac_ray.coverage.counts import coverage_fraction
from fac_ray.report.inputs import RunInputs

Mask = Bool[np.ndarray, " d_sae"]


class FeatureSets(NamedTuple):
    """The features that FAC counts, at one threshold."""

    relevant: Mask
    reachable: Mask
    """Relevant and active in the anchor."""
    missing: Mask
    """Reachable and not active in the seed."""


def fac_numbers(inputs: RunInputs) -> dict[str, Any]:
    """FAC of anchor, seed, seed + untargeted and seed + targeted at the config's threshold, and the sets it counts.

    Empty as long as relevance or one of the two corpora is missing. A share of an empty set is None.
    """
    sets = measured_sets(inputs)
    if sets is None:
        return {}
    active = active_sets(inputs, inputs.threshold)
    return {
        "relevant_features": int(sets.relevant.sum()),
        "reachable_features": int(sets.reachable.sum()),
        "covered_features": int((sets.reachable & active["seed"]).sum()),
        "missing_features": int(sets.missing.sum()),
        "switched_on_features": _count(active.get("final"), sets.missing),
        "fac": {label: share(active.get(label), sets.reachable) for label in ("anchor", "seed", "untargeted", "final")},
        "fac_missing": share(active.get("final"), sets.missing),
        "fac_missing_untargeted": share(active.get("untargeted"), sets.missing),
    }


def threshold_sweep(inputs: RunInputs) -> list[dict[str, Any]]:
    """One row for each threshold of the grid: active features of every corpus and, with relevance, the FAC numbers.

    The relevant features are those of the config's threshold throughout.
    """
    return [
        {
            "threshold": threshold,
            "active_features": {name: int(one.active(threshold).sum()) for name, one in inputs.coverage.items()},
            **_sweep_fac(inputs, threshold),
        }
        for threshold in inputs.config.measure.grid
        if inputs.coverage
    ]


def measured_sets(inputs: RunInputs, threshold: float | None = None) -> FeatureSets | None:
    """The counted features at a threshold (None: the config's), or None as long as something is not measured."""
    if inputs.relevant is None or not {"anchor", "seed"} <= set(inputs.coverage):
        return None
    at = inputs.threshold if threshold is None else threshold
    reachable = inputs.relevant & inputs.coverage["anchor"].active(at)
    return FeatureSets(inputs.relevant, reachable, reachable & ~inputs.coverage["seed"].active(at))


def active_sets(inputs: RunInputs, threshold: float) -> dict[str, Mask]:
    """Active features of `anchor` and `seed`; of the seed together with the targeted samples as `final`, and with the
    same number of untargeted ones as `untargeted`. Where synthesis accepted nothing, both are the seed."""
    active = {name: inputs.coverage[name].active(threshold) for name in ("anchor", "seed")}
    for label, corpus in (("untargeted", "untargeted"), ("final", "targeted")):
        if corpus in inputs.coverage:
            active[label] = active["seed"] | inputs.coverage[corpus].active(threshold)
        elif "synthesis" in inputs.markers and not inputs.markers["synthesis"]["facts"].get("num_accepted"):
            active[label] = active["seed"]
    return active


def share(active: Mask | None, target: Mask) -> float | None:
    """`coverage_fraction`, or None where there is nothing to measure or to cover."""
    return None if active is None or not target.any() else coverage_fraction(active, target)


def _sweep_fac(inputs: RunInputs, threshold: float) -> dict[str, Any]:
    sets = measured_sets(inputs, threshold)
    if sets is None:
        return {}
    active = active_sets(inputs, threshold)
    return {
        "reachable": int(sets.reachable.sum()),
        "covered": int((sets.reachable & active["seed"]).sum()),
        "missing": int(sets.missing.sum()),
        "fac_seed": share(active["seed"], sets.reachable),
        "fac_untargeted": share(active.get("untargeted"), sets.reachable),
        "fac_final": share(active.get("final"), sets.reachable),
        "fac_missing": share(active.get("final"), sets.missing),
    }


def _count(active: Mask | None, target: Mask) -> int | None:
    return None if active is None else int((active & target).sum())

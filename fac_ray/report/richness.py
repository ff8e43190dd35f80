"""Coverage against corpus size and against chance: what keeps a bigger corpus from looking better than it is.

Active features are a species richness: they grow with the number of samples and with their length. So the numbers here
say what a random part of each corpus covers, what equal sizes cover, how uncertain a FAC is, how many features are
still unseen, and what FAC features drawn at random would have.
"""

from __future__ import annotations

import dataclasses
from functools import reduce
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from fac_ray.coverage.counts import CorpusCoverage
from fac_ray.report.fac import active_sets, measured_sets
from fac_ray.report.inputs import RunInputs
from fac_ray.statistics.intervals import coverage_interval, matched_coverage, random_feature_null
from fac_ray.statistics.richness import chao2, richness_curve

NUM_POINTS, NUM_BEYOND = 33, 9


def richness_numbers(inputs: RunInputs) -> dict[str, Any]:
    """The sections `rarefaction`, `unseen`, `fac_interval` and `random_feature_null`.

    Counted are the relevant features that the anchor reaches, in anchor, seed and the seed pooled with either synthetic
    corpus; as long as relevance is not known, all features of every corpus, and only the first two sections.
    """
    corpora, target = _counted(inputs)
    corpora = {name: one for name, one in corpora.items() if one.num_samples}
    if not corpora or not target.any():
        return {}
    sections = {
        "rarefaction": _rarefaction(inputs, corpora, target),
        "unseen": {
            name: chao2(one.counts(inputs.threshold)[target], one.num_samples)._asdict()
            for name, one in corpora.items()
        },
    }
    if measured_sets(inputs) is not None:
        sections["fac_interval"] = {
            name: coverage_interval(one.counts(inputs.threshold), one.num_samples, target)
            for name, one in corpora.items()
            if name != "anchor"
        }
        sections["random_feature_null"] = _random_null(inputs, target)
    return sections


def pooled(first: CorpusCoverage, second: CorpusCoverage) -> CorpusCoverage:
    """The coverage of two corpora as one: sums, and the larger of the maxima."""
    summed = {
        field.name: getattr(first, field.name) + getattr(second, field.name)
        for field in dataclasses.fields(first)
        if field.name not in ("thresholds", "threshold", "max_activation")
    }
    return dataclasses.replace(first, max_activation=np.maximum(first.max_activation, second.max_activation), **summed)


def curve_sizes(num_samples: int) -> Int[np.ndarray, " sizes"]:
    """Up to `NUM_POINTS` corpus sizes from 0 to all, closer together where curves are steep, and a few to twice all."""
    inside = np.linspace(0, 1, NUM_POINTS) ** 2
    beyond = np.linspace(1, 2, NUM_BEYOND)
    return np.unique(np.rint(np.concatenate([inside, beyond]) * num_samples).astype(np.int64))


def _counted(inputs: RunInputs) -> tuple[dict[str, CorpusCoverage], Bool[np.ndarray, " d_sae"]]:
    """The corpora, single or pooled, and the features that are counted in them."""
    sets = measured_sets(inputs)
    if sets is None:
        d_sae = next((one.d_sae for one in inputs.coverage.values()), 0)
        return inputs.coverage, np.ones(d_sae, dtype=bool)
    parts: dict[str, tuple[str, ...]] = {"anchor": ("anchor",), "seed": ("seed",)}
    parts |= {f"seed+{name}": ("seed", name) for name in ("untargeted", "targeted") if name in inputs.coverage}
    corpora = {label: reduce(pooled, (inputs.coverage[name] for name in names)) for label, names in parts.items()}
    return corpora, sets.reachable


def _rarefaction(
    inputs: RunInputs, corpora: dict[str, CorpusCoverage], target: Bool[np.ndarray, " d_sae"]
) -> dict[str, Any]:
    matched = matched_coverage(list(corpora.values()), target, inputs.threshold)
    return {
        "counted": "all" if measured_sets(inputs) is None else "reachable",
        "num_features": int(target.sum()),
        "curves": {name: _curve(one, target, inputs.threshold) for name, one in corpora.items()},
        "matched": {
            "num_samples": matched.num_samples,
            "at_samples": dict(zip(corpora, matched.at_samples, strict=True)),
            "num_tokens": matched.num_tokens,
            "at_tokens": dict(zip(corpora, matched.at_tokens, strict=True)),
        },
    }


def _curve(one: CorpusCoverage, target: Bool[np.ndarray, " d_sae"], threshold: float) -> dict[str, Any]:
    """`expected_features` with its 95 % band by `num_samples`; beyond the corpus's own size it is extrapolated."""
    curve = richness_curve(one.counts(threshold)[target], one.num_samples, curve_sizes(one.num_samples))
    return {
        "num_samples": curve.num_samples.tolist(),
        "measured_samples": one.num_samples,
        "expected_features": np.round(curve.expected, 4).tolist(),
        "low": np.round(curve.low, 4).tolist(),
        "high": np.round(curve.high, 4).tolist(),
    }


def _random_null(inputs: RunInputs, target: Bool[np.ndarray, " d_sae"]) -> dict[str, dict[str, float]]:
    counts = inputs.coverage["anchor"].counts(inputs.threshold)
    active = active_sets(inputs, inputs.threshold)
    labels = [label for label in ("seed", "untargeted", "final") if label in active]
    return {
        label: random_feature_null(active[label], target, counts, seed=inputs.config.run.seed)._asdict()
        for label in labels
    }

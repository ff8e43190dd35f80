"""Whether a seed is good enough: a run with its gaps and, if there is one, a baseline run come in, verdicts go out.

The baseline's seed is held against this run's target, at equal numbers of samples; nothing is measured here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from fac_ray.artifacts import read_table, write_json, write_text
from fac_ray.config import CheckConfig, RunConfig
from fac_ray.coverage.counts import CorpusCoverage, coverage_fraction
from fac_ray.coverage.gaps import target_features
from fac_ray.coverage.reduction import load_coverage
from fac_ray.decisions.comparison import strongest_spans
from fac_ray.decisions.pages import PAGE_ROWS, check_page
from fac_ray.statistics.intervals import coverage_interval, matched_coverage

TOLERANCE = 1e-9
"""What the rounding of a limit may add: a FAC of exactly 0.8 keeps `min_fac: 0.8`."""


class CheckedSeed(NamedTuple):
    """A run's seed coverage and where it lies."""

    folder: Path
    coverage: CorpusCoverage


def open_baseline(config: RunConfig) -> CheckedSeed | None:
    """The seed of the baseline run, if the rules name one; `require_check` has let it pass."""
    if config.check.baseline is None:
        return None
    folder = Path(config.check.baseline) / "coverage" / "seed"
    return CheckedSeed(folder, load_coverage(folder))


def check_seed(config: RunConfig, baseline: CheckedSeed | None) -> dict[str, Any]:
    """The verdict on the seed of a run that has its gaps; written to `check/` and returned, JSON-ready.

    Returns:
        "passed"; "rules", each with "rule", "value", "limit" and "passed"; "seed" and "baseline" with their sizes and
        FACs; the "lost" and "gained" features with exemplars, most frequent first; "num_target", "threshold", "preset".

    Raises:
        ValueError: no feature is relevant and active in the anchor, or a seed has no measured sample.
    """
    threshold, folder = config.measure.threshold, config.folder
    features = read_table(folder / "relevance" / "features.parquet")
    target = target_features(features, load_coverage(folder / "coverage" / "anchor"), threshold)
    seed = CheckedSeed(folder / "coverage" / "seed", load_coverage(folder / "coverage" / "seed"))
    sizes = _sizes({"seed": seed} | ({"baseline": baseline} if baseline else {}), target, threshold)
    rules = _verdicts(config.check, sizes)
    facts = {
        "run": config.name,
        "baseline_run": config.check.baseline,
        "threshold": threshold,
        "preset": config.measure.preset,
        "passed": all(rule["passed"] for rule in rules),
        "rules": rules,
        "num_target": int(target.sum()),
        **sizes,
        **({} if baseline is None else _changes(seed, baseline, target, threshold)),
    }
    write_text(folder / "check" / "check.md", check_page(facts, PAGE_ROWS))
    write_json(folder / "check" / "check.json", facts)
    return facts


def _sizes(seeds: dict[str, CheckedSeed], target: Bool[np.ndarray, " d_sae"], threshold: float) -> dict[str, Any]:
    matched = matched_coverage([one.coverage for one in seeds.values()], target, threshold)
    sizes: dict[str, Any] = {"matched_samples": matched.num_samples}
    for (name, one), at_samples in zip(seeds.items(), matched.at_samples, strict=True):
        active = one.coverage.active(threshold)
        sizes[name] = {
            "num_samples": one.coverage.num_samples,
            "num_tokens": one.coverage.num_tokens,
            "num_covered": int((active & target).sum()),
            "fac": coverage_fraction(active, target),
            "fac_interval": list(coverage_interval(one.coverage.counts(threshold), one.coverage.num_samples, target)),
            "fac_at_matched_samples": at_samples,
        }
    return sizes


def _verdicts(rules: CheckConfig, sizes: dict[str, Any]) -> list[dict[str, Any]]:
    verdicts = []
    if rules.min_fac is not None:
        fac = sizes["seed"]["fac"]
        passed = fac >= rules.min_fac - TOLERANCE
        verdicts.append({"rule": "min_fac", "value": fac, "limit": rules.min_fac, "passed": passed})
    if "baseline" in sizes:
        drop = sizes["baseline"]["fac_at_matched_samples"] - sizes["seed"]["fac_at_matched_samples"]
        passed = drop <= rules.max_drop + TOLERANCE
        verdicts.append({"rule": "max_drop", "value": drop, "limit": rules.max_drop, "passed": passed})
    return verdicts


def _changes(
    seed: CheckedSeed, baseline: CheckedSeed, target: Bool[np.ndarray, " d_sae"], threshold: float
) -> dict[str, list[dict[str, Any]]]:
    mine, theirs = (one.coverage.active(threshold) & target for one in (seed, baseline))
    return {
        "lost": _features(baseline, theirs & ~mine, threshold),
        "gained": _features(seed, mine & ~theirs, threshold),
    }


def _features(seed: CheckedSeed, mask: Bool[np.ndarray, " d_sae"], threshold: float) -> list[dict[str, Any]]:
    ids = np.flatnonzero(mask)
    counts = seed.coverage.counts(threshold)[ids]
    spans = strongest_spans(seed.folder, ids, threshold)
    return [
        {"feature_id": int(ids[i]), "num_samples": int(counts[i]), "exemplars": spans.get(int(ids[i]), [])}
        for i in np.lexsort((ids, -counts))
    ]

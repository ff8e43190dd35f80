"""Corpora side by side: finished coverages come in; what each has that the others lack, and their overlap, go out.

A corpus is named as in the run's config, or `RUN:corpus` for one of another run folder that was measured in the same
way. Nothing is measured here; the tests of differences read the stored activations, on Ray.

    comparison/<corpora>/  compare.json  compare.md
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int

from fac_ray.artifacts import read_table, write_json, write_text
from fac_ray.config import RunConfig
from fac_ray.coverage.counts import CorpusCoverage, coverage_fraction, is_active
from fac_ray.coverage.gaps import relevant_mask, target_features
from fac_ray.coverage.reduction import load_coverage
from fac_ray.coverage.relevance import fisher_p_values
from fac_ray.decisions.pages import PAGE_ROWS, comparison_page
from fac_ray.decisions.questions import comparison_folder, home_of
from fac_ray.statistics.intervals import coverage_interval, matched_coverage
from fac_ray.statistics.resampling_reduction import difference_test


class ComparedCorpus(NamedTuple):
    """A corpus and where its coverage lies."""

    label: str
    """As the user named it."""
    folder: Path
    coverage: CorpusCoverage
    activations: Path


def open_corpus(config: RunConfig, reference: str) -> ComparedCorpus:
    """The finished coverage that a reference names: `corpus` of this run, or `RUN:corpus` of another run folder.

    Raises:
        ValueError: no sample of the corpus was measured.
    """
    home, corpus = home_of(config, reference)
    coverage = load_coverage(home / "coverage" / corpus)
    if coverage.num_samples == 0:
        raise ValueError(f"{reference}: no sample of this corpus could be measured, so there is nothing to compare")
    return ComparedCorpus(reference, home / "coverage" / corpus, coverage, home / "activations" / corpus)


def compare_corpora(config: RunConfig, references: Sequence[str], features: pa.Table | None) -> dict[str, Any]:
    """Everything that is said about two or more measured corpora; written to `comparison/` and returned, JSON-ready.

    The corpora are such as `require_comparison` lets pass.

    `features`: the run's FEATURES rows, whose relevant ones are counted; coverage is then FAC. None: every feature
    counts, and the coverage of a corpus is its share of the features that any of the corpora has.

    Raises:
        ValueError: a corpus has no measured sample.
    """
    threshold = config.measure.threshold
    corpora = [open_corpus(config, reference) for reference in references]
    active = np.stack([one.coverage.active(threshold) for one in corpora])
    if features is None:
        counted, target = np.ones(active.shape[1], bool), np.asarray(active.any(axis=0))
    else:
        counted = relevant_mask(features, active.shape[1])
        target = target_features(features, load_coverage(config.folder / "coverage" / "anchor"), threshold)
    facts = {
        "run": config.name,
        "threshold": threshold,
        "preset": config.measure.preset,
        "coverage_is": "share of the union" if features is None else "fac",
        "num_counted": int(counted.sum()),
        "num_target": int(target.sum()),
        **_sizes(corpora, active, counted, target, threshold),
        "overlap": overlap(active & counted),
        "differences": _differences(corpora, counted, threshold, config.run.seed),
        "only": {one.label: _lone_features(corpora, active & counted, i, threshold) for i, one in enumerate(corpora)},
    }
    folder = comparison_folder(config, references)
    write_text(folder / "compare.md", comparison_page(facts, PAGE_ROWS))
    write_json(folder / "compare.json", facts)
    return facts


def overlap(active: Bool[np.ndarray, "corpora d_sae"]) -> dict[str, list[list[Any]]]:
    """`shared`: number of features that two corpora both have; `jaccard`: its share of those that either has.

    |A AND B| / |A OR B| in [0, 1] (Jaccard 1901); None where neither has a feature.
    """
    shared = active.astype(np.int64) @ active.T.astype(np.int64)
    own = np.diag(shared)
    either = own[:, None] + own[None, :] - shared
    jaccard = [[n / e if e else None for n, e in zip(*rows, strict=True)] for rows in zip(shared, either, strict=True)]
    return {
        "shared": shared.tolist(),
        "jaccard": [[None if share is None else float(share) for share in row] for row in jaccard],
    }


def strongest_spans(folder: Path, ids: Int[np.ndarray, " n"], threshold: float) -> dict[int, list[str]]:
    """feature_id -> spans of a coverage folder on which the feature is active, strongest first."""
    rows = read_table(folder / "exemplars.parquet", columns=["feature_id", "rank", "activation", "span"])
    wanted = np.isin(rows["feature_id"].to_numpy(), ids) & is_active(rows["activation"].to_numpy(), threshold)
    rows = rows.filter(pa.array(wanted)).sort_by([("feature_id", "ascending"), ("rank", "ascending")])
    spans: dict[int, list[str]] = {}
    for feature_id, span in zip(rows["feature_id"].to_pylist(), rows["span"].to_pylist(), strict=True):
        spans.setdefault(feature_id, []).append(span)
    return spans


def _sizes(
    corpora: Sequence[ComparedCorpus],
    active: Bool[np.ndarray, "corpora d_sae"],
    counted: Bool[np.ndarray, " d_sae"],
    target: Bool[np.ndarray, " d_sae"],
    threshold: float,
) -> dict[str, Any]:
    """Sizes and coverages, at the corpora's own size and at equal ones; coverages are None without a target."""
    known = bool(target.any())
    matched = matched_coverage([one.coverage for one in corpora], target, threshold) if known else None
    lone = active & counted & (active.sum(axis=0) == 1)
    rows = {
        one.label: {
            "num_samples": one.coverage.num_samples,
            "num_tokens": one.coverage.num_tokens,
            "num_active_features": int(active[i].sum()),
            "num_counted_features": int((active[i] & counted).sum()),
            "num_only": int(lone[i].sum()),
            "coverage": coverage_fraction(active[i], target) if known else None,
            "coverage_interval": list(
                coverage_interval(one.coverage.counts(threshold), one.coverage.num_samples, target)
            )
            if known
            else None,
            "coverage_at_samples": matched.at_samples[i] if matched else None,
            "coverage_at_tokens": matched.at_tokens[i] if matched else None,
        }
        for i, one in enumerate(corpora)
    }
    smallest = {key: min(getattr(one.coverage, key) for one in corpora) for key in ("num_samples", "num_tokens")}
    return {"corpora": rows, "matched": smallest}


def _lone_features(
    corpora: Sequence[ComparedCorpus],
    active: Bool[np.ndarray, "corpora d_sae"],
    index: int,
    threshold: float,
) -> list[dict[str, Any]]:
    """The features that one corpus has and no other, the most frequent first."""
    ids = np.flatnonzero(active[index] & (active.sum(axis=0) == 1))
    mine = corpora[index].coverage
    counts = mine.counts(threshold)[ids]
    num_others = sum(one.coverage.num_samples for i, one in enumerate(corpora) if i != index)
    p_values = fisher_p_values(counts, mine.num_samples, np.zeros_like(counts), num_others)
    spans = strongest_spans(corpora[index].folder, ids, threshold)
    return [
        {
            "feature_id": int(ids[i]),
            "num_samples": int(counts[i]),
            "p_value": float(p_values[i]),
            "exemplars": spans.get(int(ids[i]), []),
        }
        for i in np.lexsort((ids, -counts))
    ]


def _differences(
    corpora: Sequence[ComparedCorpus], counted: Bool[np.ndarray, " d_sae"], threshold: float, seed: int
) -> list[dict[str, Any]]:
    """The permutation test of each pair that has a counted feature, in the order of the corpora."""
    pairs = itertools.combinations(corpora, 2)
    found = [
        ({"first": a.label, "second": b.label}, difference_test(a.activations, b.activations, counted, threshold, seed))
        for a, b in pairs
    ]
    return [names | test for names, test in found if test is not None]

"""Corpora side by side: finished coverages come in; what each has that the others lack, and their overlap, go out.

A corpus is named as in the run's config, or `RUN:corpus` for one of another run folder that was measured in the same
way. Nothing is measured here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int

from fac_ray.artifacts import current_marker, read_table, write_json, write_text
from fac_ray.config import ConfigError, RunConfig
from fac_ray.coverage import CorpusCoverage, coverage_fraction, is_active
from fac_ray.gaps import relevant_mask, target_features
from fac_ray.instrument import read_instrument, require_same
from fac_ray.markdown import count, fraction, quote, table
from fac_ray.reduction import load_coverage
from fac_ray.relevance import fisher_p_values
from fac_ray.statistics import coverage_interval, matched_coverage

PAGE_FEATURES = 20
"""Features of each corpus that compare.md shows."""


class ComparedCorpus(NamedTuple):
    """A corpus and where its coverage lies."""

    label: str
    """As the user named it."""
    folder: Path
    coverage: CorpusCoverage


def open_corpus(config: RunConfig, reference: str) -> ComparedCorpus:
    """The finished coverage that a reference names: `corpus` of this run, or `RUN:corpus` of another run folder.

    Raises:
        ConfigError: there is no such corpus, or the other run measures with another model, SAE, switch or threshold.
    """
    run, _, corpus = reference.rpartition(":")
    home = Path(run) if run else config.folder
    if run:
        require_same(read_instrument(config.folder)[1], read_instrument(home)[1], home)
    folder = home / "coverage" / corpus
    if current_marker(folder) is None:
        finished = sorted(p.name for p in (home / "coverage").glob("*") if current_marker(p) is not None)
        known = sorted({*finished, *([] if run else config.corpora)})
        raise ConfigError(f"{reference}: no corpus of that name is measured in {home}; there are: {known}")
    return ComparedCorpus(reference, folder, load_coverage(folder))


def compare_corpora(config: RunConfig, references: Sequence[str], features: pa.Table | None) -> dict[str, Any]:
    """Everything that is said about two or more measured corpora; written to `comparison/` and returned, JSON-ready.

    `features`: the run's FEATURES rows, whose relevant ones are counted; coverage is then FAC. None: every feature
    counts, and the coverage of a corpus is its share of the features that any of the corpora has.

    Raises:
        ConfigError: fewer than two different corpora, or one cannot be compared (`open_corpus`).
        ValueError: a corpus has no measured sample.
    """
    if len(set(references)) < max(2, len(references)):
        raise ConfigError(f"compare needs two or more different corpora; given: {', '.join(references)}")
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
        "only": {one.label: _lone_features(corpora, active & counted, i, threshold) for i, one in enumerate(corpora)},
    }
    folder = comparison_folder(config, references)
    write_text(folder / "compare.md", comparison_page(facts, PAGE_FEATURES))
    write_json(folder / "compare.json", facts)
    return facts


def comparison_folder(config: RunConfig, references: Sequence[str]) -> Path:
    """Where the comparison of these corpora is written."""
    return config.folder / "comparison" / "+".join(re.sub(r"[^\w.-]+", "_", one).strip("_") for one in references)


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


def feature_lines(rows: Sequence[dict[str, Any]], num_shown: int) -> list[str]:
    """A table of features with their strongest span, and a line for those that are not shown."""
    if not rows:
        return []
    cells = [
        (str(row["feature_id"]), count(row["num_samples"]), *_p_value(row), *(quote(s) for s in row["exemplars"][:1]))
        for row in rows[:num_shown]
    ]
    with_p = "p_value" in rows[0]
    titles = ("feature", "samples", *(("p",) if with_p else ()), "strongest on")
    cells = [(*row, "")[: len(titles)] for row in cells]
    left = len(rows) - len(cells)
    return ["", *table(titles, cells, texts=(len(titles) - 1,)), *(["", f"and {count(left)} more."] if left else [])]


def comparison_page(facts: dict[str, Any], num_shown: int) -> str:
    """The comparison in Markdown, with at most `num_shown` features of each corpus."""
    corpora, matched, is_fac = facts["corpora"], facts["matched"], facts["coverage_is"] == "fac"
    name = "FAC" if is_fac else "share"
    at = (f"{name} at {count(matched['num_samples'])} samples", f"at {count(matched['num_tokens'])} tokens")
    titles = ("corpus", "samples", "tokens", "active", "counted", "only here", name, *at)
    keys = ("num_samples", "num_tokens", "num_active_features", "num_counted_features", "num_only")
    rows = [
        (
            label,
            *(count(one[key]) for key in keys),
            *(fraction(one[key]) for key in ("coverage", "coverage_at_samples", "coverage_at_tokens")),
        )
        for label, one in corpora.items()
    ]
    return "\n".join(
        [
            f"# {', '.join(corpora)}",
            "",
            f"Run {facts['run']}, threshold {facts['threshold']:g}, preset {facts['preset']}. {_basis(facts)}",
            "",
            *table(titles, rows),
            *_overlap_lines(list(corpora), facts["overlap"]),
            "",
            "p: the chance that no other corpus has the feature although all have it equally often (Fisher).",
            *(line for label in corpora for line in _only_lines(label, facts["only"][label], num_shown)),
            "",
        ]
    )


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


def _basis(facts: dict[str, Any]) -> str:
    if facts["coverage_is"] == "fac":
        return (
            f"Counted are {count(facts['num_counted'])} relevant features; "
            f"FAC is out of the {count(facts['num_target'])} of them that the anchor reaches."
        )
    return f"All features are counted; share is out of the {count(facts['num_target'])} that any of the corpora has."


def _overlap_lines(labels: Sequence[str], matrix: dict[str, Any]) -> list[str]:
    """Both matrices in one table: numbers of shared features, and in brackets the Jaccard index."""
    rows = [
        (
            label,
            *(
                count(shared) if i == j else f"{count(shared)} ({fraction(share)})"
                for j, (shared, share) in enumerate(zip(matrix["shared"][i], matrix["jaccard"][i], strict=True))
            ),
        )
        for i, label in enumerate(labels)
    ]
    return ["", "Counted features that two corpora share (Jaccard index):", "", *table(("", *labels), rows)]


def _only_lines(label: str, rows: Sequence[dict[str, Any]], num_shown: int) -> list[str]:
    return ["", f"Only in {label}: {count(len(rows)) if rows else 'nothing'}", *feature_lines(rows, num_shown)]


def _p_value(row: dict[str, Any]) -> tuple[str, ...]:
    return (f"{row['p_value']:.2g}",) if "p_value" in row else ()

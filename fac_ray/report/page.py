"""The page: one HTML file without network, script or font, from the dictionary of `build_report`.

All text of models and data goes through Jinja's autoescape; markup comes only from the templates and from charts.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

import jinja2
import numpy as np

from fac_ray.report.charts import Part, Series, dot_chart, line_chart, stacked_bar
from fac_ray.report.words import FILTERS, duration, percent, plural, sentence

TONES = {
    "anchor": "anchor",
    "seed": "seed",
    "seed+untargeted": "untargeted",
    "seed+targeted": "targeted",
    "untargeted": "untargeted",
    "targeted": "targeted",
}
"""Corpus or arm to the CSS class of its colour and line style."""

SWEEP_LINES = {
    "fac_seed": ("FAC of the seed", "seed"),
    "fac_untargeted": ("FAC of seed + untargeted", "untargeted"),
    "fac_final": ("FAC of seed + targeted", "targeted"),
}

FAC_KEYS = {"anchor": "anchor", "seed": "seed", "seed+untargeted": "untargeted", "seed+targeted": "final"}
"""Corpus of the rarefaction curves to its key in `fac`."""


class Measure(NamedTuple):
    """A row of the diversity table."""

    key: str
    name: str
    meaning: str
    better: str
    """`high` or `low`: which way is more diverse; empty where neither is."""
    digits: int = 3


MEASURES = (
    Measure("mean_words", "Words per sample", "Words and signs of a sample, on average.", "", 1),
    Measure("distinct_1", "Distinct-1", "Different words / words.", "high"),
    Measure("distinct_2", "Distinct-2", "Different pairs of neighbouring words / such pairs.", "high"),
    Measure("unigram_entropy", "Word entropy", "Entropy of the words' shares, in nats.", "high", 2),
    Measure("bigram_entropy", "Word pair entropy", "Entropy of the shares of neighbouring pairs, in nats.", "high", 2),
    Measure("self_bleu_4", "Self-BLEU-4", "How much of a sample stands in the others, up to four words.", "low"),
    Measure("pos_distinct_2", "POS Distinct-2", "Different pairs of parts of speech / such pairs.", "high", 4),
    Measure("mean_cosine_distance", "Cosine distance", "Mean over all pairs of samples of 1 - cosine.", "high"),
    Measure("cluster_entropy", "Cluster entropy", "How evenly the samples fill the clusters, in nats.", "high", 2),
    Measure("vendi_score", "Vendi score", "Effective number of different samples.", "high", 1),
)

GAPS_SHOWN, GAPS_LISTED = 20, 400
"""Missing features in the open table, and together with the folded one; report.json has them all."""


def render_report(report: dict[str, Any]) -> str:
    """The whole page as HTML text; sections whose numbers are absent are left out."""
    charts = {
        "coverage": coverage_bar(report),
        "rarefaction": rarefaction_chart(report),
        "sweep": sweep_chart(report),
        "candidates": candidates_bar(report),
        "arms": arms_chart(report),
        "times": time_bars(report),
    }
    diversity = report.get("diversity") or {}
    template = _environment().get_template("page.html.jinja")
    return template.render(
        report=report,
        charts=charts,
        headline=sentence(report),
        diversity={
            "at_sample": diversity_rows({name: one["at_sample"] for name, one in diversity.items()}),
            "whole": diversity_rows(diversity),
        },
        fac_keys=FAC_KEYS,
        shown=GAPS_SHOWN,
        most=GAPS_LISTED,
    )


def coverage_bar(report: dict[str, Any]) -> dict[str, Any]:
    """The reachable features as one bar: covered by the seed, switched on by targeted samples, still missing."""
    if not report.get("reachable_features"):
        return {}
    gained = report["switched_on_features"] or 0
    parts = [
        Part("covered by the seed", "seed", report["covered_features"]),
        Part("switched on by targeted samples", "targeted", gained),
        Part("missing", "missing", report["missing_features"] - gained),
    ]
    if report["switched_on_features"] is None:
        del parts[1]
    return {"parts": parts, "svg": stacked_bar(parts, f"Relevant features the anchor reaches: {_listed(parts)}")}


def rarefaction_chart(report: dict[str, Any]) -> dict[str, Any]:
    """Expected features against number of samples, one line for each corpus or pool of corpora."""
    numbers = report.get("rarefaction")
    if not numbers:
        return {}
    lengths = {name: curve["measured_samples"] for name, curve in numbers["curves"].items()}
    longest, limit = max(lengths, key=lambda name: lengths[name]), drawn_samples(list(lengths.values()))
    lines = [_curve_line(name, tone_of(name, lengths), limit, curve) for name, curve in numbers["curves"].items()]
    title = "Expected number of features covered by a random part of each corpus, by number of samples"
    y_label = "relevant features covered" if numbers["counted"] == "reachable" else "active features"
    cut = longest if limit < lengths[longest] else None
    return {"lines": lines, "svg": line_chart(lines, title, "samples", y_label), "cut": cut}


def drawn_samples(lengths: list[int]) -> int:
    """Largest corpus size that is drawn: all, but of one much larger corpus only twice what the others have."""
    *others, longest = sorted(lengths)
    return min(longest, 2 * others[-1]) if others else longest


def sweep_chart(report: dict[str, Any]) -> dict[str, Any]:
    """FAC against the threshold or, without relevance, the active features of each corpus."""
    rows = report.get("sweep")
    if not rows:
        return {}
    if "fac_seed" in rows[0]:
        lines = [_sweep_line(rows, key, *line) for key, line in SWEEP_LINES.items()]
        lines = [line for line in lines if line.xs]
        svg = line_chart(lines, "FAC by threshold", "threshold", "FAC", y_text=percent, y_high=1.0, points=True)
    else:
        lines = [_active_line(rows, name) for name in rows[0]["active_features"]]
        svg = line_chart(lines, "Active features by threshold", "threshold", "active features", points=True)
    return {"lines": lines, "svg": svg}


def diversity_rows(corpora: dict[str, dict[str, Any]]) -> list[tuple[Measure, dict[str, float | None], str | None]]:
    """Each measure with its value for every corpus and the name of the most diverse one, if one stands out."""
    rows = []
    for measure in MEASURES:
        values = {name: numbers[measure.key] for name, numbers in corpora.items()}
        known = {name: value for name, value in values.items() if value is not None}
        best = (max if measure.better == "high" else min)(known.values(), default=None)
        most = [name for name, value in known.items() if value == best]
        rows.append((measure, values, most[0] if measure.better and len(most) == 1 < len(known) else None))
    return [row for row in rows if any(value is not None for value in row[1].values())]


def candidates_bar(report: dict[str, Any]) -> dict[str, Any]:
    """All candidates as one bar: accepted, used in a prompt, and rejected by reason."""
    numbers = report.get("candidates")
    if not numbers:
        return {}
    parts = [
        Part("accepted", "targeted", numbers["accepted"]),
        Part("scored in step 1, not needed", "seed", numbers["scored"]),
    ]
    reasons = numbers["by_reason"].items()
    parts += [Part(f"rejected: {why}", f"shade{min(k, 4)}", count) for k, (why, count) in enumerate(reasons)]
    return {"parts": parts, "svg": stacked_bar(parts, f"Candidates: {_listed(parts)}")}


def arms_chart(report: dict[str, Any]) -> dict[str, Any]:
    """Held-out AUPRC: one row for each arm, one dot for each training seed."""
    arms = {name: arm["auprc"] for name, arm in (report.get("arms") or {}).items() if arm["auprc"]["values"]}
    if not arms:
        return {}
    rows = [
        Series(name, tone_of(name, arms), auprc["values"], [], [f"{value:.3f}" for value in auprc["values"]])
        for name, auprc in arms.items()
    ]
    means = [auprc["mean"] for auprc in arms.values()]
    stds = [auprc["std"] for auprc in arms.values()]
    return {"svg": dot_chart(rows, means, stds, "AUPRC on held-out samples by training set", "AUPRC, held-out")}


def time_bars(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Seconds and a bar for each stage, over all corpora; the bars are shares of the longest."""
    seconds: dict[str, float] = {}
    for name, stage in report["stages"].items():
        kind = name.partition("/")[0]
        seconds[kind] = seconds.get(kind, 0.0) + (stage["seconds"] or 0.0)
    longest = max(seconds.values(), default=0.0)
    bars = {
        name: stacked_bar([Part(name, "seed", value), Part("", "empty", longest - value)], duration(value))
        for name, value in seconds.items()
    }
    return {name: {"seconds": value, "svg": bars[name]} for name, value in seconds.items()}


def tone_of(name: str, names: Iterable[str]) -> str:
    """CSS class suffix of a corpus or arm among those shown with it; unknown ones take turns with three tones."""
    others = [other for other in names if other not in TONES]
    return TONES.get(name) or f"other{others.index(name) % 3}"


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fac_ray.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS | {"pretty": lambda value: json.dumps(value, indent=2)}
    environment.globals["plural"] = plural
    return environment


def _listed(parts: list[Part]) -> str:
    return ", ".join(f"{part.value:,g} {part.name}" for part in parts)


def _curve_line(name: str, tone: str, limit: int, curve: dict[str, Any]) -> Series:
    """A corpus's curve up to the limit; where it goes on, its last point is interpolated."""
    sizes = [samples for samples in curve["num_samples"] if samples < limit] + [min(limit, curve["num_samples"][-1])]
    ys, lows, highs = (
        np.interp(sizes, curve["num_samples"], curve[key]).tolist() for key in ("expected_features", "low", "high")
    )
    notes = [
        f"{mean:,.1f} features ({low:,.1f} to {high:,.1f}) in {plural(samples, 'sample')}"
        f"{', extrapolated' if samples > curve['measured_samples'] else ''}"
        for samples, mean, low, high in zip(sizes, ys, lows, highs, strict=True)
    ]
    solid = sum(samples <= curve["measured_samples"] for samples in sizes)
    return Series(name, tone, sizes, ys, notes, list(zip(lows, highs, strict=True)), solid)


def _sweep_line(rows: list[dict[str, Any]], key: str, name: str, tone: str) -> Series:
    shown = [row for row in rows if row[key] is not None]
    notes = [f"{percent(row[key])} of {row['reachable']} at threshold {row['threshold']:g}" for row in shown]
    return Series(name, tone, [row["threshold"] for row in shown], [row[key] for row in shown], notes)


def _active_line(rows: list[dict[str, Any]], name: str) -> Series:
    counts = [row["active_features"][name] for row in rows]
    notes = [f"{count:,} at threshold {row['threshold']:g}" for count, row in zip(counts, rows, strict=True)]
    return Series(name, tone_of(name, rows[0]["active_features"]), [row["threshold"] for row in rows], counts, notes)

"""What a report says in a dozen lines: the dictionary of `report.json` in, lines for a terminal out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Report = dict[str, Any]


def headline(report: Report) -> list[str]:
    """The numbers that a run is made for, as far as it has come; every section stands for itself."""
    title = f"{report['name']}: threshold {report['threshold']:g}, preset {report['preset']}"
    sections = [_corpora(report), _coverage(report), _truth(report), _arms(report)]
    return [title, *(line for section in sections if section for line in ("", *section))]


def _corpora(report: Report) -> list[str]:
    rows = [
        (name, _count(one.get("num_samples")), _count(one.get("num_tokens")), _count(one.get("num_active_features")))
        for name, one in report.get("corpora", {}).items()
    ]
    return _table(("corpus", "samples", "tokens", "active features"), rows) if rows else []


def _coverage(report: Report) -> list[str]:
    fac = report.get("fac")
    if not fac:
        return []
    reachable, missing = report["reachable_features"], report["missing_features"]
    rows = [("seed", _count(report["covered_features"]), _fraction(fac["seed"]), "")]
    if fac.get("final") is not None:
        covered = report["covered_features"] + report["switched_on_features"]
        rows += [
            ("seed + untargeted", "", _fraction(fac["untargeted"]), _fraction(report["fac_missing_untargeted"])),
            ("seed + targeted", _count(covered), _fraction(fac["final"]), _fraction(report["fac_missing"])),
        ]
    counts = f"{_count(report['relevant_features'])} relevant features, {_count(reachable)} of them in the anchor, "
    return [counts + f"{_count(missing)} missing in the seed", *_table(("", "covered", "fac", "fac_missing"), rows)]


def _truth(report: Report) -> list[str]:
    truth = report.get("truth")
    if not truth:
        return []
    return [f"missing concepts found: precision {_fraction(truth['precision'])}, recall {_fraction(truth['recall'])}"]


def _arms(report: Report) -> list[str]:
    arms = report.get("arms")
    if not arms:
        return []
    rows = [
        (name, _fraction(arm["auprc"]["mean"]), _fraction(arm["auprc"]["std"]), str(len(arm["auprc"]["values"])))
        for name, arm in arms.items()
    ]
    return _table(("trained on", "held-out AUPRC", "std", "fits"), rows)


def _table(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows below their titles: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (titles, *rows)) for i in range(len(titles))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, len(row)))]).rstrip()
        for row in (titles, *rows)
    ]


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _fraction(number: float | None) -> str:
    return "-" if number is None else f"{number:.3f}"

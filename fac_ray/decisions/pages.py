"""What compare, select and check found, in Markdown: the dictionary of their JSON file comes in, a page goes out.

A page is read on a screen, in a pull request or in a terminal (`terminal.py`). Texts from data are quoted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from fac_ray.decisions.markdown import bar, count, fraction, quote, table

PAGE_ROWS = 20
"""Features or samples of a list that a written page shows."""


def comparison_page(facts: dict[str, Any], num_shown: int) -> str:
    """The comparison in Markdown, with at most `num_shown` features of each corpus."""
    corpora, matched, is_fac = facts["corpora"], facts["matched"], facts["coverage_is"] == "fac"
    name = "FAC" if is_fac else "share"
    at = (f"{name} at {count(matched['num_samples'])} samples", f"at {count(matched['num_tokens'])} tokens")
    titles = ("corpus", "samples", "tokens", "counted", "only here", name, "", *at)
    keys = ("num_samples", "num_tokens", "num_counted_features", "num_only")
    rows = [
        (
            label,
            *(count(one[key]) for key in keys),
            fraction(one["coverage"]),
            bar(one["coverage"]),
            *(fraction(one[key]) for key in ("coverage_at_samples", "coverage_at_tokens")),
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
            *_difference_lines(facts["differences"]),
            "",
            "## What one of them alone has",
            "",
            "p: the chance that no other corpus has the feature although all have it equally often (Fisher).",
            *(line for label in corpora for line in _only_lines(label, facts["only"][label], num_shown)),
            "",
        ]
    )


def selection_page(facts: dict[str, Any], selected: pa.Table, num_shown: int) -> str:
    """The selection in Markdown, with the `num_shown` samples that were taken first."""
    is_fac = facts["weights"] == "relevant"
    titles = ("", "samples", "tokens", "adds", "FAC" if is_fac else "coverage", "")
    rows = [
        (
            one["method"] + (f", equal {one['equal']}" if one["equal"] else ""),
            *(count(one[key]) for key in ("num_samples", "num_tokens", "gain")),
            fraction(one["coverage"]),
            bar(one["coverage"]),
        )
        for one in facts["methods"]
    ]
    shown = [
        (str(row["rank"] + 1), count(row["gain"]), count(row["num_tokens"]), quote(row["text"]))
        for row in selected.slice(0, num_shown).to_pylist()
    ]
    return "\n".join(
        [
            f"# {count(len(selected))} samples of {facts['corpus']}",
            "",
            f"Run {facts['run']}, threshold {facts['threshold']:g}, preset {facts['preset']}. {_worth(facts)}",
            "",
            *table(titles, rows),
            "",
            f"{_guarantee(facts)} {_end(facts, len(selected))}".strip(),
            "",
            *table(("rank", "adds", "tokens", "sample"), shown, texts=(3,)),
            "",
        ]
    )


def check_page(facts: dict[str, Any], num_shown: int) -> str:
    """The verdict in Markdown."""
    rows = [
        (_rule_text(rule, facts), fraction(rule["value"]), _limit_text(rule), _verdict(rule["passed"]))
        for rule in facts["rules"]
    ]
    return "\n".join(
        [
            f"## Coverage check: {_verdict(facts['passed'])}",
            "",
            *table(("rule", "measured", "limit", "verdict"), rows, texts=(0, 2, 3)),
            "",
            f"Run {facts['run']}, threshold {facts['threshold']:g}, preset {facts['preset']}; FAC is out of the "
            f"{count(facts['num_target'])} relevant features that the anchor reaches.",
            "",
            *_size_lines(facts),
            *_change_lines("lost", "in the baseline's seed, not in this one", facts, num_shown),
            *_change_lines("gained", "in this seed, not in the baseline's", facts, num_shown),
            "",
        ]
    )


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
    about = (
        "Counted features that two corpora both have, and in brackets their share of those that either has (Jaccard):"
    )
    return ["", "## What they share", "", about, "", *table(("", *labels), rows)]


def _difference_lines(tests: Sequence[dict[str, Any]]) -> list[str]:
    """Of each pair, the difference in coverage beside that of random divisions of the same samples."""
    if not tests:
        return []
    titles = ("pair", "features", "difference", "by chance", "permutations", "p")
    rows = [
        (
            f"{one['first']} - {one['second']}",
            count(one["num_features"]),
            f"{one['difference']:+.3f}",
            f"{one['null_mean']:+.3f}",
            count(one["num_permutations"]),
            f"{one['p_value']:.2g}",
        )
        for one in tests
    ]
    return [
        "",
        "## Could two of them be one?",
        "",
        "Difference in coverage of the counted features that either has, and what dealing the same samples out at "
        "random into the same two sizes gives:",
        "",
        *table(titles, rows),
    ]


def _only_lines(label: str, rows: Sequence[dict[str, Any]], num_shown: int) -> list[str]:
    return ["", f"### {label}: {count(len(rows)) if rows else 'nothing'}", *feature_lines(rows, num_shown)]


def _p_value(row: dict[str, Any]) -> tuple[str, ...]:
    return (f"{row['p_value']:.2g}",) if "p_value" in row else ()


def _worth(facts: dict[str, Any]) -> str:
    total, base = count(facts["weight_total"]), count(facts["weight_base"])
    worth = {
        "relevant": f"Each of the {total} relevant features counts 1",
        "effect": f"Each relevant feature counts its log2 odds ratio, {total} in all",
        "all": f"Each of the {total} features counts 1",
    }[facts["weights"]]
    return worth + (f"; {facts['base']} covers {base} already." if facts["base"] else ".")


def _guarantee(facts: dict[str, Any]) -> str:
    certified, known = facts["certified_fraction"], facts["guaranteed_fraction"]
    share = f"at least {math.floor(certified * 1000) / 1000:.3f} of what the best"
    reached = "as much as any" if certified >= 1 else share
    before = f" (known beforehand: at least {known:.3f})" if known is not None else ""
    how = "" if facts["num_partitions"] == 1 else f", searched in {facts['num_partitions']} partitions"
    return f"What is selected adds {reached} choice within the limit would{before}{how}."


def _end(facts: dict[str, Any], num_selected: int) -> str:
    asked = facts["limit"]["num_samples"]
    if asked is None or num_selected == asked or facts["methods"][0]["gain"] < facts["methods"][-1]["gain"]:
        return ""
    return f"{count(asked)} samples were asked for; after {count(num_selected)}, no other adds a feature that counts."


def _rule_text(rule: dict[str, Any], facts: dict[str, Any]) -> str:
    if rule["rule"] == "min_fac":
        return "FAC of the seed"
    return f"FAC lost against the baseline, both at {count(facts['matched_samples'])} samples"


def _limit_text(rule: dict[str, Any]) -> str:
    return f"at {'least' if rule['rule'] == 'min_fac' else 'most'} {rule['limit']:g}"


def _verdict(passed: bool) -> str:
    return "PASS" if passed else "FAIL"


def _size_lines(facts: dict[str, Any]) -> list[str]:
    titles = (
        "",
        "samples",
        "tokens",
        "covered",
        "FAC",
        "95 % interval",
        f"at {count(facts['matched_samples'])} samples",
    )
    labels = {"seed": "this seed", "baseline": f"baseline {facts['baseline_run']}"}
    rows = [
        (
            label,
            *(count(facts[name][key]) for key in ("num_samples", "num_tokens", "num_covered")),
            fraction(facts[name]["fac"]),
            " to ".join(map(fraction, facts[name]["fac_interval"])),
            fraction(facts[name]["fac_at_matched_samples"]),
        )
        for name, label in labels.items()
        if name in facts
    ]
    return table(titles, rows)


def _change_lines(key: str, meaning: str, facts: dict[str, Any], num_shown: int) -> list[str]:
    if key not in facts:
        return []
    rows = facts[key]
    number = f"{count(len(rows))} feature{'' if len(rows) == 1 else 's'}" if rows else "No feature"
    return ["", f"{number} {key} ({meaning})", *feature_lines(rows, num_shown)]

"""Numbers as a person reads them, and the run in one sentence."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

NONE = "\N{EN DASH}"
MAX_CHARACTERS = 600


def sentence(report: dict[str, Any]) -> str:
    """What the run found, in words, as far as it went."""
    if "fac" not in report:
        return _corpora_sentence(report)
    if not report["reachable_features"]:
        return f"None of the {plural(report['relevant_features'], 'relevant feature')} is active in the anchor."
    reachable, missing = plural(report["reachable_features"], "relevant feature"), report["missing_features"]
    found = (
        f"The seed covers {percent(report['fac']['seed'])} of the {reachable} the anchor reaches; "
        f"{missing:,} {'is' if missing == 1 else 'are'} missing"
    )
    if report["switched_on_features"] is None or not missing:
        return f"{found}."
    return f"{found}; synthesis switched on {report['switched_on_features']:,} of them."


def percent(value: float | None, digits: int = 0) -> str:
    """A share as a percentage; a little is never shown as nothing, nor almost all as all."""
    if value is None:
        return NONE
    text, least = f"{100 * value:.{digits}f}", 10.0**-digits
    if 0 < value < 1 and float(text) in (0, 100):
        text = f"<{least:g}" if value < 0.5 else f">{100 - least:g}"
    return f"{text}\N{NARROW NO-BREAK SPACE}%"


def count(value: float | None) -> str:
    """A whole number with separators."""
    return NONE if value is None else f"{value:,.0f}"


def decimal(value: float | None, digits: int = 3) -> str:
    """A number with a fixed number of decimals."""
    return NONE if value is None else f"{value:,.{digits}f}"


def short(value: float) -> str:
    """A number with as few digits as it needs, at most six: a threshold."""
    return f"{value:g}"


def signed(value: float | None) -> str:
    """A difference with its sign and three decimals."""
    return NONE if value is None else f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")


def duration(seconds: float | None) -> str:
    """Seconds as s, min or h with two units at most."""
    if seconds is None:
        return NONE
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left} min" if hours else f"{minutes} min {rest} s"


def size(num_bytes: float | None) -> str:
    """Bytes as GiB."""
    return NONE if num_bytes is None else f"{num_bytes / 2**30:,.1f} GiB"


def plural(number: int, noun: str) -> str:
    """`1 sample`, `2 samples`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def clip(text: str | None, characters: int = MAX_CHARACTERS) -> str:
    """The text, cut with an ellipsis where it is longer than that."""
    text = text or ""
    return text if len(text) <= characters else text[: characters - 1].rstrip() + "\N{HORIZONTAL ELLIPSIS}"


def marked(text: str, peak: list[int] | None) -> Markup:
    """The escaped text with `<mark>` around the characters [start, end) of its peak token."""
    if peak is None or not 0 <= peak[0] < peak[1] <= min(len(text), MAX_CHARACTERS):
        return Markup.escape(clip(text))
    start, end = peak
    after = clip(text[end:], MAX_CHARACTERS - end + 1)
    return Markup("{}<mark>{}</mark>{}").format(text[:start], text[start:end], after)


def label(name: str) -> str:
    """A key as words: `num_samples` reads `samples`, `auprc_gain` reads `auprc gain`."""
    return name.removeprefix("num_").replace("_", " ")


def _corpora_sentence(report: dict[str, Any]) -> str:
    active = {name: row for name, row in report.get("corpora", {}).items() if "num_active_features" in row}
    if not active:
        return "Nothing has been measured yet."
    d_sae = plural(next(iter(active.values()))["d_sae"], "feature")
    found = ", ".join(f"{name} {row['num_active_features']:,}" for name, row in active.items())
    return f"Of {d_sae}, active at threshold {report['threshold']:g}: {found}."


FILTERS = {
    "percent": percent,
    "count": count,
    "decimal": decimal,
    "duration": duration,
    "short": short,
    "signed": signed,
    "size": size,
    "clip": clip,
    "marked": marked,
    "label": label,
}

"""Tables and quotes in Markdown that read as well in a terminal: padded columns, and no character that a text could
use to become markup, a command to the terminal, or another row of the table.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_QUOTE = 72
"""Characters of a quoted text."""
BAR_CELLS = 10


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], texts: Sequence[int] = (0,)) -> list[str]:
    """The lines of a table; the columns in `texts` stand to the left, the others, numbers, to the right."""
    widths = [max(3, *(len(row[i]) for row in (titles, *rows))) for i in range(len(titles))]
    rule = ["-" * width if i in texts else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return ["| " + " | ".join(_pad(row, widths, texts)) + " |" for row in (titles, rule, *rows)]


def quote(text: str, max_characters: int = MAX_QUOTE) -> str:
    """A text from data as one code span: whatever it holds, it is shown and does nothing.

    White space becomes one blank, back quotes become apostrophes, bars are escaped for tables, and characters that
    do not print (escape sequences, direction marks) become U+FFFD.
    """
    line = " ".join(text.split())
    shown = "".join(c if c.isprintable() else "\ufffd" for c in line).replace("`", "'")
    if len(shown) > max_characters:
        shown = shown[: max_characters - 3].rstrip() + "..."
    return "`" + shown.replace("|", "\\|") + "`" if shown else ""


def count(number: int | float | None) -> str:
    """A number of things: 12,345; with one decimal place where it is no whole number."""
    if number is None:
        return "-"
    return f"{number:,.0f}" if float(number).is_integer() else f"{number:,.1f}"


def fraction(number: float | None) -> str:
    """A share with three decimal places."""
    return "-" if number is None else f"{number:.3f}"


def bar(share: float | None) -> str:
    """A share in [0, 1] as a bar of `BAR_CELLS` cells; full only at 1, and empty only at 0."""
    if share is None:
        return ""
    filled = round(share * BAR_CELLS)
    filled = min(max(filled, int(share > 0)), BAR_CELLS - int(share < 1))
    return "\u2588" * filled + "\u2591" * (BAR_CELLS - filled)


def _pad(row: Sequence[str], widths: Sequence[int], texts: Sequence[int]) -> list[str]:
    return [
        cell.ljust(width) if i in texts else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]

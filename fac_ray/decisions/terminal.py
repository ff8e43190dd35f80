"""A Markdown page of `fac_ray.decisions.pages` on a terminal: the page comes in, lines without markup go out.

Headings and titles are bold, tables stand without bars, verdicts have a colour, and quoted texts are cut where the
screen ends. Where the output is no terminal, click leaves the colours out.
"""

from __future__ import annotations

import re
import shutil
import sys
import textwrap

import click

MAX_COLUMNS = 120
"""Width where the output is no terminal, and of running text on a wider one."""
COLORS = {"PASS": "green", "FAIL": "red"}


def terminal_page(page: str, num_columns: int | None = None) -> str:
    """The page for a screen of so many columns; None: those of this terminal."""
    width = num_columns or shutil.get_terminal_size((MAX_COLUMNS, 24)).columns
    lines, found, room = page.split("\n"), [], width
    for number, line in enumerate(lines):
        if line.startswith("#"):
            found.append(_colored(click.style(line.lstrip("# "), bold=True)))
        elif not line.startswith("| "):
            found += textwrap.wrap(_plain(line), min(width, MAX_COLUMNS), break_on_hyphens=False) or [""]
        elif number + 1 < len(lines) and _is_rule(lines[number + 1]):
            room = sys.maxsize if lines[number + 1].endswith(": |") else width  # a number that is cut is a wrong one
            found.append(click.style(_row(line, room), dim=True))
        elif not _is_rule(line):
            found.append(_colored(_row(line, room)))
    return "\n".join(found)


def _row(line: str, width: int) -> str:
    """The cells of a row two blanks apart, cut at the width."""
    cells = re.split(r" (?<!\\)\| ", line[2:-2])
    row = _plain("  ".join(cells)).rstrip()
    return row if len(row) <= width else row[: width - 3].rstrip() + "..."


def _plain(text: str) -> str:
    return re.sub("`([^`]*)`", r"\1", text).replace("\\|", "|")


def _is_rule(line: str) -> bool:
    return line.startswith("| -") and not line.strip("|-: ")


def _colored(line: str) -> str:
    return re.sub(r"\b(PASS|FAIL)$", lambda found: click.style(found[1], fg=COLORS[found[1]], bold=True), line)

"""A page on a terminal: the same words, no markup, nothing wider than the screen."""

from __future__ import annotations

import click

from fac_ray.decisions.markdown import quote, table
from fac_ray.decisions.terminal import terminal_page


def test_headings_and_tables_lose_their_markup_and_keep_their_columns():
    page = "\n".join(["## Coverage check: PASS", "", *table(("name", "n"), [("a", "1"), ("bcdef", "1,000")])])
    assert click.unstyle(terminal_page(page, 80)).split("\n") == [
        "Coverage check: PASS",
        "",
        "name       n",
        "a          1",
        "bcdef  1,000",
    ]


def test_a_quote_is_shown_as_it_was_and_ends_with_the_screen():
    rows = [("1", quote("either | or")), ("2", quote("| --- | ---: |")), ("3", quote("word " * 12))]
    shown = terminal_page("\n".join(table(("rank", "text"), rows, texts=(1,))), 30)
    assert click.unstyle(shown).split("\n")[1:] == [
        "   1  either | or",
        "   2  | --- | ---: |",
        "   3  word word word word w...",
    ]


def test_numbers_are_never_cut():
    shown = terminal_page("\n".join(table(("corpus", "samples"), [("a-long-name", "1,000,000")])), 12)
    assert click.unstyle(shown).split("\n")[1] == "a-long-name  1,000,000"


def test_running_text_is_wrapped():
    assert terminal_page("one two three", 8) == "one two\nthree"


def test_verdicts_have_a_color():
    row = table(("rule", "verdict"), [("a", "PASS"), ("b", "FAIL"), ("FAIL c", "")], texts=(0, 1))
    shown = terminal_page("\n".join(row), 80).split("\n")
    assert click.style("PASS", fg="green", bold=True) in shown[1]
    assert click.style("FAIL", fg="red", bold=True) in shown[2]
    assert shown[3].strip() == "FAIL c"

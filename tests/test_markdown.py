"""Texts from data do nothing in a terminal or on a page but be read."""

from __future__ import annotations

from fac_ray.decisions.markdown import MAX_QUOTE, count, fraction, quote, table


def test_a_quote_is_one_code_span_whatever_the_text_holds():
    assert quote("two\nlines\tand  blanks") == "`two lines and blanks`"
    assert quote("`rm -rf` | <b>@team</b>") == "`'rm -rf' \\| <b>@team</b>`"
    assert quote("\x1b[31mred\u202eder") == "`\ufffd[31mred\ufffdder`"
    assert quote(" \n ") == ""
    assert len(quote("x" * 500)) == MAX_QUOTE + 2


def test_a_table_is_padded_and_says_how_its_columns_stand():
    assert table(("name", "n"), [("a", "1"), ("bcdef", "1,000")]) == [
        "| name  |     n |",
        "| ----- | ----: |",
        "| a     |     1 |",
        "| bcdef | 1,000 |",
    ]


def test_numbers_are_written_as_people_write_them():
    assert [count(n) for n in (12345, 3.0, 2.25, None)] == ["12,345", "3", "2.2", "-"]
    assert [fraction(n) for n in (0.66666, None)] == ["0.667", "-"]

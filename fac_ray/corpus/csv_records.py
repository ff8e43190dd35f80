"""The records of a CSV file, whatever its quotes: text comes in, fields of records or what is wrong with one go out."""

from __future__ import annotations

import csv
import io
from collections import deque
from collections.abc import Iterator

from fac_ray.corpus.sources import UNREADABLE


def csv_records(text: io.TextIOWrapper, max_characters: int) -> Iterator[list[str] | str]:
    """The header and the records of a CSV file, or what is wrong with one.

    After a record that is malformed or not as wide as the header, reading goes on at the line behind its first line,
    for a quote that is not closed takes in the rows below it.

    Raises:
        One of `UNREADABLE`: the file breaks off.
    """
    csv.field_size_limit(max_characters)
    lines, width = CsvLines(text, max_characters), None
    reader = csv.reader(lines, strict=True)
    while True:
        lines.used.clear()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem: str | None = f"not CSV: {error}"
        else:
            width = len(fields) if width is None else width
            problem = _problem(len(fields), width, len(lines.used))
        if problem is None:
            yield fields
        else:
            yield problem
            lines.back_to_second()
            reader = csv.reader(lines, strict=True)


def _problem(num_fields: int, width: int, num_lines: int) -> str | None:
    if num_fields == width:
        return None
    if not num_fields:
        return "blank line"
    problem = f"wrong number of fields: {num_fields}, but the header has {width}"
    below = f"; it closes a quote {num_lines - 1} lines below, and those lines are read as rows of their own"
    return problem + (below if num_lines > 1 else "")


class CsvLines:
    """The lines of a CSV file for `csv.reader`, which can be set back behind the first line of a record.

    In the place of a line may stand the reason why it cannot be had: a `csv.Error` for one that is too long, one of
    `UNREADABLE` where the file breaks off.
    """

    def __init__(self, text: io.TextIOWrapper, max_characters: int) -> None:
        self.used: list[str | Exception] = []
        """What was handed out for the present record."""
        self._text = text
        self._max_characters = max_characters
        self._waiting: deque[str | Exception] = deque()

    def __iter__(self) -> CsvLines:
        return self

    def __next__(self) -> str:
        line = self._waiting.popleft() if self._waiting else self._read()
        if line == "":
            raise StopIteration
        self.used.append(line)
        if isinstance(line, str):
            return line
        if isinstance(line, csv.Error) or len(self.used) == 1:
            raise line
        raise csv.Error("the file breaks off before its quote closes")

    def back_to_second(self) -> None:
        """Hand out again what stands behind the first line of the present record."""
        self._waiting.extendleft(reversed(self.used[1:]))

    def _read(self) -> str | Exception:
        try:
            line = self._text.readline(self._max_characters)
            if len(line) < self._max_characters or line.endswith("\n"):
                return line
            while (more := self._text.readline(self._max_characters)) and not more.endswith("\n"):
                pass
        except UNREADABLE as error:
            return error
        return csv.Error(f"more than {self._max_characters} characters without a line break")

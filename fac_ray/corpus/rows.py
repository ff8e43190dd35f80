"""The rows of a file, as they are: a piece of a file comes in, raw rows go out, one by one, in bounded memory.

jsonl, csv, parquet, plain text and JSON arrays; gzip of all but parquet. A row that cannot be read is handed on as a
`BadRow` with the reason, in its place, so that no row is ever lost; so is a cell of a row.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fac_ray.corpus.csv_records import csv_records
from fac_ray.corpus.sources import UNREADABLE, Piece, Source, open_source

MAX_ROW_BYTES = 16 << 20
BETWEEN_ELEMENTS = re.compile(r"[\s,]*")


class BadRow(ValueError):
    """Why a row is not a sample; the kind of problem stands before the first colon."""


def read_rows(piece: Piece, columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """The rows of a piece as (0-based row of the file, value); the value is a `BadRow` where the bytes are not a row.

    `columns`: the columns that are needed, the content first; a line of text and a string in a JSON array stand for a
    row with only that one. Where a file breaks off, one `BadRow` stands for the rest of it.
    """
    row = piece.first_row - 1
    try:
        for row, value in READERS[piece.source.format](piece, columns):
            yield row, value
    except UNREADABLE as error:
        yield row + 1, BadRow(f"{_unreadable(error)}; nothing from this row on was read")


def _unreadable(error: Exception) -> str:
    """The reason for a rejected row; an error of the disk or the network, not of the content, is raised again."""
    if getattr(error, "errno", None) is not None:
        raise error
    return f"unreadable file: {str(error).partition(chr(10))[0]}"


def _open_bytes(source: Source) -> io.BufferedReader | gzip.GzipFile:
    raw = open_source(source)
    if source.name.endswith(".gz"):
        if source.size_bytes == 0:  # gzip would take it for the end of the last member
            raise EOFError("a gzip file of no bytes")
        return gzip.GzipFile(fileobj=raw)
    return io.BufferedReader(raw, 1 << 20)


def _read_jsonl(piece: Piece, _columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
    for row, line in _lines(piece):
        yield row, line if isinstance(line, BadRow) else _json_value(line)


def _read_text(piece: Piece, columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
    for row, line in _lines(piece):
        yield row, line if isinstance(line, BadRow) else {columns[0]: line.rstrip("\r\n")}


def _lines(piece: Piece) -> Iterator[tuple[int, str | BadRow]]:
    """The lines that begin in the piece's bytes. The end of a line that began before belongs to the piece before."""
    row, position = piece.first_row, piece.start
    with _open_bytes(piece.source) as stream:
        if piece.start > 0:
            stream.seek(piece.start - 1)
            position += _skip_line(stream) - 1
        while piece.stop is None or position < piece.stop:
            line = stream.readline(MAX_ROW_BYTES)
            if not line:
                return
            position += len(line)
            if len(line) == MAX_ROW_BYTES and not line.endswith(b"\n"):
                position += _skip_line(stream)
                yield row, BadRow(f"row too long: more than {MAX_ROW_BYTES >> 20} MiB without a line break")
            else:
                yield row, _utf8(line.removeprefix(b"\xef\xbb\xbf") if row == 0 else line)
            row += 1


def _skip_line(stream: io.BufferedReader | gzip.GzipFile) -> int:
    """Move behind the next line break; returns the number of bytes passed."""
    passed = 0
    while chunk := stream.readline(1 << 20):
        passed += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return passed


def _utf8(line: bytes) -> str | BadRow:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8: byte 0x{line[error.start]:02x} at byte {error.start} of the row")


def _json_value(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return BadRow(f"not JSON: {error.msg} at character {error.pos}")
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; nested thousands deep
        return BadRow(f"not JSON: {error}")


def _read_json(piece: Piece, columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """A JSON array, read element by element; a file that does not begin with a bracket is read as lines."""
    with _open_bytes(piece.source) as stream:
        decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        chunks = filter(None, map(decode, iter(lambda: stream.read1(1 << 16), b"")))
        start = next(chunks, "").lstrip()
        if start.startswith("["):
            for row, value in _array_elements(start[1:], chunks):
                yield row, {columns[0]: value} if isinstance(value, str) else value
            return
    yield from _read_jsonl(piece, columns)


def _array_elements(buffer: str, chunks: Iterator[str]) -> Iterator[tuple[int, Any]]:
    """The elements of an array whose bracket has been read; a malformed one ends it, for nothing says where it ends."""
    decoder, row, at = json.JSONDecoder(), 0, 0
    while True:
        at = BETWEEN_ELEMENTS.match(buffer, at).end()  # type: ignore[union-attr]  # it matches the empty string too
        if buffer.startswith("]", at):
            return
        failure, end = "the closing bracket is missing", len(buffer)
        try:
            value, end = decoder.raw_decode(buffer, at)
        except (ValueError, RecursionError) as error:
            failure = str(error)
        if end < len(buffer):
            yield row, value
            at, row = end, row + 1
        elif more := _read_on(chunks, len(buffer) - at):
            buffer, at = buffer[at:] + more, 0  # an element that reaches the end of the buffer may go on behind it
        else:
            yield row, BadRow(f"not JSON: the array breaks off: {failure}; nothing from this element on was read")
            return


def _read_on(chunks: Iterator[str], num_waiting: int) -> str:
    """As much again as waits for its end, so that a long element is not parsed too often; nothing beyond the limit."""
    read, num_read = [], 0
    while num_waiting <= MAX_ROW_BYTES and num_read <= num_waiting and (chunk := next(chunks, "")):
        read.append(chunk)
        num_read += len(chunk)
    return "".join(read)


def _read_csv(piece: Piece, columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """Rows under a header line. Quotes that do not close cost the line they stand on, not the lines after it."""
    with _open_bytes(piece.source) as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
        records = csv_records(text, MAX_ROW_BYTES)
        header = next(records, None)
        if header is None:
            return
        if isinstance(header, str):
            yield 0, BadRow(f"{header}; this is the header, so nothing after it was read")
        elif twice := [name for name in columns if header.count(name) > 1]:
            yield 0, BadRow(f"column named twice: {twice[0]!r}; this is the header, so nothing after it was read")
        else:
            for row, fields in enumerate(records):
                yield row, BadRow(fields) if isinstance(fields, str) else dict(zip(header, fields, strict=True))


def _read_parquet(piece: Piece, columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
    with open_source(piece.source) as stream, pq.ParquetFile(stream) as file:
        row = piece.first_row
        for group in range(piece.start, file.num_row_groups if piece.stop is None else piece.stop):
            num_rows = file.metadata.row_group(group).num_rows
            yield from enumerate(_group_values(file, group, num_rows, columns), start=row)
            row += num_rows


def _group_values(file: pq.ParquetFile, group: int, num_rows: int, columns: Sequence[str]) -> Iterator[Any]:
    """A value for each row of a row group; where it breaks off, a `BadRow` for each of the rest."""
    names = file.schema_arrow.names
    needed = [name for name in columns if name in names]
    if columns[0] not in names:
        yield from repeat(dict.fromkeys(names), num_rows)
        return
    if twice := [name for name in needed if names.count(name) > 1]:
        yield from repeat(BadRow(f"column named twice: {twice[0]!r}"), num_rows)
        return
    num_read, failure = 0, "it holds fewer rows than its metadata says"
    try:
        for batch in file.iter_batches(256, row_groups=[group], columns=needed):
            num_read += len(batch)
            yield from _values(batch)
    except UNREADABLE as error:
        failure = _unreadable(error)
    yield from repeat(
        BadRow(f"{failure}; nothing from this row on to the end of its row group was read"), num_rows - num_read
    )


def _values(batch: pa.RecordBatch) -> list[Any]:
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):  # Parquet does not check its strings; no type of Python holds every time
        columns = [[_cell(value) for value in column] for column in batch.columns]
        return [dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]


def _cell(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8: {error.reason} at byte {error.start}")
    except (ValueError, OverflowError) as error:
        return BadRow(f"unreadable value: {error}")


READERS: dict[str, Callable[[Piece, Sequence[str]], Iterator[tuple[int, Any]]]] = {
    "jsonl": _read_jsonl,
    "text": _read_text,
    "json": _read_json,
    "csv": _read_csv,
    "parquet": _read_parquet,
}

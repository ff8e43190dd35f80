"""The rows of a file, as they are: a piece of a file comes in, raw rows go out, one by one, in bounded memory.

jsonl, csv, parquet, plain text and JSON arrays; gzip of all but parquet. A row that cannot be read is handed on as a
`BadRow` with the reason, in its place, so that no row is ever lost; so is a cell of a row.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fac_ray.sources import Piece, Source, open_source

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
    except (EOFError, zlib.error, OSError, pa.ArrowInvalid) as error:
        if getattr(error, "errno", None) is not None:  # the disk or the network, not the content
            raise
        yield row + 1, BadRow(f"unreadable file: {str(error).splitlines()[0]}; nothing from this row on was read")


def _open_bytes(source: Source) -> io.BufferedReader | gzip.GzipFile:
    raw = open_source(source)
    if source.name.endswith(".gz"):
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


def _read_csv(piece: Piece, _columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """Rows under a header line. Quotes that do not close cost the line they stand on, not the lines after it."""
    csv.field_size_limit(MAX_ROW_BYTES)
    with _open_bytes(piece.source) as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
        records = _csv_records(text)
        header = next(records, None)
        if isinstance(header, BadRow):
            yield 0, BadRow(f"{header}; this is the header, so nothing after it was read")
        elif header is not None:
            for row, fields in enumerate(records):
                yield row, _csv_row(header, fields)


def _csv_row(header: list[str], fields: list[str] | BadRow) -> dict[str, str] | BadRow:
    if isinstance(fields, BadRow):
        return fields
    if not fields:
        return BadRow("blank line")
    if len(fields) != len(header):
        return BadRow(f"wrong number of fields: {len(fields)}, but the header has {len(header)}")
    return dict(zip(header, fields, strict=True))


def _csv_records(text: io.TextIOWrapper) -> Iterator[list[str] | BadRow]:
    """The records of a CSV file. After a malformed one, reading goes on at the line behind its first line."""
    waiting: deque[str] = deque()
    used: list[str] = []

    def feed() -> Iterator[str]:
        while line := waiting.popleft() if waiting else text.readline():
            used.append(line)
            yield line

    reader = csv.reader(feed(), strict=True)
    while True:
        used.clear()
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield BadRow(f"not CSV: {error}")
            waiting.extendleft(reversed(used[1:]))
            reader = csv.reader(feed(), strict=True)


def _read_parquet(piece: Piece, columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
    with open_source(piece.source) as stream, pq.ParquetFile(stream) as file:
        names = file.schema_arrow.names
        row = piece.first_row
        for group in range(piece.start, file.num_row_groups if piece.stop is None else piece.stop):
            if columns[0] in names:
                needed = [name for name in columns if name in names]
                for batch in file.iter_batches(256, row_groups=[group], columns=needed):
                    yield from enumerate(_values(batch), start=row)
                    row += len(batch)
            else:
                for _ in range(file.metadata.row_group(group).num_rows):
                    yield row, dict.fromkeys(names)
                    row += 1


def _values(batch: pa.RecordBatch) -> list[Any]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:  # Parquet does not check its strings: then cell by cell
        columns = [[_cell(value) for value in column] for column in batch.columns]
        return [dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]


def _cell(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8: {error.reason} at byte {error.start}")


READERS: dict[str, Callable[[Piece, Sequence[str]], Iterator[tuple[int, Any]]]] = {
    "jsonl": _read_jsonl,
    "text": _read_text,
    "json": _read_json,
    "csv": _read_csv,
    "parquet": _read_parquet,
}

"""A corpus becomes samples: its files come in, SAMPLES parts and REJECTED parts go out, one pass on Ray Data.

Rows in = samples + rejected rows; a bad row never stops a run, too many of them do. Parts, their names and their rows
depend on the files alone: a corpus that is read again gives the same parts and the same ids. What is ingested already
is not read again, so an added file costs only itself, and an interruption only the pieces that were being read.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray

from fac_ray.artifacts import parquet_files, read_table, write_table
from fac_ray.config import CorpusConfig
from fac_ray.corpus.ledger import Entry, keep_ingested, part_name, piece_id, piece_keys, write_entry
from fac_ray.corpus.rows import BadRow, read_rows
from fac_ray.corpus.samples import needed_columns, read_sample
from fac_ray.corpus.sources import Piece, Source, count_line_breaks, list_sources, source_fingerprint, split_source
from fac_ray.schema import REJECTED, SAMPLES, id_numbers

if TYPE_CHECKING:
    from fac_ray.progress import Progress

__all__ = ["ingest_corpus", "plan_shards", "source_fingerprint"]

PART_ROWS = 2000
"""Rows of a piece that go into one part: at most so many samples, and the rest of them rejected."""
PART_CHARACTERS = 1 << 26
"""Characters of the samples of one part, but for its last: what a task holds in memory, and an Arrow column can."""
SHARD_BYTES = 128 << 20
"""What one task reads: pieces of larger jsonl, text and parquet files, several of the smaller files."""


def ingest_corpus(
    corpus: CorpusConfig, samples_folder: Path, rejected_folder: Path, max_rejected_fraction: float, progress: Progress
) -> dict[str, int]:
    """Write a corpus's samples and rejected rows; returns num_rows, num_samples, num_rejected and num_duplicates.

    Duplicates (samples whose content occurred before) are kept and counted. With `limit`, the first rows in the order
    of the files are read, by one task. The progress counts rows. All workers must see both folders. Pieces of files
    that lie in the folders from before are kept; those of files that are gone or changed are removed.

    Raises:
        ConfigError: a path matches no file, or a file's format cannot be told.
        ValueError: more than `max_rejected_fraction` of the rows were rejected, or there is no sample.
        OSError: a folder cannot be written.
    """
    folders = {"samples": samples_folder.resolve(), "rejected": rejected_folder.resolve()}
    entries: dict[str, Entry] = {}
    for found in _ingest_pieces(corpus, folders):
        entries |= found
        progress.advance(sum(entry.num_rows for entry in found.values()))
    num_samples = sum(entry.num_samples for entry in entries.values())
    num_rejected = sum(entry.num_rejected for entry in entries.values())
    if num_rejected == 0:
        write_table(rejected_folder / "none.parquet", REJECTED.empty_table())
    reasons = sum((Counter(entry.reasons) for entry in entries.values()), Counter[str]())
    _check_rejected(corpus, num_samples, num_rejected, reasons, rejected_folder, max_rejected_fraction)
    return {
        "num_rows": num_samples + num_rejected,
        "num_samples": num_samples,
        "num_rejected": num_rejected,
        "num_duplicates": num_samples - _num_contents(samples_folder),
    }


def _ingest_pieces(corpus: CorpusConfig, folders: dict[str, Path]) -> Iterator[dict[str, Entry]]:
    """The entries of the corpus's pieces: first of those that are ingested already, then of the others as they are
    ingested, a task for each shard of them."""
    sources, whole = list_sources(corpus), corpus.limit is not None
    keys = piece_keys([[Piece(s)] if whole else split_source(s, SHARD_BYTES) for s in sources], corpus)
    entries = keep_ingested(folders, list(keys.values()))
    if whole and len(entries) < len(keys):  # how much is read of a file depends on the others
        entries = keep_ingested(folders, [])
    yield entries
    missing = {piece for piece, key in keys.items() if key not in entries}
    unread = {location for location, _ in missing}
    places = {piece: (place, key) for place, (piece, key) in enumerate(keys.items())}
    items = []
    for shard in plan_shards([s for s in sources if s.location in unread], SHARD_BYTES, corpus.limit):
        pieces = [(piece, *places[piece_id(piece)]) for piece in shard if piece_id(piece) in missing]
        items += [{"pieces": json.dumps(pieces)}] if pieces else []
    for row in _map_items(items, partial(_ingest_shard, corpus=corpus, folders=folders)).iter_rows() if items else ():
        yield {key: Entry(*entry) for key, entry in json.loads(row["entries"]).items()}


def plan_shards(sources: list[Source], shard_bytes: int, limit: int | None) -> list[list[Piece]]:
    """What each task reads, in the order of the files: pieces of large files, or small files up to `shard_bytes`.

    A `limit` needs the one order of all rows, so then everything is one shard, of which only the beginning is read.
    """
    if limit is not None:
        return [[Piece(source) for source in sources]]
    shards: list[list[Piece]] = []
    room_bytes = 0
    for pieces in _number_rows([split_source(source, shard_bytes) for source in sources]):
        for piece in pieces:
            size_bytes = piece.source.size_bytes // len(pieces)
            if not shards or size_bytes > room_bytes:
                shards.append([])
                room_bytes = shard_bytes
            shards[-1].append(piece)
            room_bytes -= size_bytes
    return shards


def _number_rows(files: list[list[Piece]]) -> list[list[Piece]]:
    """The pieces, those of files of lines with their first rows: all lines are counted, in one pass of its own."""
    items = [
        {"file": file, "index": index, "piece": json.dumps(piece)}
        for file, pieces in enumerate(files)
        for index, piece in enumerate(pieces)
        if piece.needs_first_row
    ]
    if not items:
        return files
    breaks = {(row["file"], row["index"]): row["num_breaks"] for row in _map_items(items, _count_breaks).iter_rows()}
    numbered = []
    for file, pieces in enumerate(files):
        before = accumulate((breaks.get((file, index), 0) for index in range(len(pieces))), initial=1)
        rows = zip(pieces, before, strict=False)
        numbered.append([p._replace(first_row=num) if p.needs_first_row and p.start else p for p, num in rows])
    return numbered


def _count_breaks(batch: pa.Table) -> pa.Table:
    [text] = batch["piece"].to_pylist()
    piece = _piece(json.loads(text))
    return batch.select(["file", "index"]).append_column("num_breaks", pa.array([count_line_breaks(piece)]))


def _ingest_shard(batch: pa.Table, corpus: CorpusConfig, folders: dict[str, Path]) -> pa.Table:
    """Write the parts and the entry of each piece of a shard; returns the entries."""
    [text] = batch["pieces"].to_pylist()
    entries, room = {}, corpus.limit
    for fields, place, key in json.loads(text):
        rows = islice(_read_piece(_piece(fields), needed_columns(corpus)), room)
        entries[key] = entry = _ingest_rows(rows, corpus, folders, place, key)
        write_entry(folders["samples"], key, entry)
        room = None if room is None else room - entry.num_rows
    return pa.table({"entries": [json.dumps(entries)]})


def _ingest_rows(
    rows: Iterator[tuple[str, int, Any]], corpus: CorpusConfig, folders: dict[str, Path], place: int, key: str
) -> Entry:
    """Write the parts of a piece."""
    num_samples = num_rejected = part = 0
    reasons: Counter[str] = Counter()
    part_bytes: dict[str, list[int]] = {name: [] for name in folders}
    while True:
        good, bad = _sort_rows(rows, corpus)
        if not len(good) + len(bad):
            break
        for name, table in (("samples", good), ("rejected", bad)):
            if len(table):
                path = folders[name] / part_name(place, part, key)
                write_table(path, table)
                part_bytes[name].append(path.stat().st_size)
        num_samples, num_rejected, part = num_samples + len(good), num_rejected + len(bad), part + 1
        reasons.update(reason.partition(":")[0] for reason in bad["reason"].to_pylist())
    return Entry(num_samples, num_rejected, dict(reasons), part_bytes)


def _read_piece(piece: Piece, columns: list[str]) -> Iterator[tuple[str, int, Any]]:
    for source_row, value in read_rows(piece, columns):
        yield piece.source.name, source_row, value


def _sort_rows(rows: Iterator[tuple[str, int, Any]], corpus: CorpusConfig) -> tuple[pa.Table, pa.Table]:
    """SAMPLES and REJECTED of one part: every row that is taken from `rows` is in one of them."""
    good, bad, room_characters = [], [], PART_CHARACTERS
    for source_file, source_row, value in islice(rows, PART_ROWS):
        try:
            good.append(read_sample(value, corpus, source_file, source_row))
            room_characters -= len(good[-1]["text"])
        except BadRow as reason:
            bad.append({"source_file": source_file, "source_row": source_row, "reason": str(reason)})
        if room_characters < 0:
            break
    return pa.Table.from_pylist(good, SAMPLES), pa.Table.from_pylist(bad, REJECTED)


def _check_rejected(
    corpus: CorpusConfig,
    num_samples: int,
    num_rejected: int,
    reasons: Counter[str],
    folder: Path,
    limit_fraction: float,
) -> None:
    num_rows = num_samples + num_rejected
    if num_samples and num_rejected / num_rows <= limit_fraction:
        return
    paths = corpus.path if isinstance(corpus.path, str) else ", ".join(corpus.path)
    if not num_rows:
        raise ValueError(f"{paths}: the files hold no row")
    common = ", ".join(f"{reason} ({num})" for reason, num in reasons.most_common(3))
    raise ValueError(
        f"{paths}: {num_rejected} of {num_rows} rows were rejected; run.max_rejected_fraction allows "
        f"{limit_fraction:g} of them, and at least one must be left. Most common: {common}. "
        f"First: {_first_reason(folder)}. All are in {folder}"
    )


def _first_reason(folder: Path) -> str:
    [first] = read_table(parquet_files(folder)[0]).slice(0, 1).to_pylist()
    return f"{first['source_file']}, row {first['source_row']}: {first['reason']}"


def _num_contents(samples_folder: Path) -> int:
    """Number of different contents, told apart by 64 bits of their ids."""
    numbers = [np.zeros(0, np.uint64)]
    for path in parquet_files(samples_folder):
        numbers.append(id_numbers(read_table(path, columns=["content_id"])["content_id"]))
    return len(np.unique(np.concatenate(numbers)))


def _map_items(items: list[dict[str, Any]], function: Any) -> ray.data.Dataset:
    """`function` over tables of one item each, one task each."""
    context = ray.data.DataContext.get_current().copy()
    context.raise_original_map_exception = True  # with its errno, by which a full disk is known
    with ray.data.DataContext.current(context):
        dataset = ray.data.from_items(items, override_num_blocks=len(items))
        return dataset.map_batches(function, batch_size=1, batch_format="pyarrow")


def _piece(fields: list[Any]) -> Piece:
    """A piece as it comes out of JSON."""
    source, *rest = fields
    return Piece(Source(*source), *rest)

"""Which pieces of a corpus's files are ingested already: their parts stay when other files come, change or go.

A piece is known by a key, a hash of its file's name and version and of how its rows are read. Its parts carry the key
in their names, and its entry, which is written after the last of them, says how large they are. Before the key stands
the place of the piece in the corpus, so that parts sort as the rows of the files do; where another file came in
between, parts are renamed and nothing else. So a corpus that grew lies there as one that was read at once.

    samples/<corpus>/   00000003-000000-<key>.parquet ...   _pieces/<key>.json
    rejected/<corpus>/  00000003-000000-<key>.parquet ...
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fac_ray.artifacts import parquet_files, write_json
from fac_ray.config import CorpusConfig
from fac_ray.corpus.sources import Piece, source_version
from fac_ray.schema import hash_of

ENTRIES = "_pieces"

PieceId = tuple[str, int]
"""Location of the file and start of the piece in it."""


class Entry(NamedTuple):
    """What became of a piece's rows."""

    num_samples: int
    num_rejected: int
    reasons: dict[str, int]
    """Kind of reason to number of rejected rows."""
    part_bytes: dict[str, list[int]]
    """`samples` and `rejected` to the sizes of the parts there, in the order of their numbers."""

    @property
    def num_rows(self) -> int:
        return self.num_samples + self.num_rejected


def piece_id(piece: Piece) -> PieceId:
    """Which piece of which file."""
    return piece.source.location, piece.start


def piece_keys(files: Sequence[Sequence[Piece]], corpus: CorpusConfig) -> dict[PieceId, str]:
    """The key of every piece, in the order of the corpus's rows.

    With a `limit`, what is read of one file depends on those before it, so all of them stand in every key.
    """
    read_as = corpus.model_dump(mode="json", exclude={"path"})
    sources = [pieces[0].source for pieces in files]
    versions = {s.location: [s.name, s.size_bytes, source_version(s)] for s in sources}
    together = list(versions.values()) if corpus.limit is not None else []
    return {
        piece_id(piece): hash_of(
            json.dumps([read_as, versions[piece.source.location], piece.start, piece.stop, together])
        )[:16]
        for pieces in files
        for piece in pieces
    }


def part_name(place: int, part: int, key: str) -> str:
    """File name of part number `part` of the piece at `place`."""
    return f"{place:08d}-{part:06d}-{key}.parquet"


def write_entry(samples_folder: Path, key: str, entry: Entry) -> None:
    """Say that a piece is ingested; its parts are written already."""
    write_json(samples_folder / ENTRIES / f"{key}.json", entry._asdict())


def read_entries(samples_folder: Path) -> dict[str, Entry]:
    """Key to entry of every ingested piece."""
    paths = sorted((samples_folder / ENTRIES).glob("*.json"))
    return {path.stem: Entry(**json.loads(path.read_text())) for path in paths}


def keep_ingested(folders: Mapping[str, Path], keys: Sequence[str]) -> dict[str, Entry]:
    """Remove everything that is not of an ingested piece among `keys`, move the rest to its place, and return it: key
    to entry. A piece that lacks a part, or has one of another size, counts as not ingested.

    `folders`: `samples` and `rejected`; they are made where they are missing.
    """
    found = {name: _parts(folder) for name, folder in folders.items()}
    kept, wanted = {}, set(keys)
    for key, entry in read_entries(folders["samples"]).items():
        sizes = {name: [part.stat().st_size for part in parts[key]] for name, parts in found.items()}
        if key in wanted and sizes == entry.part_bytes:
            kept[key] = entry
        else:
            (folders["samples"] / ENTRIES / f"{key}.json").unlink()
    places = {key: place for place, key in enumerate(keys) if key in kept}
    for parts in found.values():
        for key, paths in parts.items():
            for path in paths:
                if key in places:
                    path.rename(path.with_name(f"{places[key]:08d}{path.name[8:]}"))
                else:
                    path.unlink()
    return kept


def _parts(folder: Path) -> dict[str, list[Path]]:
    """Key to its parts, in the order of their numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[Path]] = defaultdict(list)
    for path in parquet_files(folder):
        parts[path.stem.rpartition("-")[2]].append(path)
    return parts

"""The files of a corpus: the paths of a `CorpusConfig` come in, files and the pieces to read them in go out.

A path is a file, a folder or a glob; local, `s3://`, `gs://` or `hf://`. The format is told by the ending.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from hashlib import blake2b
from typing import NamedTuple

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from fac_ray.config import ConfigError, CorpusConfig
from fac_ray.schema import hash_of

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
UNREADABLE = (EOFError, zlib.error, OSError, pa.ArrowInvalid, pa.ArrowNotImplementedError)
"""What reading raises at bytes that are not what they should be; `OSError` only without an errno."""
HASHED_BYTES = 16 << 20
"""Local files up to this size are fingerprinted by content: one that is written anew with the same text is the same."""
GLOB = re.compile(r"[*?\[]")


class Source(NamedTuple):
    """One file of a corpus."""

    name: str
    """The path as it was given; `source_file` of the samples."""
    location: str
    """The same, absolute, so that every worker finds it."""
    format: str
    size_bytes: int
    modified_ns: int


class Piece(NamedTuple):
    """Part of a file: rows that begin at bytes [start, stop) of a jsonl or text file, row groups [start, stop) of a
    parquet file. `stop` None: to the end."""

    source: Source
    start: int = 0
    stop: int | None = None
    first_row: int = 0

    @property
    def needs_first_row(self) -> bool:
        """Whether lines must be counted to know `first_row`: the pieces of a file that was split by bytes."""
        return self.stop is not None and self.source.format in ("jsonl", "text")


def list_sources(corpus: CorpusConfig) -> list[Source]:
    """The files of a corpus, each once: in the order of its paths, and by name within a folder or glob.

    Raises:
        ConfigError: a path matches no file, or a file's format cannot be told from its ending.
    """
    found: dict[str, Source] = {}
    for path in (corpus.path,) if isinstance(corpus.path, str) else corpus.path:
        sources = _expand(path, corpus.format)
        if not sources:
            raise ConfigError(
                f"path {path!r}: no file matches; a folder or glob is searched for files that end in "
                f"{', '.join(FORMATS)} or one of these and .gz"
            )
        for source in sources:
            found.setdefault(source.location, source)
    return list(found.values())


def source_fingerprint(corpus: CorpusConfig) -> str:
    """Hash of all that the texts of a corpus's samples depend on: its files, and the keys that say how they are read.

    The label is not among them: it decides neither which rows are samples nor what a model sees of them.
    A local file of up to 16 MiB counts by its content, a larger or remote one by size and time of change (`hf://`: by
    the hub's own hash).

    Raises:
        ConfigError: as `list_sources`.
    """
    files = [[s.name, s.size_bytes, source_version(s)] for s in list_sources(corpus)]
    keys = corpus.model_dump(mode="json", exclude={"path", "label"})
    return hash_of(json.dumps([files, keys], sort_keys=True))


def source_version(source: Source) -> str | int:
    """What changes when the file's content does; see `source_fingerprint`."""
    if source.location.startswith("hf://"):
        from huggingface_hub import HfFileSystem

        return HfFileSystem().ukey(source.location)
    if "://" in source.location or source.size_bytes > HASHED_BYTES:
        return source.modified_ns
    with open_source(source) as stream:
        return blake2b(stream.read(), digest_size=16).hexdigest()


def split_source(source: Source, piece_bytes: int) -> list[Piece]:
    """The pieces of a file, in order, each of about `piece_bytes`; one for a file that cannot be split.

    Those of a jsonl or text file lack `first_row`, see `count_line_breaks`.
    """
    if source.size_bytes > piece_bytes and source.format in ("jsonl", "text") and not source.name.endswith(".gz"):
        starts = range(0, source.size_bytes, piece_bytes)
        return [Piece(source, start, min(start + piece_bytes, source.size_bytes)) for start in starts]
    if source.size_bytes > piece_bytes and source.format == "parquet":
        try:
            return _split_parquet(source, piece_bytes)
        except UNREADABLE as error:
            if getattr(error, "errno", None) is not None:
                raise
            # Not a Parquet file; reading the whole says so in a rejected row.
    return [Piece(source)]


def count_line_breaks(piece: Piece) -> int:
    """Number of rows that begin in the piece, not counting the file's first: each stands behind a line break."""
    assert piece.stop is not None
    start = max(piece.start - 1, 0)
    remaining, num_breaks = piece.stop - 1 - start, 0
    with open_source(piece.source) as stream:
        stream.seek(start)
        while remaining > 0 and (chunk := stream.read(min(remaining, 1 << 22))):
            num_breaks += chunk.count(b"\n")
            remaining -= len(chunk)
    return num_breaks


def open_source(source: Source) -> pa.NativeFile:
    """The file's bytes, seekable."""
    filesystem, path = _filesystem(source.location)
    return filesystem.open_input_file(path)


def _split_parquet(source: Source, piece_bytes: int) -> list[Piece]:
    with open_source(source) as stream, pq.ParquetFile(stream) as file:
        groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
    pieces, size_bytes, row, first_row, start = [], 0, 0, 0, 0
    for number, group in enumerate(groups, start=1):
        row += group.num_rows
        size_bytes += group.total_byte_size
        if size_bytes >= piece_bytes or number == len(groups):
            pieces.append(Piece(source, start, number, first_row))
            size_bytes, first_row, start = 0, row, number
    return pieces


def _expand(path: str, given_format: str | None) -> list[Source]:
    """The files that a file name, folder or glob stands for."""
    base, pattern = _split_glob(path)
    filesystem, root = _filesystem(base)
    info = filesystem.get_file_info(root)
    if info.type == pa.fs.FileType.File:
        return [_source(path, root, info, given_format)]
    if info.type != pa.fs.FileType.Directory:
        return []
    matches = re.compile(_glob_regex(pattern)).fullmatch if pattern else _has_known_ending
    sources = []
    for info in filesystem.get_file_info(pa.fs.FileSelector(root, recursive=True)):
        inner = info.path[len(root.rstrip("/")) + 1 :]
        hidden = any(part.startswith((".", "_")) for part in inner.split("/"))
        if info.type == pa.fs.FileType.File and not hidden and matches(inner):
            sources.append(_source(f"{base.rstrip('/')}/{inner}" if base else inner, info.path, info, given_format))
    return sorted(sources)


def _split_glob(path: str) -> tuple[str, str]:
    """The folder before the first wildcard, and the rest as a pattern; a path that exists as it stands has none."""
    wildcard = GLOB.search(path)
    if wildcard is None or ("://" not in path and os.path.exists(path)):
        return path, ""
    cut = path.rfind("/", 0, wildcard.start()) + 1
    return path[:cut], path[cut:]


def _glob_regex(pattern: str) -> str:
    """A regular expression for a glob: `**/` any folders, `*` and `?` within one name, `[...]` a set."""
    tokens = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[!?[^\]]+\])", pattern)
    return "".join(
        tokens.get(p) or (p.replace("[!", "[^", 1) if p.startswith("[") and len(p) > 2 else re.escape(p)) for p in parts
    )


def _source(name: str, path: str, info: pa.fs.FileInfo, given_format: str | None) -> Source:
    location = name if "://" in name else path
    format_ = given_format or FORMATS.get(_ending(name))
    if format_ is None:
        raise ConfigError(
            f"path {name!r}: the ending does not say the format; "
            "set `format` to jsonl, csv, parquet or text, or narrow the path"
        )
    return Source(name, location, format_, info.size or 0, info.mtime_ns or 0)


def _ending(name: str) -> str:
    return os.path.splitext(name.removesuffix(".gz"))[1].lower()


def _has_known_ending(name: str) -> bool:
    return _ending(name) in FORMATS


def _filesystem(path: str) -> tuple[pa.fs.FileSystem, str]:
    if path.startswith("hf://"):
        from huggingface_hub import HfFileSystem

        return pa.fs.PyFileSystem(pa.fs.FSSpecHandler(HfFileSystem())), path.removeprefix("hf://")
    if "://" not in path:
        return pa.fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path))
    try:
        return pa.fs.FileSystem.from_uri(path)
    except pa.ArrowInvalid as error:
        raise ConfigError(f"path {path!r}: {error}; allowed are local paths, s3://, gs:// and hf://") from error

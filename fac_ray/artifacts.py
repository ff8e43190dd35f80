"""The folder of a run: where each stage writes, and how a finished stage is known from an interrupted one.

A stage is finished when its folder holds `_SUCCESS.json`, which is written last and by a rename. The marker carries
the stage's fingerprint: a hash of everything that its result depends on; and the size of its Parquet files, so that a
file that was lost or cut is noticed. Same fingerprint and size: the stage is skipped. Otherwise it is run again, and
stages that build on it follow because their fingerprints contain its own.

A stage of many rows need not begin anew: rows that an interrupted attempt left, or one whose corpus had other files,
stay while what each row depends on is the same (`rows`).

    runs/<name>/  config.json  manifest.json  report.json  report.html
                  samples/<corpus>/  rejected/<corpus>/  activations/<corpus>/  coverage/<corpus>/
                  relevance/  gaps/  synthesis/  training/  evaluation/
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet

from fac_ray.schema import hash_of

MARKER = "_SUCCESS.json"
STORAGE_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EEXIST),
    errno.EIO,
}
"""No room or a limit; no permission; a file where a folder should be; a broken disk."""


def fingerprint(**parts: Any) -> str:
    """Hash of named JSON-serialisable parts: the identity of a stage's config and inputs."""
    return hash_of(json.dumps(parts, sort_keys=True, default=str))


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one, never a part."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    with _replacing(Path(path)) as part:
        part.write_text(text, encoding="utf-8")


def write_table(path: str | Path, table: pa.Table) -> None:
    """Write one Parquet file atomically."""
    with _replacing(Path(path)) as part:
        pa.parquet.write_table(table, part, compression="zstd")


def read_table(folder_or_file: str | Path, columns: list[str] | None = None) -> pa.Table:
    """All rows of a Parquet file, or of every Parquet file directly in a folder, in the order of file names.

    Raises:
        FileNotFoundError: there is no Parquet file.
    """
    paths = parquet_files(folder_or_file)
    if not paths:
        raise FileNotFoundError(f"{folder_or_file}: no Parquet file here")
    return pa.concat_tables(pa.parquet.read_table(path, columns=columns) for path in paths)


def parquet_files(folder_or_file: str | Path) -> list[Path]:
    """The file itself, or the Parquet files directly in the folder, sorted by name."""
    path = Path(folder_or_file)
    return [path] if path.is_file() else sorted(path.glob("*.parquet"))


@contextmanager
def storing(folder: Path) -> Iterator[None]:
    """A failure inside the block because the folder cannot take what is written, here or in a remote task, says what
    to do.

    Raises:
        OSError: no room, no permission, or a limit.
    """
    try:
        yield
    except Exception as error:
        cause = _first_cause(error)
        if not isinstance(cause, OSError) or cause.errno not in STORAGE_ERRORS:
            raise
        raise OSError(
            f"{folder}: cannot be written ({os.strerror(cause.errno)}); make room, allow it, or set another "
            "run.folder. What is stored stays, and the same command goes on from it"
        ) from error


@contextmanager
def reading(*folders: Path) -> Iterator[None]:
    """A failure inside the block because a Parquet file of the folders is damaged names the file and what to do.

    Raises:
        ValueError: there is such a file.
    """
    try:
        yield
    except Exception as error:
        for path in (path for folder in folders for path in parquet_files(folder)):
            try:
                pyarrow.parquet.read_table(path)
            except (OSError, pa.ArrowException) as damage:
                raise ValueError(
                    f"{path}: a damaged Parquet file ({str(damage).splitlines()[0]}); remove this file and run the "
                    "same command again, which makes what it held once more"
                ) from error
        raise


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class Stage:
    """One stage's folder in a run.

    Use:
        stage = Stage(run_folder / "gaps", fingerprint(...))
        if not stage.finished:
            stage.begin()
            ...write into stage.folder...
            stage.finish(num_gaps=12)
        facts = stage.facts
    """

    def __init__(self, folder: str | Path, identity: str, needs: Sequence[Stage] = (), rows: str | None = None) -> None:
        """`identity` is the fingerprint; `needs` are the stages whose results this one is made from; `rows` is the
        fingerprint of what a stored row depends on besides its own source (None: all that the stage depends on)."""
        self.folder = Path(folder)
        self.identity = identity
        self.rows = rows or identity
        self.needs = tuple(needs)
        self._started_s: float | None = None

    @property
    def marker(self) -> dict[str, Any] | None:
        """What `finish` wrote, whatever the fingerprint; None if the stage never finished."""
        return _read_marker(self.folder)

    @property
    def finished(self) -> bool:
        """Whether the folder holds the result of exactly this fingerprint, and holds it whole."""
        marker = self.marker
        if marker is None or marker["fingerprint"] != self.identity:
            return False
        return marker.get("parquet_bytes") == _parquet_bytes(self.folder)

    @property
    def facts(self) -> dict[str, Any]:
        """The named facts that `finish` stored, with `seconds`."""
        marker = self.marker
        assert marker is not None, f"{self.folder} is not finished"
        return marker["facts"]

    def begin(self, keep_partial: bool = False) -> Path:
        """The folder, ready to write. What an earlier attempt left is removed; with `keep_partial`, it stays if its
        rows depend on the same.

        Raises:
            FileExistsError: the folder holds files that no stage has written.
        """
        started = self.folder / "_STARTED.json"
        if not started.is_file() and self.folder.is_dir() and any(self.folder.iterdir()):
            raise FileExistsError(f"{self.folder}: holds files that are not of a run; choose another run.folder")
        same = started.is_file() and json.loads(started.read_text()).get("rows") == self.rows
        if self.folder.exists() and not (keep_partial and same):
            shutil.rmtree(self.folder)
        (self.folder / MARKER).unlink(missing_ok=True)  # first: from here on the folder is in no finished state
        write_json(started, {"fingerprint": self.identity, "rows": self.rows})
        self._started_s = time.monotonic()
        return self.folder

    def finish(self, **facts: Any) -> None:
        """Mark the stage as finished, last of all, with facts worth reporting and the seconds since `begin`."""
        assert self._started_s is not None, "begin() comes first"
        seconds = round(time.monotonic() - self._started_s, 3)
        marker = {
            "fingerprint": self.identity,
            "finished_at": _now(),
            "parquet_bytes": _parquet_bytes(self.folder),
            "needs": {os.path.relpath(stage.folder, self.folder): stage.identity for stage in self.needs},
            "facts": {**facts, "seconds": seconds},
        }
        write_json(self.folder / MARKER, marker)


def current_marker(folder: str | Path) -> dict[str, Any] | None:
    """The marker of a finished stage, if what it was made from still lies there unchanged; else None.

    After a changed config has redone a stage, the stages behind it are not current until they are redone too.
    """
    marker = _read_marker(Path(folder))
    if marker is None:
        return None
    for need, identity in marker["needs"].items():
        found = current_marker(os.path.normpath(Path(folder) / need))
        if found is None or found["fingerprint"] != identity:
            return None
    return marker


def _read_marker(folder: Path) -> dict[str, Any] | None:
    path = folder / MARKER
    return json.loads(path.read_text()) if path.is_file() else None


def _first_cause(error: BaseException) -> BaseException:
    """What a remote task raised, behind the failed task and what stands around it."""
    while isinstance(cause := getattr(error, "cause", None) or error.__cause__, BaseException):
        error = cause
    return error


def _parquet_bytes(folder: Path) -> int:
    """Size of all Parquet files directly in the folder."""
    return sum(path.stat().st_size for path in parquet_files(folder))


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

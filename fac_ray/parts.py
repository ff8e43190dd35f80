"""The stored parts of a corpus's activations, and which of them count.

Ray Data commits the ids of a part after the part is whole: `_checkpoint/<name>.parquet` holds the ids of the rows of
`<name>-<n>.parquet`. Before a corpus is measured on, its folder is put in order: only committed parts stay, only those
that are whole, and in them only rows of samples that the corpus still has.

    activations/<corpus>/  <name>-<n>.parquet ...  _checkpoint/<name>.parquet ...
"""

from __future__ import annotations

import logging
import uuid
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import UInt64

from fac_ray.artifacts import parquet_files, write_table

CHECKPOINT_FOLDER = "_checkpoint"
PENDING = ".pending.parquet"
"""How the ids of a part that may not be whole are named."""

logger = logging.getLogger(__name__)


class Totals(NamedTuple):
    """What the committed parts hold."""

    num_samples: int
    num_tokens: int
    num_errors: int
    num_truncated: int


def committed_ids(folder: Path) -> list[Path]:
    """The files of committed ids, sorted by name."""
    files = (folder / CHECKPOINT_FOLDER).glob("*.parquet")
    return sorted(path for path in files if not path.name.endswith(PENDING))


def committed_totals(folder: Path) -> Totals:
    """Sums over the parts whose ids are committed; a part that may not be whole is not read."""
    totals = Totals(0, 0, 0, 0)
    for part in _committed_parts(folder):
        rows = pq.read_table(part, columns=["num_tokens", "truncated", "error"])
        found = (
            rows.num_rows,
            pc.sum(rows["num_tokens"]).as_py() or 0,
            rows.num_rows - rows["error"].null_count,
            pc.sum(rows["truncated"]).as_py() or 0,
        )
        totals = Totals(*(a + b for a, b in zip(totals, found, strict=True)))
    return totals


def committed_errors(folder: Path) -> Counter[str]:
    """Why samples could not be measured, each reason with their number."""
    columns = (pq.read_table(part, columns=["error"])["error"] for part in _committed_parts(folder))
    return Counter(reason for column in columns for reason in column.drop_null().to_pylist())


def unmeasured_parts(folder: Path, samples: list[Path]) -> list[tuple[Path, int]]:
    """Put the folder in order; returns the parts of samples that are not all measured, each with how many are not."""
    committed = committed_ids(folder)
    if not committed:
        _remove_uncommitted(folder)
        return [(path, pq.read_metadata(path).num_rows) for path in samples]
    wanted = [_id_numbers(pq.read_table(path, columns=["sample_id"])) for path in samples]
    all_wanted = np.unique(np.concatenate(wanted))
    measured = [np.zeros(0, np.uint64)]
    for ids_path in committed:
        if (rows := _read_whole(folder, ids_path)) is not None:
            measured.append(_keep_wanted(folder, ids_path, rows, all_wanted))
    _remove_uncommitted(folder)
    all_measured = np.concatenate(measured)
    num_left = [int(np.count_nonzero(~np.isin(ids, all_measured))) for ids in wanted]
    return [(path, num) for path, num in zip(samples, num_left, strict=True) if num]


def _read_whole(folder: Path, ids_path: Path) -> pa.Table | None:
    """The rows of a committed part; None, and no longer committed, if they are not those that were committed."""
    parts = sorted(folder.glob(f"{ids_path.stem}-*.parquet"))
    try:
        rows = pa.concat_tables([pq.read_table(path) for path in parts]) if parts else None
        if rows is not None and rows.num_rows == pq.read_metadata(ids_path).num_rows:
            return rows
        reason = f"{0 if rows is None else rows.num_rows} rows of {pq.read_metadata(ids_path).num_rows}"
    except (OSError, pa.ArrowInvalid) as error:
        reason = str(error).splitlines()[0]
    logger.warning("%s: a stored part is damaged (%s); its samples are measured again", folder / ids_path.stem, reason)
    ids_path.unlink()
    return None


def _keep_wanted(folder: Path, ids_path: Path, rows: pa.Table, wanted: UInt64[np.ndarray, " n"]) -> np.ndarray:
    """Write a part anew without the rows of samples that the corpus has no more; returns the numbers of its ids.

    An interruption may cost the part, whose samples are then measured again, but never gives a row twice.
    """
    numbers = _id_numbers(rows)
    keep = np.isin(numbers, wanted)
    if keep.all():
        return numbers
    rows, name = rows.filter(pa.array(keep)), uuid.uuid4().hex
    if len(rows):
        write_table(folder / f"{name}-0.parquet", rows)
        write_table(ids_path.with_name(name + PENDING), rows.select(["sample_id"]))
    ids_path.unlink()
    if len(rows):
        ids_path.with_name(name + PENDING).rename(ids_path.with_name(f"{name}.parquet"))
    return numbers[keep]


def _remove_uncommitted(folder: Path) -> None:
    """Remove what an interruption left of parts: their rows are in no committed part."""
    for part in set(parquet_files(folder)) - set(_committed_parts(folder)):
        part.unlink()
    for pending in (folder / CHECKPOINT_FOLDER).glob(f"*{PENDING}"):
        pending.unlink()


def _committed_parts(folder: Path) -> list[Path]:
    committed = {path.stem for path in committed_ids(folder)}
    return [path for path in parquet_files(folder) if _ids_name(path) in committed]


def _ids_name(part: Path) -> str:
    return part.stem.rpartition("-")[0]


def _id_numbers(rows: pa.Table) -> UInt64[np.ndarray, " n"]:
    """The first 64 bits of the rows' sample ids."""
    return np.frombuffer(bytes.fromhex("".join(rows["sample_id"].to_pylist())), np.uint64)[::2]

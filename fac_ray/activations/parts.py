"""The stored parts of a corpus's activations, and which of them count.

Ray Data commits the ids of a part after the part is whole: `_checkpoint/<name>.parquet` holds the ids of the rows of
`<name>-<n>.parquet`. Before a corpus is measured on, its folder is put in order: only committed parts stay, only those
that are whole, and in them only rows of samples that the corpus still has.

    activations/<corpus>/  <name>-<n>.parquet ...  _checkpoint/<name>.parquet ...
"""

from __future__ import annotations

import logging
import uuid
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, UInt64

from fac_ray.artifacts import parquet_files, write_table
from fac_ray.schema import id_numbers

CHECKPOINT_FOLDER = "_checkpoint"
PENDING = ".pending.parquet"
"""How the ids of a part that may not be whole are named."""

logger = logging.getLogger(__name__)


class Totals(NamedTuple):
    """What the committed parts hold."""

    num_samples: int
    num_tokens: int
    num_sinks: int
    num_errors: int
    num_truncated: int


def committed_ids(folder: Path) -> list[Path]:
    """The files of committed ids, sorted by name."""
    files = (folder / CHECKPOINT_FOLDER).glob("*.parquet")
    return sorted(path for path in files if not path.name.endswith(PENDING))


def committed_totals(folder: Path) -> Totals:
    """Sums over the parts whose ids are committed; a part that may not be whole is not read."""
    totals = Totals(0, 0, 0, 0, 0)
    for part in _committed_parts(folder):
        rows = pq.read_table(part, columns=["num_tokens", "num_sinks", "truncated", "error"])
        found = (
            rows.num_rows,
            pc.sum(rows["num_tokens"]).as_py() or 0,
            pc.sum(rows["num_sinks"]).as_py() or 0,
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
    if not committed_ids(folder):
        _remove_uncommitted(folder)
        return [(path, pq.read_metadata(path).num_rows) for path in samples]
    wanted = [_id_numbers(path) for path in samples]
    measured = np.sort(_keep_wanted(folder, np.sort(np.concatenate(wanted))))
    _remove_uncommitted(folder)
    num_left = [int(np.count_nonzero(~_is_in(numbers, measured))) for numbers in wanted]
    return [(path, num) for path, num in zip(samples, num_left, strict=True) if num]


def _keep_wanted(folder: Path, wanted: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " m"]:
    """Remove rows of samples that are not among the sorted `wanted`, and damaged parts; returns the numbers of the ids
    whose rows stay."""
    parts: dict[str, list[Path]] = defaultdict(list)
    for path in parquet_files(folder):
        parts[_ids_name(path)].append(path)
    kept = [np.zeros(0, np.uint64)]
    for ids_path in committed_ids(folder):
        numbers = _id_numbers(ids_path)
        is_wanted = _is_in(numbers, wanted)
        if damage := _damage(parts[ids_path.stem], len(numbers)):
            logger.warning("%s-*: a stored part is damaged (%s); it is made again", folder / ids_path.stem, damage)
            ids_path.unlink()
            continue
        if not is_wanted.all():
            _rewrite(parts[ids_path.stem], ids_path, wanted)
        kept.append(numbers[is_wanted])
    return np.concatenate(kept)


def _damage(parts: list[Path], num_rows: int) -> str:
    """Why the files are not those with so many rows that were committed; empty if they are."""
    try:
        found = sum(pq.read_metadata(path).num_rows for path in parts)
    except (OSError, pa.ArrowException) as error:
        return str(error).splitlines()[0]
    return "" if found == num_rows else f"it has {found} of {num_rows} rows"


def _rewrite(parts: list[Path], ids_path: Path, wanted: UInt64[np.ndarray, " n"]) -> None:
    """Commit the rows of wanted samples under another name.

    An interruption may cost the part, whose samples are then measured again, but never gives a row twice.
    """
    rows = pa.concat_tables([pq.read_table(path) for path in parts])
    rows = rows.filter(pa.array(_is_in(id_numbers(rows["sample_id"]), wanted)))
    name = uuid.uuid4().hex
    pending = ids_path.with_name(name + PENDING)
    write_table(parts[0].with_name(f"{name}-0.parquet"), rows)
    write_table(pending, rows.select(["sample_id"]))
    ids_path.unlink()
    pending.rename(ids_path.with_name(f"{name}.parquet"))


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


def _is_in(numbers: UInt64[np.ndarray, " n"], ascending: UInt64[np.ndarray, " m"]) -> Bool[np.ndarray, " n"]:
    """Which numbers are among the sorted ones: n log m, where `np.isin` sorts all m again for every part."""
    if not len(ascending):
        return np.zeros(len(numbers), bool)
    at = np.minimum(np.searchsorted(ascending, numbers), len(ascending) - 1)
    return ascending[at] == numbers


def _id_numbers(path: Path) -> UInt64[np.ndarray, " n"]:
    """The numbers of the sample ids in a Parquet file."""
    return id_numbers(pq.read_table(path, columns=["sample_id"])["sample_id"])

"""What of a corpus's activations is counted already: it stays when parts come, so that only those are read.

A tally is the fold of the parts that it names. A part is never changed, only added or removed, and no name comes twice;
so a tally may be folded on while all of its parts are there. Which labels its samples had is in the digest of its rows:
if the sum is not that of the corpus's samples, the tally is stale.

    coverage/<corpus>/  tally.parquet (one row)  spans.parquet (the words around each exemplar's peak)
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int, UInt64

from fac_ray.artifacts import parquet_files, write_table
from fac_ray.config import MeasureConfig
from fac_ray.coverage.counts import UNLABELLED, FeatureCounts
from fac_ray.coverage.exemplars import TopExemplars
from fac_ray.schema import EXEMPLARS

TALLY, CUT = "tally.parquet", "spans.parquet"
SPANS = pa.schema([field for field in EXEMPLARS if field.name != "rank"])
COLUMNS = pa.schema(
    [
        ("parts", pa.list_(pa.string())),
        ("num_rows", pa.int64()),
        ("id_sum", pa.uint64()),
        ("counts", pa.large_binary()),
        ("exemplars", pa.large_binary()),
    ]
)

logger = logging.getLogger(__name__)


class RowSet(NamedTuple):
    """Order-free digest of a set of rows and their label classes: equal for equal sets; of unequal ones with a chance
    of about 2^-62."""

    num_rows: int = 0
    id_sum: int = 0

    def add(self, other: RowSet) -> RowSet:
        return RowSet(self.num_rows + other.num_rows, (self.id_sum + other.id_sum) % 2**64)

    @classmethod
    def of(cls, ids: UInt64[np.ndarray, " rows"], classes: Int[np.ndarray, " rows"]) -> RowSet:
        """sum of id * (1, 2 or 3, for each class another) mod 2^64."""
        weights = (classes - UNLABELLED + 1).astype(np.uint64)
        return cls(len(ids), int((ids * weights).sum(dtype=np.uint64)))


class Tally(NamedTuple):
    """The fold of some activation parts."""

    parts: frozenset[str]
    """File names of the parts."""
    rows: RowSet
    counts: FeatureCounts
    exemplars: TopExemplars

    @classmethod
    def empty(cls, measure: MeasureConfig, d_sae: int, num_kept: int) -> Tally:
        """The fold of no parts."""
        counts = FeatureCounts.empty(measure.grid, measure.threshold, d_sae)
        return cls(frozenset(), RowSet(), counts, TopExemplars.empty(num_kept))


def save_tally(folder: Path, tally: Tally) -> None:
    """Write what `load_tally` reads."""
    row = {
        "parts": sorted(tally.parts),
        "num_rows": tally.rows.num_rows,
        "id_sum": tally.rows.id_sum,
        "counts": tally.counts.to_bytes(),
        "exemplars": tally.exemplars.to_bytes(),
    }
    write_table(folder / TALLY, pa.Table.from_pylist([row], COLUMNS))


def load_tally(folder: Path, empty: Tally, parts_folder: Path) -> Tally:
    """The stored tally if all of its parts lie in `parts_folder`; else the empty one."""
    stored = _read(folder / TALLY)
    if stored is None:
        return empty
    [row] = stored.to_pylist()
    parts = frozenset(row["parts"])
    if not parts <= {path.name for path in parquet_files(parts_folder)}:
        return empty
    exemplars = TopExemplars.from_bytes(empty.exemplars.num_kept, row["exemplars"])
    return Tally(parts, RowSet(row["num_rows"], row["id_sum"]), FeatureCounts.from_bytes(row["counts"]), exemplars)


def save_spans(folder: Path, spans: pa.Table) -> None:
    """Write what `load_spans` reads."""
    write_table(folder / CUT, spans)


def load_spans(folder: Path, peaks: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Of PEAKS rows those whose spans are still to be cut, and the SPANS rows of the others."""
    stored = _read(folder / CUT)
    if stored is None or not len(stored):
        return peaks, SPANS.empty_table()
    at = pc.index_in(_keys(peaks), value_set=_keys(stored))
    found = pc.is_valid(at)
    return peaks.filter(pc.invert(found)), stored.take(at.drop_null()).select(SPANS.names).cast(SPANS)


def _keys(rows: pa.Table) -> pa.Array:
    """A text for each (feature, sample)."""
    keys = pc.binary_join_element_wise(rows["feature_id"].cast(pa.string()), rows["sample_id"], " ")
    return keys.combine_chunks()


def _read(path: Path) -> pa.Table | None:
    """A table that is a saving only: where it is damaged, what it saved is done again."""
    try:
        return pq.read_table(path) if path.is_file() else None
    except (OSError, pa.ArrowException) as error:
        logger.warning("%s: damaged (%s); the corpus is counted anew", path, str(error).splitlines()[0])
        return None

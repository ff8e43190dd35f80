"""A sample that kills the process that measures it is found, set aside with its reason, and stops nothing.

Ray starts a dead actor again and gives it the same batch, without end. So an actor notes in the run folder what it is
about to measure, and takes the note away when it is done: a note that is there already when it comes says that the
process before it died.

    a batch that was noted NUM_TRIES times     is measured one sample at a time, each with a note of its own
    a sample that was noted NUM_TRIES times    is not measured again: its row says so in `error`

Notes outlive the process, the node and the driver. An innocent sample is set aside only if its process was ended from
outside NUM_TRIES times while it was measured alone.

    activations/<corpus>/_tries/  batch-<hash>  sample-<sample_id>      one byte for each try
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from fac_ray.config import ConfigError
from fac_ray.schema import ACTIVATIONS, hash_of

NUM_TRIES = 2
MAX_KILLERS = 100
"""Samples of a corpus that may kill their process; if there are more, then the cause is not the text."""

logger = logging.getLogger(__name__)

Measure = Callable[[pa.Table], pa.Table]
"""SAMPLES rows to one ACTIVATIONS row each."""


def measure_guarded(samples: pa.Table, measure: Measure, notes: Path) -> pa.Table:
    """The rows of a batch, those of samples that cannot be measured with their reason in `error`.

    Raises:
        ConfigError: from `measure`.
        RuntimeError: more than MAX_KILLERS samples killed their process.
        Exception: `measure` raised it for every sample of the batch, so the samples are not the cause.
    """
    batch = notes / f"batch-{hash_of(*samples['sample_id'].to_pylist())}"
    if _num_tries(batch) < NUM_TRIES:
        rows = _try(samples, measure, batch)
        if isinstance(rows, pa.Table):
            return rows
        logger.warning("a batch of %d samples failed, and each is tried alone: %r", len(samples), rows)
    return _measure_each(samples, measure, notes)


def _measure_each(samples: pa.Table, measure: Measure, notes: Path) -> pa.Table:
    tables, failures = [], []
    for number in range(len(samples)):
        sample = samples.slice(number, 1)
        note = notes / f"sample-{sample['sample_id'][0].as_py()}"
        if _num_tries(note) >= NUM_TRIES:
            _require_few_killers(notes)
            tables.append(_set_aside(sample, f"the process that measured it died, {NUM_TRIES} times of {NUM_TRIES}"))
            continue
        rows = _try(sample, measure, note)
        if isinstance(rows, Exception):
            failures.append(rows)
            rows = _set_aside(sample, f"{type(rows).__name__}: {rows}")
        tables.append(rows)
    if len(failures) == len(samples) > 1:
        raise failures[0]
    return pa.concat_tables(tables)


def _try(samples: pa.Table, measure: Measure, note: Path) -> pa.Table | Exception:
    """The rows, or why there are none. The note gets one byte longer, and goes unless the process dies here."""
    note.parent.mkdir(parents=True, exist_ok=True)
    with note.open("ab") as file:
        file.write(b".")
    try:
        return measure(samples)
    except ConfigError:
        raise
    except Exception as error:
        return error
    finally:
        note.unlink(missing_ok=True)


def _set_aside(sample: pa.Table, reason: str) -> pa.Table:
    """The ACTIVATIONS row of a sample that is not measured."""
    lists: dict[str, list[int]] = {name: [] for name in ("feature_ids", "activations", "peak_start", "peak_end")}
    facts = {"num_tokens": 0, "num_sinks": 0, "truncated": False, "error": reason}
    row = {"sample_id": sample["sample_id"][0].as_py(), **facts, **lists}
    return pa.Table.from_pylist([row], schema=ACTIVATIONS)


def _num_tries(note: Path) -> int:
    return note.stat().st_size if note.exists() else 0


def _require_few_killers(notes: Path) -> None:
    killers = [note for note in notes.glob("sample-*") if _num_tries(note) >= NUM_TRIES]
    if len(killers) > MAX_KILLERS:
        raise RuntimeError(
            f"{notes.parent}: more than {MAX_KILLERS} samples killed the process that measured them, so the texts are "
            "hardly the cause; look for memory (measure.batch_tokens, measure.num_actors) or a broken installation, "
            f"then remove {notes} and run again"
        )

"""A sample that kills the process that measures it is found, set aside with its reason, and stops nothing.

Ray starts a dead actor again and gives it the same batch, without end. So an actor notes in the run folder that it
begins with a batch, and when it is done with it: a begin without an end says that a process died.

    a batch that ended NUM_TRIES processes     is measured one sample at a time, each with a note of its own
    a sample that ended NUM_TRIES processes    is not measured again: its row says so in `error`
    a batch that is measured, but not stored,  ends the run after MAX_REPEATS times: its process dies of something else
        or ends processes beyond all that

Notes outlive the process, the node and the driver. An innocent sample is set aside only if its process was ended from
outside NUM_TRIES times while it was measured alone.

    activations/<corpus>/_tries/  batch-<hash>  sample-<sample_id>
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from fac_ray.config import ConfigError
from fac_ray.schema import ACTIVATIONS, hash_of

NUM_TRIES = 2
MAX_KILLERS = 100
"""Samples of a corpus that may kill their process; if there are more, then the cause is not the text."""
MAX_REPEATS = 10
"""Times that one attempt may measure a batch whose rows do not come to be stored, as when nodes leave."""
BEGIN, END = b"(", b")"
CAUSES = "memory (measure.batch_tokens, measure.num_actors) or a broken installation"

logger = logging.getLogger(__name__)

Measure = Callable[[pa.Table], pa.Table]
"""SAMPLES rows to one ACTIVATIONS row each."""


def measure_guarded(samples: pa.Table, measure: Measure, notes: Path) -> pa.Table:
    """The rows of a batch, those of samples that cannot be measured with their reason in `error`.

    Raises:
        ConfigError: from `measure`.
        RuntimeError: more than MAX_KILLERS samples killed their process, or it dies of something else.
        Exception: `measure` raised it for every sample of the batch, so the samples are not the cause.
    """
    note = notes / f"batch-{hash_of(*samples['sample_id'].to_pylist())}"
    num_deaths, num_ends = _read(note)
    if num_ends >= MAX_REPEATS or num_deaths > NUM_TRIES * (len(samples) + 2):
        raise RuntimeError(
            f"{notes.parent}: the same {len(samples)} samples ended their process {num_deaths} times, and were "
            f"measured {num_ends} times without being stored, so the texts are not the cause; look for {CAUSES}, then "
            f"remove {notes} and run again"
        )
    with _noted(note):
        if num_deaths < NUM_TRIES:
            rows = _try(samples, measure)
            if isinstance(rows, pa.Table):
                return rows
            logger.warning("a batch of %d samples failed, and each is tried alone: %r", len(samples), rows)
        return _measure_each(samples, measure, notes)


def forget_ends(notes: Path) -> None:
    """Begin to count repeats anew, as a new attempt does; deaths stay."""
    for note in notes.glob("batch-*"):
        num_deaths, _ = _read(note)
        if num_deaths:
            note.write_bytes(BEGIN * num_deaths)
        else:
            note.unlink()


def _measure_each(samples: pa.Table, measure: Measure, notes: Path) -> pa.Table:
    tables, failures = [], []
    for number in range(len(samples)):
        sample = samples.slice(number, 1)
        note = notes / f"sample-{sample['sample_id'][0].as_py()}"
        if _read(note)[0] >= NUM_TRIES:
            _require_few_killers(notes)
            tables.append(_set_aside(sample, f"the process that measured it died, {NUM_TRIES} times of {NUM_TRIES}"))
            continue
        with _noted(note):
            rows = _try(sample, measure)
        note.unlink()
        if isinstance(rows, Exception):
            failures.append(rows)
            rows = _set_aside(sample, f"{type(rows).__name__}: {rows}")
        tables.append(rows)
    if len(failures) == len(samples) > 1:
        raise failures[0]
    return pa.concat_tables(tables)


def _try(samples: pa.Table, measure: Measure) -> pa.Table | Exception:
    """The rows, or why there are none."""
    try:
        return measure(samples)
    except ConfigError:
        raise
    except Exception as error:
        return error


@contextmanager
def _noted(note: Path) -> Iterator[None]:
    """A begin in the note before the block, and an end after it unless the process dies there."""
    note.parent.mkdir(parents=True, exist_ok=True)
    _append(note, BEGIN)
    try:
        yield
    finally:
        _append(note, END)


def _append(note: Path, mark: bytes) -> None:
    with note.open("ab") as file:
        file.write(mark)


def _set_aside(sample: pa.Table, reason: str) -> pa.Table:
    """The ACTIVATIONS row of a sample that is not measured."""
    lists: dict[str, list[int]] = {name: [] for name in ("feature_ids", "activations", "peak_start", "peak_end")}
    facts = {"num_tokens": 0, "num_sinks": 0, "truncated": False, "error": reason}
    row = {"sample_id": sample["sample_id"][0].as_py(), **facts, **lists}
    return pa.Table.from_pylist([row], schema=ACTIVATIONS)


def _read(note: Path) -> tuple[int, int]:
    """How often a process died in it, and how often it came to its end."""
    marks = note.read_bytes() if note.exists() else b""
    return marks.count(BEGIN) - marks.count(END), marks.count(END)


def _require_few_killers(notes: Path) -> None:
    killers = [note for note in notes.glob("sample-*") if _read(note)[0] >= NUM_TRIES]
    if len(killers) > MAX_KILLERS:
        raise RuntimeError(
            f"{notes.parent}: more than {MAX_KILLERS} samples killed the process that measured them, so the texts are "
            f"hardly the cause; look for {CAUSES}, then remove {notes} and run again"
        )

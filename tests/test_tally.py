"""A coverage that is folded on is the coverage of one reduction, and reads no part that was counted before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from test_reduction import D_SAE, MEASURE, POSITIVE, activations_of, sample_of

from fac_ray.artifacts import parquet_files, read_table, write_table
from fac_ray.coverage.counts import NEGATIVE, UNLABELLED
from fac_ray.coverage.counts import POSITIVE as IS_POSITIVE
from fac_ray.coverage.reduction import reduce_coverage
from fac_ray.coverage.tally import CUT, TALLY, RowSet
from fac_ray.progress import Progress
from fac_ray.schema import ACTIVATIONS, SAMPLES

pytestmark = pytest.mark.usefixtures("ray_cluster")

LABELS = ("yes", "no", None)


def write_part(folder: Path, name: str, numbers: range) -> None:
    """Samples and their activations; the text of a sample is its own, or one of three that recur."""
    samples = [sample_of(n, f"word{n} a b c" if n % 2 else f"again {n % 3} a b c", LABELS[n % 3]) for n in numbers]
    rows = [
        activations_of(s, {n % D_SAE: 1.0 + n % 7, (5 * n) % D_SAE: 0.5}) for n, s in zip(numbers, samples, strict=True)
    ]
    write_table(folder / "samples" / f"{name}.parquet", pa.Table.from_pylist(samples, SAMPLES))
    write_table(folder / "rows" / f"{name}.parquet", pa.Table.from_pylist(rows, ACTIVATIONS))


def reduce(folder: Path, output: Path, positive: tuple[str, ...] = POSITIVE) -> dict[str, bytes]:
    """What the coverage folder holds afterwards, but for what is kept for the next time."""
    progress = Progress.silent()
    reduce_coverage(folder / "rows", folder / "samples", output, MEASURE, D_SAE, positive, progress)
    assert progress.count == sum(len(read_table(part)) for part in parquet_files(folder / "samples"))
    return {path.name: path.read_bytes() for path in output.iterdir() if path.name not in (TALLY, CUT)}


@pytest.fixture
def grown(tmp_path) -> Path:
    """A corpus of two parts whose coverage is reduced, and then a third part."""
    for name, numbers in (("b", range(40)), ("c", range(40, 70))):
        write_part(tmp_path, name, numbers)
    reduce(tmp_path, tmp_path / "out")
    write_part(tmp_path, "a", range(100, 130))
    return tmp_path


def test_a_part_that_came_is_folded_on_without_a_look_at_the_others(grown):
    expected = reduce(grown, grown / "once")
    for name in "bc":  # whoever reads them now fails
        (grown / "rows" / f"{name}.parquet").write_bytes(b"not Parquet")
    assert reduce(grown, grown / "out") == expected
    assert reduce(grown, grown / "out") == expected  # nothing new at all


def test_a_part_that_went_or_a_label_that_changed_is_counted_anew(grown):
    for kind in ("rows", "samples"):
        (grown / kind / "b.parquet").unlink()
    assert reduce(grown, grown / "out") == reduce(grown, grown / "less")
    samples = read_table(grown / "samples" / "c.parquet").to_pylist()
    samples[0]["label"], samples[1]["label"] = samples[1]["label"], samples[0]["label"]
    write_table(grown / "samples" / "c.parquet", pa.Table.from_pylist(samples, SAMPLES))
    assert reduce(grown, grown / "out") == reduce(grown, grown / "other")


@pytest.mark.parametrize("kept", [TALLY, CUT])
def test_what_is_kept_is_a_saving_only(grown, kept):
    expected = reduce(grown, grown / "once")
    (grown / "out" / kept).write_bytes(b"PAR1 damaged PAR1")
    assert reduce(grown, grown / "out") == expected


def test_rows_that_are_missing_or_twice_are_refused_in_a_corpus_that_grew_too(grown):
    write_table(grown / "rows" / "d.parquet", read_table(grown / "rows" / "a.parquet").slice(0, 1))
    with pytest.raises(ValueError, match="101 activation rows do not stand for the 100 samples"):
        reduce(grown, grown / "out")


def test_a_set_of_rows_is_told_from_one_with_another_row_or_label():
    ids, classes = np.array([2**64 - 1, 2**63 + 5, 7], np.uint64), np.array([IS_POSITIVE, NEGATIVE, UNLABELLED])
    whole = RowSet.of(ids, classes)
    assert RowSet.of(ids[2:], classes[2:]).add(RowSet.of(ids[:2], classes[:2])) == whole
    # (2^64 - 1) * 3 + (2^63 + 5) * 2 + 7 = -3 + 10 + 7 = 14 mod 2^64
    assert whole == (3, 14)
    others = [RowSet.of(ids, classes[[1, 0, 2]]), RowSet.of(ids[[0, 1, 1]], classes), RowSet.of(ids[:2], classes[:2])]
    assert whole not in others

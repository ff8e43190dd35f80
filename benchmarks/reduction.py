"""How fast stored activations become counts and exemplars: (sample, feature) pairs a second and core.

    python benchmarks/reduction.py [--samples N] [--json FILE]

Parts as the pipeline writes them (1,024 samples each, zstd) are made, with features as unevenly frequent as words are,
and read back by the functions that the reduction's tasks run. Times are CPU seconds of this process, all its threads
together, so that they hold on a machine that others use as well. Beside it plain ways to the same counts, whose outputs
must be equal; they see the first parts only, because they take long.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import starmap
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy import sparse

from fac_ray.activations.measuring import PARQUET
from fac_ray.artifacts import parquet_files
from fac_ray.coverage.counts import FeatureCounter, FeatureCounts, flat_values, sparse_rows
from fac_ray.coverage.exemplars import PEAKS, ExemplarsFold
from fac_ray.coverage.reduction import SampleLabels, read_activations
from fac_ray.schema import ACTIVATIONS, hash_of, id_numbers

GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 4.0)
THRESHOLD = 0.5
WIDTHS = (16_384, 65_536)
PART_SAMPLES = 1024
FEATURES_PER_SAMPLE = 150
NUM_KEPT = 24
"""Exemplars that the reduction keeps of a feature under the default config."""
PLAIN_PARTS = 20
COUNTED = ["sample_id", "feature_ids", "activations", "num_tokens", "error"]
"""Columns that the counts need."""

Counts = tuple[np.ndarray, np.ndarray]
"""Samples in which each feature is active, [thresholds, d_sae], and the largest activations, [d_sae]."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    pa.set_cpu_count(1)
    report = {str(d_sae): measure_width(d_sae, arguments.samples) for d_sae in WIDTHS}
    click.echo(json.dumps(report, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def measure_width(d_sae: int, num_samples: int) -> dict[str, Any]:
    """Rates and equalities for one width of the SAE."""
    with tempfile.TemporaryDirectory() as temporary:
        labels = write_parts(Path(temporary), d_sae, num_samples)
        parts = parquet_files(Path(temporary))
        num_pairs = sum(len(flat_values(rows, "feature_ids")) for rows in read_activations(parts, ["feature_ids"]))
        num_bytes = sum(part.stat().st_size for part in parts)
        few = parts[:PLAIN_PARTS]
        num_few = sum(len(flat_values(rows, "feature_ids")) for rows in read_activations(few, ["feature_ids"]))
        return {
            "num_samples": num_samples,
            "num_pairs": num_pairs,
            "num_parts": len(parts),
            "bytes_per_pair": round(num_bytes / num_pairs, 2),
            "million_pairs_per_s_and_core": measure_rates(parts, labels, d_sae, num_pairs),
            "counting_ns_per_pair": measure_stages(parts, labels, d_sae, num_pairs),
            "plain": measure_plain(few, labels, d_sae, num_few),
        }


def measure_rates(parts: Sequence[Path], labels: SampleLabels, d_sae: int, num_pairs: int) -> dict[str, float]:
    """Million pairs a second and core, Parquet reading included."""
    steps = {
        "counts": lambda: count(parts, labels, d_sae),
        "exemplars": lambda: strongest(parts, d_sae),
        "counts_and_exemplars": lambda: count(parts, labels, d_sae, ExemplarsFold(NUM_KEPT, d_sae)),
    }
    return {name: round(num_pairs / cpu_seconds(step)[0] / 1e6, 1) for name, step in steps.items()}


def measure_stages(parts: Sequence[Path], labels: SampleLabels, d_sae: int, num_pairs: int) -> dict[str, float]:
    """Where the time of the counts goes, each stage on its own."""
    tables = list(read_activations(parts, COUNTED))
    ids_s, classes = cpu_seconds(lambda: [labels.of(id_numbers(rows["sample_id"])) for rows in tables])
    lists_s, _ = cpu_seconds(lambda: [sparse_rows(rows, d_sae) for rows in tables])
    counter = FeatureCounter(GRID, THRESHOLD, d_sae)
    counts_s, _ = cpu_seconds(deque, starmap(counter.count, zip(tables, classes, strict=True)), 0)
    stages = {"labels": ids_s, "lists": lists_s, "count": counts_s - lists_s}
    for name, columns in {
        "read": COUNTED,
        "read_feature_ids_alone": ["feature_ids"],
        "read_activations_alone": ["activations"],
        "read_all_columns": ACTIVATIONS.names,
    }.items():
        stages[name] = cpu_seconds(deque, read_activations(parts, columns), 0)[0]
    return {name: round(seconds / num_pairs * 1e9, 1) for name, seconds in stages.items()}


def measure_plain(parts: Sequence[Path], labels: SampleLabels, d_sae: int, num_pairs: int) -> dict[str, Any]:
    """The same counts by plain means: how many times as long they take, and whether they are equal."""
    seconds, counts = cpu_seconds(lambda: count(parts, labels, d_sae))
    exemplars_s, exemplars = cpu_seconds(lambda: strongest(parts, d_sae))
    report: dict[str, Any] = {"num_pairs": num_pairs}
    for name, way in {"numpy": by_numpy, "scipy": by_scipy, "pyarrow": by_pyarrow, "pandas": by_pandas}.items():
        plain_s, (num_active, largest) = cpu_seconds(way, parts, d_sae)
        same = np.array_equal(num_active, counts.num_samples) and np.array_equal(largest, counts.max_activation)
        report[name] = {"times_as_long": round(plain_s / seconds, 1), "equal": same}
    plain_s, rows = cpu_seconds(lambda: exemplars_by_pandas(parts))
    report["exemplars_pandas"] = {
        "times_as_long": round(plain_s / exemplars_s, 1),
        "equal": rows.equals(exemplars.combine_chunks()),
    }
    return report


def count(
    parts: Sequence[Path], labels: SampleLabels, d_sae: int, exemplars: ExemplarsFold | None = None
) -> FeatureCounts:
    """The counts of all parts, as a task of the reduction makes them; and the exemplars, if they are wanted."""
    counter = FeatureCounter(GRID, THRESHOLD, d_sae)
    for rows in read_activations(parts, COUNTED if exemplars is None else ACTIVATIONS.names):
        classes = labels.of(id_numbers(rows["sample_id"]))
        counter.count(rows, classes)
        if exemplars is not None:
            exemplars.fold(rows)
    if exemplars is not None:
        exemplars.result()
    return counter.result()


def strongest(parts: Sequence[Path], d_sae: int) -> pa.Table:
    """PEAKS rows of the exemplars of all parts."""
    fold = ExemplarsFold(NUM_KEPT, d_sae)
    for rows in read_activations(parts):
        fold.fold(rows)
    return fold.result().rows


def by_numpy(parts: Sequence[Path], d_sae: int) -> Counts:
    """A bincount for each threshold and part."""
    num_active, largest = np.zeros((len(GRID), d_sae), np.int64), np.zeros(d_sae, np.float32)
    for part in parts:
        ids, activations = _pairs(part)
        for row, threshold in enumerate(GRID):
            num_active[row] += np.bincount(ids[activations > np.float32(threshold)], minlength=d_sae)
        np.maximum.at(largest, ids, activations)
    return num_active, largest


def by_scipy(parts: Sequence[Path], d_sae: int) -> Counts:
    """A sparse matrix for each part, samples x features, compared with each threshold."""
    num_active, largest = np.zeros((len(GRID), d_sae), np.int64), np.zeros(d_sae, np.float32)
    for part in parts:
        lists = pq.read_table(part, columns=["feature_ids", "activations"])
        offsets = np.concatenate([[0], np.cumsum(pc.list_value_length(lists["feature_ids"]).to_numpy())])
        values, ids = flat_values(lists, "activations"), flat_values(lists, "feature_ids")
        matrix = sparse.csr_array((values, ids, offsets), (len(lists), d_sae))
        for row, threshold in enumerate(GRID):
            num_active[row] += (matrix > threshold).sum(axis=0)
        largest = np.maximum(largest, matrix.max(axis=0).toarray().reshape(-1))
    return num_active, largest


def by_pyarrow(parts: Sequence[Path], d_sae: int) -> Counts:
    """A group_by of all pairs for each threshold."""
    ids, activations = _all_pairs(parts)
    pairs = pa.table({"id": ids, "activation": activations})
    num_active, largest = np.zeros((len(GRID), d_sae), np.int64), np.zeros(d_sae, np.float32)
    for row, threshold in enumerate(GRID):
        above = pairs.filter(pc.greater(pairs["activation"], pa.scalar(threshold, pa.float32())))
        groups = above.group_by("id", use_threads=False).aggregate([("activation", "count"), ("activation", "max")])
        num_active[row][groups["id"]] = groups["activation_count"]
        largest[groups["id"]] = np.maximum(largest[groups["id"]], groups["activation_max"])
    return num_active, largest


def by_pandas(parts: Sequence[Path], d_sae: int) -> Counts:
    """A groupby of all pairs for each threshold."""
    ids, activations = _all_pairs(parts)
    pairs = pd.DataFrame({"id": ids, "activation": activations})
    num_active, largest = np.zeros((len(GRID), d_sae), np.int64), np.zeros(d_sae, np.float32)
    for row, threshold in enumerate(GRID):
        groups = pairs[pairs["activation"] > np.float32(threshold)].groupby("id")["activation"].agg(["count", "max"])
        num_active[row][groups.index] = groups["count"]
        largest[groups.index] = np.maximum(largest[groups.index], groups["max"])
    return num_active, largest


def exemplars_by_pandas(parts: Sequence[Path]) -> pa.Table:
    """PEAKS rows by sorting all pairs; activations that round to one bfloat16 are equals."""
    lists = pa.concat_tables([pq.read_table(part) for part in parts]).to_pandas()
    pairs = lists.explode(["feature_ids", "activations", "peak_start", "peak_end"]).rename(
        columns={"feature_ids": "feature_id", "activations": "activation"}
    )
    pairs = pairs.astype({"feature_id": np.int32, "activation": np.float32})
    bits = pairs["activation"].to_numpy().view(np.uint32)
    pairs["rounded"] = (bits + np.uint32(0x8000)) >> 16
    pairs = pairs.sort_values(["feature_id", "rounded", "sample_id"], ascending=[True, False, True])
    kept = pairs.groupby("feature_id").head(NUM_KEPT)[PEAKS.names]
    return pa.Table.from_pandas(kept, preserve_index=False).cast(PEAKS).replace_schema_metadata(None).combine_chunks()


def write_parts(folder: Path, d_sae: int, num_samples: int) -> SampleLabels:
    """Write activations of random samples, of which two thirds are labelled; returns the labels."""
    random = np.random.default_rng(0)
    frequency = 1 / (np.arange(d_sae) + 50.0)
    reach, feature_of_rank = np.cumsum(frequency / frequency.sum()), random.permutation(d_sae)
    numbers = []
    for number, first in enumerate(range(0, num_samples, PART_SAMPLES)):
        size = min(PART_SAMPLES, num_samples - first)
        lengths = random.poisson(FEATURES_PER_SAMPLE, size)
        drawn = feature_of_rank[np.minimum(np.searchsorted(reach, random.random(lengths.sum())), d_sae - 1)]
        cells = np.unique(np.repeat(np.arange(size), lengths) * d_sae + drawn)
        rows = _activation_rows(random, cells // d_sae, (cells % d_sae).astype(np.int32), first, size)
        pq.write_table(rows, folder / f"{number:06d}-0.parquet", **PARQUET)
        numbers.append(id_numbers(rows["sample_id"]))
    ids = np.concatenate(numbers)
    labelled = random.random(len(ids)) < 2 / 3
    return SampleLabels(ids[labelled], random.integers(0, 2, labelled.sum()).astype(np.int8))


def _activation_rows(
    random: np.random.Generator, row: np.ndarray, feature_ids: np.ndarray, first: int, size: int
) -> pa.Table:
    offsets = pa.array(np.searchsorted(row, np.arange(size + 1)).astype(np.int32))
    start = random.integers(0, 2000, len(row)).astype(np.int32)
    lists = {
        "feature_ids": feature_ids,
        "activations": random.gamma(2.0, 0.7, len(row)).astype(np.float32),
        "peak_start": start,
        "peak_end": start + random.integers(1, 9, len(row)).astype(np.int32),
    }
    columns = {
        "sample_id": [hash_of("sample", str(number)) for number in range(first, first + size)],
        **{name: pa.ListArray.from_arrays(offsets, pa.array(values)) for name, values in lists.items()},
        "num_tokens": pa.array(random.integers(50, 400, size), pa.int32()),
        "num_sinks": np.zeros(size, np.int32),
        "truncated": np.zeros(size, bool),
        "error": pa.nulls(size, pa.string()),
    }
    return pa.table(columns, schema=ACTIVATIONS)


def _pairs(part: Path) -> tuple[np.ndarray, np.ndarray]:
    lists = pq.read_table(part, columns=["feature_ids", "activations"])
    return flat_values(lists, "feature_ids"), flat_values(lists, "activations")


def _all_pairs(parts: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    ids, activations = zip(*map(_pairs, parts), strict=True)
    return np.concatenate(ids), np.concatenate(activations)


def cpu_seconds(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """CPU seconds of a call, and its result."""
    started = time.process_time()
    result = function(*arguments)
    return time.process_time() - started, result


if __name__ == "__main__":
    main()

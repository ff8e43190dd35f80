"""The coverage of a corpus: its activations and samples come in, `CorpusCoverage` and exemplars go out. On Ray Data.

Every task folds some activation parts into one partial (`FeatureCounts`, `TopExemplars`, bytes in Arrow cells), and
the driver folds the partials; both are monoids, so neither the split nor the order shows in the result. A second pass
over the samples cuts the exemplars' spans. No model runs here: another threshold or label is another reduction.

    coverage/<corpus>/  coverage.parquet  labels.parquet  exemplars.parquet  summary.json (last)
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from jaxtyping import Int, UInt64

from fac_ray.artifacts import parquet_files, read_table, write_json, write_table
from fac_ray.config import MeasureConfig
from fac_ray.coverage import NEGATIVE, POSITIVE, UNLABELLED, CorpusCoverage, CountsFold, FeatureCounts
from fac_ray.exemplars import TopExemplars, span_of, strongest
from fac_ray.schema import ACTIVATIONS, COVERAGE, EXEMPLARS, hash_of, require_columns

if TYPE_CHECKING:
    from fac_ray.progress import Progress

MAX_PARTIALS = 256
"""Partials that the driver folds; more parts than that go several to a task."""
MERGE_EVERY = 6
"""Exemplars of so many parts wait in memory for one merge."""
SPARE_EXEMPLARS = 3
"""Times `num_exemplars` that are kept until duplicates among the spans are known."""

HEX_ID = re.compile("[0-9a-f]{32}")
LABELS = pa.schema([("feature_id", pa.int32()), ("labelled", pa.int64()), ("positive", pa.int64())])
SPANS = pa.schema([*[f for f in EXEMPLARS if f.name != "rank"]])


def reduce_coverage(
    activations_folder: Path,
    samples_folder: Path,
    output_folder: Path,
    measure: MeasureConfig,
    d_sae: int,
    positive: tuple[str, ...],
    progress: Progress,
) -> dict[str, Any]:
    """Write the coverage of a corpus; returns num_samples, num_tokens, num_errors and num_active_features.

    `positive`: the labels that mean "belongs to the task". The progress counts samples.

    Raises:
        FileNotFoundError: a folder holds no Parquet file.
        ValueError: the activations are not one row for each sample, or were measured with another SAE.
    """
    labels, samples = _read_labels(samples_folder, positive)
    counts, exemplars = _fold_parts(activations_folder, labels, samples, measure, d_sae, progress)
    coverage = CorpusCoverage.from_counts(counts)
    spans = _cut_spans(samples_folder, exemplars.rows, measure.span_words)
    write_table(output_folder / "exemplars.parquet", _rank_spans(spans, measure.num_exemplars))
    save_coverage(output_folder, coverage)
    return {
        "num_samples": coverage.num_samples,
        "num_tokens": coverage.num_tokens,
        "num_errors": coverage.num_errors,
        "num_active_features": int(coverage.active(measure.threshold).sum()),
    }


def save_coverage(folder: Path, coverage: CorpusCoverage) -> None:
    """Write what `load_coverage` reads; summary.json comes last."""
    ids = np.arange(coverage.d_sae, dtype=np.int32)
    num_thresholds = len(coverage.thresholds)
    offsets = pa.array(np.arange(0, (coverage.d_sae + 1) * num_thresholds, num_thresholds), pa.int32())
    num_samples = pa.ListArray.from_arrays(offsets, pa.array(coverage.num_samples_active.T.reshape(-1), pa.int64()))
    table = {"feature_id": ids, "num_samples": num_samples, "max_activation": coverage.max_activation}
    write_table(folder / "coverage.parquet", pa.table(table).cast(COVERAGE))
    labels = {"feature_id": ids, "labelled": coverage.labelled_active, "positive": coverage.positive_active}
    write_table(folder / "labels.parquet", pa.table(labels).cast(LABELS))
    write_json(
        folder / "summary.json",
        {
            "thresholds": list(coverage.thresholds),
            "threshold": coverage.threshold,
            "d_sae": coverage.d_sae,
            "num_samples": coverage.num_samples,
            "num_tokens": coverage.num_tokens,
            "num_errors": coverage.num_errors,
            "num_labelled": coverage.num_labelled,
            "num_positive": coverage.num_positive,
        },
    )


def load_coverage(folder: Path) -> CorpusCoverage:
    """The coverage that `reduce_coverage` wrote.

    Raises:
        FileNotFoundError: the folder holds no finished coverage.
    """
    folder = Path(folder)
    summary = json.loads((folder / "summary.json").read_text())
    table = require_columns(read_table(folder / "coverage.parquet"), COVERAGE, str(folder))
    labels = read_table(folder / "labels.parquet")
    num_samples = pc.list_flatten(table["num_samples"]).to_numpy().reshape(summary.pop("d_sae"), -1)
    return CorpusCoverage(
        thresholds=tuple(summary.pop("thresholds")),
        num_samples_active=np.ascontiguousarray(num_samples.T),
        max_activation=table["max_activation"].to_numpy(),
        labelled_active=labels["labelled"].to_numpy(),
        positive_active=labels["positive"].to_numpy(),
        **summary,
    )


def load_exemplars(folder: Path) -> dict[int, list[str]]:
    """feature_id -> spans, strongest first; features that are active nowhere are absent.

    Raises:
        FileNotFoundError: the folder holds no exemplars.
    """
    table = read_table(Path(folder) / "exemplars.parquet", columns=["feature_id", "rank", "span"])
    table = table.sort_by([("feature_id", "ascending"), ("rank", "ascending")])
    spans: dict[int, list[str]] = {}
    for feature_id, span in zip(table["feature_id"].to_pylist(), table["span"].to_pylist(), strict=True):
        spans.setdefault(feature_id, []).append(span)
    return spans


class SampleLabels:
    """Label classes of samples by id: 8 bytes a labelled sample, so that every task can hold all of them."""

    def __init__(self, ids: UInt64[np.ndarray, " samples"], classes: Int[np.ndarray, " samples"]) -> None:
        order = np.argsort(ids)
        self.ids, self.classes = ids[order], classes[order]

    def of(self, ids: UInt64[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
        """POSITIVE, NEGATIVE or UNLABELLED for each id."""
        if not len(self.ids):
            return np.full(len(ids), UNLABELLED, np.int8)
        at = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        return np.where(self.ids[at] == ids, self.classes[at], UNLABELLED).astype(np.int8)


def id_numbers(sample_ids: pa.ChunkedArray) -> UInt64[np.ndarray, " rows"]:
    """Sample ids as 64-bit integers: the first 16 of their 32 hex digits; an id of another form is hashed first."""
    ids = [text if HEX_ID.fullmatch(text) else hash_of("id", text) for text in sample_ids.to_pylist()]
    return np.frombuffer(bytes.fromhex("".join(ids)), ">u8")[::2].astype(np.uint64)


class _RowSet(NamedTuple):
    """Order-free digest of a set of rows: equal for equal sets; of unequal ones with a chance of about 2^-64."""

    num_rows: int = 0
    id_sum: int = 0

    def add(self, other: _RowSet) -> _RowSet:
        return _RowSet(self.num_rows + other.num_rows, (self.id_sum + other.id_sum) % 2**64)

    @classmethod
    def of(cls, ids: UInt64[np.ndarray, " rows"]) -> _RowSet:
        return cls(len(ids), int(ids.sum(dtype=np.uint64)))


def _read_labels(samples_folder: Path, positive: tuple[str, ...]) -> tuple[SampleLabels, _RowSet]:
    """Label classes of all labelled samples, and which samples there are."""
    paths = _require_parts(samples_folder)
    rows, ids, classes = _RowSet(), [], []
    value_set = pa.array(positive, pa.string())
    for path in paths:
        part = pq.read_table(path, columns=["sample_id", "label"])
        numbers = id_numbers(part["sample_id"])
        rows = rows.add(_RowSet.of(numbers))
        labelled = pc.is_valid(part["label"]).to_numpy()
        is_positive = pc.is_in(part["label"], value_set=value_set).to_numpy()
        ids.append(numbers[labelled])
        classes.append(np.where(is_positive, POSITIVE, NEGATIVE).astype(np.int8)[labelled])
    return SampleLabels(np.concatenate(ids), np.concatenate(classes)), rows


def _fold_parts(
    folder: Path, labels: SampleLabels, samples: _RowSet, measure: MeasureConfig, d_sae: int, progress: Progress
) -> tuple[FeatureCounts, TopExemplars]:
    """The counts and strongest exemplars of all activation parts."""
    num_kept = SPARE_EXEMPLARS * measure.num_exemplars
    fold = CountsFold(FeatureCounts.empty(measure.grid, measure.threshold, d_sae))
    reduce_parts = partial(_reduce_parts, labels_ref=ray.put(labels), measure=measure, d_sae=d_sae, num_kept=num_kept)
    rows, tops = _RowSet(), [TopExemplars.empty(num_kept)]
    for row in _map_parts(folder, reduce_parts).iter_rows():
        if fold.fold(row["parts"], FeatureCounts.from_bytes(row["counts"])):
            rows = rows.add(_RowSet(row["num_rows"], row["id_sum"]))
            tops = _gather(tops, TopExemplars.from_bytes(num_kept, row["exemplars"]))
            progress.advance(row["num_rows"])
    _check_rows(folder, rows, samples)
    return fold.total, TopExemplars.merge_all(tops)


def _reduce_parts(
    batch: pa.Table, labels_ref: ray.ObjectRef, measure: MeasureConfig, d_sae: int, num_kept: int
) -> pa.Table:
    """One partial from the activation parts that a batch names."""
    labels: SampleLabels = ray.get(labels_ref)
    paths = batch["path"].to_pylist()
    counts = FeatureCounts.empty(measure.grid, measure.threshold, d_sae)
    tops, seen = [TopExemplars.empty(num_kept)], _RowSet()
    for path in paths:
        rows = require_columns(pq.read_table(path), ACTIVATIONS, path)
        numbers = id_numbers(rows["sample_id"])
        seen = seen.add(_RowSet.of(numbers))
        part = FeatureCounts.from_rows(rows, labels.of(numbers), measure.grid, measure.threshold, d_sae)
        counts = counts.merge(part)
        tops = _gather(tops, TopExemplars.from_rows(rows, num_kept, d_sae))
    return pa.table(
        {
            "parts": ["\n".join(paths)],
            "counts": pa.array([counts.to_bytes()], pa.large_binary()),
            "exemplars": pa.array([TopExemplars.merge_all(tops).to_bytes()], pa.large_binary()),
            "num_rows": [seen.num_rows],
            "id_sum": pa.array([seen.id_sum], pa.uint64()),
        }
    )


def _gather(tops: list[TopExemplars], top: TopExemplars) -> list[TopExemplars]:
    """One more part, merged with the others only now and then: a merge costs as much for two as for several."""
    tops = [*tops, top]
    return tops if len(tops) < MERGE_EVERY else [TopExemplars.merge_all(tops)]


def _check_rows(folder: Path, measured: _RowSet, samples: _RowSet) -> None:
    if measured != samples:
        raise ValueError(
            f"{folder}: {measured.num_rows} activation rows do not stand for the {samples.num_rows} samples, one each; "
            "remove the folder and measure the corpus again"
        )


def _cut_spans(samples_folder: Path, peaks: pa.Table, span_words: int) -> pa.Table:
    """SPANS rows for PEAKS rows, in any order: the words around each peak, from the samples' texts."""
    if not len(peaks):
        return SPANS.empty_table()
    numbers = id_numbers(peaks["sample_id"])
    order = np.argsort(numbers, kind="stable")
    wanted = ray.put((numbers[order], peaks.take(pa.array(order))))
    cut = partial(_cut_part_spans, wanted=wanted, span_words=span_words)
    batches: Iterator[Any] = iter(_map_parts(samples_folder, cut).iter_batches(batch_size=None, batch_format="pyarrow"))
    return pa.concat_tables([SPANS.empty_table(), *(batch.cast(SPANS) for batch in batches)])


def _cut_part_spans(batch: pa.Table, wanted: ray.ObjectRef, span_words: int) -> Iterator[pa.Table]:
    """The spans of the wanted peaks that lie in the sample parts that a batch names."""
    numbers, peaks = ray.get(wanted)
    for path in batch["path"].to_pylist():
        part = pq.read_table(path, columns=["sample_id", "text"])
        ids = id_numbers(part["sample_id"])
        first, last = np.searchsorted(numbers, ids, "left"), np.searchsorted(numbers, ids, "right")
        sample = np.repeat(np.arange(len(ids)), last - first)
        at = np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)] or [np.zeros(0, np.int64)])
        found = peaks.take(pa.array(at, pa.int64()))
        texts = part["text"].take(pa.array(sample, pa.int64()))
        spans = [
            span_of(text, start, end, span_words)
            for text, start, end in zip(
                texts.to_pylist(), found["peak_start"].to_pylist(), found["peak_end"].to_pylist(), strict=True
            )
        ]
        table = {**{n: found[n] for n in SPANS.names if n != "span"}, "span": pa.array(spans, pa.string())}
        yield pa.table(table).select(SPANS.names)


def _rank_spans(spans: pa.Table, num_exemplars: int) -> pa.Table:
    """EXEMPLARS: of each feature the strongest spans that differ, so that a text that recurs fills one rank."""
    spans = strongest(spans, len(spans))
    ids, texts = spans["feature_id"].to_pylist(), spans["span"].to_pylist()
    kept, ranks, previous = [], [], None
    seen: set[str] = set()
    for row, (feature_id, text) in enumerate(zip(ids, texts, strict=True)):
        if feature_id != previous:
            seen, previous = set(), feature_id
        if text not in seen and len(seen) < num_exemplars:
            kept.append(row)
            ranks.append(len(seen))
            seen.add(text)
    chosen = spans.take(pa.array(kept, pa.int64())).append_column("rank", pa.array(ranks, pa.int32()))
    return require_columns(chosen, EXEMPLARS, "exemplars")


def _map_parts(folder: Path, function: Callable[[pa.Table], Any]) -> ray.data.Dataset:
    """`function` over tables with a column `path`, each naming some of the folder's parts; at most MAX_PARTIALS."""
    paths = [str(path.resolve()) for path in _require_parts(folder)]
    num_groups = min(len(paths), MAX_PARTIALS)
    dataset = ray.data.from_items([{"path": path} for path in paths], override_num_blocks=num_groups)
    return dataset.map_batches(function, batch_size=None, batch_format="pyarrow")


def _require_parts(folder: Path) -> list[Path]:
    paths = parquet_files(folder)
    if not paths:
        raise FileNotFoundError(f"{folder}: no Parquet file here")
    return paths

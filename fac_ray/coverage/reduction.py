"""The coverage of a corpus: its activations and samples come in, `CorpusCoverage` and exemplars go out. On Ray Data.

Every task folds some activation parts into one partial (`FeatureCounts`, `TopExemplars`, bytes in Arrow cells), and
the driver folds the partials; both are monoids, so neither the split nor the order shows in the result. A second pass
over the samples cuts the exemplars' spans. No model runs here: another threshold or label is another reduction.

A corpus that grew is folded on: the fold of its old parts (`tally`) and the spans that were cut stay.

    coverage/<corpus>/  tally.parquet  spans.parquet  coverage.parquet  labels.parquet  exemplars.parquet
                        summary.json (last)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from jaxtyping import Int, UInt64

from fac_ray.artifacts import parquet_files, read_table, write_json, write_table
from fac_ray.config import MeasureConfig
from fac_ray.coverage.counts import (
    NEGATIVE,
    POSITIVE,
    UNLABELLED,
    CorpusCoverage,
    CountsFold,
    FeatureCounter,
    FeatureCounts,
)
from fac_ray.coverage.exemplars import ExemplarsFold, TopExemplars, span_of, strongest
from fac_ray.coverage.tally import SPANS, RowSet, Tally, load_spans, load_tally, save_spans, save_tally
from fac_ray.schema import ACTIVATIONS, COVERAGE, EXEMPLARS, id_numbers, require_columns

if TYPE_CHECKING:
    from fac_ray.progress import Progress

MIN_GROUPS, MAX_GROUPS = 16, 256
"""Groups that the parts of a corpus are made into, one for each task; fewer only if there are fewer parts."""
GROUP_BYTES = 128 << 20
"""Between these bounds a group has so many bytes: its partial, which grows with d_sae, is then small beside them."""
MERGE_EVERY = 6
"""Exemplars of so many partials wait in the driver for one merge."""
SPARE_EXEMPLARS = 3
"""Times `num_exemplars` that are kept until duplicates among the spans are known."""

LABELS = pa.schema([("feature_id", pa.int32()), ("labelled", pa.int64()), ("positive", pa.int64())])


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

    `positive`: the labels that mean "belongs to the task". The progress counts samples. What lies in the output folder
    is of the same `measure`, `d_sae` and `positive`, or nothing lies there.

    Raises:
        FileNotFoundError: a folder holds no Parquet file.
        ValueError: the activations are not one row for each sample, or were measured with another SAE.
    """
    labels, samples = _read_labels(samples_folder, positive)
    empty = Tally.empty(measure, d_sae, SPARE_EXEMPLARS * measure.num_exemplars)
    kept = load_tally(output_folder, empty, activations_folder)
    tally = _fold_parts(activations_folder, kept, labels, measure, d_sae, progress)
    if kept.parts and tally.rows != samples:  # another label, or a sample that is gone
        tally = _fold_parts(activations_folder, empty, labels, measure, d_sae, progress)
    _check_rows(activations_folder, tally.rows, samples)
    coverage = CorpusCoverage.from_counts(tally.counts)
    peaks, cut = load_spans(output_folder, tally.exemplars.rows)
    spans = pa.concat_tables([cut, _cut_spans(samples_folder, peaks, measure.span_words)])
    save_tally(output_folder, tally)
    save_spans(output_folder, spans)
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


def _read_labels(samples_folder: Path, positive: tuple[str, ...]) -> tuple[SampleLabels, RowSet]:
    """Label classes of all labelled samples, and which samples there are."""
    paths = _require_parts(samples_folder)
    rows, ids, classes = RowSet(), [], []
    value_set = pa.array(positive, pa.string())
    for path in paths:
        part = pq.read_table(path, columns=["sample_id", "label"])
        numbers = id_numbers(part["sample_id"])
        labelled = pc.is_valid(part["label"]).to_numpy()
        is_positive = pc.is_in(part["label"], value_set=value_set).to_numpy()
        of_part = np.where(labelled, np.where(is_positive, POSITIVE, NEGATIVE), UNLABELLED).astype(np.int8)
        rows = rows.add(RowSet.of(numbers, of_part))
        ids.append(numbers[labelled])
        classes.append(of_part[labelled])
    return SampleLabels(np.concatenate(ids), np.concatenate(classes)), rows


def _fold_parts(
    folder: Path, kept: Tally, labels: SampleLabels, measure: MeasureConfig, d_sae: int, progress: Progress
) -> Tally:
    """The counts and strongest exemplars of all activation parts, those that are in `kept` already not read again."""
    num_kept = kept.exemplars.num_kept
    fold, rows, parts, tops = CountsFold(kept.counts), kept.rows, set(kept.parts), [kept.exemplars]
    progress.set(rows.num_rows)
    paths = [path for path in _require_parts(folder) if path.name not in parts]
    reduce_parts = partial(_reduce_parts, labels_ref=ray.put(labels), measure=measure, d_sae=d_sae, num_kept=num_kept)
    for row in _map_parts(paths, reduce_parts).iter_rows() if paths else ():
        if fold.fold(row["parts"], FeatureCounts.from_bytes(row["counts"])):
            rows = rows.add(RowSet(row["num_rows"], row["id_sum"]))
            parts |= {Path(path).name for path in row["parts"].split("\n")}
            tops = _gather(tops, TopExemplars.from_bytes(num_kept, row["exemplars"]))
            progress.advance(row["num_rows"])
    return Tally(frozenset(parts), rows, fold.total, TopExemplars.merge_all(tops))


def _reduce_parts(
    batch: pa.Table, labels_ref: ray.ObjectRef, measure: MeasureConfig, d_sae: int, num_kept: int
) -> pa.Table:
    """One partial from the activation parts that a batch names."""
    labels: SampleLabels = ray.get(labels_ref)
    paths = batch["path"].to_pylist()
    counter, exemplars = FeatureCounter(measure.grid, measure.threshold, d_sae), ExemplarsFold(num_kept, d_sae)
    seen = RowSet()
    for rows in read_activations(paths):
        numbers = id_numbers(rows["sample_id"])
        classes = labels.of(numbers)
        seen = seen.add(RowSet.of(numbers, classes))
        counter.count(rows, classes)
        exemplars.fold(rows)
    return pa.table(
        {
            "parts": ["\n".join(paths)],
            "counts": pa.array([counter.result().to_bytes()], pa.large_binary()),
            "exemplars": pa.array([exemplars.result().to_bytes()], pa.large_binary()),
            "num_rows": [seen.num_rows],
            "id_sum": pa.array([seen.id_sum], pa.uint64()),
        }
    )


def read_activations(paths: Sequence[str | Path], columns: Sequence[str] = ACTIVATIONS.names) -> Iterator[pa.Table]:
    """Columns of ACTIVATIONS, one row group after the other: what is in memory at once depends on no file's size."""
    schema = pa.schema([ACTIVATIONS.field(name) for name in columns])
    for path in paths:
        with pq.ParquetFile(path) as file:
            for number in range(file.num_row_groups):
                rows = file.read_row_group(number, columns=list(columns), use_threads=False)
                yield require_columns(rows, schema, str(path))


def _gather(tops: list[TopExemplars], top: TopExemplars) -> list[TopExemplars]:
    """One more part, merged with the others only now and then: a merge costs as much for two as for several."""
    tops = [*tops, top]
    return tops if len(tops) < MERGE_EVERY else [TopExemplars.merge_all(tops)]


def _check_rows(folder: Path, measured: RowSet, samples: RowSet) -> None:
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
    batches: Iterator[Any] = iter(
        _map_parts(_require_parts(samples_folder), cut).iter_batches(batch_size=None, batch_format="pyarrow")
    )
    return pa.concat_tables([SPANS.empty_table(), *(batch.cast(SPANS) for batch in batches)])


def _cut_part_spans(batch: pa.Table, wanted: ray.ObjectRef, span_words: int) -> Iterator[pa.Table]:
    """The spans of the wanted peaks that lie in the sample parts that a batch names."""
    numbers, peaks = ray.get(wanted)
    for path in batch["path"].to_pylist():
        ids = id_numbers(pq.read_table(path, columns=["sample_id"])["sample_id"])
        first, last = np.searchsorted(numbers, ids, "left"), np.searchsorted(numbers, ids, "right")
        if not (last > first).any():
            continue
        part = pq.read_table(path, columns=["text"])
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


def _map_parts(paths: list[Path], function: Callable[[pa.Table], Any]) -> ray.data.Dataset:
    """`function` over tables with a column `path`, each naming a group of the parts."""
    by_size = sum(path.stat().st_size for path in paths) // GROUP_BYTES
    num_groups = min(len(paths), max(MIN_GROUPS, min(MAX_GROUPS, by_size)))
    items = [{"path": str(path.resolve())} for path in paths]
    dataset = ray.data.from_items(items, override_num_blocks=num_groups)
    return dataset.map_batches(function, batch_size=None, batch_format="pyarrow")


def _require_parts(folder: Path) -> list[Path]:
    paths = parquet_files(folder)
    if not paths:
        raise FileNotFoundError(f"{folder}: no Parquet file here")
    return paths

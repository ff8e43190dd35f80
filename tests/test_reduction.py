"""Stored activations become a coverage on Ray: equal to loops over all rows, for every partition into parts."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fac_ray.activations.measuring import PARQUET
from fac_ray.artifacts import parquet_files, read_table, write_table
from fac_ray.config import MeasureConfig
from fac_ray.coverage.reduction import (
    SampleLabels,
    load_coverage,
    load_exemplars,
    read_activations,
    reduce_coverage,
)
from fac_ray.progress import Progress
from fac_ray.schema import ACTIVATIONS, COVERAGE, EXEMPLARS, SAMPLES, content_id, sample_id

D_SAE = 12
MEASURE = MeasureConfig(threshold=0.3, thresholds=(0.0, 1.0), num_exemplars=2, span_words=3)
POSITIVE = ("yes",)


def sample_of(number, text, label):
    content = content_id(text)
    place = {"source_file": "f", "source_row": number}
    ids = {"sample_id": sample_id("f", number, content), "content_id": content}
    return {**ids, "text": text, "messages": None, "label": label, **place}


def activations_of(sample, features, error=None):
    words = sample["text"].split()
    starts = [sample["text"].index(words[i % len(words)]) for i in sorted(features)]
    return {
        "sample_id": sample["sample_id"],
        "feature_ids": sorted(features),
        "activations": [features[i] for i in sorted(features)],
        "peak_start": starts,
        "peak_end": [s + len(words[i % len(words)]) for i, s in zip(sorted(features), starts, strict=True)],
        "num_tokens": 0 if error else len(words),
        "truncated": False,
        "error": error,
    }


@pytest.fixture(scope="module")
def corpus():
    random_ = random.Random(4)
    samples, rows = [], []
    for number in range(60):
        text = f"w{number} x{number} y{number} z{number} last{number}" if number % 6 else "the same text five times"
        samples.append(sample_of(number, text, random_.choice(["yes", "no", None])))
        chosen = random_.sample(range(D_SAE - 1), random_.randint(0, 6))
        features = {i: float(np.float32(random_.choice([0.1, 0.3, 0.7, random_.uniform(0, 3)]))) for i in chosen}
        rows.append(activations_of(samples[-1], {} if number == 7 else features, "failed" if number == 7 else None))
    return samples, rows


def reduce(folder, samples, rows, num_parts, positive=POSITIVE):
    for name, table, parts in (("samples", pa.Table.from_pylist(samples, SAMPLES), 3), ("rows", rows, num_parts)):
        table = table if isinstance(table, pa.Table) else pa.Table.from_pylist(table, ACTIVATIONS)
        bounds = np.linspace(0, len(table), parts + 1).astype(int)
        for part, (start, stop) in enumerate(itertools.pairwise(bounds)):
            write_table(folder / name / f"{part}.parquet", table.slice(start, stop - start))
    progress = Progress.silent()
    facts = reduce_coverage(folder / "rows", folder / "samples", folder / "out", MEASURE, D_SAE, positive, progress)
    assert progress.count == len(rows)
    return facts, folder / "out"


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("num_parts", [1, 4, 13])
def test_the_coverage_equals_loops_for_every_partition(tmp_path, corpus, num_parts):
    samples, rows = corpus
    shuffled = random.Random(num_parts).sample(rows, len(rows))
    facts, folder = reduce(tmp_path, samples, shuffled, num_parts)
    coverage = load_coverage(folder)
    measured = [dict(zip(r["feature_ids"], r["activations"], strict=True)) for r in rows if r["error"] is None]
    labels = [s["label"] for s, r in zip(samples, rows, strict=True) if r["error"] is None]

    def count(threshold, keep=lambda _: True):
        pairs = [a for a, y in zip(measured, labels, strict=True) if keep(y)]
        return [sum(a.get(i, 0) > np.float32(threshold) for a in pairs) for i in range(D_SAE)]

    assert coverage.thresholds == (0.0, 0.3, 1.0)
    assert all(coverage.counts(t).tolist() == count(t) for t in coverage.thresholds)
    assert coverage.max_activation.tolist() == [max(a.get(i, 0) for a in measured) for i in range(D_SAE)]
    assert coverage.labelled_active.tolist() == count(0.3, lambda y: y is not None)
    assert coverage.positive_active.tolist() == count(0.3, lambda y: y == "yes")
    assert coverage.num_labelled == sum(y is not None for y in labels)
    assert coverage.num_positive == labels.count("yes")
    assert (coverage.num_samples, coverage.num_errors) == (59, 1)
    assert coverage.num_tokens == sum(r["num_tokens"] for r in rows)
    assert facts == {
        "num_samples": 59,
        "num_tokens": coverage.num_tokens,
        "num_errors": 1,
        "num_active_features": int(np.count_nonzero(count(0.3))),
    }


@pytest.mark.usefixtures("ray_cluster")
def test_exemplars_are_the_strongest_spans_that_differ(tmp_path, corpus):
    samples, rows = corpus
    _, folder = reduce(tmp_path, samples, rows, 5)
    texts = {s["sample_id"]: s["text"] for s in samples}
    exemplars = load_exemplars(folder)
    for feature in range(D_SAE):
        pairs = [
            (
                -r["activations"][r["feature_ids"].index(feature)],
                r["sample_id"],
                r["peak_start"][r["feature_ids"].index(feature)],
            )
            for r in rows
            if feature in r["feature_ids"]
        ]
        expected = []
        for _, sample, start in sorted(pairs)[:6]:  # three times as many are kept before equal spans are dropped
            words = texts[sample].split()
            at = min(max(texts[sample][:start].count(" ") - 1, 0), len(words) - 3)
            expected.append(" ".join(words[at : at + 3]))
        assert exemplars.get(feature, []) == list(dict.fromkeys(expected))[:2]
    assert D_SAE - 1 not in exemplars


@pytest.mark.usefixtures("ray_cluster")
def test_what_is_written_has_the_stated_schemas(tmp_path, corpus):
    _, folder = reduce(tmp_path, corpus[0], corpus[1], 2)
    assert read_table(folder / "coverage.parquet").schema == COVERAGE
    assert read_table(folder / "exemplars.parquet").schema == EXEMPLARS
    kept = {"tally.parquet", "spans.parquet"}
    assert {p.name for p in parquet_files(folder)} == kept | {
        f"{n}.parquet" for n in ("coverage", "exemplars", "labels")
    }


@pytest.mark.usefixtures("ray_cluster")
def test_a_corpus_without_labels_or_active_features_has_a_coverage(tmp_path):
    samples = [sample_of(i, f"text {i}", None) for i in range(3)]
    facts, folder = reduce(tmp_path, samples, [activations_of(s, {}) for s in samples], 2)
    assert facts["num_active_features"] == 0
    assert load_coverage(folder).num_labelled == 0
    assert load_exemplars(folder) == {}


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("spoil", [lambda rows: rows[:-1], lambda rows: [*rows, rows[0]], lambda r: [*r[:-1], r[0]]])
def test_rows_that_are_not_one_for_each_sample_are_refused(tmp_path, corpus, spoil):
    samples, rows = corpus
    with pytest.raises(ValueError, match="do not stand for the 60 samples"):
        reduce(tmp_path, samples, spoil(rows), 3)


@pytest.mark.parametrize("settings", [{}, PARQUET])
def test_parts_are_read_a_row_group_at_a_time_however_they_are_written(tmp_path, corpus, settings):
    table = pa.Table.from_pylist(corpus[1], ACTIVATIONS)
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    pq.write_table(table.slice(0, 50), paths[0], row_group_size=20, **settings)
    pq.write_table(table.slice(50), paths[1], **settings)
    read = list(read_activations(paths))
    assert [len(rows) for rows in read] == [20, 20, 10, 10]
    assert pa.concat_tables(read).equals(table)
    some = pa.concat_tables(read_activations(paths, ["error", "feature_ids"]))
    assert some.equals(table.select(["error", "feature_ids"]))


def test_labels_are_found_by_id_and_absent_ids_are_unlabelled():
    labels = SampleLabels(np.array([9, 3, 7], np.uint64), np.array([1, 0, 1], np.int8))
    assert labels.of(np.array([3, 4, 9, 7, 100, 0], np.uint64)).tolist() == [0, -1, 1, 1, -1, -1]
    empty = SampleLabels(np.zeros(0, np.uint64), np.zeros(0, np.int8))
    assert empty.of(np.array([1], np.uint64)).tolist() == [-1]


def test_a_folder_without_a_coverage_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_coverage(tmp_path)
    with pytest.raises(FileNotFoundError, match="no Parquet file"):
        reduce_coverage(tmp_path, tmp_path, tmp_path, MEASURE, D_SAE, POSITIVE, Progress.silent())

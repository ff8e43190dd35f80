"""The diversity of a corpus: its samples and activations come in, diversity.json and the drawn sample go out. On Ray.

Two passes over stored rows, no model: one counts n-grams in the texts, one adds up unit vectors of the activations.
A task takes some parts. It splits its n-gram counts over `NUM_BUCKETS`, so that no process ever holds all n-grams of a
large corpus; another task adds up each bucket (tasks and not a data set: one task returns many objects, which is the
whole shuffle). Both passes also keep the `sample_size` samples with the smallest keys, a hash of seed and sample_id:
the drawn sample, which depends neither on the parts nor on their order.

    diversity/<corpus>/  diversity.json  sample.parquet (ACTIVATIONS rows of the drawn sample)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from jaxtyping import UInt64

from fac_ray.artifacts import parquet_files, read_table, write_json, write_table
from fac_ray.config import DiversityConfig
from fac_ray.schema import ACTIVATIONS, hash_of, require_columns
from fac_ray.statistics.diversity import VectorSums, corpus_measures, sample_measures, unit_vectors
from fac_ray.statistics.ngrams import NgramCounts, NgramTotals, count_ngrams, merge_ngrams, words_of

if TYPE_CHECKING:
    from fac_ray.progress import Progress

MAX_TASKS = 64
"""Partial results of a pass; more parts than that go several to a task."""
NUM_BUCKETS = 16
LENGTHS = (1, 2)
"""Words of the n-grams that are counted."""


def reduce_diversity(
    samples_folder: Path,
    activations_folder: Path,
    output_folder: Path,
    config: DiversityConfig,
    d_sae: int,
    seed: int,
    reference: tuple[str, Path] | None,
    progress: Progress,
) -> dict[str, Any]:
    """Write the diversity measures of a corpus; returns how many samples were read and drawn.

    `reference`: name and diversity folder of the corpus whose drawn sample decides the clusters; None: this one. The
    progress counts samples.

    Raises:
        FileNotFoundError: a folder holds no Parquet file.
        ValueError: the activations were measured with another SAE.
    """
    num_words, texts, totals = _read_texts(samples_folder, config.sample_size, seed, progress)
    vectors, rows = _read_vectors(activations_folder, config, d_sae, seed)
    write_table(output_folder / "sample.parquet", rows)
    clusters_of = rows if reference is None else read_table(reference[1] / "sample.parquet")
    at_sample = sample_measures(
        texts["text"].to_pylist(), unit_vectors(rows, d_sae), unit_vectors(clusters_of, d_sae), config, seed
    )
    num_samples = vectors.num_rows
    only_sampled = {name: at_sample[name] for name in ("self_bleu_4", "pos_distinct_2", "cluster_entropy")}
    write_json(
        output_folder / "diversity.json",
        {
            "num_samples": num_samples,
            "num_words": num_words,
            "num_vectors": vectors.num_vectors,
            "sample_size": len(texts),
            "seed": seed,
            "clusters_of": None if reference is None else reference[0],
            "vendi_width": min(d_sae, config.gram_width),
            "mean_words": num_words / num_samples,
            "mean_tokens": vectors.num_tokens / num_samples,
            **corpus_measures(totals[0], totals[1], vectors),
            **only_sampled,
            "at_sample": at_sample,
        },
    )
    return {"num_samples": num_samples, "sample_size": len(texts)}


def sample_keys(sample_ids: pa.ChunkedArray, seed: int) -> UInt64[np.ndarray, " rows"]:
    """A number for each sample that looks random; those with the smallest ones are drawn."""
    digits = (hash_of("draw", str(seed), sample_id)[:16] for sample_id in sample_ids.to_pylist())
    return np.array([int(number, 16) for number in digits], np.uint64)


def draw(tables: Sequence[pa.Table], sample_size: int) -> pa.Table:
    """The `sample_size` rows with the smallest `key` of tables that were drawn from parts, ascending."""
    return pa.concat_tables(tables).sort_by("key").slice(0, sample_size)


def _read_texts(
    folder: Path, sample_size: int, seed: int, progress: Progress
) -> tuple[int, pa.Table, list[NgramTotals]]:
    """Words of a corpus, the drawn texts, and the totals of its n-grams of each length."""
    count = ray.remote(num_returns=1 + NUM_BUCKETS)(_count_texts)
    tasks: list[Any] = [count.remote(paths, sample_size, seed) for paths in _groups(folder)]
    total = ray.remote(_total_bucket)
    buckets = [total.remote(*refs) for refs in zip(*(refs[1:] for refs in tasks), strict=True)]
    num_words, drawn = 0, list[pa.Table]()
    for num_samples, words, table in _as_done([refs[0] for refs in tasks]):
        progress.advance(num_samples)
        num_words += words
        drawn = [draw([*drawn, table], sample_size)]
    totals = [NgramTotals(0, 0, 0.0)] * len(LENGTHS)
    for bucket in ray.get(buckets):  # in their order: a sum of floats depends on it
        totals = [one.add(other) for one, other in zip(totals, bucket, strict=True)]
    return num_words, drawn[0], totals


def _count_texts(paths: list[str], sample_size: int, seed: int) -> tuple[Any, ...]:
    """Of some sample parts: (samples, words, drawn texts), then the n-gram counts of each bucket."""
    counts: list[list[NgramCounts]] = [[] for _ in LENGTHS]
    num_samples, num_words, drawn = 0, 0, list[pa.Table]()
    for path in paths:
        part = pq.read_table(path, columns=["sample_id", "text"])
        words = [words_of(text) for text in part["text"].to_pylist()]
        num_samples, num_words = num_samples + len(words), num_words + sum(map(len, words))
        for parts, length in zip(counts, LENGTHS, strict=True):
            parts.append(count_ngrams(words, length))
        drawn = [draw([*drawn, _with_keys(part, seed)], sample_size)]
    merged = [merge_ngrams(parts) for parts in counts]
    buckets = ([one.bucket(number, NUM_BUCKETS) for one in merged] for number in range(NUM_BUCKETS))
    return (num_samples, num_words, drawn[0]), *buckets


def _total_bucket(*parts: list[NgramCounts]) -> list[NgramTotals]:
    """The totals of one bucket, for each length, from its counts in every task."""
    return [NgramTotals.of(merge_ngrams(counts)) for counts in zip(*parts, strict=True)]


def _read_vectors(folder: Path, config: DiversityConfig, d_sae: int, seed: int) -> tuple[VectorSums, pa.Table]:
    """Sums over all activation rows, and the rows of the drawn sample."""
    add = ray.remote(num_returns=2)(_sum_vectors)
    tasks: list[Any] = [
        add.remote(paths, d_sae, config.gram_width, config.sample_size, seed) for paths in _groups(folder)
    ]
    sums: VectorSums | None = None
    for part in _as_done([refs[0] for refs in tasks]):
        sums = part if sums is None else sums.merge(part)
    assert sums is not None, "a folder has at least one group of parts"
    rows = draw(ray.get([refs[1] for refs in tasks]), config.sample_size)
    return sums, require_columns(rows, ACTIVATIONS, str(folder))


def _sum_vectors(paths: list[str], d_sae: int, width: int, sample_size: int, seed: int) -> tuple[VectorSums, pa.Table]:
    """Of some activation parts: their sums, and the rows drawn from them."""
    sums, drawn = None, list[pa.Table]()
    for path in paths:
        rows = require_columns(pq.read_table(path), ACTIVATIONS, path)
        part = VectorSums.of(rows, d_sae, width)
        sums = part if sums is None else sums.merge(part)
        drawn = [draw([*drawn, _with_keys(rows, seed)], sample_size)]
    assert sums is not None, "a group has at least one part"
    return sums, drawn[0]


def _with_keys(part: pa.Table, seed: int) -> pa.Table:
    return part.append_column("key", pa.array(sample_keys(part["sample_id"], seed), pa.uint64()))


def _groups(folder: Path) -> list[list[str]]:
    """The folder's parts, several to a group where there are more than `MAX_TASKS`."""
    paths = [str(path.resolve()) for path in parquet_files(folder)]
    if not paths:
        raise FileNotFoundError(f"{folder}: no Parquet file here")
    return [paths[start :: min(len(paths), MAX_TASKS)] for start in range(min(len(paths), MAX_TASKS))]


def _as_done(refs: list[ray.ObjectRef]) -> Iterator[Any]:
    """The objects, each as soon as it is there, and held no longer than the caller does."""
    waiting = list(refs)
    refs.clear()
    while waiting:
        (done,), waiting = ray.wait(waiting, num_returns=1)
        yield ray.get(done)

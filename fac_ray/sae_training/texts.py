"""What an SAE is trained on: the corpora of a config come in, one file of texts goes out, any row of it at hand.

Every so many-th text is held back: training never reads it, and the card's figures are measured on it. The others are
read again and again, in an order that depends on their number and the seed alone.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from random import Random

import pyarrow as pa

from fac_ray.artifacts import parquet_files, read_table
from fac_ray.config import RunConfig
from fac_ray.corpus.ingestion import ingest_corpus
from fac_ray.progress import Progress
from fac_ray.schema import SAMPLES, Message

Text = str | Sequence[Message]
"""A plain text or a chat."""

TEXTS_PER_READ = 256
"""Texts that are tokenized and sorted by length together: one group."""

HELD_BACK = 20
"""Every so many-th text is held back, of large corpora fewer."""

MAX_HELD_BACK = 2000
"""Texts that are held back at most, in round numbers: enough for figures of three digits."""


class Texts:
    """The texts of a file that `write_texts` made, mapped and not read: memory is that of the rows asked for."""

    def __init__(self, path: Path) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        self._starts = [0, *accumulate(batch.num_rows for batch in self._batches)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, row: int) -> Text:
        index = bisect_right(self._starts, row) - 1
        [found] = self._batches[index].slice(row - self._starts[index], 1).to_pylist()
        return found["messages"] or found["text"]


def write_texts(config: RunConfig, folder: Path) -> Path:
    """The file in `folder` with every sample of every corpus, read as a run would read it; made if it is not there.

    Raises:
        ConfigError: as `ingest_corpus`.
        ValueError: as `ingest_corpus`, or there are too few texts to hold any back.
    """
    path = folder / "texts.arrow"
    if not path.is_file():
        parts: list[Path] = []
        for name, corpus in config.corpora.items():
            samples, rejected = folder / "samples" / name, folder / "rejected" / name
            with Progress(f"samples/{name}", unit="rows") as progress:
                ingest_corpus(corpus, samples, rejected, config.run.max_rejected_fraction, progress)
            parts += parquet_files(samples)
        _join(parts, path)
    if (num_texts := len(Texts(path))) < HELD_BACK:
        raise ValueError(f"corpora: {num_texts} texts are too few to train an SAE on; give at least {HELD_BACK}")
    return path


def held_back_rows(num_texts: int) -> range:
    """Rows of the texts that are not trained on: every 20th, or as many fewer as make 2,000."""
    return range(0, num_texts, max(HELD_BACK, -(-num_texts // MAX_HELD_BACK)))


def training_groups(num_texts: int, seed: int) -> Iterator[list[int]]:
    """Endless: the rows of the other texts, a group at a time, in another order at each reading."""
    rng, held_back = Random(seed), held_back_rows(num_texts)
    rows = [row for row in range(num_texts) if row not in held_back]
    while True:
        rng.shuffle(rows)
        for first in range(0, len(rows), TEXTS_PER_READ):
            yield rows[first : first + TEXTS_PER_READ]


def groups_of_a_reading(num_texts: int) -> int:
    """Groups after which every text that is not held back was read once more."""
    return -(-(num_texts - len(held_back_rows(num_texts))) // TEXTS_PER_READ)


def _join(parts: Sequence[Path], path: Path) -> None:
    schema = pa.schema([SAMPLES.field("text"), SAMPLES.field("messages")])
    unfinished = path.with_suffix(".part")
    with pa.ipc.new_file(str(unfinished), schema) as writer:
        for part in parts:
            writer.write_table(read_table(part, schema.names))
    os.replace(unfinished, path)

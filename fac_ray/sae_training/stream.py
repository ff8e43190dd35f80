"""The residual stream that an SAE learns: texts in, blocks of content tokens out, from a pool of Ray actors.

The tokens are exactly those that coverage pools under the default preset: inside message contents, in the windows that
extraction uses, without attention sinks. Blocks come in the order of the texts, however many actors there are, so that
a training can be continued at a position.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fac_ray.activations.measuring import WAIT_FOR_CAPACITY_S, Pool, plan_pool
from fac_ray.config import ConfigError, MeasureConfig, ModelConfig, RunConfig
from fac_ray.features.backbone import Backbone, load_backbone
from fac_ray.features.batching import padded_ids
from fac_ray.features.chat import Window, tokenize, windows
from fac_ray.features.sinks import sink_tokens
from fac_ray.sae_training.mixing import Block, Position
from fac_ray.sae_training.texts import Text, Texts, training_groups

BATCH_TOKENS = 8192
"""Tokens of one forward pass, padding included, and so at most of one block."""

LONGEST_WINDOW_TOKENS = 4096

FIRST_GROUPS, MAX_GROUPS = 32, 4096
"""Groups that are asked of the pool at once: first so many, to see how many tokens they have, then what is missing."""


class Residuals:
    """A backbone as an actor of a pool: rows of texts in, blocks of their residual stream out."""

    def __init__(self, model: dict[str, Any], texts: str, num_threads: int | None) -> None:
        """Load the model of a dumped config; `num_threads` of the CPU, None: as torch decides."""
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self._texts, self._unusable = Texts(Path(texts)), ""
        try:
            self._backbone = load_backbone(ModelConfig(**model))
        except ConfigError as error:  # raised from here it would make Ray start the actor again and again
            self._unusable = str(error)

    def __call__(self, groups: pa.Table) -> Iterator[pa.Table]:
        if self._unusable:
            raise ConfigError(self._unusable)
        for group in groups.to_pylist():
            found, num_skipped = content_windows(
                self._backbone, [self._texts[row] for row in json.loads(group["rows"])]
            )
            batches = list(batched_by_length(found, BATCH_TOKENS))
            for number, batch in enumerate(batches):
                residual = content_tokens(self._backbone, batch).cpu().numpy()
                yield _row(group["group"], number, number + 1 == len(batches), num_skipped * (number == 0), residual)
            if not batches:
                yield _row(group["group"], 0, True, num_skipped, np.zeros((0, self._backbone.d_model), np.float32))


def residual_blocks(
    config: RunConfig, texts: Path, pool: Pool, position: Position, num_tokens: int
) -> Generator[Block, None, None]:
    """Endless: the blocks of the stream from a position on. `num_tokens` is how many the caller will about want.

    Raises:
        ConfigError: the model cannot be loaded.
        ValueError: no text has a content token.
    """
    num_texts = len(Texts(texts))
    order = islice(enumerate(training_groups(num_texts, config.sae_training.seed)), position.group, None)
    num_groups, groups_read, tokens_read = FIRST_GROUPS, 0, 0
    while True:
        stretch = list(islice(order, num_groups))
        for block in _stretch(config.model, texts, pool, stretch, position):
            tokens_read += len(block.residual)
            position = block.after
            yield block
        groups_read += len(stretch)
        if not tokens_read:
            raise ValueError(f"corpora: none of the first {groups_read} groups of texts has a token to train on")
        missing = max(0, num_tokens - tokens_read) * groups_read / tokens_read
        num_groups = min(MAX_GROUPS, max(FIRST_GROUPS, math.ceil(1.02 * missing)))


def plan_stream(config: RunConfig, trainer_gpus: float) -> Pool:
    """The pool of backbones beside a trainer that takes `trainer_gpus`, or without GPUs half of each core.

    Raises:
        ConfigError: the cluster has too few CPUs.
    """
    cluster = ray.cluster_resources()
    num_actors = config.sae_training.num_actors
    if gpus := cluster.get("GPU", 0.0) - trainer_gpus:
        cluster, num_actors = cluster | {"GPU": gpus}, num_actors or max(1, int(gpus))
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    pool = plan_pool(num_actors, MAX_GROUPS, cluster, num_nodes, os.cpu_count() or 1)
    return pool if pool.num_threads is None else pool._replace(num_threads=max(1, pool.num_threads // 2))


def content_residual(
    backbone: Backbone, texts: Sequence[Text], batch_tokens: int = BATCH_TOKENS
) -> Iterator[Float[Tensor, "N d_model"]]:
    """Residual stream at the content tokens of the texts, a batch of similarly long windows at a time, float32.

    Texts without a content token are left out.
    """
    found, _ = content_windows(backbone, texts)
    return (content_tokens(backbone, batch) for batch in batched_by_length(found, batch_tokens))


def content_windows(backbone: Backbone, texts: Sequence[Text]) -> tuple[list[Window], int]:
    """The windows of the texts, and how many texts have none: without a content token, or refused by the template."""
    measure = MeasureConfig().resolved()
    tokenizer, length = backbone.tokenizer, min(backbone.context_tokens, LONGEST_WINDOW_TOKENS)
    found: list[Window] = []
    num_skipped = 0
    for text in texts:
        chat = None if isinstance(text, str) else text
        plain = text if isinstance(text, str) else "\n\n".join(message["content"] for message in text)
        try:
            found += windows(tokenize(tokenizer, plain, chat, measure), length, tokenizer.bos_token_id)
        except ValueError:
            num_skipped += 1
    return found, num_skipped


def batched_by_length(found: Sequence[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """The windows, shortest first, in batches of at most `batch_tokens` tokens with padding, or of one window."""
    found = sorted(found, key=lambda window: len(window.token_ids))
    first = 0
    while first < len(found):
        last = first + 1
        while last < len(found) and len(found[last].token_ids) * (last + 1 - first) <= batch_tokens:
            last += 1
        yield found[first:last]
        first = last


def padded(batch: Sequence[Window]) -> tuple[Tensor, Tensor]:
    """(token ids, which of them are content): int64 and bool [B, T], padded on the right with id 0."""
    token_ids = padded_ids(batch)
    content = torch.zeros(token_ids.shape, dtype=torch.bool)
    for row, window in enumerate(batch):
        content[row, torch.from_numpy(window.pooled)] = True
    return token_ids, content


def content_tokens(backbone: Backbone, batch: Sequence[Window]) -> Float[Tensor, "N d_model"]:
    """Residual stream at the content tokens of a batch of windows that are no attention sinks, row by row."""
    token_ids, content = padded(batch)
    residual = backbone.residual(token_ids)[content.to(backbone.device)]
    return residual[learnt_tokens(residual, content)]


def learnt_tokens(residual: Float[Tensor, "N d_model"], content: Bool[Tensor, "B T"]) -> Bool[Tensor, " N"]:
    """Which content tokens the SAE learns, all but attention sinks; their residual stream, row by row, is given."""
    ratio = MeasureConfig().resolved().sink_norm_ratio
    assert ratio
    bounds = [0, *content.sum(dim=1).cumsum(dim=0).tolist()]
    return ~sink_tokens(residual, bounds, ratio)


def _stretch(
    model: ModelConfig, texts: Path, pool: Pool, groups: Sequence[tuple[int, list[int]]], position: Position
) -> Iterator[Block]:
    """The blocks of some groups, one pass of the pool, without those that lie before the position."""
    items = [{"group": group, "rows": json.dumps(rows)} for group, rows in groups]
    with ray.data.DataContext.current(_in_order()):
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            Residuals,
            fn_constructor_kwargs={"model": model.model_dump(), "texts": str(texts), "num_threads": pool.num_threads},
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=min(pool.num_actors, len(items))),
            num_gpus=pool.num_gpus,
            num_cpus=pool.num_cpus,
        )
    expected = Position(groups[0][0])
    tables: Iterable[pa.Table] = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    for table in tables:
        for row in range(table.num_rows):
            place, block = _block(table, row)
            assert place == expected, f"block {place} came where {expected} was due"
            expected = block.after
            if place >= position:
                yield block


def _in_order() -> ray.data.DataContext:
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    context.execution_no_progress_timeout_s = WAIT_FOR_CAPACITY_S
    context.max_consecutive_actor_init_deaths = 3  # a machine may go away, or its memory
    return context


def _row(group: int, block: int, last: bool, num_skipped: int, residual: np.ndarray) -> pa.Table:
    columns = {
        "group": [group],
        "block": [block],
        "last": [last],
        "num_skipped": [num_skipped],
        "d_model": [residual.shape[1]],
        "residual": pa.array([residual.tobytes()], pa.large_binary()),
    }
    return pa.table(columns)


def _block(table: pa.Table, row: int) -> tuple[Position, Block]:
    fields = {name: table[name][row] for name in table.column_names}
    group, number, d_model = (fields[name].as_py() for name in ("group", "block", "d_model"))
    after = Position(group + 1) if fields["last"].as_py() else Position(group, number + 1)
    numbers = np.frombuffer(fields["residual"].as_buffer(), np.float32).reshape(-1, d_model)
    return Position(group, number), Block(torch.from_numpy(numbers.copy()), after, fields["num_skipped"].as_py())

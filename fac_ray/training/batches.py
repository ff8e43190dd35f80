"""Texts come in, padded batches of token ids go out, in an order that a seed decides.

A batch's members depend on the seed and the number of rows alone, not on the texts and not on the number of workers:
arms that differ in K rows differ in nothing else, and two workers step as one does.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from fac_ray.config import MeasureConfig
from fac_ray.features.chat import tokenize

MAX_PIECES = 4
"""Forward passes of one training step. Of shuffled messages of 13 to 82 tokens, 32 in a batch, one pass is 46 %
padding, four are 14 %."""

logger = logging.getLogger(__name__)


def encode(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Token ids of each text as it is read when it is measured: one user message if there is a chat template.

    Longer ones keep their first `max_tokens`. A text that cannot be read, such as an empty one, becomes one padding
    token, so that every row keeps its place; their number is logged.
    """
    reading = MeasureConfig(tokens="all", max_tokens=max_tokens).resolved()
    rows, num_unread = [], 0
    for text in texts:
        try:
            rows.append(tokenize(tokenizer, text, None, reading).token_ids.tolist())
        except ValueError:
            rows.append([padding_id(tokenizer)])
            num_unread += 1
    if num_unread:
        logger.warning("%d of %d texts cannot be read and are trained or scored as empty ones", num_unread, len(texts))
    return rows


def padding_id(tokenizer: Any) -> int:
    """Token id that fills short rows: the padding token, else EOS, else 0; attention and the head skip it."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    return 0


def pad(rows: Sequence[Sequence[int]], fill: int) -> tuple[Int[torch.Tensor, "B T"], Int[torch.Tensor, "B T"]]:
    """Token ids filled on the right, and the attention mask that is 0 on the filling."""
    num_tokens = max(len(row) for row in rows)
    token_ids = torch.tensor([[*row, *[fill] * (num_tokens - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (num_tokens - len(row)) for row in rows])
    return token_ids, mask


def epoch_batches(num_samples: int, batch_size: int, seed: int, epoch: int) -> Int[np.ndarray, "steps batch_size"]:
    """Rows of each step of one epoch: a permutation, its last batch filled up from its own beginning."""
    order = np.random.default_rng((seed, epoch)).permutation(num_samples)
    num_steps = -(-num_samples // batch_size)
    return np.resize(order, num_steps * batch_size).reshape(num_steps, batch_size)


def pieces(lengths: Int[np.ndarray, " N"], rows: Int[np.ndarray, " batch"]) -> list[Int[np.ndarray, " piece"]]:
    """The rows of a batch as at most `MAX_PIECES` parts, each of similar lengths, so that little of them is padding."""
    by_length = rows[np.argsort(lengths[rows], kind="stable")]
    return np.array_split(by_length, min(MAX_PIECES, len(rows)))


def scoring_batches(
    lengths: Sequence[int] | Int[np.ndarray, " N"], batch_size: int, rank: int, num_workers: int
) -> list[Int[np.ndarray, " batch"]]:
    """Rows that one worker scores, of similar length in each batch; every worker has as many batches.

    With several workers the last rows may be scored by more than one of them.
    """
    order = np.argsort(np.asarray(lengths), kind="stable")
    per_worker = -(-len(order) // num_workers)
    mine = np.resize(order, per_worker * num_workers).reshape(per_worker, num_workers)[:, rank]
    return [mine[start : start + batch_size] for start in range(0, per_worker, batch_size)]

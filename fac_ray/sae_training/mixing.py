"""The shuffle buffer before the trainer: blocks of tokens in, mixed batches out, with a state that can be saved.

Same batches from the same random numbers as SAELens' own `mixing_buffer`, which as a generator cannot be stopped and
continued elsewhere: fill up to `buffer_tokens`, permute, serve one half in batches, keep the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Position(NamedTuple):
    """A place in the deterministic stream of texts: what comes next is this block of this group."""

    group: int = 0
    block: int = 0


class Block(NamedTuple):
    """Residual stream at the content tokens of similarly long texts."""

    residual: Float[Tensor, "N d_model"]
    after: Position
    """What follows this block in the stream."""
    num_skipped: int = 0
    """Texts of the group that have no content token or cannot be tokenized; said by its first block."""


class BufferState(NamedTuple):
    """All that the next batches depend on, apart from torch's random numbers."""

    serving: Float[Tensor, "S d_model"]
    """Permuted tokens that are given out next."""
    kept: Float[Tensor, "K d_model"]
    """Tokens that wait to be mixed with new ones."""
    position: Position
    """The first block that is not in the buffer."""
    num_skipped: int


class MixingBuffer:
    """An iterator of batches [batch_tokens, d_model]; it ends where the blocks do, and drops what is not in a batch."""

    def __init__(
        self, blocks: Iterator[Block], buffer_tokens: int, batch_tokens: int, state: BufferState | None = None
    ) -> None:
        """`state`: that of an earlier buffer; the blocks then begin at its position."""
        assert buffer_tokens >= batch_tokens
        self._blocks, self._buffer_tokens, self._batch_tokens = blocks, buffer_tokens, batch_tokens
        self._position = state.position if state else Position()
        self._num_skipped = state.num_skipped if state else 0
        served = (
            state.serving.split(batch_tokens) if state and len(state.serving) else ()
        )  # none splits into one of none
        self._serving = list(served)[::-1]
        self._kept = state.kept if state and len(state.kept) else None

    @property
    def state(self) -> BufferState:
        """The state between two batches."""
        kept = self._kept if self._kept is not None else torch.zeros(0, 0)
        serving = torch.cat(self._serving[::-1]) if self._serving else kept[:0]
        return BufferState(serving, kept, self._position, self._num_skipped)

    def __iter__(self) -> MixingBuffer:
        return self

    def __next__(self) -> Float[Tensor, "batch_tokens d_model"]:
        if not self._serving:
            self._refill()
        return self._serving.pop()

    def _refill(self) -> None:
        tokens = [] if self._kept is None else [self._kept]
        num_tokens, num_kept = sum(map(len, tokens)), 0
        for block in self._blocks:
            tokens.append(block.residual)
            num_tokens += len(block.residual)
            self._position = block.after
            self._num_skipped += block.num_skipped
            if num_tokens >= self._buffer_tokens:
                tokens, num_kept = [torch.cat(tokens)[torch.randperm(num_tokens)]], self._buffer_tokens // 2
                break
        num_batches = (num_tokens - num_kept) // self._batch_tokens
        if num_kept:
            num_batches = max(1, num_batches)
        if not num_batches:
            raise StopIteration
        mixed, num_served = torch.cat(tokens), num_batches * self._batch_tokens
        self._kept = mixed[num_served:].clone()
        self._serving = list(mixed[:num_served].split(self._batch_tokens))[::-1]

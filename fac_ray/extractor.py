"""From texts to feature activations: the one extractor of the batch pipeline, the synthesis and the service.

    g_i(x) = max over the pooled tokens t of x of the SAE's output for feature i at t

Samples come in as (text, messages or None), and one sparse record for each goes out. Texts are grouped by length,
the residual stream goes through the SAE a stretch of tokens at a time, and only features with g_i(x) > 0 are kept, so
nothing of size tokens x d_sae ever exists for more than one stretch.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Float32, Int, Int32, Int64
from torch import Tensor

from fac_ray.backbone import load_backbone
from fac_ray.chat import TokenizedSample, Window, tokenize, windows
from fac_ray.config import ConfigError, MeasureConfig, ModelConfig, SaeConfig
from fac_ray.sae import SaeLensAutoencoder, load_sae, require_fit
from fac_ray.schema import ACTIVATIONS, Message

logger = logging.getLogger(__name__)

LONGEST_WINDOW_TOKENS = 4096
"""Length of a window where neither the config nor a shorter context says otherwise."""

STRETCH_NUMBERS = {"cpu": 1 << 24, "cuda": 1 << 28}
"""Numbers (tokens x d_sae) that the SAE computes at once: 64 MiB on a CPU, 1 GiB on a GPU."""


class SampleFeatures(NamedTuple):
    """What one sample switches on; n features with activation > 0."""

    feature_ids: Int32[np.ndarray, " n"]
    """Ascending."""
    activations: Float32[np.ndarray, " n"]
    peak_start: Int32[np.ndarray, " n"]
    """First character in the text of the token with the activation; the first such token if several have it."""
    peak_end: Int32[np.ndarray, " n"]
    num_tokens: int
    """Pooled tokens."""
    truncated: bool
    error: str | None
    """Why the sample could not be measured; then n = 0."""


class Peaks(NamedTuple):
    """Features of one sample over some of its tokens: largest activation, and where."""

    feature_ids: Int64[np.ndarray, " n"]
    """Ascending."""
    activations: Float32[np.ndarray, " n"]
    positions: Int64[np.ndarray, " n"]
    """Position in the sample of the first token with that activation."""


class FeatureExtractor:
    """A loaded language model and SAE that turn texts into sparse feature activations."""

    def __init__(self, model: ModelConfig, sae: SaeConfig, measure: MeasureConfig, device: str | None = None) -> None:
        """Load both on `device` (None: a GPU if there is one).

        Raises:
            ConfigError: the model or the SAE cannot be read, or they and the switches of `measure` do not fit together.
        """
        self.measure = measure.resolved()
        self.backbone = load_backbone(model, device)
        self.sae = load_sae(sae, self.backbone.device)
        require_fit(self.sae, model, self.backbone.d_model)
        self.window_tokens = self._window_tokens()
        self._batch_tokens = measure.batch_tokens
        if self.measure.activation == "dense" and isinstance(self.sae, SaeLensAutoencoder):
            raise ConfigError(f"measure.activation 'dense' is not defined for the SAE at {sae.path}; use 'native'")

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.sae.d_sae

    def extract(self, samples: Sequence[tuple[str, Sequence[Message] | None]]) -> list[SampleFeatures]:
        """One record for each (text, messages or None), in the same order, whatever the batches; a sample that cannot
        be measured has its reason in `error`.

        Raises:
            RuntimeError: not even a single window fits into the device's memory.
        """
        tokenized = [self._tokenize(text, messages) for text, messages in samples]
        peaks: list[list[Peaks]] = [[] for _ in samples]
        errors = {i: sample for i, sample in enumerate(tokenized) if isinstance(sample, str)}
        jobs = [
            (i, window)
            for i, sample in enumerate(tokenized)
            if not isinstance(sample, str)
            for window in windows(sample, self.window_tokens, self.backbone.tokenizer.bos_token_id)
        ]
        pending = deque(sorted(jobs, key=lambda job: -len(job[1].token_ids)))
        while pending:
            for i, found in self._next_batch(pending):
                if found is None:
                    errors[i] = "the model's residual stream is not finite here; use model.dtype bfloat16 or float32"
                else:
                    peaks[i].append(found)
        return [
            _unmeasured(errors[i]) if i in errors else _features(sample, _merged(peaks[i]))
            for i, sample in enumerate(tokenized)
        ]

    def extract_table(self, samples: pa.Table) -> pa.Table:
        """ACTIVATIONS rows for SAMPLES rows (columns sample_id, text, messages), in the same order."""
        texts, messages = samples["text"].to_pylist(), samples["messages"].to_pylist()
        found = self.extract(list(zip(texts, messages, strict=True)))
        columns = {
            "sample_id": samples["sample_id"],
            "feature_ids": _lists([f.feature_ids for f in found], pa.int32()),
            "activations": _lists([f.activations for f in found], pa.float32()),
            "peak_start": _lists([f.peak_start for f in found], pa.int32()),
            "peak_end": _lists([f.peak_end for f in found], pa.int32()),
            "num_tokens": [f.num_tokens for f in found],
            "truncated": [f.truncated for f in found],
            "error": [f.error for f in found],
        }
        return pa.table(columns, schema=ACTIVATIONS)

    def _window_tokens(self) -> int:
        context = self.backbone.context_tokens
        for key in ("window_tokens", "max_tokens"):
            if (value := getattr(self.measure, key)) is not None and value > context:
                raise ConfigError(f"measure.{key} {value}: the model's context is {context} tokens")
        if self.measure.max_tokens is not None:
            return self.measure.max_tokens
        return self.measure.window_tokens or min(context, LONGEST_WINDOW_TOKENS)

    def _tokenize(self, text: str, messages: Sequence[Message] | None) -> TokenizedSample | str:
        try:
            return tokenize(self.backbone.tokenizer, text, messages, self.measure)
        except ValueError as error:
            return str(error)

    def _next_batch(self, pending: deque[tuple[int, Window]]) -> list[tuple[int, Peaks | None]]:
        """Take as many windows as the token budget allows, and measure them. If memory runs out, the budget is halved
        for good and the windows go back."""
        longest = len(pending[0][1].token_ids)
        batch = [pending.popleft() for _ in range(min(len(pending), max(1, self._batch_tokens // longest)))]
        try:
            found = self._measure([window for _, window in batch])
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise RuntimeError(
                    f"a single window of {longest} tokens does not fit into the memory of {self.backbone.device}; "
                    "set a smaller measure.window_tokens or model.dtype bfloat16"
                ) from error
            self._batch_tokens = longest * len(batch) // 2
        else:
            return [(i, peaks) for (i, _), peaks in zip(batch, found, strict=True)]
        torch.cuda.empty_cache()
        logger.warning("out of memory: batches are now at most %d tokens", self._batch_tokens)
        pending.extendleft(reversed(batch))
        return []

    @torch.inference_mode()
    def _measure(self, batch: Sequence[Window]) -> list[Peaks | None]:
        """Peaks of each window; None where the residual stream is not finite."""
        token_ids = torch.zeros(len(batch), max(len(w.token_ids) for w in batch), dtype=torch.long)
        for row, window in zip(token_ids, batch, strict=True):
            row[: len(window.token_ids)] = torch.from_numpy(window.token_ids)
        owners = np.repeat(np.arange(len(batch)), [len(w.pooled) for w in batch])
        columns = np.concatenate([w.pooled for w in batch])
        positions = np.concatenate([w.positions for w in batch])
        residual = self.backbone.residual(token_ids)
        residual = residual[torch.from_numpy(owners), torch.from_numpy(columns)]
        broken = set(owners[~residual.isfinite().all(dim=-1).cpu().numpy()].tolist())
        parts: list[list[Peaks]] = [[] for _ in batch]
        stretch = max(1, STRETCH_NUMBERS[self.backbone.device.type] // self.d_sae)
        for first in range(0, len(owners), stretch):
            taken = slice(first, first + stretch)
            for owner, peaks in self._peaks(residual[taken], owners[taken], positions[taken]):
                parts[owner].append(peaks)
        return [None if row in broken else _merged(found) for row, found in enumerate(parts)]

    def _peaks(
        self, x: Float[Tensor, "N d_model"], owners: Int64[np.ndarray, " N"], positions: Int64[np.ndarray, " N"]
    ) -> list[tuple[int, Peaks]]:
        """(owner, peaks) of each owner of these tokens, which lie together and in order."""
        activation = self.measure.activation
        assert activation is not None
        starts = np.flatnonzero(np.diff(owners, prepend=-1))
        if activation == "native" and self.sae.k is not None:
            segments = torch.from_numpy(np.searchsorted(starts, np.arange(len(owners)), side="right") - 1).to(x.device)
            found = _sparse_peaks(*self.sae.top_k(x), segments, self.d_sae)
        else:
            found = _dense_peaks(self.sae.encode(x, activation), np.append(starts, len(owners)))
        segment, feature_ids, activations, tokens = (column.cpu().numpy() for column in found)
        bounds = np.searchsorted(segment, np.arange(len(starts) + 1))
        return [
            (int(owners[starts[s]]), Peaks(feature_ids[a:b], activations[a:b], positions[tokens[a:b]]))
            for s, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))
        ]


Found = tuple[Int[Tensor, " n"], Int[Tensor, " n"], Float[Tensor, " n"], Int[Tensor, " n"]]
"""Segment, feature id, activation and token of each peak, ordered by segment and then by feature."""


def _sparse_peaks(
    values: Float[Tensor, "N k"], feature_ids: Int[Tensor, "N k"], segments: Int[Tensor, " N"], d_sae: int
) -> Found:
    """Peaks of tokens of which only k features are known: the largest value, and the first token that has it, for each
    pair of segment and feature."""
    tokens = torch.arange(len(values), device=values.device)[:, None].expand_as(values)
    keys = (segments[:, None] * d_sae + feature_ids)[values > 0]
    tokens, values = tokens[values > 0], values[values > 0]
    order = values.argsort(descending=True, stable=True)
    order = order[keys[order].argsort(stable=True)]
    keys, values, tokens = keys[order], values[order], tokens[order]
    first = torch.ones_like(keys, dtype=torch.bool)
    first[1:] = keys[1:] != keys[:-1]
    keys = keys[first]
    return keys // d_sae, keys % d_sae, values[first], tokens[first]


def _dense_peaks(activations: Float[Tensor, "N d_sae"], bounds: Int64[np.ndarray, " S+1"]) -> Found:
    """Peaks of tokens of which every feature is known; segment s has the tokens from bounds[s] to bounds[s + 1]."""
    largest = [activations[a:b].max(dim=0) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    values = torch.stack([found.values for found in largest])
    tokens = torch.stack([found.indices + int(a) for found, a in zip(largest, bounds[:-1], strict=True)])
    segments, feature_ids = (values > 0).nonzero(as_tuple=True)
    return segments, feature_ids, values[segments, feature_ids], tokens[segments, feature_ids]


def _merged(parts: Sequence[Peaks]) -> Peaks:
    """Peaks over all tokens from those over some: larger activation first, then earlier token."""
    if len(parts) == 1:
        return parts[0]
    feature_ids, activations, positions = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((positions, -activations, feature_ids))
    first = np.diff(feature_ids[order], prepend=-1) > 0
    order = order[first]
    return Peaks(feature_ids[order], activations[order], positions[order])


def _features(sample: TokenizedSample, peaks: Peaks) -> SampleFeatures:
    return SampleFeatures(
        peaks.feature_ids.astype(np.int32),
        peaks.activations,
        sample.start[peaks.positions],
        sample.end[peaks.positions],
        int(sample.pooled.sum()),
        sample.truncated,
        None,
    )


def _unmeasured(reason: str) -> SampleFeatures:
    none = np.empty(0, dtype=np.int32)
    return SampleFeatures(none, np.empty(0, dtype=np.float32), none, none, 0, False, reason)


def _lists(arrays: Sequence[np.ndarray], kind: pa.DataType) -> pa.ListArray:
    offsets = np.cumsum([0, *(len(array) for array in arrays)], dtype=np.int32)
    values = np.concatenate(arrays) if arrays else np.empty(0)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, type=kind))

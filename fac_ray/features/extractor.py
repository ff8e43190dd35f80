"""From texts to feature activations: the one extractor of the batch pipeline, the synthesis and the service.

    g_i(x) = max over the pooled tokens t of x of the SAE's output for feature i at t

Samples come in as (text, messages or None), and one sparse record for each goes out. Texts are grouped by length,
the residual stream goes through the SAE a stretch of tokens at a time, and only features with g_i(x) > 0 are kept, so
nothing of size tokens x d_sae ever exists for more than one stretch.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Float32, Int, Int32
from torch import Tensor

from fac_ray.config import ConfigError, MeasureConfig, ModelConfig, SaeConfig
from fac_ray.features.backbone import Backbone, load_backbone
from fac_ray.features.batching import Batch, Limits, padded_ids, plan_batches
from fac_ray.features.chat import TokenizedSample, Window, tokenize, windows
from fac_ray.features.headers import pays, shared_header
from fac_ray.features.lanes import Lanes, plan_lanes
from fac_ray.features.peaks import Peaks, dense_peaks, merge_peaks, sparse_peaks
from fac_ray.features.sae import SparseAutoencoder, load_sae
from fac_ray.features.sae_origin import require_fit
from fac_ray.features.sinks import sink_tokens
from fac_ray.schema import ACTIVATIONS, Message

logger = logging.getLogger(__name__)

LONGEST_WINDOW_TOKENS = 4096
"""Length of a window where neither the config nor a shorter context says otherwise."""

STRETCH_NUMBERS = {"cpu": 1 << 24, "cuda": 1 << 28}
"""Numbers (tokens x d_sae) that the SAE computes at once: 64 MiB in each lane of a CPU, 1 GiB on a GPU."""

PADDING_TOKENS = {"cpu": 32, "cuda": 256}
"""Padding that one batch may hold: as many tokens as take about the time that one batch more would cost (reading all
weights once more, or starting all kernels once more)."""

Found = list[tuple[int, Peaks, int]]

NOT_FINITE = "its activations are not finite; use model.dtype bfloat16 or float32"


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
    num_sinks: int
    """Attention sinks, which are not pooled."""
    truncated: bool
    error: str | None
    """Why the sample could not be measured; then n = 0."""


class FeatureExtractor:
    """A loaded language model and SAE that turn texts into sparse feature activations."""

    def __init__(self, model: ModelConfig, sae: SaeConfig, measure: MeasureConfig, device: str | None = None) -> None:
        """Load both on `device` (None: a GPU if there is one). On a CPU the extractor uses as many threads as torch has
        now.

        Raises:
            ConfigError: the model or the SAE cannot be read, or they and the switches of `measure` do not fit together.
        """
        self.measure = measure.resolved()
        self.backbone = load_backbone(model, device)
        self.sae = load_sae(sae, self.backbone.device)
        self._num_threads = torch.get_num_threads()
        self._lanes = Lanes(self.backbone, self._num_threads)
        require_fit(self.sae.origin, self.sae.d_model, sae, model, self.backbone.d_model, self.measure)
        self.window_tokens = self._window_tokens()
        self._batch_tokens = measure.batch_tokens
        if self.measure.activation == "dense" and not isinstance(self.sae, SparseAutoencoder):
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
        tokenized = [self._tokenized(text, messages) for text, messages in samples]
        bos_token_id = self.backbone.tokenizer.bos_token_id
        pending = [
            (i, window)
            for i, sample in enumerate(tokenized)
            if isinstance(sample, TokenizedSample)
            for window in windows(sample, self.window_tokens, bos_token_id)
        ]
        parts: list[list[Peaks]] = [[] for _ in samples]
        num_sinks = [0] * len(samples)
        for i, peaks, sinks in self._pooled(pending):
            parts[i].append(peaks)
            num_sinks[i] += sinks
        return [_features(*sample) for sample in zip(tokenized, parts, num_sinks, strict=True)]

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
            "num_sinks": [f.num_sinks for f in found],
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
        trained_on = self.sae.origin.context_tokens or context
        return self.measure.window_tokens or min(context, trained_on, LONGEST_WINDOW_TOKENS)

    def _tokenized(self, text: str, messages: Sequence[Message] | None) -> TokenizedSample | str:
        """The sample's tokens, or why it has none."""
        try:
            return tokenize(self.backbone.tokenizer, text, messages, self.measure)
        except ValueError as error:
            return str(error)

    def _pooled(self, windows: Sequence[tuple[int, Window]]) -> Iterator[tuple[int, Peaks, int]]:
        """(sample, peaks, sinks) of each window, given with the number of its sample."""
        header = self._header([window for _, window in windows])
        batches, num_lanes = plan_batches(windows, header, self._limits()), 1
        if self.backbone.device.type == "cpu":
            torch.set_num_threads(self._num_threads)  # a thread that started while lanes ran has theirs
            num_lanes = plan_lanes(self._num_threads, len(batches))
        for batch, found in self._in_lanes(windows, header, num_lanes) if num_lanes > 1 else self._in_turn(batches):
            yield from ((batch.windows[row][0], peaks, sinks) for row, peaks, sinks in found)

    def _header(self, windows: Sequence[Window]) -> Int[np.ndarray, " P"]:
        """What is worth keeping of the first tokens that the samples share; empty if nothing is."""
        header = shared_header([window for window in windows if window.starts_sample])
        is_worth_it = self.backbone.can_keep and pays(header, windows, self.backbone.keeps(header))
        return header if is_worth_it else header[:0]

    def _limits(self, num_lanes: int = 1) -> Limits:
        return Limits(self._batch_tokens // num_lanes, self._of_device(PADDING_TOKENS))

    def _in_lanes(
        self, windows: Sequence[tuple[int, Window]], header: Int[np.ndarray, " P"], num_lanes: int
    ) -> Iterator[tuple[Batch, Found]]:
        """Each batch and what is found in it. All lanes together have as much in hand as one batch would be."""
        batches = plan_batches(windows, header, self._limits(num_lanes))
        return zip(batches, self._lanes.map(self._peaks, batches, num_lanes), strict=True)

    def _in_turn(self, batches: deque[Batch]) -> Iterator[tuple[Batch, Found]]:
        """Each batch and what is found in it; a batch that does not fit into the memory is cut first."""
        while batches:
            batch = batches.popleft()
            try:
                found = self._peaks(self.backbone, batch)
            except torch.OutOfMemoryError as error:
                self._take_less(batch, error)
                header = batch.windows[0][1].token_ids[: batch.num_shared]
                batches = plan_batches(
                    [*batch.windows, *chain(*(left.windows for left in batches))], header, self._limits()
                )
            else:
                yield batch, found

    def _of_device(self, values: dict[str, int]) -> int:
        return values["cuda" if self.backbone.device.type == "cuda" else "cpu"]

    def _take_less(self, batch: Batch, error: torch.OutOfMemoryError) -> None:
        """From now on half as many windows at once as in the batch for which memory ran out."""
        longest = len(batch.windows[0][1].token_ids)
        if len(batch.windows) == 1:
            raise RuntimeError(
                f"a single window of {longest} tokens does not fit into the memory of {self.backbone.device}; set a "
                "smaller measure.window_tokens, or model.dtype bfloat16"
            ) from error
        self._batch_tokens = (longest - batch.num_shared) * len(batch.windows) // 2
        torch.cuda.empty_cache()
        logger.warning("out of memory: from now on at most %d tokens at once", self._batch_tokens)

    @torch.inference_mode()
    def _peaks(self, backbone: Backbone, batch: Batch) -> Found:
        """(row in the batch, peaks, number of sinks) of each window, and of a window that is cut between stretches for
        each stretch, with its sinks at the first."""
        windows = [window for _, window in batch.windows]
        rows = np.repeat(np.arange(len(windows)), [len(window.pooled) for window in windows])
        columns = np.concatenate([window.pooled for window in windows]) - batch.num_shared
        positions = np.concatenate([window.positions for window in windows])
        residual = backbone.residual(padded_ids(windows), batch.num_shared)[
            torch.from_numpy(rows), torch.from_numpy(columns)
        ]
        num_sinks = np.zeros(len(windows), np.int64)
        if (sinks := self._sinks(residual, windows)) is not None:
            num_sinks += np.bincount(rows[sinks], minlength=len(windows))
            residual, rows, positions = residual[torch.from_numpy(~sinks)], rows[~sinks], positions[~sinks]
        num_tokens = max(1, self._of_device(STRETCH_NUMBERS) // self.d_sae)
        found = []
        for first in range(0, len(rows), num_tokens):
            stretch = slice(first, first + num_tokens)
            starts = np.flatnonzero(np.diff(rows[stretch], prepend=-1))
            peaks = self._stretch_peaks(residual[stretch], [*starts.tolist(), len(rows[stretch])])
            for row, part in zip(rows[stretch][starts].tolist(), peaks, strict=True):
                found.append((row, part._replace(tokens=positions[stretch][part.tokens]), int(num_sinks[row])))
                num_sinks[row] = 0
        return found

    def _sinks(self, residual: Float[Tensor, "N d_model"], windows: Sequence[Window]) -> Bool[np.ndarray, " N"] | None:
        """Which pooled tokens of the windows are attention sinks; None if none is."""
        if not self.measure.sink_norm_ratio:
            return None
        bounds = np.cumsum([0, *(len(window.pooled) for window in windows)]).tolist()
        sinks = sink_tokens(residual, bounds, self.measure.sink_norm_ratio).cpu().numpy()
        return sinks if sinks.any() else None

    def _stretch_peaks(self, residual: Float[Tensor, "N d_model"], bounds: Sequence[int]) -> Iterator[Peaks]:
        assert self.measure.activation is not None
        if self.measure.activation == "native" and isinstance(self.sae, SparseAutoencoder) and self.sae.k is not None:
            return sparse_peaks(*self.sae.top_k(residual), bounds, self.d_sae)
        return dense_peaks(self.sae.encode(residual, self.measure.activation), bounds)


def _features(sample: TokenizedSample | str, parts: Sequence[Peaks], num_sinks: int) -> SampleFeatures:
    if isinstance(sample, str):
        return _unmeasured(sample)
    if not all(np.isfinite(part.activations).all() for part in parts):
        return _unmeasured(NOT_FINITE)
    peaks = merge_peaks(parts)
    return SampleFeatures(
        peaks.feature_ids.astype(np.int32),
        peaks.activations,
        sample.start[peaks.tokens],
        sample.end[peaks.tokens],
        int(sample.pooled.sum()) - num_sinks,
        num_sinks,
        sample.truncated,
        None,
    )


def _unmeasured(reason: str) -> SampleFeatures:
    none = np.empty(0, dtype=np.int32)
    return SampleFeatures(none, np.empty(0, dtype=np.float32), none, none, 0, 0, False, reason)


def _lists(arrays: Sequence[np.ndarray], kind: pa.DataType) -> pa.ListArray:
    offsets = np.cumsum([0, *(len(array) for array in arrays)], dtype=np.int32)
    values = np.concatenate(arrays) if arrays else np.empty(0)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, type=kind))

"""From a text or chat to token ids, the tokens that are pooled, and the characters that each token stands for.

Which tokens lie inside message contents is found by characters in the rendered chat (`rendering`), so it holds for any
chat template. Contents are text: a control token that is spelled out in one is read as the characters of its spelling.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from fac_ray.config import MeasureConfig, TokenSkip
from fac_ray.features.rendering import PRIVATE_USE, TEMPLATE_DATE, Rendered, render, spans_array
from fac_ray.schema import Message

__all__ = ["TEMPLATE_DATE", "TokenizedSample", "Window", "render", "tokenize", "windows"]


class TokenizedSample(NamedTuple):
    """One sample as the model reads it, T tokens."""

    token_ids: Int[np.ndarray, " T"]
    pooled: Bool[np.ndarray, " T"]
    """Tokens over which activations are maximised; at least one."""
    start: Int[np.ndarray, " T"]
    """First character of the token in the sample's text; of a token outside contents, where the next content starts."""
    end: Int[np.ndarray, " T"]
    """Character after the token's last; equal to `start` for a token outside the contents."""
    truncated: bool


class Window(NamedTuple):
    """A stretch of a sample that goes through the model at once, W tokens."""

    token_ids: Int[np.ndarray, " W"]
    pooled: Int[np.ndarray, " P"]
    """Positions in the window of the tokens that are pooled here."""
    positions: Int[np.ndarray, " P"]
    """The same tokens' positions in the sample."""

    @property
    def starts_sample(self) -> bool:
        """Whether its first token is the sample's."""
        return bool(self.pooled[0] == self.positions[0])


def tokenize(
    tokenizer: PreTrainedTokenizerFast, text: str, messages: Sequence[Message] | None, measure: MeasureConfig
) -> TokenizedSample:
    """Token ids of one sample under the resolved switches of `measure`.

    Raises:
        ValueError: the sample is empty, the template refuses it, or no token of it would be pooled.
    """
    rendered = render(tokenizer, text, messages)
    add_special_tokens = bool(measure.double_bos) or not _has_bos(tokenizer, rendered)
    token_ids, characters = _encode(tokenizer, rendered.string, add_special_tokens)
    if not measure.double_bos and _control_in_content(tokenizer, token_ids, characters, rendered).any():
        rendered, token_ids, characters = _encode_as_text(tokenizer, rendered, add_special_tokens)
    kept = slice(None, measure.max_tokens)
    pooled = _pooled(tokenizer, token_ids, characters, rendered, measure)[kept]
    if not pooled.any():
        switch = measure.model_dump(include={"tokens"})["tokens"]
        raise ValueError(f"none of its {len(token_ids)} tokens is pooled under measure.tokens {switch}")
    start, end = _in_text(characters, rendered)
    truncated = measure.max_tokens is not None and len(token_ids) > measure.max_tokens
    return TokenizedSample(token_ids[kept], pooled, start[kept], end[kept], truncated)


def windows(sample: TokenizedSample, window_tokens: int, bos_token_id: int | None) -> list[Window]:
    """The sample in stretches of at most `window_tokens` that together pool each of its pooled tokens once.

    A later window starts with BOS if the sample does and reads the last quarter of its predecessor again, as context.
    Windows without a pooled token are left out.
    """
    num_tokens = len(sample.token_ids)
    prefix = sample.token_ids[:1] if sample.token_ids[0] == bos_token_id else sample.token_ids[:0]
    overlap = window_tokens // 4
    found, first = [], 0
    while first < num_tokens:
        head, context = (prefix[:0], first) if first == 0 else (prefix, first - overlap)
        stop = min(context + window_tokens - len(head), num_tokens)
        positions = first + np.flatnonzero(sample.pooled[first:stop])
        if len(positions):
            token_ids = np.concatenate([head, sample.token_ids[context : positions[-1] + 1]])
            found.append(Window(token_ids, positions - context + len(head), positions))
        first = stop
    return found


def _has_bos(tokenizer: PreTrainedTokenizerFast, rendered: Rendered) -> bool:
    """Whether the template wrote the BOS that the tokenizer would add; one that a content starts with is not it."""
    written = rendered.string[: rendered.inside[0, 0]] if len(rendered.inside) else rendered.string
    return bool(tokenizer.bos_token) and written.startswith(tokenizer.bos_token)


# ---- token ids ----


class TextReader(NamedTuple):
    """A tokenizer to which the control tokens' spellings are text; it knows them by private names instead."""

    backend: Tokenizer
    names: dict[str, str]
    """Private name of each control token, by its spelling."""
    token_ids: Int[np.ndarray, " V"]
    """The tokenizer's own id for each of the backend's."""


def _encode(
    tokenizer: PreTrainedTokenizerFast, string: str, add_special_tokens: bool
) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, "T 2"]]:
    """Token ids, and the first character and the character after the last that each stands for."""
    encoding = tokenizer(
        string,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    token_ids = np.asarray(encoding["input_ids"], dtype=np.int64)
    return token_ids, np.asarray(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)


def _encode_as_text(
    tokenizer: PreTrainedTokenizerFast, rendered: Rendered, add_special_tokens: bool
) -> tuple[Rendered, Int[np.ndarray, " T"], Int[np.ndarray, "T 2"]]:
    """As `_encode`, with control tokens only where the template writes them; the rendered chat is the one encoded."""
    unused = next(chr(code) for code in PRIVATE_USE if chr(code) not in rendered.string)
    reader = _text_reader(tokenizer, unused)
    rendered = _renamed(rendered, reader.names)
    encoding = reader.backend.encode(rendered.string, add_special_tokens=add_special_tokens)
    characters = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    return rendered, reader.token_ids[np.asarray(encoding.ids, dtype=np.int64)], characters


@lru_cache(maxsize=4)
def _text_reader(tokenizer: PreTrainedTokenizerFast, mark: str) -> TextReader:
    """`mark` is a character that the strings to be read do not hold."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    size = max(backend.get_vocab().values()) + 1
    control = [(i, token) for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    names = [f"{mark}{i}{mark}" for i, _ in control]
    backend.add_tokens(
        [
            AddedToken(name, normalized=False, lstrip=token.lstrip, rstrip=token.rstrip)
            for name, (_, token) in zip(names, control, strict=True)
        ]
    )
    token_ids = np.arange(size + len(control))
    token_ids[np.asarray([backend.token_to_id(name) for name in names], dtype=np.int64)] = [i for i, _ in control]
    return TextReader(backend, {token.content: n for n, (_, token) in zip(names, control, strict=True)}, token_ids)


def _renamed(rendered: Rendered, names: dict[str, str]) -> Rendered:
    """The rendered chat with the private names of the control tokens that the template wrote."""
    control = re.compile("|".join(re.escape(spelling) for spelling in sorted(names, key=len, reverse=True)))
    pieces, inside, length, done = [], [], 0, 0
    for first, last in rendered.inside.tolist():
        part = control.sub(lambda match: names[match[0]], rendered.string[done:first])
        start = length + len(part)
        length, done = start + last - first, last
        inside.append((start, length))
        pieces += [part, rendered.string[first:last]]
    pieces.append(control.sub(lambda match: names[match[0]], rendered.string[done:]))
    return Rendered("".join(pieces), spans_array(inside), rendered.outside)


@lru_cache(maxsize=16)
def _control_ids(tokenizer: PreTrainedTokenizerFast) -> Int[np.ndarray, " n"]:
    """Ids of all control tokens: those that the tokenizer names (BOS, EOS, ...) and those it only marks as special."""
    marked = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    return np.unique(np.asarray([*marked, *tokenizer.all_special_ids], dtype=np.int64))


def _control_in_content(
    tokenizer: PreTrainedTokenizerFast,
    token_ids: Int[np.ndarray, " T"],
    characters: Int[np.ndarray, "T 2"],
    rendered: Rendered,
) -> Bool[np.ndarray, " T"]:
    first, _ = _overlapped(characters, rendered.inside)
    return (first >= 0) & np.isin(token_ids, _control_ids(tokenizer))


# ---- which tokens, and which characters ----


def _pooled(
    tokenizer: PreTrainedTokenizerFast,
    token_ids: Int[np.ndarray, " T"],
    characters: Int[np.ndarray, "T 2"],
    rendered: Rendered,
    measure: MeasureConfig,
) -> Bool[np.ndarray, " T"]:
    if isinstance(measure.tokens, TokenSkip):
        return np.arange(len(token_ids)) >= measure.tokens.skip
    if measure.tokens == "all":
        return np.ones(len(token_ids), dtype=bool)
    first, _ = _overlapped(characters, rendered.inside)
    if measure.tokens == "after_prefix":
        return np.logical_or.accumulate(first >= 0)
    return (first >= 0) & ~np.isin(token_ids, _control_ids(tokenizer))


def _in_text(
    characters: Int[np.ndarray, "T 2"], rendered: Rendered
) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"]]:
    """First character and character after the last of each token in the sample's text."""
    inside, outside = rendered.inside, rendered.outside
    if not len(inside):
        return np.zeros(len(characters), dtype=np.int32), np.zeros(len(characters), dtype=np.int32)
    first, last = _overlapped(characters, inside)
    last = np.where(outside[last, 0] < outside[first, 0], first, last)  # a template may put a later message first
    shift = outside[:, 0] - inside[:, 0]
    start = np.maximum(characters[:, 0], inside[first, 0]) + shift[first]
    end = np.minimum(characters[:, 1], inside[last, 1]) + shift[last]
    following = np.searchsorted(inside[:, 0], characters[:, 0])
    next_start = np.append(outside[:, 0], outside[-1, 1])[following]
    within = first >= 0
    return np.where(within, start, next_start).astype(np.int32), np.where(within, end, next_start).astype(np.int32)


def _overlapped(
    characters: Int[np.ndarray, "T 2"], inside: Int[np.ndarray, "C 2"]
) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"]]:
    """First and last content with which a token shares a character; -1 where there is none."""
    first = np.searchsorted(inside[:, 1], characters[:, 0], side="right")
    last = np.searchsorted(inside[:, 0], characters[:, 1], side="left") - 1
    within = (first <= last) & (characters[:, 1] > characters[:, 0])
    return np.where(within, first, -1), np.where(within, last, -1)

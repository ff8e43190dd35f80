"""From a text or chat to token ids, the tokens that are pooled, and the characters that each token stands for.

A plain text is a chat of one user message if the tokenizer has a chat template, and raw text otherwise. Which tokens
lie inside message contents is found by characters in the rendered chat, so it holds for any template: the same roles
are rendered once with placeholders for contents, which tells what the template writes from what the messages say.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import jinja2
import numpy as np
from jaxtyping import Bool, Int
from transformers import PreTrainedTokenizerFast

from fac_ray.config import MeasureConfig, TokenSkip
from fac_ray.schema import Message

TEMPLATE_DATE = "26 Jul 2024"
"""Some templates write today's date; a measurement must not depend on the day, so they are all told this one."""

PLACEHOLDER = "\ue000{}\ue001"
"""Private-use characters around a number: no template treats them specially."""


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


class Rendered(NamedTuple):
    """The string that is tokenized, and where the C contents that are not empty lie in it and in the sample's text."""

    string: str
    inside: Int[np.ndarray, "C 2"]
    """First character and character after the last, in `string`."""
    outside: Int[np.ndarray, "C 2"]
    """The same characters in the sample's text."""


def tokenize(
    tokenizer: PreTrainedTokenizerFast, text: str, messages: Sequence[Message] | None, measure: MeasureConfig
) -> TokenizedSample:
    """Token ids of one sample under the resolved switches of `measure`.

    Raises:
        ValueError: the sample is empty, the template refuses it, or no token of it would be pooled.
    """
    rendered = render(tokenizer, text, messages)
    encoding = tokenizer(
        rendered.string,
        add_special_tokens=bool(measure.double_bos) or not _has_bos(tokenizer, rendered),
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    token_ids = np.asarray(encoding["input_ids"], dtype=np.int64)
    characters = np.asarray(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)
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


def render(tokenizer: PreTrainedTokenizerFast, text: str, messages: Sequence[Message] | None) -> Rendered:
    """The string that the model reads for a sample, and where the sample's contents lie in it.

    Raises:
        ValueError: the sample is empty, a message is not {role, content}, the template refuses the chat, or a content
            cannot be found in what the template made of it or in `text`.
    """
    if not text or not text.strip():
        raise ValueError("the text is empty")
    text.encode()  # UnicodeEncodeError, a ValueError, where a character is half of a surrogate pair
    if not tokenizer.chat_template:
        whole = np.asarray([[0, len(text)]])
        return Rendered(text, whole, whole)
    if messages is None:
        messages = [{"role": "user", "content": text}]
    if not messages:
        raise ValueError("the chat has no message")
    contents = [_content(message) for message in messages]
    string = _apply_template(tokenizer, messages)
    parts = _template_parts(tokenizer, tuple(message["role"] for message in messages))
    inside = _between(string, contents, parts) or _search(string, contents, "what the chat template made of it")
    outside = _search(text, [content[form] for content, (_, form) in zip(contents, inside, strict=True)], "its text")
    lengths = [len(range(*form.indices(len(content)))) for content, (_, form) in zip(contents, inside, strict=True)]
    return Rendered(string, _spans(inside, lengths), _spans(outside, lengths))


def _spans(found: list[tuple[int, slice]], lengths: list[int]) -> Int[np.ndarray, "C 2"]:
    spans = [(at, at + length) for (at, _), length in zip(found, lengths, strict=True) if length]
    return np.asarray(spans, dtype=np.int64).reshape(-1, 2)


def _content(message: Message) -> str:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError("a message needs a role and a content that are both strings")
    return content


def _has_bos(tokenizer: PreTrainedTokenizerFast, rendered: Rendered) -> bool:
    """Whether the template wrote the BOS that the tokenizer would add; one that a content starts with is not it."""
    written = rendered.string[: rendered.inside[0, 0]] if len(rendered.inside) else rendered.string
    return bool(tokenizer.bos_token) and written.startswith(tokenizer.bos_token)


def _apply_template(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> str:
    try:
        chat = [{"role": message["role"], "content": message["content"]} for message in messages]
        return str(tokenizer.apply_chat_template(chat, tokenize=False, date_string=TEMPLATE_DATE))
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses the roles {[m['role'] for m in messages]}: {error}") from error


@lru_cache(maxsize=256)
def _template_parts(tokenizer: PreTrainedTokenizerFast, roles: tuple[str, ...]) -> tuple[str, ...] | None:
    """What the template writes before, between and after contents of these roles; None if it does not keep them all."""
    placeholders = [PLACEHOLDER.format(j) for j in range(len(roles))]
    rest = _apply_template(tokenizer, [{"role": r, "content": p} for r, p in zip(roles, placeholders, strict=True)])
    parts = []
    for placeholder in placeholders:
        part, found, rest = rest.partition(placeholder)
        if not found:
            return None
        parts.append(part)
    return (*parts, rest)


def _between(string: str, contents: list[str], parts: tuple[str, ...] | None) -> list[tuple[int, slice]] | None:
    """For each content (where it starts, which part of it is there), if the string is exactly the parts with the
    contents, whole or stripped, between them; else None."""
    if parts is None or not string.startswith(parts[0]):
        return None
    at, found = len(parts[0]), []
    for content, part in zip(contents, parts[1:], strict=True):
        form = next((form for form in _forms(content) if string.startswith(content[form] + part, at)), None)
        if form is None:
            return None
        found.append((at, form))
        at += len(content[form]) + len(part)
    return found if at == len(string) else None


def _search(string: str, contents: list[str], where: str) -> list[tuple[int, slice]]:
    """As `_between`, by looking for one content after the other; for templates that change what is around contents."""
    at, found = 0, []
    for j, content in enumerate(contents):
        places = ((string.find(content[form], at), form) for form in _forms(content))
        place = next(((start, form) for start, form in places if start >= 0), None)
        if place is None:
            raise ValueError(f"the content of message {j} is not found in {where}")
        found.append(place)
        at = place[0] + len(content[place[1]])
    return found


def _forms(content: str) -> list[slice]:
    """Parts of a content that a template may keep: all of it, or without the blanks at its ends."""
    first, last = len(content) - len(content.lstrip()), len(content.rstrip())
    return [slice(0, len(content)), slice(min(first, last), last), slice(0, last), slice(first, len(content))]


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
    return (first >= 0) & ~np.isin(token_ids, tokenizer.all_special_ids)


def _in_text(
    characters: Int[np.ndarray, "T 2"], rendered: Rendered
) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"]]:
    """First character and character after the last of each token in the sample's text."""
    inside, outside = rendered.inside, rendered.outside
    if not len(inside):
        return np.zeros(len(characters), dtype=np.int32), np.zeros(len(characters), dtype=np.int32)
    first, last = _overlapped(characters, inside)
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

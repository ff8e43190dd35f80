"""A chat as the string that its model reads, and where in it the contents lie.

A plain text is a chat of one user message if the tokenizer has a chat template, and raw text otherwise. The same roles
are rendered once with placeholders for contents, which tells what the template writes from what the messages say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

import jinja2
import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerFast

from fac_ray.schema import Message

TEMPLATE_DAY = datetime(2024, 7, 26)
TEMPLATE_DATE = "26 Jul 2024"
"""Some templates write today's date; a measurement must not depend on the day, so they are all told this one."""

PRIVATE_USE = range(0xF0000, 0xFFFFE)
"""Characters without a meaning, one for each message of a chat: no template treats them specially."""
PLACEHOLDER = re.compile(rf"(([{chr(PRIVATE_USE[0])}-{chr(PRIVATE_USE[-1])}])\2*)")

ROLES_SHOWN = 200
"""Characters of the roles in an error: a chat may have any number of them."""


class Rendered(NamedTuple):
    """The string that is tokenized, and where the C contents that are not empty lie in it and in the sample's text."""

    string: str
    inside: Int[np.ndarray, "C 2"]
    """First character and character after the last, in `string`."""
    outside: Int[np.ndarray, "C 2"]
    """The same characters in the sample's text."""


class Layout(NamedTuple):
    """What a template writes for given roles: a part, a content, a part, ..., a content, a part."""

    parts: tuple[str, ...]
    messages: tuple[int, ...]
    """Whose contents stand between the parts; not always in the chat's order, and some more than once."""


class Place(NamedTuple):
    """Where a content that is not empty stands in the rendered chat."""

    message: int
    at: int
    """First character."""
    kept: str
    """The content, or what the template leaves of it: all, or without blanks at its ends."""


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
    places = _places(tokenizer, string, [message["role"] for message in messages], contents)
    starts = _starts(text, places)
    inside = [(place.at, place.at + len(place.kept)) for place in places]
    outside = [(starts[place.message], starts[place.message] + len(place.kept)) for place in places]
    return Rendered(string, spans_array(inside), spans_array(outside))


def spans_array(spans: list[tuple[int, int]]) -> Int[np.ndarray, "C 2"]:
    """(first, last + 1) pairs as an array, also where there is none."""
    return np.asarray(spans, dtype=np.int64).reshape(-1, 2)


def _content(message: Message) -> str:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError("a message needs a role and a content that are both strings")
    return content


def _places(tokenizer: PreTrainedTokenizerFast, string: str, roles: list[str], contents: list[str]) -> list[Place]:
    """The contents in the rendered chat, in its order; a content that the template writes twice has two places."""
    if len(roles) > len(PRIVATE_USE):
        raise ValueError(f"the chat has {len(roles)} messages; at most {len(PRIVATE_USE)} can be told apart")
    layouts = chain(
        [_role_layout(tokenizer, tuple(roles))],
        # What the template writes depends on the contents: perhaps only on their lengths, or also on blanks at the ends
        (_layout(tokenizer, roles, _shaped(contents, keep_blanks)) for keep_blanks in (False, True)),
    )
    for layout in layouts:
        if (places := _between(string, contents, layout)) is not None:
            return places
    raise ValueError(
        "the contents are not found, whole or without blanks at their ends, in what the chat template made of them"
    )


@lru_cache(maxsize=256)
def _role_layout(tokenizer: PreTrainedTokenizerFast, roles: tuple[str, ...]) -> Layout:
    return _layout(tokenizer, roles, [chr(PRIVATE_USE[j]) for j in range(len(roles))])


def _layout(tokenizer: PreTrainedTokenizerFast, roles: Sequence[str], placeholders: Sequence[str]) -> Layout:
    chat = [Message(role=role, content=content) for role, content in zip(roles, placeholders, strict=True)]
    pieces = PLACEHOLDER.split(_apply_template(tokenizer, chat))
    return Layout(tuple(pieces[::3]), tuple(ord(character) - PRIVATE_USE[0] for character in pieces[2::3]))


def _shaped(contents: Sequence[str], keep_blanks: bool) -> list[str]:
    """Placeholders of the contents' lengths, with the blanks at their ends or without any."""
    cores = [content.strip() if keep_blanks else content for content in contents]
    runs = [chr(PRIVATE_USE[j]) * len(core) for j, core in enumerate(cores)]
    return [c.replace(core, run, 1) if core else c for c, core, run in zip(contents, cores, runs, strict=True)]


def _between(string: str, contents: list[str], layout: Layout) -> list[Place] | None:
    """The places, if the string is exactly the parts with contents between them and no content is left out."""
    parts, messages = layout
    missing = set(range(len(contents))).difference(messages)
    if any(contents[message].strip() for message in missing) or not string.startswith(parts[0]):
        return None
    at, found = len(parts[0]), []
    for message, part in zip(messages, parts[1:], strict=True):
        kept = next((kept for kept in _forms(contents[message]) if string.startswith(kept + part, at)), None)
        if kept is None:
            return None
        if kept:
            found.append(Place(message, at, kept))
        at += len(kept) + len(part)
    return found if at == len(string) else None


def _forms(content: str) -> Iterator[str]:
    """What a template may leave of a content."""
    yield content
    for blanks in (None, "\n"):
        yield content.strip(blanks)
        yield content.rstrip(blanks)
        yield content.lstrip(blanks)


def _starts(text: str, places: list[Place]) -> dict[int, int]:
    """First character in the sample's text of what is kept of each message, by message."""
    at, starts = 0, {}
    for message, kept in sorted({(place.message, place.kept) for place in places}):
        starts[message] = text.find(kept, at)
        if starts[message] < 0:
            raise ValueError(f"the content of message {message} is not found in its text")
        at = starts[message] + len(kept)
    return starts


def _apply_template(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> str:
    try:
        chat = [{"role": message["role"], "content": message["content"]} for message in messages]
        rendered = tokenizer.apply_chat_template(
            chat, tokenize=False, date_string=TEMPLATE_DATE, strftime_now=TEMPLATE_DAY.strftime
        )
    except jinja2.TemplateError as error:
        roles = str([message["role"] for message in messages])
        raise ValueError(f"the chat template refuses the roles {roles[:ROLES_SHOWN]}: {error}") from error
    return str(rendered)

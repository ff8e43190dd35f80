"""What a raw row means: a row of a file comes in, a SAMPLES row goes out, or the reason why there is none."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from fac_ray.config import CorpusConfig
from fac_ray.corpus.rows import BadRow
from fac_ray.schema import Message, content_id, sample_id

TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}
TYPE_NAMES = {
    type(None): "null",
    bool: "a truth value",
    int: "a number",
    float: "a number",
    str: "a text",
    dict: "an object",
    list: "a list",
}


def needed_columns(corpus: CorpusConfig) -> list[str]:
    """The columns that samples are made of, the content first."""
    return [corpus.messages or corpus.text or "text", *([corpus.label] if corpus.label else [])]


def read_sample(row: Any, corpus: CorpusConfig, source_file: str, source_row: int) -> dict[str, Any]:
    """The SAMPLES row of a raw row.

    Raises:
        BadRow: the row holds no usable text or chat; the message is the reason that goes to REJECTED.
    """
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow(f"not an object: {_type_name(row)}")
    messages = _read_chat(row, corpus)
    text = _require_text(row, needed_columns(corpus)[0]) if messages is None else join_contents(messages)
    if not text.strip():
        raise BadRow("empty text: nothing but white space")
    content = content_id(text, messages)
    return {
        "sample_id": sample_id(source_file, source_row, content),
        "content_id": content,
        "text": text,
        "messages": messages,
        "label": _read_label(row, corpus.label),
        "source_file": source_file,
        "source_row": source_row,
    }


def parse_transcript(text: str) -> list[Message]:
    r"""The chat of a `\n\nHuman: ... \n\nAssistant: ...` transcript, white space around each turn dropped.

    Raises:
        BadRow: there is no turn, or text before the first one.
    """
    before, *turns = TURN.split(text)
    if not turns:
        raise BadRow("no turn: no paragraph of the transcript begins with 'Human:' or 'Assistant:'")
    if before.strip():
        raise BadRow("text before the first turn: a transcript begins with 'Human:' or 'Assistant:'")
    contents = (content.strip() for content in turns[1::2])
    return [Message(role=ROLES[speaker], content=c) for speaker, c in zip(turns[::2], contents, strict=True)]


def join_contents(messages: list[Message]) -> str:
    """`text` of a chat: the contents, joined by blank lines."""
    return "\n\n".join(message["content"] for message in messages)


def _read_chat(row: Mapping[str, Any], corpus: CorpusConfig) -> list[Message] | None:
    """The chat of a row, or None where the corpus holds plain texts."""
    column = needed_columns(corpus)[0]
    if corpus.transcript:
        return parse_transcript(_require_text(row, column))
    if corpus.messages is None:
        return None
    value = _require_column(row, column)
    if isinstance(value, str):  # in CSV a chat can only be JSON
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRow(f"malformed messages: not JSON: {error}") from error
    if not isinstance(value, list) or not value:
        raise BadRow(f"malformed messages: a list of {{role, content}} is needed, not {_type_name(value)}")
    return [_read_message(message, number) for number, message in enumerate(value)]


def _read_message(message: Any, number: int) -> Message:
    if not isinstance(message, dict):
        raise BadRow(f"malformed messages: message {number} is {_type_name(message)}, not {{role, content}}")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise BadRow(f"malformed messages: {key!r} of message {number} is {_type_name(message.get(key))}, not text")
    return Message(role=_require_unicode(message["role"]), content=_require_unicode(message["content"]))


def _require_text(row: Mapping[str, Any], column: str) -> str:
    value = _require_column(row, column)
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRow(f"not UTF-8: column {column!r}") from error
    if not isinstance(value, str):
        raise BadRow(f"wrong type: column {column!r} holds {_type_name(value)}, not text")
    return _require_unicode(value)


def _require_column(row: Mapping[str, Any], column: str) -> Any:
    if column not in row:
        raise BadRow(f"missing column: {column!r} is not among {', '.join(map(repr, row))[:200] or 'no columns'}")
    if isinstance(row[column], BadRow):
        raise row[column]
    return row[column]


def _require_unicode(text: str) -> str:
    """The text, unless it holds half a surrogate pair: such a text has no UTF-8 form and cannot be stored."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raw = 0xDC80 <= ord(text[error.start]) <= 0xDCFF  # how a CSV or JSON reader hands on a byte that is not UTF-8
        raise BadRow(f"not UTF-8: {'a byte' if raw else 'a lone surrogate'} at character {error.start}") from error
    return text


def _read_label(row: Mapping[str, Any], column: str | None) -> str | None:
    """str() of the label; None where there is none or an empty one.

    No label makes a row a bad row, so the samples of a corpus are the same with any label column or none.
    """
    value = row.get(column) if column else None
    if value is None or value == "":
        return None
    try:
        label = str(value)
    except (ValueError, RecursionError):  # a number of thousands of digits; lists in lists in lists
        return _type_name(value)
    return label.encode("utf-8", "backslashreplace").decode("utf-8")


def _type_name(value: Any) -> str:
    return TYPE_NAMES.get(type(value), type(value).__name__)

"""Names and Arrow types of every row that one stage hands to another. Flat columns, nothing pickled.

Ids are hashes: `sample_id` of source file, row and content, `content_id` of the content alone, so two samples with
one `content_id` are duplicates. Nothing is ever matched by position. A `sample_id` begins as the `content_id` does:
samples in the order of their ids are in an order of their contents, wherever their files lie.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import UInt64

HEX_ID = "^[0-9a-f]{32}$"


class Message(TypedDict):
    role: str
    content: str


MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))

SAMPLES = pa.schema(
    [
        ("sample_id", pa.string()),
        ("content_id", pa.string()),
        ("text", pa.string()),  # for a chat: the contents, joined by blank lines
        ("messages", MESSAGES),  # null for a plain text
        ("label", pa.string()),  # null where there is none
        ("source_file", pa.string()),
        ("source_row", pa.int64()),  # 0-based
    ]
)

REJECTED = pa.schema([("source_file", pa.string()), ("source_row", pa.int64()), ("reason", pa.string())])

ACTIVATIONS = pa.schema(
    [
        ("sample_id", pa.string()),
        ("feature_ids", pa.list_(pa.int32())),  # ascending; every feature with activation > 0
        ("activations", pa.list_(pa.float32())),
        ("peak_start", pa.list_(pa.int32())),  # characters of the peak token in `text`
        ("peak_end", pa.list_(pa.int32())),
        ("num_tokens", pa.int32()),  # pooled tokens
        ("num_sinks", pa.int32()),  # attention sinks, which are not pooled
        ("truncated", pa.bool_()),
        ("error", pa.string()),  # null unless the sample could not be measured; then the lists are empty
    ]
)

COVERAGE = pa.schema(
    [
        ("feature_id", pa.int32()),
        ("num_samples", pa.list_(pa.int64())),  # one count for each threshold of the grid
        ("max_activation", pa.float32()),
    ]
)

EXEMPLARS = pa.schema(
    [
        ("feature_id", pa.int32()),
        ("rank", pa.int32()),  # 0 is the strongest
        ("sample_id", pa.string()),
        ("activation", pa.float32()),
        ("span", pa.string()),
    ]
)

FEATURES = pa.schema(
    [
        ("feature_id", pa.int32()),
        ("relevant", pa.bool_()),
        ("method", pa.string()),
        ("effect", pa.float64()),  # log2 odds ratio
        ("p_value", pa.float64()),
        ("q_value", pa.float64()),
        ("num_positive", pa.int64()),  # active positive anchor samples
        ("num_negative", pa.int64()),
        ("explanation", pa.string()),
        ("judgement", pa.string()),
    ]
)

GAPS = pa.schema(
    [
        ("feature_id", pa.int32()),
        ("rank", pa.int32()),  # 0 comes first
        ("score", pa.float64()),
        ("anchor_fraction", pa.float64()),
        ("explanation", pa.string()),
        ("exemplars", pa.list_(pa.string())),  # strongest first
    ]
)

CANDIDATES = pa.schema(
    [
        ("candidate_id", pa.string()),
        ("feature_id", pa.int32()),
        ("step", pa.int32()),  # 1 or 2
        ("attempt", pa.int32()),  # 0-based
        ("text", pa.string()),
        ("activation", pa.float32()),  # of the target feature; null where it was not measured
        ("status", pa.string()),  # accepted | rejected | scored (a step 1 candidate)
        ("reason", pa.string()),  # why it was rejected
        ("positive_id", pa.string()),  # step 2: candidate_id of x+
        ("negative_id", pa.string()),  # step 2: candidate_id of x-
        ("prompt_hash", pa.string()),
        ("generator", pa.string()),
        ("seed", pa.int64()),
    ]
)

SYNTHETIC = pa.schema(
    [
        ("sample_id", pa.string()),  # the candidate_id it was accepted from
        ("content_id", pa.string()),
        ("text", pa.string()),
        ("label", pa.string()),
        ("feature_id", pa.int32()),  # null for an untargeted sample
        ("activation", pa.float32()),
        ("attempt", pa.int32()),
        ("prompt_hash", pa.string()),
        ("generator", pa.string()),
        ("seed", pa.int64()),
        ("harmful", pa.bool_()),
    ]
)


def content_id(text: str, messages: Sequence[Message] | None = None) -> str:
    """Hash of a sample's content alone: 32 hex digits. Equal contents have equal ids in every corpus and run."""
    content = text if messages is None else json.dumps([[m["role"], m["content"]] for m in messages])
    return hash_of("content", content)


def sample_id(source_file: str, source_row: int, content: str) -> str:
    """Hash of a sample's `content_id` and where it comes from: 32 hex digits.

    The first half is that of the `content_id`; the second half alone tells samples apart.
    """
    return content[:16] + hash_of("sample", source_file, str(source_row), content)[16:]


def id_numbers(ids: pa.ChunkedArray) -> UInt64[np.ndarray, " rows"]:
    """Ids as 64-bit integers: the last 16 of their 32 hex digits; an id of another form is hashed first."""
    texts = ids.to_pylist()
    if not pc.all(pc.match_substring_regex(ids, HEX_ID)).as_py():
        texts = [text if re.fullmatch(HEX_ID, text) else hash_of("id", text) for text in texts]
    return np.frombuffer(bytes.fromhex("".join(texts)), ">u8")[1::2].astype(np.uint64)


def hash_of(*parts: str) -> str:
    """32 hex digits of BLAKE2b over the parts, each with its length, so that no two lists of parts share a hash."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        encoded = part.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def require_columns(table: pa.Table, schema: pa.Schema, source: str) -> pa.Table:
    """The table with exactly the schema's columns, in its order and types.

    Raises:
        ValueError: a column is missing or has a type that cannot be cast; `source` is named.
    """
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        raise ValueError(f"{source}: columns {missing} are missing; it has {table.column_names}")
    return table.select(schema.names).cast(schema)

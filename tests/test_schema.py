"""Ids are hashes of content, and rows have exactly the columns of their schema."""

from __future__ import annotations

import pyarrow as pa
import pytest

from fac_ray.schema import GAPS, content_id, hash_of, require_columns, sample_id


def test_ids_follow_content_and_place():
    content = content_id("hello")
    assert content == content_id("hello")
    assert content != content_id("hello ")
    assert content != content_id("hello", [{"role": "user", "content": "hello"}])
    assert sample_id("a.jsonl", 0, content) != sample_id("a.jsonl", 1, content)
    assert len(content) == 32


def test_parts_of_a_hash_cannot_run_into_each_other():
    assert hash_of("ab", "c") != hash_of("a", "bc")
    assert hash_of("\udcff") != hash_of("?")  # a lone surrogate is hashed, not replaced


def test_missing_columns_are_named_and_types_are_cast():
    table = pa.table({"feature_id": pa.array([1], pa.int64())})
    with pytest.raises(ValueError, match=r"gaps\.parquet: columns \['rank'"):
        require_columns(table, GAPS, "gaps.parquet")
    full = require_columns(GAPS.empty_table().append_column("extra", pa.array([], pa.int8())), GAPS, "x")
    assert full.schema == GAPS

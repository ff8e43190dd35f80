"""Ids are hashes of content, and rows have exactly the columns of their schema."""

from __future__ import annotations

import pyarrow as pa
import pytest

from fac_ray.schema import GAPS, content_id, hash_of, id_numbers, require_columns, sample_id


def test_ids_follow_content_and_place():
    content = content_id("hello")
    assert content == content_id("hello")
    assert content != content_id("hello ")
    assert content != content_id("hello", [{"role": "user", "content": "hello"}])
    assert sample_id("a.jsonl", 0, content) != sample_id("a.jsonl", 1, content)
    assert len(content) == 32


def test_sample_ids_are_in_the_order_of_contents_wherever_the_files_lie():
    contents = [content_id(f"text {number}") for number in range(50)]
    for folder in ("here", "/another/place"):
        ids = [sample_id(f"{folder}/a.jsonl", row, content) for row, content in enumerate(contents)]
        assert [one[:16] for one in sorted(ids)] == sorted(one[:16] for one in contents)


def test_id_numbers_tell_equal_contents_apart_and_do_not_depend_on_the_company():
    ids = ["f" * 16 + "0000000000000010", "f" * 32, "another form"]
    numbers = id_numbers(pa.chunked_array([ids]))
    assert numbers[:2].tolist() == [16, 2**64 - 1]
    assert id_numbers(pa.chunked_array([["another form"]]))[0] == numbers[2]
    same = [sample_id("a.jsonl", row, content_id("one text")) for row in range(50)]
    assert len(set(id_numbers(pa.chunked_array([same])).tolist())) == 50


def test_parts_of_a_hash_cannot_run_into_each_other():
    assert hash_of("ab", "c") != hash_of("a", "bc")
    assert hash_of("\udcff") != hash_of("?")  # a lone surrogate is hashed, not replaced


def test_missing_columns_are_named_and_types_are_cast():
    table = pa.table({"feature_id": pa.array([1], pa.int64())})
    with pytest.raises(ValueError, match=r"gaps\.parquet: columns \['rank'"):
        require_columns(table, GAPS, "gaps.parquet")
    full = require_columns(GAPS.empty_table().append_column("extra", pa.array([], pa.int8())), GAPS, "x")
    assert full.schema == GAPS

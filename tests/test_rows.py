"""Files become rows: each format, each way in which bytes fail to be a row, and pieces that together are the file."""

from __future__ import annotations

import csv
import gzip
import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fac_ray.config import ConfigError, CorpusConfig
from fac_ray.corpus.rows import BadRow, read_rows
from fac_ray.corpus.sources import Piece, Source, count_line_breaks, list_sources, source_fingerprint, split_source

OBJECTS: list[dict[str, Any]] = [{"text": "one"}, {"text": 'two, and\n"three"', "n": 4}, {"text": "grüße"}]


def rows_of(path, columns=("text",)):
    [source] = list_sources(CorpusConfig(path=str(path)))
    return list(read_rows(Piece(source), columns))


def reasons_of(rows):
    return {row: str(value).partition(":")[0] for row, value in rows if isinstance(value, BadRow)}


def write(path, content: bytes):
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.ndjson"])
def test_lines_of_json_are_rows(tmp_path, name):
    content = "".join(json.dumps(value) + "\n" for value in OBJECTS).encode()
    assert rows_of(write(tmp_path / name, content)) == list(enumerate(OBJECTS))


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
@pytest.mark.parametrize("indent", [None, 2])
def test_elements_of_a_json_array_are_rows(tmp_path, name, indent):
    content = json.dumps([*OBJECTS, "plain"], indent=indent).encode()
    assert rows_of(write(tmp_path / name, content)) == list(enumerate([*OBJECTS, {"text": "plain"}]))


def test_an_array_larger_than_every_buffer_is_read_whole(tmp_path):
    elements = [{"text": "x" * size} for size in (10, 70_000, 5, 300_000, 0, 65_536)] + [12, 345]
    assert [value for _, value in rows_of(write(tmp_path / "a.json", json.dumps(elements).encode()))] == elements


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_csv_fields_may_hold_commas_quotes_and_line_breaks(tmp_path, name):
    text = io.StringIO()
    writer = csv.DictWriter(text, ["text", "label"])
    writer.writeheader()
    expected = [{"text": 'a "quoted"\r\nline, and\n\nmore', "label": "1"}, {"text": "plain", "label": ""}]
    writer.writerows(expected)
    assert rows_of(write(tmp_path / name, text.getvalue().encode())) == list(enumerate(expected))


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_lines_of_plain_text_are_rows_with_or_without_a_last_line_break(tmp_path, name):
    expected = [(0, {"text": "first"}), (1, {"text": ""}), (2, {"text": "third"})]
    assert rows_of(write(tmp_path / name, b"\xef\xbb\xbffirst\r\n\nthird\n")) == expected
    assert rows_of(write(tmp_path / name, b"first\r\n\nthird")) == expected


def test_parquet_rows_are_rows(tmp_path):
    pq.write_table(pa.Table.from_pylist(OBJECTS), tmp_path / "a.parquet", row_group_size=2)
    assert rows_of(tmp_path / "a.parquet") == [(i, {"text": value["text"]}) for i, value in enumerate(OBJECTS)]


def test_a_parquet_file_without_the_column_still_has_its_rows(tmp_path):
    pq.write_table(pa.table({"body": ["a", "b"]}), tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet") == [(0, {"body": None}), (1, {"body": None})]


def test_parquet_strings_that_are_not_utf8_cost_their_cell_alone(tmp_path):
    strings = pa.array([b"fine", b"a\xff", b"fine too"]).view(pa.string())
    pq.write_table(pa.table({"text": strings, "n": [1, 2, 3]}), tmp_path / "a.parquet")
    rows = rows_of(tmp_path / "a.parquet", ("text", "n"))
    assert [rows[0], rows[2]] == [(0, {"text": "fine", "n": 1}), (2, {"text": "fine too", "n": 3})]
    assert str(rows[1][1]["text"]).startswith("not UTF-8")
    assert rows[1][1]["n"] == 2


def test_a_bad_line_costs_its_row_alone(tmp_path):
    lines = [b'{"text": "a"}', b"{broken", b'{"text": "\xff"}', b"[" * 100_000, b"9" * 10_000, b"", b'{"text": "z"}']
    rows = rows_of(write(tmp_path / "a.jsonl", b"\n".join(lines)))
    assert reasons_of(rows) == {1: "not JSON", 2: "not UTF-8", 3: "not JSON", 4: "not JSON", 5: "not JSON"}
    assert rows[0] == (0, {"text": "a"})
    assert rows[6] == (6, {"text": "z"})


def test_a_line_above_the_limit_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr("fac_ray.corpus.rows.MAX_ROW_BYTES", 100)
    rows = rows_of(write(tmp_path / "a.txt", b"a\n" + b"x" * 1000 + b"\nb\n"))
    assert reasons_of(rows) == {1: "row too long"}
    assert [row for row, _ in rows] == [0, 1, 2]
    assert rows[2][1] == {"text": "b"}


def test_an_open_quote_in_csv_costs_its_line_alone(tmp_path):
    lines = [b"text,label", b"a,1", b'"open,1', b"b,0", b'c,"1" x', b"d,1,2", b"", b"e\xff,1", b"f,0"]
    rows = rows_of(write(tmp_path / "a.csv", b"\n".join(lines) + b"\n"))
    assert reasons_of(rows) == {1: "not CSV", 3: "not CSV", 4: "wrong number of fields", 5: "blank line"}
    assert rows[2] == (2, {"text": "b", "label": "0"})
    assert rows[6] == (6, {"text": "e\udcff", "label": "1"})  # the byte is refused when the text is looked at
    assert rows[7] == (7, {"text": "f", "label": "0"})


def test_a_broken_array_keeps_the_elements_before_the_break(tmp_path):
    for content in (b'[{"text": "a"}, "b", {broken}, "c"]', b'[{"text": "a"}, "b", {"text": "c'):
        rows = rows_of(write(tmp_path / "a.json", content))
        assert rows[:2] == [(0, {"text": "a"}), (1, {"text": "b"})]
        assert reasons_of(rows) == {2: "not JSON"}


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz", "a.csv.gz", "a.json.gz"])
def test_a_truncated_gzip_file_keeps_its_rows_and_one_rejected_row_says_so(tmp_path, name):
    texts = [f"{i} {'ab cd ' * (i % 7)}{i * i * 7919 % 1009}" for i in range(3000)]
    whole = {
        "a.jsonl.gz": "".join(json.dumps({"text": text}) + "\n" for text in texts),
        "a.txt.gz": "".join(text + "\n" for text in texts),
        "a.csv.gz": "text\n" + "".join(text + "\n" for text in texts),
        "a.json.gz": json.dumps(texts),
    }[name]
    path = tmp_path / name
    path.write_bytes(gzip.compress(whole.encode())[:-2000])
    rows = rows_of(path)
    assert len(rows) > 1000
    assert [value for _, value in rows[:-1]] == [{"text": text} for text in texts[: len(rows) - 1]]
    assert reasons_of(rows) == {len(rows) - 1: "unreadable file"}


def test_a_file_that_is_not_what_its_ending_says_is_one_rejected_row(tmp_path):
    for name in ("a.parquet", "b.jsonl.gz"):
        (tmp_path / name).write_bytes(b"neither of the two")
        assert reasons_of(rows_of(tmp_path / name)) == {0: "unreadable file"}


def test_a_file_that_vanished_stops_the_run(tmp_path):
    source = Source("gone.jsonl", str(tmp_path / "gone.jsonl"), "jsonl", 1, 0)
    with pytest.raises(FileNotFoundError):
        list(read_rows(Piece(source), ["text"]))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([b"", b"a", b"bc", b"\r", b"\xc3\xa4", b"x" * 40]), max_size=12),
    st.integers(1, 30),
    st.booleans(),
)
def test_the_pieces_of_a_file_are_the_file(tmp_path_factory, lines, piece_bytes, last_break):
    path = tmp_path_factory.mktemp("pieces") / "a.txt"
    path.write_bytes(b"\n".join(lines) + (b"\n" if last_break else b""))
    [source] = list_sources(CorpusConfig(path=str(path)))
    whole = list(read_rows(Piece(source), ["text"]))
    rows, before = [], 1
    for piece in split_source(source, piece_bytes):
        first_row = before if piece.start else 0
        rows += list(read_rows(piece._replace(first_row=first_row), ["text"]))
        before += count_line_breaks(piece) if piece.needs_first_row else 0
    assert rows == whole


def test_the_row_groups_of_a_parquet_file_are_the_file(tmp_path):
    pq.write_table(pa.table({"text": [f"text {i}" for i in range(50)]}), tmp_path / "a.parquet", row_group_size=7)
    [source] = list_sources(CorpusConfig(path=str(tmp_path)))
    pieces = split_source(source, 100)
    assert len(pieces) > 2
    rows = [row for piece in pieces for row in read_rows(piece, ["text"])]
    assert rows == list(read_rows(Piece(source), ["text"]))


@pytest.fixture
def tree(tmp_path, monkeypatch):
    for name in ("b.jsonl", "a.jsonl.gz", "deep/er/c.csv", "deep/d[1].txt", "README.md", ".hidden.jsonl", "_x/e.jsonl"):
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, b'{"text": "x"}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path / "corpus"


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("corpus/b.jsonl", ["corpus/b.jsonl"]),
        ("corpus", ["corpus/a.jsonl.gz", "corpus/b.jsonl", "corpus/deep/d[1].txt", "corpus/deep/er/c.csv"]),
        ("corpus/*.jsonl", ["corpus/b.jsonl"]),
        ("corpus/**/*.csv", ["corpus/deep/er/c.csv"]),
        ("corpus/deep/d[1].txt", ["corpus/deep/d[1].txt"]),
        ("corpus/[ab].json*", ["corpus/a.jsonl.gz", "corpus/b.jsonl"]),
        (("corpus/b.jsonl", "corpus/*.gz", "./corpus/b.jsonl"), ["corpus/b.jsonl", "corpus/a.jsonl.gz"]),
    ],
)
@pytest.mark.usefixtures("tree")
def test_a_path_is_a_file_a_folder_or_a_glob(path, names):
    assert [source.name for source in list_sources(CorpusConfig(path=path))] == names


@pytest.mark.usefixtures("tree")
def test_a_path_that_matches_nothing_is_a_config_error():
    with pytest.raises(ConfigError, match=r"corpus/\*\.arrow.*no file matches"):
        list_sources(CorpusConfig(path="corpus/*.arrow"))
    with pytest.raises(ConfigError, match="nowhere"):
        list_sources(CorpusConfig(path="nowhere"))
    with pytest.raises(ConfigError, match=r"README\.md.*format"):
        list_sources(CorpusConfig(path="corpus/README.md"))
    with pytest.raises(ConfigError, match="ftp://"):
        list_sources(CorpusConfig(path="ftp://host/x.jsonl"))


def test_the_fingerprint_depends_on_content_and_keys_and_not_on_the_time_of_writing(tree):
    corpus = CorpusConfig(path="corpus/b.jsonl")
    before = source_fingerprint(corpus)
    (tree / "b.jsonl").write_bytes(b'{"text": "x"}\n')
    assert source_fingerprint(corpus) == before
    assert source_fingerprint(CorpusConfig(path="corpus/b.jsonl", label="y")) == before
    assert source_fingerprint(CorpusConfig(path="corpus/b.jsonl", text="y")) != before
    (tree / "b.jsonl").write_bytes(b'{"text": "z"}\n')
    assert source_fingerprint(corpus) != before


def test_a_uri_goes_through_its_file_system(tree):
    path = f"file://{tree}"
    sources = list_sources(CorpusConfig(path=f"{path}/**/*.[jct]*"))
    assert [s.name for s in sources] == [
        f"{path}/{n}" for n in ("a.jsonl.gz", "b.jsonl", "deep/d[1].txt", "deep/er/c.csv")
    ]
    assert list(read_rows(Piece(sources[0]), ["text"])) == [(0, {"text": "x"})]
    assert list_sources(CorpusConfig(path=f"{path}/b.jsonl"))[0].location == f"{path}/b.jsonl"

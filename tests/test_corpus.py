"""Rows become samples: each kind of bad row, whole corpora on Ray, and the laws that rows and parts obey."""

from __future__ import annotations

import csv
import gzip
import json
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fac_ray.artifacts import parquet_files, read_table
from fac_ray.config import CorpusConfig
from fac_ray.corpus.ingestion import ingest_corpus, plan_shards
from fac_ray.corpus.rows import BadRow
from fac_ray.corpus.samples import parse_transcript, read_sample
from fac_ray.corpus.sources import Source
from fac_ray.progress import Progress
from fac_ray.schema import REJECTED, SAMPLES, Message, content_id

HH_RLHF = Path(__file__).parents[2] / "shared" / "data" / "hh-rlhf" / "harmless-base_test.jsonl.gz"
PLAIN = CorpusConfig(path="x", label="label")
CHAT = CorpusConfig(path="x", messages="chat")
TRANSCRIPT = CorpusConfig(path="x", transcript=True)


def ingest(tmp_path, corpus, max_rejected_fraction=1.0, name="run"):
    samples, rejected = tmp_path / name / "samples", tmp_path / name / "rejected"
    facts = ingest_corpus(corpus, samples, rejected, max_rejected_fraction, Progress.silent())
    return facts, read_table(samples), read_table(rejected)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("value", "corpus", "reason"),
    [
        (["a"], PLAIN, "not an object: a list"),
        ("a", PLAIN, "not an object: a text"),
        (None, PLAIN, "not an object: null"),
        ({"body": "a"}, PLAIN, "missing column: 'text' is not among 'body'"),
        ({}, PLAIN, "missing column: 'text' is not among no columns"),
        ({"text": 3}, PLAIN, "wrong type: column 'text' holds a number"),
        ({"text": None}, PLAIN, "wrong type: column 'text' holds null"),
        ({"text": ["a"]}, PLAIN, "wrong type: column 'text' holds a list"),
        ({"text": ""}, PLAIN, "empty text"),
        ({"text": " \n\t\u2003"}, PLAIN, "empty text"),
        ({"text": "a\ud800"}, PLAIN, "not UTF-8: a lone surrogate at character 1"),
        ({"text": "a\udcff"}, PLAIN, "not UTF-8: a byte at character 1"),
        ({"text": b"\xff"}, PLAIN, "not UTF-8"),
        ({"text": BadRow("not UTF-8: here")}, PLAIN, "not UTF-8: here"),
        (BadRow("not JSON: here"), PLAIN, "not JSON: here"),
        ({"text": "a"}, CHAT, "missing column: 'chat'"),
        ({"chat": None}, CHAT, "malformed messages: .* not null"),
        ({"chat": []}, CHAT, "malformed messages"),
        ({"chat": "[broken"}, CHAT, "malformed messages: not JSON"),
        ({"chat": [{"role": "user"}]}, CHAT, "malformed messages: 'content' of message 0 is null"),
        ({"chat": [{"content": "a"}]}, CHAT, "malformed messages: 'role'"),
        ({"chat": [{"role": "user", "content": "a"}, "b"]}, CHAT, "malformed messages: message 1 is a text"),
        ({"chat": [{"role": "user", "content": " "}, {"role": "assistant", "content": ""}]}, CHAT, "empty text"),
        ({"text": "Nobody speaks."}, TRANSCRIPT, "no turn"),
        ({"text": "Before.\n\nHuman: a"}, TRANSCRIPT, "text before the first turn"),
        ({"text": "\n\nHuman:\n\nAssistant: "}, TRANSCRIPT, "empty text"),
    ],
)
def test_a_row_that_is_no_sample_says_why(value, corpus, reason):
    with pytest.raises(BadRow, match=reason):
        read_sample(value, corpus, "f", 0)


def test_a_chat_s_text_is_its_contents_joined_by_blank_lines():
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u\nv", "name": "extra"}]
    expected: list[Message] = [{"role": "system", "content": "s"}, {"role": "user", "content": "u\nv"}]
    for value in (chat, json.dumps(chat)):
        sample = read_sample({"chat": value}, CHAT, "f", 3)
        assert sample["messages"] == expected
        assert sample["text"] == "s\n\nu\nv"
        assert sample["content_id"] == content_id("", expected)


def test_a_label_is_text_or_absent():
    labels = [read_sample({"text": "a", "label": x}, PLAIN, "f", 0)["label"] for x in (1, True, "no", 0.5, "", None)]
    assert labels == ["1", "True", "no", "0.5", None, None]
    assert read_sample({"text": "a"}, PLAIN, "f", 0)["label"] is None


@pytest.mark.parametrize("label", ["\ud800", BadRow("not UTF-8: here"), b"\xff", {"a": ["b"]}, float("nan")])
def test_no_label_makes_a_sample_a_bad_row(label):
    sample = read_sample({"text": "a", "label": label}, PLAIN, "f", 0)
    assert sample["text"] == "a"
    assert sample["label"].encode("utf-8")


def test_ids_tell_places_apart_and_content_ids_do_not():
    first, again, elsewhere = (read_sample({"text": "a"}, PLAIN, "f", row) for row in (0, 0, 1))
    assert first == again
    assert first["sample_id"] != elsewhere["sample_id"]
    assert first["content_id"] == elsewhere["content_id"]


def test_a_transcript_is_a_chat():
    turns = parse_transcript("\n\nHuman: What is\n\nthis? \n\nAssistant: A Human: a test.\n\nHuman: Oh.")
    assert turns == [
        {"role": "user", "content": "What is\n\nthis?"},
        {"role": "assistant", "content": "A Human: a test."},
        {"role": "user", "content": "Oh."},
    ]
    assert parse_transcript("Human: hi")[0] == {"role": "user", "content": "hi"}


def test_small_files_share_a_shard_and_large_ones_do_not():
    sources = [
        Source(f"{name}.csv", f"/{name}.csv", "csv", size, 0)
        for name, size in zip("abcd", (40, 60, 1, 500), strict=True)
    ]
    shards = plan_shards(sources, 100, None)
    assert [[piece.source.name for piece in shard] for shard in shards] == [["a.csv", "b.csv"], ["c.csv"], ["d.csv"]]
    assert len(plan_shards(sources, 100, limit=3)) == 1


@pytest.mark.usefixtures("ray_cluster")
def test_no_row_of_a_hostile_corpus_is_lost(tmp_path):
    random_ = random.Random(7)
    lines = [_hostile_line(random_, i) for i in range(200)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines[:120]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines[120:]) + b"\n"))
    facts, samples, rejected = ingest(tmp_path, CorpusConfig(path=str(tmp_path / "*.jsonl*"), label="label"))
    assert facts["num_rows"] == facts["num_samples"] + facts["num_rejected"] == 200
    assert facts["num_samples"] == len(samples) > 20
    assert facts["num_rejected"] == len(rejected) > 20
    places = {
        tuple(row.values()) for t in (samples, rejected) for row in t.select(["source_file", "source_row"]).to_pylist()
    }
    assert places == {(str(tmp_path / n), i) for n, num in (("a.jsonl", 120), ("b.jsonl.gz", 80)) for i in range(num)}
    assert len(set(samples["sample_id"].to_pylist())) == len(samples)
    assert all(rejected["reason"].to_pylist())


def _hostile_line(random_, number):
    text = "".join(random_.choice('abc \u00e4\u4e2d\U0001f600\u2028\x00"\\,') for _ in range(random_.randint(0, 30)))
    good = json.dumps({"text": f"{number} {text}", "label": random_.choice([0, "1", None, {"a": []}])}).encode()
    kinds = [
        lambda: good,
        lambda: good[: random_.randint(0, len(good) - 1)],
        lambda: bytes(random_.randrange(256) for _ in range(20)).replace(b"\n", b"?"),
        lambda: good.replace(b'"text"', b'"txt"'),
        lambda: json.dumps({"text": random_.choice(["", " ", None, 5, [], {}, "\ud83d"])}).encode(),
        lambda: good[:12] + b"\xff" + good[12:],
        lambda: b"",
        lambda: b"[" * 3000,
    ]
    return random_.choice(kinds + kinds[:1] * 5)()


@pytest.mark.usefixtures("ray_cluster")
def test_a_corpus_read_again_gives_the_same_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("fac_ray.corpus.ingestion.SHARD_BYTES", 20_000)
    rows = [{"text": f"text {i % 3000}"} if i % 50 else {"no": i} for i in range(5000)]
    write_lines(tmp_path / "big.jsonl", rows)  # about 100 kB: several pieces, so rows must be counted first
    write_lines(tmp_path / "small.jsonl", [{"text": "last"}])
    corpus = CorpusConfig(path=str(tmp_path))
    first, samples, rejected = ingest(tmp_path, corpus, name=".first")  # hidden: not part of the corpus
    second, *_ = ingest(tmp_path, corpus, name=".second")
    assert first == second == {"num_rows": 5001, "num_samples": 4901, "num_rejected": 100, "num_duplicates": 1960}
    parts = [parquet_files(tmp_path / run / "samples") for run in (".first", ".second")]
    assert len(parts[0]) > 3
    assert [p.name for p in parts[0]] == [p.name for p in parts[1]]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*parts, strict=True))
    assert samples["source_row"].to_pylist() == [i for i in range(5000) if i % 50] + [0]
    assert samples["text"].to_pylist() == [r["text"] for r in rows if "text" in r] + ["last"]
    assert rejected["source_row"].to_pylist() == list(range(0, 5000, 50))
    assert samples.schema == SAMPLES
    assert rejected.schema == REJECTED


@pytest.mark.usefixtures("ray_cluster")
def test_parts_of_an_interrupted_attempt_do_not_stay(tmp_path):
    corpus = CorpusConfig(path=str(write_lines(tmp_path / "a.jsonl", [{"text": "a"}])))
    ingest(tmp_path, corpus)
    pq.write_table(SAMPLES.empty_table(), tmp_path / "run" / "samples" / "999999-000000.parquet")
    _, samples, rejected = ingest(tmp_path, corpus)
    assert len(parquet_files(tmp_path / "run" / "samples")) == 1
    assert samples["text"].to_pylist() == ["a"]
    assert len(rejected) == 0


@pytest.mark.usefixtures("ray_cluster")
def test_a_limit_reads_the_first_rows_in_file_order(tmp_path):
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "y"], ["a", 1], ["", 0], ["c\nd", 0]])
    write_lines(tmp_path / "b.jsonl", [{"text": f"b{i}", "y": i} for i in range(10)])
    facts, samples, rejected = ingest(tmp_path, CorpusConfig(path=str(tmp_path), label="y", limit=5))
    assert facts == {"num_rows": 5, "num_samples": 4, "num_rejected": 1, "num_duplicates": 0}
    assert samples["text"].to_pylist() == ["a", "c\nd", "b0", "b1"]
    assert samples["label"].to_pylist() == ["1", "0", "0", "1"]
    assert rejected.to_pylist() == [
        {"source_file": str(tmp_path / "a.csv"), "source_row": 1, "reason": "empty text: nothing but white space"}
    ]


@pytest.mark.usefixtures("ray_cluster")
def test_too_many_rejected_rows_stop_the_run_and_say_why(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a"}, {"txt": "b"}, {"txt": "c"}, []])
    with pytest.raises(ValueError, match=r"3 of 4 rows.*0\.05.*missing column \(2\).*row 1: .*'txt'.*rejected"):
        ingest(tmp_path, CorpusConfig(path=str(path)), max_rejected_fraction=0.05)
    assert len(read_table(tmp_path / "run" / "rejected")) == 3
    assert ingest(tmp_path, CorpusConfig(path=str(path)), max_rejected_fraction=0.75)[0]["num_samples"] == 1


@pytest.mark.usefixtures("ray_cluster")
def test_a_corpus_without_samples_stops_the_run(tmp_path):
    with pytest.raises(ValueError, match="hold no row"):
        ingest(tmp_path, CorpusConfig(path=str(write_lines(tmp_path / "a.jsonl", []))))
    with pytest.raises(ValueError, match="1 of 1 rows were rejected"):
        ingest(tmp_path, CorpusConfig(path=str(write_lines(tmp_path / "b.jsonl", [[]]))))


@pytest.mark.skipif(not HH_RLHF.is_file(), reason="the HH-RLHF test file is not beside the checkout")
@pytest.mark.parametrize("column", ["chosen", "rejected"])
@pytest.mark.usefixtures("ray_cluster")
def test_every_transcript_of_hh_rlhf_is_a_chat(tmp_path, column):
    facts, samples, _ = ingest(tmp_path, CorpusConfig(path=str(HH_RLHF), text=column, transcript=True))
    assert (facts["num_rows"], facts["num_samples"], facts["num_rejected"]) == (2312, 2312, 0)
    chats = samples["messages"].to_pylist()
    assert all(chat[0]["role"] == "user" and chat[-1]["role"] == "assistant" for chat in chats)
    assert samples["text"].to_pylist() == ["\n\n".join(m["content"] for m in chat) for chat in chats]

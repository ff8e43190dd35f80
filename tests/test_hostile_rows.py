"""Ten thousand hostile rows in every format: each is a sample with one activation row, or a rejected row with a reason.

What must become of a row is decided where it is made: the text of its sample, or None for a rejected row.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from tiny_llama import save_authors_sae
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fac_ray.artifacts import read_table
from fac_ray.config import CorpusConfig, MeasureConfig, ModelConfig, SaeConfig
from fac_ray.corpus.ingestion import ingest_corpus
from fac_ray.features.extractor import FeatureExtractor
from fac_ray.progress import Progress
from fac_ray.reference import MODEL

SEED = 20
HUGE_CHARACTERS = 1_000_000

WORDS = ["refund", "tell me", "caf\u00e9", "\u4f60\u597d", "\u05e9\u05dc\u05d5\u05dd", "\u0645\u0631\u062d\u0628\u0627"]
MARKS = ["\u0301", "\u0327", "\u200b", "\u200d", "\u2060", "\ufeff", "\u202e", "\u2066", "\u2028", "\x85", "\xa0"]
SIGNS = [
    "\x00",
    "\x07",
    "\x1b[31m",
    "\x7f",
    "\r\n",
    "\n",
    "\r",
    "\t",
    '"',
    '""',
    ",",
    ";",
    "\\",
    "\\u0000",
    "'",
    "{",
    "]",
]
EMOJI = ["\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f3f3\ufe0f\u200d\U0001f308", "\U0001f1e9\U0001f1ea"]
ODD = [
    "\ufffe",
    "\uffff",
    "\U0010ffff",
    "\ue000",
    "\U000f0000",
    "<|user|>",
    "<|eos|>",
    "<|bos|>",
    "<|assistant|>",
    "None",
]
BLANK = ["", " ", "\n", "\t \u2003\x85", "\u3000\u2028", "\x1c\x1f"]
PIECES = [WORDS, WORDS, MARKS, SIGNS, EMOJI, ODD]


class Made:
    """A file that was made: what must become of each of its rows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.texts: list[str | None] = []


def hostile_text(dice, breaks=True):
    """A text of which something is left when it is stripped; without line breaks if asked."""
    pieces = [dice.choice(dice.choice(PIECES)) for _ in range(dice.randint(0, 12))]
    text = "".join([f"row {dice.randrange(10**6)}", *pieces]) if dice.random() < 0.9 else "".join([*pieces, "x"])
    return text if breaks else text.replace("\r", "").replace("\n", "")


def broken(dice, data: bytes) -> bytes:
    """The bytes with something in the middle that is never UTF-8."""
    at = dice.randrange(len(data) + 1)
    return data[:at] + dice.choice([b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf8\x88\x80\x80"]) + data[at:]


# ---- lines ----


def json_line(dice, value):
    return json.dumps(value, ensure_ascii=dice.random() < 0.5).encode()


def hostile_json(dice) -> tuple[bytes, str | None]:
    text = hostile_text(dice)
    good = {"text": text, "label": dice.choice(["1", 0, None, True, 1e999, {"a": [1]}, "\x00", "\u202e"])}
    wrong = dice.choice([5, 2.5, None, True, [], {}, [text], {"text": text}, dice.choice(BLANK), float("nan")])
    deep = dice.choice([10, 100, 900, 5000])
    kinds = [
        lambda: (json_line(dice, good), text),
        lambda: (json_line(dice, good), text),
        lambda: (json_line(dice, good | {"label": "a label"}).replace(b'"a label"', b"[" * 200 + b"]" * 200), text),
        lambda: (b" \t" + json_line(dice, good | {"more": [[good]]}) + b" \r", text),
        lambda: (json_line(dice, good | {"text": wrong}), None),
        lambda: (json.dumps({"txt": text, "\ud800": 1}).encode(), None),
        lambda: (json_line(dice, dice.choice([[good], text, 3, None, True])), None),
        lambda: (json.dumps({"text": text + dice.choice(["\ud800", "\udfff", "\udc80 a"])}).encode(), None),
        lambda: (json_line(dice, good)[: dice.randrange(12)], None),
        lambda: (broken(dice, json.dumps(good, ensure_ascii=False).encode()), None),
        lambda: (b'{"text": ' + b"[" * deep + b"]" * deep + b"}", None),
        lambda: (b'{"text": "x", "label": ' + b"9" * 5000 + b"}", None),
        lambda: (dice.choice([b"", b" ", b"\r", b"\x00", b"\xef\xbb\xbf{}", b"NaN", b"{", b"}", b'"']), None),
    ]
    return dice.choice(kinds)()


def hostile_chat(dice) -> tuple[bytes, str | None]:
    contents = [dice.choice([*BLANK, hostile_text(dice), hostile_text(dice)]) for _ in range(dice.randint(1, 6))]
    chat = [{"role": dice.choice(["user", "assistant", "system"]), "content": content} for content in contents]
    text = "\n\n".join(contents)
    expected = text if text.strip() else None
    some = dice.randrange(len(chat))

    def spoilt(value):
        return [value if j == some else message for j, message in enumerate(chat)]

    kinds = [
        lambda: (json_line(dice, {"messages": chat}), expected),
        lambda: (json_line(dice, {"messages": json.dumps(chat)}), expected),
        lambda: (
            json_line(dice, {"messages": [{**m, "role": dice.choice(["", "tool", "\x00", "x" * 500])} for m in chat]}),
            expected,
        ),
        lambda: (json_line(dice, {"messages": spoilt(dice.choice([None, 3, "user: hello", [], ["user", "x"]]))}), None),
        lambda: (json_line(dice, {"messages": spoilt({"role": "user"})}), None),
        lambda: (json_line(dice, {"messages": spoilt({"content": "x"})}), None),
        lambda: (
            json_line(dice, {"messages": spoilt({"role": "user", "content": [{"type": "text", "text": "x"}]})}),
            None,
        ),
        lambda: (json_line(dice, {"messages": dice.choice([[], {}, None, 3, "", "[", "[1]", "{}", chat[0]])}), None),
        lambda: (json.dumps({"messages": spoilt({"role": "user", "content": "\ud83d"})}).encode(), None),
        lambda: (json_line(dice, {"text": text}), None),
    ]
    return dice.choice(kinds)()


def hostile_line(dice) -> tuple[bytes, str | None]:
    text = hostile_text(dice, breaks=False)
    kinds = [
        lambda: (text.encode(), text),
        lambda: (text.encode() + b"\r", text),
        lambda: (dice.choice(BLANK).replace("\n", "").encode(), None),
        lambda: (broken(dice, text.encode()), None),
    ]
    return dice.choice(kinds)()


def write_lines(folder, name, num_rows, make, dice, last_break=b"\n"):
    made = Made(folder / name)
    lines = [make(dice) for _ in range(num_rows)]
    content = b"\n".join(line for line, _ in lines) + last_break
    made.texts = [text for _, text in lines]
    made.path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return made


# ---- tables ----


def write_csv(folder, name, num_rows, dice):
    """As programs write it: whatever a field holds, it is quoted where it must be."""
    made, stream = Made(folder / name), io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow(["label", "text"])
    for _ in range(num_rows):
        text = dice.choice([hostile_text(dice)] * 5 + [dice.choice(BLANK)])
        writer.writerow([dice.choice(["1", "", 'say "x",\n']), text])
        made.texts.append(text if text.strip() else None)
    made.path.write_bytes(b"\xef\xbb\xbf" + stream.getvalue().encode())
    return made


def write_csv_with_open_quotes(folder, name, num_rows, dice):
    """As people write it: each line is a row of its own, and those with a quote that does not close are rejected."""
    made, lines = Made(folder / name), [b"text,label"]
    for i in range(num_rows):
        text = f"row {i} {dice.choice(WORDS)}"
        kinds = [
            (f"{text},1", text),
            (f'"{text}",1', text),
            (f'{text} 5" long,0', f'{text} 5" long'),
            (f'"{text}, ""quoted""",0', f'{text}, "quoted"'),
            (f'"{text},1', None),
            (f'"{text}" and more,1', None),
            (f"{text},1,2", None),
            (text, None),
            ("", None),
        ]
        line, expected = dice.choice(kinds[:4] * 3 + kinds)
        lines.append(line.encode())
        made.texts.append(expected)
    made.path.write_bytes(b"\r\n".join(lines) + b"\r\n")
    return made


def write_parquet(folder, name, num_rows, dice):
    """Strings that are not checked, in two kinds of columns, and labels of a type that Python has no value for."""
    made, values = Made(folder / name), []
    for _ in range(num_rows):
        text = hostile_text(dice)
        value, expected = dice.choice(
            [(text.encode(), text)] * 4 + [(broken(dice, text.encode()), None), (None, None), (b" ", None)]
        )
        values.append(value)
        made.texts.append(expected)
    texts = pa.array(values, pa.binary())
    labels = pa.array([dice.randrange(-(2**62), 2**62) for _ in values], pa.timestamp("ns"))
    table = pa.table({"label": labels, "text": texts if "binary" in name else texts.view(pa.string())})
    pq.write_table(table, made.path, row_group_size=dice.choice([7, 300]))
    return made


def write_typed_parquet(folder, name, column):
    """A text column of another type: no row is a sample."""
    made = Made(folder / name)
    pq.write_table(pa.table({"text": column}), made.path)
    made.texts = [None] * len(column)
    return made


def write_broken_parquet(folder, name):
    """Three row groups, the second of which is overwritten: its rows are rejected, one by one."""
    made = Made(folder / name)
    texts = [f"row {i} of three groups" for i in range(300)]
    pq.write_table(pa.table({"text": texts}), made.path, row_group_size=100, compression="zstd", use_dictionary=False)
    start = pq.read_metadata(made.path).row_group(1).column(0).data_page_offset
    content = bytearray(made.path.read_bytes())
    content[start : start + 200] = b"\xff" * 200
    made.path.write_bytes(content)
    made.texts = [None if 100 <= i < 200 else text for i, text in enumerate(texts)]
    return made


def write_bytes(folder, name, content, num_rejected):
    made = Made(folder / name)
    made.path.write_bytes(content)
    made.texts = [None] * num_rejected
    return made


def write_texts(folder, dice):
    huge = dice.choice(WORDS[:2]) * (HUGE_CHARACTERS // 7)
    return [
        write_lines(folder, "a.jsonl", 3000, hostile_json, dice),
        write_lines(folder, "b.jsonl.gz", 500, hostile_json, dice),
        write_lines(folder, "c.txt", 1500, hostile_line, dice),
        write_lines(folder, "d.txt.gz", 300, hostile_line, dice),
        write_csv(folder, "e.csv", 1500, dice),
        write_csv_with_open_quotes(folder, "f.csv", 1500, dice),
        write_parquet(folder, "g.parquet", 800, dice),
        write_parquet(folder, "h-binary.parquet", 300, dice),
        write_typed_parquet(folder, "i.parquet", [1, 2, None]),
        write_typed_parquet(folder, "j.parquet", [["a"], [], None]),
        write_typed_parquet(folder, "k.parquet", [True, False]),
        write_broken_parquet(folder, "l.parquet"),
        write_lines(folder, "m.jsonl", 2, lambda _: (json.dumps({"text": huge}).encode(), huge), dice),
        write_bytes(folder, "n.jsonl", b"", 0),
        write_bytes(folder, "o.csv", b"", 0),
        write_bytes(folder, "p.jsonl.gz", b"", 1),
        write_bytes(folder, "q.parquet", b"", 1),
        write_bytes(folder, "r.parquet", b"PAR1" + b"\xff" * 50 + b"\x20\x00\x00\x00PAR1", 1),
        write_bytes(folder, "s.csv", b"text,label,text\nx,1,y\n", 1),
        write_bytes(folder, "t.jsonl", '{"text": "x"}\n'.encode("utf-16"), 2),
    ]


def write_chats(folder, dice):
    return [
        write_lines(folder, "a.jsonl", 2000, hostile_chat, dice),
        write_lines(folder, "b.jsonl.gz", 500, hostile_chat, dice),
    ]


def ingested(folder, made, **columns):
    """The samples of a corpus, after every row of every file was found to have become what it must."""
    out = folder.with_name(f"{folder.name}-out")
    corpus = CorpusConfig(path=str(folder), **columns)
    facts = ingest_corpus(corpus, out / "samples", out / "rejected", 1.0, Progress.silent())
    samples, rejected = read_table(out / "samples"), read_table(out / "rejected")
    for file in made:
        found = {row["source_row"]: row["text"] for row in rows_of(samples, file)}
        bad = {row["source_row"]: row["reason"] for row in rows_of(rejected, file)}
        assert all(bad.values()), file.path.name
        assert not found.keys() & bad.keys(), file.path.name
        outcome = found | dict.fromkeys(bad)
        assert len(outcome) == len(found) + len(bad) == len(file.texts), file.path.name
        for row, text in enumerate(file.texts):
            assert outcome[row] == text, (file.path.name, row, bad.get(row))
    num_rows = sum(len(file.texts) for file in made)
    assert facts["num_rows"] == facts["num_samples"] + facts["num_rejected"] == num_rows
    assert (facts["num_samples"], facts["num_rejected"]) == (len(samples), len(rejected))
    assert len(set(samples["sample_id"].to_pylist())) == len(samples)
    return samples, num_rows


def rows_of(table, made):
    return table.filter(pc.equal(table["source_file"], str(made.path))).to_pylist()


@pytest.fixture
def instrument(tmp_path):
    """The embedded world's tokenizer, whose control tokens the rows spell, with a random model of one narrow block."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    settings = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=1024, **sizes)
    LlamaForCausalLM(settings).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model", save_authors_sae(tmp_path / "sae.pth", d_model=32)


def require_one_row_each(samples, instrument, **switches):
    """Measure the samples in this process; returns how many of them have an error."""
    model, sae = instrument
    extractor = FeatureExtractor(
        ModelConfig(path=str(model), hook_layer=1), SaeConfig(path=str(sae)), MeasureConfig(**switches), device="cpu"
    )
    rows = extractor.extract_table(samples)
    assert rows["sample_id"].to_pylist() == samples["sample_id"].to_pylist()
    for row in rows.select(["feature_ids", "activations", "num_tokens", "error"]).to_pylist():
        assert len(row["feature_ids"]) == len(row["activations"])
        assert (row["num_tokens"] > 0) == (row["error"] is None)
    return sum(error is not None for error in rows["error"].to_pylist())


@pytest.mark.usefixtures("ray_cluster")
def test_no_hostile_row_is_lost_or_merged_and_every_sample_is_measured_once(tmp_path, instrument):
    dice = random.Random(SEED)
    (tmp_path / "texts").mkdir()
    (tmp_path / "chats").mkdir()
    texts, num_text_rows = ingested(tmp_path / "texts", write_texts(tmp_path / "texts", dice), label="label")
    chats, num_chat_rows = ingested(tmp_path / "chats", write_chats(tmp_path / "chats", dice), messages="messages")
    assert num_text_rows + num_chat_rows >= 10_000
    huge = pc.greater(pc.utf8_length(texts["text"]), 100_000)
    assert pc.sum(huge).as_py() == 2
    assert require_one_row_each(texts.filter(pc.invert(huge)), instrument) == 0
    assert require_one_row_each(texts.filter(huge), instrument, max_tokens=512) == 0
    assert require_one_row_each(chats, instrument) < len(chats)

"""Which tokens are pooled under the chat formats that are measured, token by token."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

import pytest
from chat_templates import TEMPLATES, chat_tokenizer

from fac_ray.config import PRESETS, MeasureConfig
from fac_ray.corpus.samples import join_contents
from fac_ray.features.chat import TEMPLATE_DATE, tokenize
from fac_ray.features.rendering import render
from fac_ray.schema import Message

CORRECTED = MeasureConfig().resolved()
FAMILIES = list(TEMPLATES)
EMOJI = "\U0001f600"
BYTES_OF_EMOJI = ("<0xF0>", "<0x9F>", "<0x98>", "<0x80>")
BLANKS = {"\u0120": " ", "\u010a": "\n", "\u2581": " "}

# Every control token of every family, and role headers that are plain words.
LURE = "moon<|eot_id|><|start_header_id|>user<|im_end|></s><s>[INST]<end_of_turn>USER: <|begin_of_text|>"


def user(content) -> Message:
    return {"role": "user", "content": content}


def assistant(content) -> Message:
    return {"role": "assistant", "content": content}


def system(content) -> Message:
    return {"role": "system", "content": content}


def no(*tokens):
    return [(token, False) for token in tokens]


def yes(*tokens):
    return [(token, True) for token in tokens]


def in_order(*runs):
    return [token for run in runs for token in run]


def read(family, *chat, **switches):
    """(token, whether it is pooled) of a chat; blanks as they are."""
    tokenizer = chat_tokenizer(family)
    sample = tokenize(tokenizer, join_contents(list(chat)), chat, MeasureConfig(**switches).resolved())
    tokens = tokenizer.convert_ids_to_tokens(sample.token_ids)
    readable = ["".join(BLANKS.get(c, c) for c in token) for token in tokens]
    return list(zip(readable, sample.pooled.tolist(), strict=True))


LLAMA_SYSTEM = ["<|begin_of_text|>", "<|start_header_id|>", "system", "<|end_header_id|>", "\n\n"]
LLAMA_SYSTEM += ["Cut", "ting", " Knowledge", " Date", ":", " December", " ", "202", "3", "\n"]
LLAMA_SYSTEM += ["Today", " Date", ":", " ", "26", " Jul", " ", "202", "4", "\n\n"]


def llama_header(role):
    return no("<|start_header_id|>", role, "<|end_header_id|>", "\n\n")


def test_llama_3_1_pools_contents_and_no_dated_header():
    end = no("<|eot_id|>")
    opening = no(*LLAMA_SYSTEM) + end + llama_header("user")
    assert read("llama 3.1", user("hello moon")) == opening + yes("hello", " moon") + end
    assert read("llama 3.1", user(" \n hello\n"), assistant("")) == (
        opening + yes("hello") + end + llama_header("assistant") + end
    )
    assert read("llama 3.1", system("be kind"), user("hello"), assistant("moon"), user("how")) == in_order(
        [*no(*LLAMA_SYSTEM), *yes("be", " kind"), *end],
        [*llama_header("user"), *yes("hello"), *end],
        [*llama_header("assistant"), *yes("moon"), *end],
        [*llama_header("user"), *yes("how"), *end],
    )


def test_skipping_31_ids_drops_exactly_the_doubled_bos_and_llama_3_1_s_prefix():
    # 25 of the dated system header with BOS, 1 end of turn, 4 of the user's header, and 1 more BOS: 31. From there on
    # all is pooled: ends of turns and the header of the next turn too.
    prefix = ["<|begin_of_text|>", *LLAMA_SYSTEM, "<|eot_id|>"]
    prefix += ["<|start_header_id|>", "user", "<|end_header_id|>", "\n\n"]
    assert len(prefix) == 31
    found = read("llama 3.1", user("hello moon"), assistant("how"), preset="authors-code")
    header = ["<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n"]
    assert found == no(*prefix) + yes("hello", " moon", "<|eot_id|>", *header, "how", "<|eot_id|>")


def test_the_paper_s_prefix_is_the_same_with_one_bos():
    found = read("llama 3.1", user("hello"), preset="paper")
    header = ["<|start_header_id|>", "user", "<|end_header_id|>", "\n\n"]
    assert found == no(*LLAMA_SYSTEM, "<|eot_id|>", *header) + yes("hello", "<|eot_id|>")
    assert sum(not pooled for _, pooled in found) == 30


def test_mistral_0_2_pools_contents_and_no_bracketed_word():
    # The brackets are text to this tokenizer, and the blank of the template belongs to the content's first token.
    opens, closes = no(" ", "[", "INST", "]"), no(" ", "[", "/", "INST", "]")
    assert read("mistral 0.2", user("hello moon")) == no("<s>") + opens + yes(" hello", " moon") + closes
    assert read("mistral 0.2", system("be"), user(EMOJI), assistant("moon"), user("how")) == in_order(
        [*no("<s>"), *opens, *no(" "), *yes("b", "e"), *no("\n", "\n"), *yes(*BYTES_OF_EMOJI), *closes],
        [*yes(" moon"), *no("</s>"), *opens, *yes(" how"), *closes],
    )
    assert read("mistral 0.2", user("[INST]"), assistant("")) == (
        [*no("<s>"), *opens, *no(" "), *yes("[", "INST", "]"), *closes, *no(" ", "</s>")]
    )


def test_mistral_0_3_finds_the_system_message_in_the_last_user_turn():
    assert read("mistral 0.3", user("hello moon")) == no("<s>", "[INST]") + yes(" hello", " moon") + no("[/INST]")
    assert read("mistral 0.3", system("be"), user("hello"), assistant("moon "), user("how")) == in_order(
        [*no("<s>", "[INST]"), *yes(" hello"), *no("[/INST]"), *yes(" moon"), *no("</s>")],
        [*no("[INST]", " "), *yes("b", "e"), *no("\n", "\n"), *yes("h", "o", "w"), *no("[/INST]")],
    )
    assert read("mistral 0.3", user("[/INST]"), assistant(EMOJI)) == in_order(
        [*no("<s>", "[INST]", " "), *yes("[", "/", "INST", "]"), *no("[/INST]")],
        [*no(" "), *yes(*BYTES_OF_EMOJI), *no("</s>")],
    )


def chatml(role, *tokens):
    return [*no("<|im_start|>", role, "\n"), *yes(*tokens), *no("<|im_end|>", "\n")]


def test_qwen_2_5_pools_no_system_message_that_the_template_injects():
    injected = no("<|im_start|>", "system", "\n", "You", " help", " the", " user", ".", "<|im_end|>", "\n")
    assert read("qwen 2.5", user("You help the user.")) == injected + chatml(
        "user", "You", " help", " the", " user", "."
    )
    assert read("qwen 2.5", system("be kind"), user("hello"), assistant("moon")) == (
        chatml("system", "be", " kind") + chatml("user", "hello") + chatml("assistant", "moon")
    )


def test_chatml_keeps_blanks_and_a_token_that_straddles_a_header_and_a_content_is_pooled():
    assert read("chatml", user(" hello "), assistant(""), user("moon")) == (
        chatml("user", " hello", " ") + chatml("assistant") + chatml("user", "moon")
    )
    # The template's line break and the content's are one token.
    assert read("chatml", user("\nmoon")) == no("<|im_start|>", "user") + yes("\n\n", "moon") + no("<|im_end|>", "\n")


def gemma(role, *tokens):
    return [*no("<start_of_turn>", *role, "\n"), *yes(*tokens), *no("<end_of_turn>", "\n")]


def test_gemma_2_calls_the_assistant_model_and_refuses_a_system_message():
    assert read("gemma 2", user(" how moon\n"), assistant("model")) == (
        no("<bos>") + gemma("user", *"how", " moon") + gemma("model", *"model")
    )
    assert read("gemma 2", user("\u200d"), assistant(EMOJI)) == (
        no("<bos>") + gemma("user", "<0xE2>", "<0x80>", "<0x8D>") + gemma("model", *BYTES_OF_EMOJI)
    )
    with pytest.raises(ValueError, match=r"refuses the roles \['system', 'user'\]: no system role"):
        read("gemma 2", system("be kind"), user("hello"))


def test_a_template_without_control_tokens_pools_no_role_and_no_opening_line():
    opening = no("<s>", " The", " user", " ", *"asks,", " and", " you", " ", *"help.")
    asks, answers = no(" ", *"USER:"), no(" ", *"ASSISTANT:")
    assert read("vicuna", user("hello"), assistant("USER: moon")) == (
        [*opening, *asks, *yes(" hello"), *answers, *no(" "), *yes(*"USER:", " moon"), *no("</s>")]
    )
    assert read("vicuna", system("be kind"), user("how")) == (
        [*no("<s>"), *yes(" be", " kind"), *asks, *yes(" how"), *no(" ")]
    )


# ---- laws of all of them ----


@pytest.mark.parametrize("family", FAMILIES)
def test_a_control_token_spelled_in_a_content_is_text(family):
    """The model reads as many turns as there are messages, whatever a content spells, and all of it is pooled."""
    tokenizer = chat_tokenizer(family)
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    lured, harmless = (
        tokenize(tokenizer, join_contents(chat), chat, CORRECTED)
        for chat in ([user(content), assistant("moon")] for content in (LURE, "hello"))
    )
    ids = lured.token_ids.tolist()
    assert [i for i in ids if i in control] == [i for i in harmless.token_ids.tolist() if i in control]
    read_back = "".join(
        BLANKS.get(c, c) for c in "".join(tokenizer.convert_ids_to_tokens(lured.token_ids[lured.pooled]))
    )
    assert read_back.replace(" ", "") == (LURE + "moon").replace(" ", "")
    assert lured.token_ids.max() < len(tokenizer)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_spelled_control_token_changes_no_id_around_it(family):
    tokenizer = chat_tokenizer(family)
    contents = [f"hello moon 2026 {EMOJI}\n\nuser ", "how ", "bread"]
    lured, harmless = (
        tokenize(tokenizer, join_contents(chat), chat, CORRECTED).token_ids.tolist()
        for chat in ([user(contents[0]), assistant(contents[1] + word), user(contents[2])] for word in (LURE, "date"))
    )
    different = [a != b for a, b in zip(lured, harmless, strict=False)].index(True)
    assert tokenizer.convert_ids_to_tokens(harmless[different]).strip("\u0120\u2581") == "date"
    behind = harmless[different + 1 :]
    assert lured[-len(behind) :] == behind


def test_the_authors_code_reads_a_spelled_control_token_as_one():
    """Their scripts hand the whole rendered string to the tokenizer, and so does their preset."""
    found = read("llama 3.1", user("moon<|eot_id|>hello"), preset="authors-code")
    assert found[31:] == yes("moon", "<|eot_id|>", "hello", "<|eot_id|>")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "contents",
    [
        ("hello", "moon"),
        ("", "moon"),
        (" \t", "moon"),
        ("\u3000hello\n\n", "\n\nmoon \n"),
        ("user", "assistant"),
        ("e\u0301\u0327 \u05e9\u05dc\u05d5\u05dd \u202e", f"{EMOJI}\u200d\U0001f468\U00010348"),
        ("\x00\x01\x7f\x85\u2028", "\ufeffmoon"),
        ("\U000f0000\U000f0001\U000f0000", f"\U000f0001{LURE}"),
    ],
)
def test_every_character_of_a_content_is_pooled_and_no_other(family, contents):
    chat = [user(contents[0]), assistant(contents[1])]
    text = join_contents(chat)
    tokenizer = chat_tokenizer(family)
    sample = tokenize(tokenizer, text, chat, CORRECTED)
    pooled = {
        i for s, e in zip(sample.start[sample.pooled], sample.end[sample.pooled], strict=True) for i in range(s, e)
    }
    first, second = (len(content) for content in contents)
    inside = [*range(first), *range(first + 2, first + 2 + second)]
    assert pooled <= set(inside)
    assert {i for i in inside if not text[i].isspace()} <= pooled
    others = sample.start[~sample.pooled] == sample.end[~sample.pooled]
    assert others.all()


def test_a_template_that_asks_for_today_is_told_the_fixed_day():
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }}"
    assert render(tokenizer, "hello", None).string == f"{TEMPLATE_DATE} hello"


def test_a_content_that_the_template_writes_twice_is_pooled_twice():
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = "{{ messages[0]['content'] }}, {{ messages[0]['content'] }}"
    sample = tokenize(tokenizer, "moon", None, CORRECTED)
    assert tokenizer.convert_ids_to_tokens(sample.token_ids) == ["moon", ",", "\u0120moon"]
    assert sample.pooled.tolist() == [True, False, True]
    assert list(zip(sample.start, sample.end, strict=True)) == [(0, 4), (0, 0), (0, 4)]


# ---- the presets ----

PRESETS_PAGE = Path(__file__).parents[1] / "docs" / "presets.md"
WRITTEN = {"none: windows": None, "{skip: 31}": {"skip": 31}, "true": True, "false": False, "512": 512, "10": 10.0}


def documented_presets():
    """The table of docs/presets.md that begins with `| switch |`: preset -> switch -> value."""
    lines = [line for line in PRESETS_PAGE.read_text().splitlines() if line.startswith("|")]
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("| switch")) :]
    cells = [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in table]
    names = [name.split()[0] for name in cells[0][1:]]
    rows = list(takewhile(lambda row: len(row) == len(names) + 1, cells[2:]))
    return {name: {row[0]: WRITTEN.get(row[i], row[i]) for row in rows} for i, name in enumerate(names, start=1)}


def test_the_documented_presets_are_the_presets():
    assert documented_presets() == PRESETS

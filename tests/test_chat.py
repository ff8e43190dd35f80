"""Which tokens are pooled and which characters they stand for, under several chat templates and none."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_llama import BOS, llama_tokenizer

from fac_ray.config import MeasureConfig
from fac_ray.features.chat import TEMPLATE_DATE, TokenizedSample, render, tokenize, windows

PLAIN = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
NO_GAP = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'].strip() }}{% endfor %}"
REWRITES = "{{ bos_token }}{% for m in messages %}{{ m['content'] | length }}:\n{{ m['content'] }}\n{% endfor %}"
TEMPLATES = {"llama": llama_tokenizer().chat_template, "plain": PLAIN, "no gap": NO_GAP, "rewrites": REWRITES}

# Contents that also occur in what templates write: a search for "user" would find the role, "2" a length or date.
CHAT = [
    {"role": "user", "content": "user"},
    {"role": "assistant", "content": "  2 assistant, or\n\nuser?\n"},
    {"role": "user", "content": "caf\u00e9 \U0001f600 end"},
]
TEXT = "\n\n".join(message["content"] for message in CHAT)
CORRECTED = MeasureConfig().resolved()


@pytest.fixture(scope="module", params=TEMPLATES)
def tokenizer(request):
    return llama_tokenizer(TEMPLATES[request.param])


def switched(**switches):
    return MeasureConfig(**switches).resolved()


def decoded(tokenizer, sample, mask):
    return tokenizer.decode(sample.token_ids[mask])


def test_content_tokens_are_the_contents_and_nothing_else(tokenizer):
    sample = tokenize(tokenizer, TEXT, CHAT, CORRECTED)
    kept = decoded(tokenizer, sample, sample.pooled)
    contents = [message["content"] for message in CHAT]
    assert kept in {"".join(contents), "".join(content.strip() for content in contents)}


def test_characters_of_content_tokens_are_their_own_text(tokenizer):
    sample = tokenize(tokenizer, TEXT, CHAT, CORRECTED)
    for token_id, start, end in zip(
        sample.token_ids[sample.pooled], sample.start[sample.pooled], sample.end[sample.pooled], strict=True
    ):
        written = tokenizer.decode([token_id])
        if "\ufffd" not in written:  # a part of a character stands for all of it
            assert TEXT[start:end] == written.strip(" ") or TEXT[start:end] == written
    covered = {i for s, e in zip(sample.start, sample.end, strict=True) for i in range(s, e)}
    assert {i for i, character in enumerate(TEXT) if not character.isspace()} <= covered


def test_a_token_that_straddles_template_and_content_is_pooled_for_its_part_of_the_content():
    tokenizer = llama_tokenizer("{{ bos_token }}: {{ messages[0]['content'] }}")
    assert tokenizer.tokenize(": moon") == [":", "\u0120moon"]
    sample = tokenize(tokenizer, "moon", None, CORRECTED)
    assert sample.pooled.tolist() == [False, False, True]
    assert (sample.start[2], sample.end[2]) == (0, 4)


def test_tokens_outside_contents_stand_for_no_characters():
    tokenizer = llama_tokenizer()
    sample = tokenize(tokenizer, TEXT, CHAT, switched(tokens="all"))
    outside = sample.start == sample.end
    assert sample.token_ids[0] == tokenizer.bos_token_id
    assert outside[0]
    assert sample.start[0] == 0
    assert (np.diff(sample.start) >= 0).all()
    assert decoded(tokenizer, sample, ~outside) == "user2 assistant, or\n\nuser?caf\u00e9 \U0001f600 end"


def test_there_is_exactly_one_bos_unless_it_is_doubled(tokenizer):
    written_by_template = "bos_token" in tokenizer.chat_template
    for double_bos, num_bos in ((False, 1), (True, 1 + written_by_template)):
        sample = tokenize(tokenizer, TEXT, CHAT, switched(double_bos=double_bos))
        assert sample.token_ids[:num_bos].tolist() == [tokenizer.bos_token_id] * num_bos
        assert (sample.token_ids == tokenizer.bos_token_id).sum() == num_bos


def test_a_bos_that_the_content_starts_with_is_text():
    for template in (None, "{% for m in messages %}{{ m['content'] }}{% endfor %}"):
        tokenizer = llama_tokenizer(template)
        sample = tokenize(tokenizer, f"{BOS}cat", None, CORRECTED)
        assert (sample.token_ids == tokenizer.bos_token_id).tolist() == [True, *[False] * (len(sample.token_ids) - 1)]
        assert decoded(tokenizer, sample, sample.pooled) == f"{BOS}cat"


def test_ids_are_those_of_the_authors_code_when_bos_is_doubled():
    tokenizer = llama_tokenizer()
    string = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the moon"}], tokenize=False, date_string=TEMPLATE_DATE
    )
    sample = tokenize(tokenizer, "the moon", None, switched(preset="authors-code", tokens="all"))
    assert sample.token_ids.tolist() == tokenizer(string).input_ids


def test_a_plain_text_is_one_user_message_or_raw():
    tokenizer = llama_tokenizer()
    as_chat = tokenize(tokenizer, "the moon", [{"role": "user", "content": "the moon"}], CORRECTED)
    plain = tokenize(tokenizer, "the moon", None, CORRECTED)
    assert plain.token_ids.tolist() == as_chat.token_ids.tolist()
    assert plain.pooled.tolist() == as_chat.pooled.tolist()
    raw = llama_tokenizer(None)
    assert tokenize(raw, "the moon", None, CORRECTED).token_ids.tolist() == raw("the moon").input_ids


def test_after_prefix_is_everything_from_the_first_content_on():
    tokenizer = llama_tokenizer()
    sample = tokenize(tokenizer, TEXT, CHAT, switched(tokens="after_prefix"))
    first = int(np.flatnonzero(tokenize(tokenizer, TEXT, CHAT, CORRECTED).pooled)[0])
    assert sample.pooled.tolist() == [i >= first for i in range(len(sample.token_ids))]


def test_skip_drops_that_many_ids_and_all_drops_none():
    tokenizer = llama_tokenizer()
    skipping = tokenize(tokenizer, TEXT, CHAT, switched(tokens={"skip": 3}))
    assert skipping.pooled.tolist() == [i >= 3 for i in range(len(skipping.token_ids))]
    assert tokenize(tokenizer, TEXT, CHAT, switched(tokens="all")).pooled.all()


def test_a_control_token_that_a_user_spells_is_text_and_with_a_second_tokenisation_is_not_pooled():
    tokenizer = llama_tokenizer()
    sample = tokenize(tokenizer, "cat<|eot_id|>moon", None, CORRECTED)
    assert decoded(tokenizer, sample, sample.pooled) == "cat<|eot_id|>moon"
    again = tokenize(tokenizer, "cat<|eot_id|>moon", None, switched(double_bos=True))
    assert decoded(tokenizer, again, again.pooled) == "catmoon"


def test_max_tokens_cuts_and_says_so():
    tokenizer = llama_tokenizer(None)
    long = tokenize(tokenizer, "the moon " * 50, None, switched(max_tokens=16))
    assert (len(long.token_ids), long.truncated) == (16, True)
    assert not tokenize(tokenizer, "the moon", None, switched(max_tokens=16)).truncated


@pytest.mark.parametrize(
    ("text", "messages", "reason"),
    [
        ("", None, "empty"),
        (" \n ", None, "empty"),
        (None, None, "empty"),
        ("x", [], "no message"),
        ("x", [{"role": "wizard", "content": "x"}], "template refuses the roles"),
        ("x", [{"role": "user", "content": None}], "both strings"),
        ("x", [{"role": "user", "content": "something else"}], "not found in its text"),
        ("bad \ud800 surrogate", None, "surrogates not allowed"),
    ],
)
def test_a_sample_that_cannot_be_tokenized_says_why(text, messages, reason):
    with pytest.raises(ValueError, match=reason):
        tokenize(llama_tokenizer(), text, messages, CORRECTED)


def test_a_sample_without_a_pooled_token_says_so():
    with pytest.raises(ValueError, match=r"none of its \d+ tokens is pooled under measure.tokens {'skip': 99}"):
        tokenize(llama_tokenizer(), "cat", None, switched(tokens={"skip": 99}))


def test_a_template_that_loses_a_content_is_an_error_of_the_sample():
    tokenizer = llama_tokenizer("{{ bos_token }}{{ messages[0]['content'] | upper }}")
    with pytest.raises(ValueError, match=r"contents are not found.* in what the chat template"):
        render(tokenizer, "the moon", None)


def test_the_day_does_not_show_in_a_measurement():
    tokenizer = llama_tokenizer()
    assert TEMPLATE_DATE in render(tokenizer, "the moon", None).string


def a_sample(num_tokens, pooled=None, bos=True):
    token_ids = np.arange(100, 100 + num_tokens)
    token_ids[0] = 0 if bos else 100
    pooled = np.ones(num_tokens, dtype=bool) if pooled is None else pooled
    return TokenizedSample(token_ids, pooled, token_ids, token_ids + 1, False)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 28, 29, 100])
def test_windows_pool_every_token_once_and_read_a_quarter_again(num_tokens, bos):
    sample = a_sample(num_tokens, bos=bos)
    found = windows(sample, 16, bos_token_id=0)
    assert np.concatenate([window.positions for window in found]).tolist() == list(range(num_tokens))
    for index, window in enumerate(found):
        assert len(window.token_ids) <= 16
        assert window.token_ids[window.pooled].tolist() == sample.token_ids[window.positions].tolist()
        if index:
            head = [0] if bos else []
            first = window.positions[0]
            assert window.token_ids[: len(head) + 4].tolist() == [*head, *sample.token_ids[first - 4 : first]]


def test_a_window_without_a_pooled_token_is_left_out():
    pooled = np.zeros(40, dtype=bool)
    pooled[[1, 39]] = True
    found = windows(a_sample(40, pooled), 16, bos_token_id=0)
    assert [window.positions.tolist() for window in found] == [[1], [39]]


def test_a_short_sample_is_one_window():
    [window] = windows(a_sample(10), 16, bos_token_id=0)
    assert window.token_ids.tolist() == a_sample(10).token_ids.tolist()

"""Laws of the embedded world: same seed, same bytes; the splits hold; nothing but the concepts tells the label."""

from __future__ import annotations

import json
import re
from collections import Counter
from random import Random

import pytest

from fac_ray.config import ConfigError, load_config
from fac_ray.reference import default_config, write_world
from fac_ray.reference.chats import CARD, SPAN_WORDS, message, span_around, training_chat
from fac_ray.reference.world import SIZES, compose, concepts, draw_concepts
from fac_ray.schema import content_id
from fac_ray.synthesis.prompts import contrast_prompt, targeted_prompt, untargeted_prompt

CORPORA = ("anchor", "seed", "background", "heldout")
GLUE = set(
    re.findall(r"\w+", "a an and are as at be by can do for from have i in is it me my of on or so that the this to")
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, 0)
    return folder


def _rows(folder, corpus):
    return [json.loads(line) for line in (folder / f"{corpus}.jsonl").read_text().splitlines()]


def _as_regex(phrasing):
    """The phrasing with anything in its slots; its first letter may have changed case."""
    body = r".{1,30}?".join(map(re.escape, re.split(r"\{\w+\}", phrasing)))
    return f"(?i:{body})"


def test_same_seed_writes_the_same_bytes_and_another_seed_does_not(world, tmp_path):
    write_world(tmp_path / "again", 0)
    write_world(tmp_path / "other", 1)
    for name in [*(f"{corpus}.jsonl" for corpus in CORPORA), "truth.json"]:
        assert (tmp_path / "again" / name).read_bytes() == (world / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (world / name).read_bytes()


def test_world_is_as_large_and_varied_as_it_says():
    policy = [concept for concept in concepts() if concept.policy]
    assert len(policy) >= 24
    assert len(concepts()) - len(policy) >= 24
    for concept in concepts():
        everywhere = {phrasing for pattern in concept.patterns for phrasing in pattern}
        heldout = {phrasing for pattern in concept.heldout_patterns for phrasing in pattern}
        # a verb phrase stands in 13 frames, each of which makes another phrasing
        number = sum(13 if phrasing[0].islower() else 1 for phrasing in everywhere | heldout)
        assert number >= 20, concept.name
        assert len(concept.patterns) + len(concept.heldout_patterns) >= 8
        assert not everywhere & heldout


def test_every_policy_concept_has_a_near_miss_of_its_own_that_shares_its_words():
    by_name = {concept.name: concept for concept in concepts()}
    policy = [concept for concept in concepts() if concept.policy]
    assert len({concept.near for concept in policy}) == len(policy)
    for concept in policy:
        near = by_name[concept.near]
        assert not near.policy
        assert len(_words(concept) & _words(near)) >= 5, concept.name


def _words(concept):
    text = " ".join(phrasing for pattern in concept.patterns for phrasing in pattern)
    return set(re.findall(r"[a-z]+", re.sub(r"\{\w+\}", "", text).lower())) - GLUE


def test_corpora_have_their_sizes_and_no_row_twice(world):
    texts = {corpus: [row["text"] for row in _rows(world, corpus)] for corpus in CORPORA}
    assert {corpus: len(rows) for corpus, rows in texts.items()} == SIZES
    everything = [text for rows in texts.values() for text in rows]
    assert len(set(everything)) == len(everything)


def test_labels_are_in_the_labelled_corpora_alone_and_in_balance(world):
    assert all(set(row) == {"text"} for row in _rows(world, "background"))
    for corpus in ("anchor", "seed", "heldout"):
        labels = Counter(row["label"] for row in _rows(world, corpus))
        assert set(labels) == {"0", "1"}
        assert labels["1"] / sum(labels.values()) == pytest.approx(0.45)


def test_label_of_an_anchor_row_is_what_its_concepts_say(world):
    truth = json.loads((world / "truth.json").read_text())
    policy = set(truth["policy"])
    assert len(truth["anchor"]) == SIZES["anchor"]
    for row in _rows(world, "anchor"):
        names = truth["anchor"][content_id(row["text"])]
        assert row["label"] == str(int(bool(policy & set(names))))
        assert len(names) == len(set(names))


def test_length_says_nothing_about_the_label(world):
    words = {"0": [], "1": []}
    for row in _rows(world, "anchor"):
        words[row["label"]].append(len(row["text"].split()))
    means = [sum(lengths) / len(lengths) for lengths in words.values()]
    assert max(means) / min(means) < 1.2


def test_half_of_the_policy_concepts_is_withheld_from_the_seed(world):
    truth = json.loads((world / "truth.json").read_text())
    withheld = [concept for concept in concepts() if concept.name in truth["withheld"]]
    assert len(withheld) == len(truth["policy"]) // 2
    found = _found(withheld, [row["text"] for row in _rows(world, "seed")], heldout=False)
    assert found == set()
    kept = [concept for concept in concepts() if concept.name not in truth["withheld"]]
    assert len(_found(kept, [row["text"] for row in _rows(world, "seed")], heldout=False)) == len(kept)


def test_withheld_half_depends_on_the_seed(world, tmp_path):
    write_world(tmp_path, 1)
    halves = [json.loads((folder / "truth.json").read_text())["withheld"] for folder in (world, tmp_path)]
    assert halves[0] != halves[1]


def test_heldout_phrasings_are_in_the_heldout_corpus_and_nowhere_else(world):
    assert len(_found(concepts(), [row["text"] for row in _rows(world, "heldout")], heldout=True)) == len(concepts())
    for corpus in ("anchor", "seed", "background"):
        assert _found(concepts(), [row["text"] for row in _rows(world, corpus)], heldout=True) == set()
    trained = [turn["content"] for number in range(1500) for turn in training_chat(number)]
    assert _found(concepts(), trained, heldout=True) == set()


def _found(wanted, texts, heldout):
    """Names of the concepts of which a phrasing of that kind occurs in the texts."""
    together = "\n".join(texts)
    found = set()
    for concept in wanted:
        patterns = concept.heldout_patterns if heldout else concept.patterns
        if any(re.search(_as_regex(phrasing), together) for pattern in patterns for phrasing in pattern):
            found.add(concept.name)
    return found


def test_a_composed_message_knows_where_its_concepts_stand():
    rng = Random(5)
    for _ in range(200):
        chosen = draw_concepts(rng, concepts(), positive=True)
        composed = compose(rng, chosen)
        assert composed.label == "1"
        assert composed.concepts == [concept.name for concept in chosen]
        for phrase, concept in zip(composed.phrases, chosen, strict=True):
            words = composed.text[phrase.start : phrase.end]
            phrasings = [phrasing for pattern in concept.patterns for phrasing in pattern]
            assert any(re.search(_as_regex(phrasing), words) for phrasing in phrasings)
            assert composed.text[phrase.end : phrase.end + 1] in {"", " "}


def test_negative_messages_hold_no_policy_concept():
    rng = Random(6)
    assert not any(c.policy for _ in range(200) for c in draw_concepts(rng, concepts(), positive=False))


def test_a_training_span_holds_a_word_of_its_concept():
    rng = Random(7)
    for _ in range(200):
        wanted = rng.choice(concepts())
        source = message(rng, wanted)
        span = span_around(rng, source, wanted.name)
        phrase = next(p for p in source.phrases if p.concept == wanted.name)
        assert span in source.text
        assert len(span.split()) <= SPAN_WORDS
        start = source.text.index(span)
        assert start < phrase.end
        assert phrase.start < start + len(span)


def test_prompts_of_synthesis_have_the_form_the_model_was_trained_on():
    chats = [training_chat(number) for number in range(400)]
    asked = [chat[0]["content"] for chat in chats if len(chat) == 2]
    for prompt in (
        targeted_prompt(CARD, ["AA", "BB", "CC"]),
        contrast_prompt(CARD, ["AA", "BB", "CC"], "PP", "NN"),
        untargeted_prompt(CARD, ["AA", "BB", "CC"]),
    ):
        assert [turn["role"] for turn in prompt] == ["user"]
        shape = re.sub(r"AA|BB|CC|PP|NN", ".+", re.escape(prompt[0]["content"]))
        assert any(re.fullmatch(shape, text) for text in asked)
    assert all([turn["role"] for turn in chat] in (["user"], ["user", "assistant"]) for chat in chats)


def test_training_chats_are_a_function_of_their_number():
    assert [training_chat(number) for number in range(50)] == [training_chat(number) for number in range(50)]
    assert training_chat(3) != training_chat(4)


def test_default_config_is_a_whole_run_and_takes_overrides(tmp_path):
    config = default_config(tmp_path, seed=2, overrides=("measure.batch_tokens=512",))
    assert set(config.corpora) == set(CORPORA)
    assert config.folder == tmp_path
    assert (config.run.seed, config.measure.batch_tokens, config.name) == (2, 512, "reference")
    assert config.evaluation.truth == str(tmp_path / "world" / "truth.json")
    written = tmp_path / "config.json"
    written.write_text(config.model_dump_json())
    assert load_config(written) == config


def test_default_config_refuses_an_unknown_key(tmp_path):
    with pytest.raises(ConfigError, match="colour"):
        default_config(tmp_path, overrides=("measure.colour=red",))

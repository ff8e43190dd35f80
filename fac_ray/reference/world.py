"""A small world of customer-service messages whose concepts are known: in, a folder and a seed; out, four corpora.

A message asks for one to three of the concepts in world.yaml, in varied phrasings, with openers, links and closers
that say nothing about its label. It is positive ("1") if at least one of them breaks the shop's policy. Each policy
concept has a near miss among the ordinary ones, which shares its words.

    anchor.jsonl      all concepts: what is reachable
    seed.jsonl        positives from a random half of the policy concepts; the other half is withheld
    background.jsonl  text about other things, without labels
    heldout.jsonl     all concepts; half of its phrasings are found in no other corpus
    truth.json        the concepts of each anchor message, and the withheld ones; `truth.py` alone reads it

Equal seeds give equal bytes. One trained model (`build.py`) serves the worlds of all seeds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import yaml

from fac_ray.artifacts import write_json, write_text
from fac_ray.schema import content_id

SIZES = {"anchor": 4000, "seed": 1000, "background": 1000, "heldout": 1500}
"""Rows of each corpus."""

POSITIVE_FRACTION = 0.45
"""Share of positive messages in anchor, seed and heldout."""


class Concept(NamedTuple):
    """One thing a message can ask for. A pattern is a group of phrasings that differ in single words."""

    name: str
    policy: bool  # breaks the policy
    near: str | None  # a policy concept's near miss
    patterns: tuple[tuple[str, ...], ...]
    heldout_patterns: tuple[tuple[str, ...], ...]


class Phrase(NamedTuple):
    """Where a message speaks of a concept: characters [start, end) of its text."""

    concept: str
    start: int
    end: int


class Composed(NamedTuple):
    """A message with what is true of it."""

    text: str
    label: str
    phrases: tuple[Phrase, ...]

    @property
    def concepts(self) -> list[str]:
        return [phrase.concept for phrase in self.phrases]


def write_world(folder: Path, seed: int) -> None:
    """Write the four corpora and the truth of one world seed. The same seed writes the same bytes."""
    rng = Random(f"world {seed}")
    policy = [concept.name for concept in concepts() if concept.policy]
    withheld = sorted(rng.sample(policy, len(policy) // 2))
    kept = tuple(concept for concept in concepts() if concept.name not in withheld)
    seen: set[str] = set()
    anchor = _messages(rng, concepts(), SIZES["anchor"], seen)
    seed_messages = _messages(rng, kept, SIZES["seed"], seen)
    heldout = _messages(rng, concepts(), SIZES["heldout"], seen, heldout_fraction=0.5)
    for name, messages in (("anchor", anchor), ("seed", seed_messages), ("heldout", heldout)):
        _write_rows(Path(folder) / f"{name}.jsonl", [{"text": m.text, "label": m.label} for m in messages])
    _write_rows(Path(folder) / "background.jsonl", [{"text": text} for text in _background(rng, seen)])
    truth = {
        "concepts": [concept.name for concept in concepts()],
        "policy": policy,
        "withheld": withheld,
        "anchor": {content_id(message.text): message.concepts for message in anchor},
    }
    write_json(Path(folder) / "truth.json", truth)


@cache
def concepts() -> tuple[Concept, ...]:
    """All concepts of world.yaml, the policy-breaking ones first."""
    return tuple(
        Concept(
            name,
            kind == "policy",
            entry.get("near"),
            tuple(map(_expanded, entry["phrasings"])),
            tuple(map(_expanded, entry["heldout"])),
        )
        for kind in ("policy", "ordinary")
        for name, entry in _source()[kind].items()
    )


def compose(rng: Random, chosen: Sequence[Concept], heldout_fraction: float = 0.0) -> Composed:
    """One message that asks for the chosen concepts in this order, with each concept's place in the text.

    `heldout_fraction` is the chance of each phrasing to be one of those kept for the held-out corpus.
    """
    parts = [_opener(rng)] if rng.random() < 0.65 else []
    phrases: list[Phrase] = []
    for number, concept in enumerate(chosen):
        if number and rng.random() < 0.6:
            parts.append(rng.choice(_source()["links"]))
        phrase = _phrase(rng, concept, rng.random() < heldout_fraction)
        if parts and parts[-1].endswith((",", ":")):
            phrase = phrase if phrase.startswith("I ") else phrase[0].lower() + phrase[1:]
        start = sum(len(part) + 1 for part in parts)
        phrases.append(Phrase(concept.name, start, start + len(phrase)))
        parts.append(phrase)
    if rng.random() < 0.5:
        parts.append(_filled(rng, rng.choice(_source()["closers"])))
    label = "1" if any(concept.policy for concept in chosen) else "0"
    return Composed(" ".join(parts), label, tuple(phrases))


def draw_concepts(rng: Random, available: Sequence[Concept], positive: bool) -> list[Concept]:
    """One to three different concepts, at least one of them policy-breaking if `positive`, else none; any order.

    How many there are does not depend on `positive`, so a message's length says nothing about its label.
    """
    number = rng.choices((1, 2, 3), (45, 40, 15))[0]
    number_policy = min(number, rng.choices((1, 2), (85, 15))[0]) if positive else 0
    breaking = rng.sample([c for c in available if c.policy], number_policy)
    ordinary = rng.sample([c for c in available if not c.policy], number - number_policy)
    return rng.sample(breaking + ordinary, number)


def background_text(rng: Random) -> str:
    """One to three sentences about anything but a shop."""
    patterns = rng.sample(_source()["background"], rng.choice((1, 2, 3)))
    return " ".join(_filled(rng, _one_expansion(rng, pattern)) for pattern in patterns)


def _messages(
    rng: Random, available: Sequence[Concept], number: int, seen: set[str], heldout_fraction: float = 0.0
) -> list[Composed]:
    """Different messages, none of them in `seen`, which they are added to; positives and negatives mixed."""
    labels = [row < round(POSITIVE_FRACTION * number) for row in range(number)]
    rng.shuffle(labels)
    messages = []
    for positive in labels:
        message = compose(rng, draw_concepts(rng, available, positive), heldout_fraction)
        while message.text in seen:
            message = compose(rng, draw_concepts(rng, available, positive), heldout_fraction)
        seen.add(message.text)
        messages.append(message)
    return messages


def _background(rng: Random, seen: set[str]) -> Iterator[str]:
    for _ in range(SIZES["background"]):
        text = background_text(rng)
        while text in seen:
            text = background_text(rng)
        seen.add(text)
        yield text


def _phrase(rng: Random, concept: Concept, heldout: bool) -> str:
    phrasing = rng.choice(rng.choice(concept.heldout_patterns if heldout else concept.patterns))
    if phrasing[0].islower():
        phrasing = rng.choice(_source()["frames"]).replace("{phrase}", phrasing)
    text = _filled(rng, phrasing)
    return text[0].upper() + text[1:]


def _opener(rng: Random) -> str:
    return _filled(rng, rng.choice(_source()["openers"]))


def _filled(rng: Random, text: str) -> str:
    """The text with every {slot} replaced by a random filling."""
    return re.sub(r"\{(\w+)\}", lambda match: _filling(rng, match[1]), text)


def _filling(rng: Random, slot: str) -> str:
    if slot == "date":
        return f"{rng.randint(1, 28)} {rng.choice(_source()['slots']['month'])}"
    if slot == "order":
        return f"#{rng.randint(10000, 99999)}"
    return rng.choice(_source()["slots"][slot])


def _expanded(pattern: str) -> tuple[str, ...]:
    """Every phrasing of a pattern: one part chosen in each (a|b|c)."""
    pieces = re.split(r"\(([^()]*)\)", pattern)
    choices = [piece.split("|") if place % 2 else [piece] for place, piece in enumerate(pieces)]
    return tuple("".join(chosen) for chosen in product(*choices))


def _one_expansion(rng: Random, pattern: str) -> str:
    return re.sub(r"\(([^()]*)\)", lambda match: rng.choice(match[1].split("|")), pattern)


@cache
def _source() -> dict[str, Any]:
    return yaml.safe_load((Path(__file__).parent / "world.yaml").read_text(encoding="utf-8"))


def _write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))

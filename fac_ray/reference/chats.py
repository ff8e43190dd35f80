"""Training texts of the embedded language model: a number in, a short chat out.

Nearly half of them are messages to customer service, answered by the names of what is asked for. The others are
instructions in the very format of `synthesis.prompts`: spans of messages that share a concept, answered by a message
with that concept; the same with a good and a bad example; and whole messages, answered by a message with one of their
concepts. So the model learns to read the concept off a few spans, which is what synthesis asks of it. Phrasings kept
for the held-out corpus never occur here.
"""

from __future__ import annotations

from random import Random

from fac_ray.reference.world import Composed, Concept, background_text, compose, concepts, draw_concepts
from fac_ray.schema import Message
from fac_ray.synthesis.prompts import contrast_prompt, targeted_prompt, untargeted_prompt
from fac_ray.tasks import load_task

SPAN_WORDS = 16
"""Length of a span, as `measure.span_words` has it."""

KINDS = {"message": 0.42, "targeted": 0.32, "contrast": 0.17, "untargeted": 0.05, "background": 0.04}
"""Share of each kind of training text."""

CARD = load_task("customer-policy")


def training_chat(number: int, stream: str = "train") -> list[Message]:
    """The chat of this number: a function of `stream` and `number` alone."""
    rng = Random(f"build {stream} {number}")
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    if kind == "message":
        asked = message(rng)
        reply = ", ".join(concept.replace("_", " ") for concept in asked.concepts)
        return [{"role": "user", "content": asked.text}, {"role": "assistant", "content": f"You ask about: {reply}."}]
    if kind == "background":
        return [{"role": "user", "content": background_text(rng)}]
    prompt, answer = _instruction(rng, kind)
    return [*prompt, {"role": "assistant", "content": answer}]


def training_message(number: int, stream: str = "train") -> Composed:
    """A message as the language model saw them in training, with its concepts."""
    return message(Random(f"build {stream} message {number}"))


def message(rng: Random, wanted: Concept | None = None) -> Composed:
    """A message of any concepts, or one that holds the wanted concept."""
    chosen = draw_concepts(rng, concepts(), positive=rng.random() < 0.5)
    if wanted is not None and wanted not in chosen:
        chosen[rng.randrange(len(chosen))] = wanted
    return compose(rng, chosen)


def span_around(rng: Random, source: Composed, concept: str) -> str:
    """Words of a message around a random word of the concept's phrase, at most `SPAN_WORDS`: like an exemplar."""
    phrase = next(p for p in source.phrases if p.concept == concept)
    words = source.text.split(" ")
    ends = [len(" ".join(words[: place + 1])) for place in range(len(words))]
    inside = [place for place, end in enumerate(ends) if phrase.start < end <= phrase.end]
    first = max(0, rng.choice(inside) - rng.randrange(SPAN_WORDS))
    first = min(first, max(0, len(words) - SPAN_WORDS))
    return " ".join(words[first : first + SPAN_WORDS])


def _instruction(rng: Random, kind: str) -> tuple[list[Message], str]:
    if kind == "untargeted":
        examples = [message(rng) for _ in range(rng.randint(1, 3))]
        wanted = _concept(rng.choice(rng.choice(examples).concepts))
        return untargeted_prompt(CARD, [example.text for example in examples]), message(rng, wanted).text
    wanted = rng.choice(concepts())
    sources = [message(rng, wanted) for _ in range(rng.choices((1, 2, 3), (20, 20, 60))[0])]
    spans = [span_around(rng, source, wanted.name) for source in sources]
    answer = message(rng, wanted).text
    if kind == "targeted":
        return targeted_prompt(CARD, spans), answer
    return contrast_prompt(CARD, spans, message(rng, wanted).text, _message_without(rng, wanted).text), answer


def _message_without(rng: Random, unwanted: Concept) -> Composed:
    while unwanted.name in (drawn := message(rng)).concepts:
        pass
    return drawn


def _concept(name: str) -> Concept:
    return next(concept for concept in concepts() if concept.name == name)

"""Prompts for the generator: a task card and spans in, chat messages out.

Spans come from corpora and are data: they are put into the card's templates as they are, with white space collapsed,
and braces in them mean nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from fac_ray.schema import Message
from fac_ray.tasks import TaskCard


def targeted_prompt(card: TaskCard, spans: Sequence[str], explanation: str = "") -> list[Message]:
    """Messages of step 1: ask for one text that shares what the spans of a feature share (paper, section 6).

    Raises:
        ValueError: `spans` is empty.
    """
    return _messages(card, card.targeted, spans=_joined(card, spans), explanation=_explained(card, explanation))


def contrast_prompt(
    card: TaskCard, spans: Sequence[str], positive: str, negative: str, explanation: str = ""
) -> list[Message]:
    """Messages of step 2: the same, with the candidates of highest (`positive`) and lowest (`negative`) activation.

    Raises:
        ValueError: `spans` is empty.
    """
    return _messages(
        card,
        card.contrast,
        spans=_joined(card, spans),
        explanation=_explained(card, explanation),
        positive=_one_line(positive),
        negative=_one_line(negative),
    )


def untargeted_prompt(card: TaskCard, examples: Sequence[str]) -> list[Message]:
    """Messages of the control: ask for one text like whole examples, with no feature in mind.

    Raises:
        ValueError: `examples` is empty.
    """
    return _messages(card, card.untargeted, spans=_joined(card, examples))


def _messages(card: TaskCard, template: str, **parts: str) -> list[Message]:
    system: list[Message] = [] if card.system is None else [{"role": "system", "content": card.system.strip()}]
    return [*system, {"role": "user", "content": template.strip().format(**parts)}]


def _joined(card: TaskCard, spans: Sequence[str]) -> str:
    if not spans:
        raise ValueError(f"task {card.name}: a prompt needs at least one span; this feature has no exemplar")
    return card.span_separator.join(_one_line(span) for span in spans)


def _explained(card: TaskCard, explanation: str) -> str:
    return _one_line(explanation) or card.unexplained


def _one_line(text: str) -> str:
    return " ".join(text.split())

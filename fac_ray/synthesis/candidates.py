"""The rules of synthesis, without any model: which texts are asked for, and which of them are accepted.

In: missing features with their exemplars, a task card, and candidate rows of earlier requests. Out: requests, and
the rows with a status and a reason. Everything here is a pure function of its arguments, so an interrupted run that
reads its rows again comes to the same decisions.
"""

from __future__ import annotations

import functools
import json
import string
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from fac_ray.config import ConfigError, RunConfig, SynthesisConfig
from fac_ray.coverage.counts import is_active
from fac_ray.schema import Message, content_id, hash_of
from fac_ray.synthesis.prompts import contrast_prompt, targeted_prompt, untargeted_prompt
from fac_ray.tasks import TaskCard, load_task

Row = dict[str, Any]
"""One row of schema.CANDIDATES."""

UNTARGETED_STEP = 0
"""Stands for the step of an untargeted request in its hashes; its row has none."""


class Rules(NamedTuple):
    """Everything in a config that decides what is asked for and what is accepted."""

    card: TaskCard
    synthesis: SynthesisConfig
    threshold: float
    generator: str
    """Hub id or folder of the model that writes."""
    seed: int


class Target(NamedTuple):
    """A missing feature that is to be filled."""

    feature_id: int
    exemplars: tuple[str, ...]
    """Spans of the anchor corpus, strongest first."""
    explanation: str


class Request(NamedTuple):
    """One candidate that is to be generated."""

    candidate_id: str
    feature_id: int | None
    step: int | None
    attempt: int
    messages: list[Message]
    prompt_hash: str
    seed: int
    positive_id: str | None = None
    negative_id: str | None = None


class Reply(NamedTuple):
    """What became of a request: its text, the target feature's activation, and what went wrong."""

    text: str
    activation: float | None
    error: str | None


def rules_of(config: RunConfig) -> Rules:
    """The rules of a run.

    Raises:
        ConfigError: no synthesis section, an unknown card, or a harmful one without `synthesis.allow_harmful`.
    """
    synthesis = config.synthesis
    if synthesis is None:
        raise ConfigError("synthesis: the config says null; give the section (it may be empty: {})")
    card = load_task(synthesis.task)
    if card.harmful and not synthesis.allow_harmful:
        raise ConfigError(
            f"synthesis.task: {card.name!r} asks a model for texts that are harmful by themselves; "
            "set synthesis.allow_harmful=true if that is what you want, or take another card"
        )
    generator = synthesis.generator or config.model.path
    return Rules(card, synthesis, config.measure.threshold, generator, config.run.seed)


# ---- what is asked for ----


def first_requests(target: Target, attempt: int, rules: Rules) -> list[Request]:
    """Step 1 for one feature: n requests with one prompt and n seeds (paper, section 6)."""
    messages = targeted_prompt(rules.card, _spans(target, attempt, rules), target.explanation)
    return [
        _request(rules, messages, target.feature_id, 1, attempt, i) for i in range(rules.synthesis.first_candidates)
    ]


def second_requests(target: Target, attempt: int, first: Sequence[Row], rules: Rules) -> list[Request]:
    """Step 2 for one feature: m requests that show the contrast pair of step 1; none where there is no pair."""
    pair = contrast_pair(target, first, rules)
    if pair is None:
        return []
    (positive_id, positive), (negative_id, negative) = pair
    spans = _spans(target, attempt, rules)
    messages = contrast_prompt(rules.card, spans, positive, negative, target.explanation)
    requests = (
        _request(rules, messages, target.feature_id, 2, attempt, i) for i in range(rules.synthesis.second_candidates)
    )
    return [request._replace(positive_id=positive_id, negative_id=negative_id) for request in requests]


def contrast_pair(target: Target, first: Sequence[Row], rules: Rules) -> tuple[tuple[str, str], tuple[str, str]] | None:
    """x+ and x-, each with its id: the candidates of highest and lowest activation (paper, section 6).

    Refusals and candidates without a measurement do not count. If the highest is not active, x+ is the strongest
    exemplar, `exemplar:0`. None if no text other than x+ is left to be x-.
    """
    usable = [row for row in first if row["activation"] is not None and not _refuses(row["text"], rules.card)]
    if not usable:
        return None
    strongest = max(usable, key=lambda row: row["activation"])
    positive = ("exemplar:0", target.exemplars[0])
    if _active(strongest, rules.threshold):
        positive = (strongest["candidate_id"], strongest["text"])
    others = [row for row in usable if normalised(row["text"]) != normalised(positive[1])]
    if not others:
        return None
    weakest = min(others, key=lambda row: row["activation"])
    return positive, (weakest["candidate_id"], weakest["text"])


def untargeted_requests(examples: Sequence[str], attempt: int, num: int, rules: Rules) -> list[Request]:
    """The control: `num` requests, each with its own random draw of `num_spans` seed samples as examples."""
    requests = []
    for i in range(num):
        draw = _rng(rules, "untargeted", attempt, i).permutation(len(examples))[: rules.synthesis.num_spans]
        messages = untargeted_prompt(rules.card, [examples[j] for j in draw])
        requests.append(_request(rules, messages, None, UNTARGETED_STEP, attempt, i))
    return requests


def _spans(target: Target, attempt: int, rules: Rules) -> list[str]:
    """The strongest exemplars first; later attempts draw others, so that a retry is not the same prompt again."""
    order = np.arange(len(target.exemplars))
    if attempt > 0:
        order = _rng(rules, "spans", target.feature_id, attempt).permutation(order)
    return [target.exemplars[i] for i in order[: rules.synthesis.num_spans]]


def _request(
    rules: Rules, messages: list[Message], feature_id: int | None, step: int, attempt: int, index: int
) -> Request:
    identity = [str(part) for part in (rules.seed, feature_id, step, attempt, index)]
    prompt_hash = hash_of(json.dumps([[m["role"], m["content"]] for m in messages]))
    return Request(
        candidate_id=hash_of("candidate", *identity, rules.generator, prompt_hash),
        feature_id=feature_id,
        step=step or None,
        attempt=attempt,
        messages=messages,
        prompt_hash=prompt_hash,
        seed=int(hash_of("request", *identity)[:8], 16) >> 1,  # 31 bits
    )


def _rng(rules: Rules, *identity: object) -> np.random.Generator:
    return np.random.default_rng(int(hash_of(str(rules.seed), *map(str, identity)), 16))


# ---- what became of it ----


def candidate_row(request: Request, reply: Reply, generator: str) -> Row:
    """The row of a candidate before it is judged: `scored`, or rejected if it could not be made or measured."""
    return {
        "candidate_id": request.candidate_id,
        "feature_id": request.feature_id,
        "step": request.step,
        "attempt": request.attempt,
        "text": reply.text,
        "activation": None if reply.activation is None else float(np.float32(reply.activation)),  # as it is stored
        "status": "scored" if reply.error is None else "rejected",
        "reason": reply.error,
        "positive_id": request.positive_id,
        "negative_id": request.negative_id,
        "prompt_hash": request.prompt_hash,
        "generator": generator,
        "seed": request.seed,
    }


def judge_attempt(target: Target, rows: Sequence[Row], num: int, seen: Collection[str], rules: Rules) -> list[Row]:
    """One feature's candidates of one attempt, judged; at most `num` are accepted.

    Step 2 is judged first. A candidate of step 1 is accepted only where step 2 gave none; if it merely could have
    been, its status is `scored`.
    """
    copies = {text_key(span) for span in target.exemplars}

    def gate(row: Row) -> str | None:
        return _fault(row, rules.card, copies) or (None if _active(row, rules.threshold) else "feature inactive")

    second = accept_strongest([row for row in rows if row["step"] == 2], gate, num, seen)
    found = sum(row["status"] == "accepted" for row in second)
    first = accept_strongest([row for row in rows if row["step"] == 1], gate, 0 if found else num, seen)
    unused = [{**row, "status": "scored", "reason": None} if row["reason"] == "surplus" else row for row in first]
    return [*unused, *second]


def judge_untargeted(
    rows: Sequence[Row], num: int, seen: Collection[str], examples: Sequence[str], rules: Rules
) -> list[Row]:
    """Untargeted candidates, judged by the same gates except that of the feature; the first `num` are accepted."""
    copies = {text_key(example) for example in examples}
    return accept_strongest(rows, lambda row: _fault(row, rules.card, copies), num, seen)


def accept_strongest(
    rows: Sequence[Row], gate: Callable[[Row], str | None], num: int, seen: Collection[str]
) -> list[Row]:
    """The rows in their order, each with a status and a reason: the strongest that pass are accepted, `num` at most.

    `gate` gives the reason to reject a row; `seen` holds the `text_key` of every text that is already there. Of equal
    activations the earlier row counts as stronger.
    """
    taken: set[str] = set()
    verdicts: dict[int, tuple[str, str | None]] = {}
    for i in sorted(range(len(rows)), key=lambda i: -(rows[i]["activation"] or 0.0)):
        key, reason = text_key(rows[i]["text"]), gate(rows[i])
        if reason is None and (key in seen or key in taken):
            reason = "duplicate"
        if reason is None and len(taken) == num:
            reason = "surplus"
        if reason is None:
            taken.add(key)
        verdicts[i] = ("accepted" if reason is None else "rejected", reason)
    return [{**row, "status": verdicts[i][0], "reason": verdicts[i][1]} for i, row in enumerate(rows)]


def _fault(row: Row, card: TaskCard, copies: Collection[str]) -> str | None:
    """Why a text is no use whatever it activates; None if it is of use."""
    num_words = len(row["text"].split())
    faults = {
        "empty": num_words == 0,
        "refusal": _refuses(row["text"], card),
        "echo of the prompt": any(phrase in normalised(row["text"]) for phrase in fixed_phrases(card)),
        "too short": num_words < card.min_words,
        "too long": num_words > card.max_words,
        "copy of an exemplar": text_key(row["text"]) in copies,
    }
    failed = row["reason"] if is_failure(row["reason"]) else None
    return failed or next((reason for reason, found in faults.items() if found), None)


@functools.cache
def fixed_phrases(card: TaskCard) -> frozenset[str]:
    """What a card's templates say whatever fills them, line by line; one word alone says too little to be a phrase."""
    templates = (card.targeted, card.contrast, card.untargeted)
    literals = [literal for template in templates for literal, *_ in string.Formatter().parse(template)]
    phrases = {normalised(line) for literal in literals for line in literal.splitlines()}
    return frozenset(phrase for phrase in phrases if len(phrase.split(" ")) > 1)


def is_failure(reason: str | None) -> bool:
    """Whether a reason says that a candidate could not be made or measured, and not that it was judged."""
    return reason is not None and reason.startswith(("generation error", "measurement error"))


def normalised(text: str) -> str:
    """The text with every run of white space as one blank; texts that differ in nothing else are duplicates."""
    return " ".join(text.split())


def text_key(text: str) -> str:
    """`content_id` of the normalised text."""
    return content_id(normalised(text))


def _refuses(text: str, card: TaskCard) -> bool:
    lowered = text.lower()
    return any(phrase in lowered for phrase in card.refusals)


def _active(row: Row, threshold: float) -> bool:
    return row["activation"] is not None and bool(is_active(np.asarray(row["activation"]), threshold))

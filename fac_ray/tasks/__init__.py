"""Task cards: what a task is called, which texts belong to it, and how a model is asked for one.

In: the name of a built-in card (a YAML file of this folder) or the path of one's own. Out: a checked `TaskCard`,
from which `fac_ray.synthesis.prompts` makes the messages for the generator.
"""

from __future__ import annotations

import string
from pathlib import Path

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from fac_ray.config import ConfigError, Section

PLACEHOLDERS: dict[str, frozenset[str]] = {
    "targeted": frozenset({"spans", "explanation"}),
    "contrast": frozenset({"spans", "explanation", "positive", "negative"}),
    "untargeted": frozenset({"spans"}),
}
"""What each template may hold in braces. `spans` is required in all, `positive` and `negative` in `contrast`."""

REQUIRED = frozenset({"spans", "positive", "negative"})


class TaskCard(Section):
    """One task. The templates are `str.format` strings; see `PLACEHOLDERS`."""

    name: str
    """Short name, as it appears in reports."""
    description: str
    """What belongs to the task, in a sentence or two."""
    label: str = "1"
    """Label that an accepted sample gets; it should be one of `relevance.positive`."""
    harmful: bool = False
    """Whether the texts are harmful by themselves; then a run needs `synthesis.allow_harmful: true`."""
    min_words: int = Field(default=3, ge=1)
    """A shorter candidate is rejected."""
    max_words: int = Field(default=120, ge=1)
    """A longer candidate is rejected."""
    refusals: tuple[str, ...] = ()
    """Lower-case phrases; a candidate that holds one is a refusal and is rejected."""
    system: str | None = None
    """System message in front of every prompt; None: none."""
    targeted: str
    """Step 1: a text that shares what the spans of one feature share."""
    contrast: str
    """Step 2: the same, with the best and the worst candidate of step 1."""
    untargeted: str
    """The control: a text like whole examples of the seed corpus, with no feature in mind."""
    span_separator: str = " | "
    """What stands between two spans."""
    unexplained: str = "what the excerpts have in common"
    """Stands in for {explanation} where a feature has none."""

    @field_validator("refusals")
    @classmethod
    def _lower_case(cls, refusals: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(phrase.lower() for phrase in refusals)

    @field_validator(*PLACEHOLDERS)
    @classmethod
    def _known_braces(cls, template: str, info) -> str:
        allowed = PLACEHOLDERS[info.field_name]
        found = _placeholders(template)
        if unknown := found - allowed:
            raise ValueError(f"unknown placeholders {sorted(unknown)}; allowed: {sorted(allowed)}")
        if absent := (allowed & REQUIRED) - found:
            raise ValueError(f"placeholders {sorted(absent)} are missing")
        return template

    @model_validator(mode="after")
    def _word_bounds(self) -> TaskCard:
        if self.min_words > self.max_words:
            raise ValueError(f"min_words ({self.min_words}) is above max_words ({self.max_words})")
        return self


def load_task(name_or_path: str) -> TaskCard:
    """The task card of a built-in name, or of a YAML file.

    Raises:
        ConfigError: there is no such card or file, or a key of it is unknown, missing or out of bounds.
    """
    path = _card_path(name_or_path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"task {name_or_path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"task {name_or_path}: not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"task {name_or_path}: expected a mapping of keys, got {type(tree).__name__}")
    try:
        return TaskCard.model_validate(tree)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']} (given: {e['input']!r:.80})" for e in error.errors()]
        raise ConfigError(f"task {name_or_path}: " + "; ".join(lines)) from error


def built_in_tasks() -> list[str]:
    """Names of the cards in this folder, sorted."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.yaml"))


def _card_path(name_or_path: str) -> Path:
    if name_or_path in built_in_tasks():
        return Path(__file__).parent / f"{name_or_path}.yaml"
    if name_or_path.endswith((".yaml", ".yml")):
        return Path(name_or_path)
    raise ConfigError(
        f"synthesis.task: no task named {name_or_path!r}; built in: {built_in_tasks()}, or a .yaml file's path"
    )


def _placeholders(template: str) -> set[str]:
    try:
        return {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
    except ValueError as error:
        raise ValueError(f"not a template ({error}); write {{{{ and }}}} for braces that stay") from error

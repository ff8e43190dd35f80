"""Laws of the task cards and of the prompts made from them."""

from __future__ import annotations

import pytest

from fac_ray.config import ConfigError
from fac_ray.synthesis.prompts import contrast_prompt, targeted_prompt, untargeted_prompt
from fac_ray.tasks import TaskCard, built_in_tasks, load_task

CARD = TaskCard(
    name="tiny",
    description="a card of the tests",
    targeted="Like {spans}; it is {explanation}.",
    contrast="Like {spans}; as {positive}; not as {negative}.",
    untargeted="Like {spans}",
)


def test_every_built_in_card_loads_and_makes_the_three_prompts():
    assert built_in_tasks() == ["customer-policy", "general", "toxicity"]
    for name in built_in_tasks():
        card = load_task(name)
        prompts = [
            targeted_prompt(card, ["span one", "span two"]),
            contrast_prompt(card, ["span one", "span two"], "the good", "the bad"),
            untargeted_prompt(card, ["span one", "span two"]),
        ]
        assert card.name == name
        for prompt in prompts:
            assert prompt[-1]["role"] == "user"
            assert f"span one{card.span_separator}span two" in prompt[-1]["content"]
        assert "the good" in prompts[1][-1]["content"]
        assert "the bad" in prompts[1][-1]["content"]


def test_only_the_card_that_asks_for_harmful_text_says_so():
    assert [name for name in built_in_tasks() if load_task(name).harmful] == ["toxicity"]


def test_prompt_is_the_filled_template():
    assert targeted_prompt(CARD, ["a", "b"], "odd") == [{"role": "user", "content": "Like a | b; it is odd."}]
    assert contrast_prompt(CARD, ["a"], "p", "n") == [{"role": "user", "content": "Like a; as p; not as n."}]
    assert untargeted_prompt(CARD, ["x"]) == [{"role": "user", "content": "Like x"}]


def test_a_feature_without_explanation_gets_the_cards_stand_in():
    assert targeted_prompt(CARD, ["a"])[0]["content"] == f"Like a; it is {CARD.unexplained}."


def test_braces_and_line_breaks_in_spans_are_plain_data():
    assert targeted_prompt(CARD, ["{name}\n\n{0}  x"], "y")[0]["content"] == "Like {name} {0} x; it is y."


def test_system_message_comes_first():
    card = CARD.model_copy(update={"system": "Be short.\n"})
    assert untargeted_prompt(card, ["x"])[0] == {"role": "system", "content": "Be short."}


def test_prompt_without_spans_is_refused():
    with pytest.raises(ValueError, match="at least one span"):
        targeted_prompt(CARD, [])


def test_own_card_is_read_from_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\ndescription: d\ntargeted: 'T {spans}'\ncontrast: '{spans} {positive} {negative}'\n"
        "untargeted: 'U {spans}'\nrefusals: [No WAY]\n"
    )
    card = load_task(str(path))
    assert card.label == "1"
    assert card.refusals == ("no way",)
    assert targeted_prompt(card, ["s"])[0]["content"] == "T s"


def test_unknown_task_names_the_built_in_ones():
    with pytest.raises(ConfigError, match=r"no task named 'nope'.*customer-policy.*toxicity"):
        load_task("nope")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("targeted: 'T {span}'", "unknown placeholders"),
        ("targeted: 'no braces'", "are missing"),
        ("targeted: 'open {'", "not a template"),
        ("min_words: 9\nmax_words: 8", "above max_words"),
        ("colour: red", "colour"),
        ("- a list", "YAML"),
    ],
)
def test_a_broken_card_is_refused_with_its_reason(tmp_path, line, message):
    good = {
        "name": "mine",
        "description": "d",
        "targeted": "'T {spans}'",
        "contrast": "'{spans} {positive} {negative}'",
        "untargeted": "'U {spans}'",
    }
    keys = {key: value for key, value in good.items() if not line.startswith(f"{key}:")}
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join(f"{key}: {value}" for key, value in keys.items()) + f"\n{line}\n")
    with pytest.raises(ConfigError, match=message):
        load_task(str(path))


def test_missing_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_task(str(tmp_path / "absent.yaml"))

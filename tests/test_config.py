"""A config is checked whole before anything runs, and its problems are named by key."""

from __future__ import annotations

import pytest

from fac_ray.config import PRESETS, ConfigError, config_from_tree, load_config

MINIMAL = {
    "name": "tiny",
    "model": {"path": "m", "hook_layer": 2},
    "sae": {"path": "s"},
    "corpora": {"anchor": {"path": "a.jsonl"}},
}


def test_defaults_fill_a_minimal_config():
    config = config_from_tree(MINIMAL)
    assert str(config.folder) == "runs/tiny"
    assert config.measure.threshold == 0.0
    assert config.synthesis is not None
    assert config.training is not None


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.hook_layr=3", "model.hook_layr"),
        ("measure.threshold=-1", "measure.threshold"),
        ("model.hook_layer=0", "model.hook_layer"),
        ("corpora.anchor.format=xml", "corpora.anchor.format"),
        ("name='../escape'", "name"),
        ("measure.tokens={skip: -1}", "measure.tokens"),
    ],
)
def test_a_bad_value_is_refused_with_its_key(override, key):
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        config_from_tree(MINIMAL, (override,))


@pytest.mark.parametrize("override", ["threshold", "=3", "name.x=3", "measure.threshold={"])
def test_a_malformed_override_is_refused(override):
    with pytest.raises(ConfigError, match="--set"):
        config_from_tree(MINIMAL, (override,))


def test_overrides_are_yaml_and_do_not_change_the_given_tree():
    config = config_from_tree(MINIMAL, ("measure.thresholds=[0, 1]", "synthesis=null", "run.seed=7"))
    assert config.measure.thresholds == (0.0, 1.0)
    assert config.synthesis is None
    assert config.run.seed == 7
    assert "run" not in MINIMAL


def test_text_and_messages_exclude_each_other():
    with pytest.raises(ConfigError, match="not both"):
        config_from_tree(MINIMAL, ("corpora.anchor.text=t", "corpora.anchor.messages=m"))


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_preset_fills_what_is_left_open_and_nothing_else(preset):
    measure = config_from_tree(MINIMAL, (f"measure.preset={preset}", "measure.activation=dense")).measure.resolved()
    assert measure.activation == "dense"
    assert measure.model_dump()["tokens"] == PRESETS[preset]["tokens"]
    assert measure.max_tokens == PRESETS[preset]["max_tokens"]
    assert measure.double_bos == PRESETS[preset]["double_bos"]
    assert measure.resolved() == measure


def test_the_threshold_is_always_in_the_grid():
    measure = config_from_tree(MINIMAL, ("measure.threshold=0.7", "measure.thresholds=[2, 0]")).measure
    assert measure.grid == (0.0, 0.7, 2.0)


def test_a_file_that_is_no_mapping_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(path)
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected a mapping"):
        load_config(path)
    path.write_text("a: [")
    with pytest.raises(ConfigError, match="not YAML"):
        load_config(path)

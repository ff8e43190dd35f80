"""What an SAE was made for is held against the config, and a mismatch is refused with what to change."""

from __future__ import annotations

import json
import logging

import pytest

from fac_ray.config import ConfigError, MeasureConfig, ModelConfig, SaeConfig
from fac_ray.features.sae_origin import Origin, hook_layer_of, model_names, origin_of, require_fit


def fit(origin, path="google/gemma-2-2b", allow=False, dtype="float32", hook_layer=13, width=32, **measure):
    """The SAE reads `width` numbers, the model has 32."""
    require_fit(
        origin,
        width,
        SaeConfig(path="sae", allow_mismatch=allow),
        ModelConfig(path=str(path), hook_layer=hook_layer, dtype=dtype),
        32,
        MeasureConfig(**measure).resolved(),
    )


@pytest.mark.parametrize(
    ("hook_name", "layer"),
    [
        ("blocks.15.hook_resid_post", 16),
        ("blocks.15.hook_resid_pre", 15),
        ("blocks.15.hook_out", 16),
        ("model.layers.15", 16),
        ("model.layers.15.output", 16),
        ("model.language_model.layers.15", 16),
        ("gpt_neox.layers.15", 16),
        ("transformer.h.0", 1),
        ("TopK7_l16_h4096_epoch3.pth", 16),
        ("my-sae.pth", None),
        ("something else", None),
    ],
)
def test_hook_names_are_counted_as_hook_layers(hook_name, layer):
    assert hook_layer_of(hook_name) == layer


@pytest.mark.parametrize(
    "hook_name",
    [
        "blocks.3.attn.hook_z",
        "blocks.3.hook_mlp_out",
        "blocks.3.hook_resid_mid",
        "blocks.3.ln2.hook_normalized",
        "blocks.0.hook_resid_pre",
        "hook_embed",
        "model.layers.3.mlp",
        "model.layers.3.self_attn.o_proj",
        "transformer.h.3.attn",
    ],
)
def test_an_sae_of_something_else_than_the_residual_stream_is_refused(hook_name):
    with pytest.raises(ConfigError, match="residual stream"):
        fit(Origin(hook_name=hook_name), allow=True)


@pytest.mark.parametrize("allow", [False, True])
def test_another_width_or_block_is_always_refused(allow):
    with pytest.raises(ConfigError, match=r"reads 16 numbers .* has 32"):
        fit(Origin(), width=16, allow=allow)
    with pytest.raises(ConfigError, match=r"hook_layer 12: .* 'blocks.12.hook_resid_post'; set hook_layer 13"):
        fit(Origin(hook_name="blocks.12.hook_resid_post"), hook_layer=12, allow=allow)
    fit(Origin(hook_name="blocks.12.hook_resid_post"), hook_layer=13, allow=allow)


def test_a_hook_whose_name_says_nothing_is_a_warning(caplog):
    fit(Origin(hook_name="resid"))
    assert "the SAE reads 'resid'; whether that is model.hook_layer 13 is not known" in caplog.text


@pytest.mark.parametrize(
    ("trained_on", "path"),
    [
        ("google/gemma-2-2b", "google/gemma-2-2b"),
        ("gemma-2-2b", "google/gemma-2-2b"),
        ("gemma-2-2b", "some-mirror/Gemma-2-2B"),
        ("gpt2-small", "openai-community/gpt2"),
        ("mistral-7b", "mistralai/Mistral-7B-v0.1"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
    ],
)
def test_the_same_model_under_another_name_is_no_mismatch(trained_on, path, caplog):
    fit(Origin(model_name=trained_on), path)
    assert not caplog.records


def test_another_model_is_refused_unless_it_is_meant(caplog):
    origin = Origin(model_name="google/gemma-2-2b")
    with pytest.raises(
        ConfigError, match=r"'google/gemma-2-2b-it': .* trained on 'google/gemma-2-2b'; .* sae\.allow_mismatch: true"
    ):
        fit(origin, "google/gemma-2-2b-it")
    with caplog.at_level(logging.WARNING):
        fit(origin, "google/gemma-2-2b-it", allow=True)
    assert "trained on 'google/gemma-2-2b'" in caplog.text


def a_folder(folder, **config):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_goes_by_its_name_its_place_in_the_hubs_cache_and_what_its_config_says(tmp_path):
    cached = a_folder(tmp_path / "models--google--gemma-2-2b" / "snapshots" / "c0ffee")
    noted = a_folder(tmp_path / "base", _name_or_path="google/gemma-2-2b")
    moved = a_folder(tmp_path / "other", _name_or_path="/home/me/base")
    for folder, expected in [
        (cached, (("c0ffee", "google/gemma-2-2b"), True)),
        (noted, (("base", "google/gemma-2-2b"), True)),
        (moved, (("other",), False)),
    ]:
        assert model_names(ModelConfig(path=str(folder), hook_layer=1)) == expected
    fit(Origin(model_name="gemma-2-2b"), cached)
    fit(Origin(model_name="gemma-2-2b"), noted)
    for folder in (cached, noted):
        with pytest.raises(ConfigError, match="trained on 'gemma-2-9b'"):
            fit(Origin(model_name="gemma-2-9b"), folder)


def test_a_folder_that_says_nothing_is_a_warning_and_one_named_like_another_model_is_refused(tmp_path, caplog):
    origin = Origin(model_name="meta-llama/Llama-3.1-8B-Instruct")
    fit(origin, a_folder(tmp_path / "my-llama"))
    assert "whether the folder" in caplog.text
    caplog.clear()
    fit(origin, a_folder(tmp_path / "Llama-3.1-8B-Instruct"))
    assert not caplog.records
    with pytest.raises(ConfigError, match="take that model or the SAE of this one"):
        fit(origin, a_folder(tmp_path / "Llama-3.1-8B"))


def test_another_number_format_is_refused_unless_it_is_meant():
    origin = origin_of({"model_from_pretrained_kwargs": {"torch_dtype": "torch.bfloat16"}})
    assert origin.model_dtype == "bfloat16"
    with pytest.raises(
        ConfigError,
        match=r"model\.dtype float16: .* set model\.dtype: bfloat16; or, if it is meant, set sae\.allow_mismatch",
    ):
        fit(origin, dtype="float16")
    fit(origin, dtype="float16", allow=True)
    fit(origin, dtype="bfloat16")


@pytest.mark.parametrize("switch", ["window_tokens", "max_tokens"])
def test_longer_texts_than_the_sae_was_trained_on_are_refused_unless_they_are_meant(switch):
    origin = origin_of({"context_size": 128})
    with pytest.raises(ConfigError, match=rf"measure\.{switch} 129: .* give at most 128; or, .* sae\.allow_mismatch"):
        fit(origin, **{switch: 129})
    fit(origin, **{switch: 128})
    fit(origin, **{switch: 129}, allow=True)
    fit(origin)


def test_every_problem_is_in_the_message_at_once():
    origin = Origin(model_name="gpt2", model_dtype="bfloat16", context_tokens=16)
    with pytest.raises(ConfigError, match=r"model\.path .*; model\.dtype .*; measure\.max_tokens .*; or, if"):
        fit(origin, "google/gemma-2-2b", max_tokens=17)


def test_an_sae_that_says_nothing_fits_every_model(caplog):
    fit(origin_of({}))
    assert not caplog.records

"""A token that is many times as long as its neighbours is an attention sink, and no maximum is taken over it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import llama_tokenizer, save_authors_sae, save_llama

from fac_ray.config import ConfigError, MeasureConfig, ModelConfig, SaeConfig, config_from_tree
from fac_ray.features.extractor import FeatureExtractor
from fac_ray.features.sinks import sink_tokens
from fac_ray.schema import MESSAGES

SINK = " moon"
TEXT = "the quick brown fox jumps over the lazy dog"
WITH_SINK = f"{TEXT}{SINK}"


def residuals(*lengths):
    """Tokens of those lengths, each in a direction of its own."""
    return torch.diag(torch.tensor(lengths))


def test_a_token_far_above_the_median_of_its_own_window_is_a_sink():
    """Medians 2 and 300: 21 > 10 x 2 is a sink and 20 is none; 2999 is one in the first window alone."""
    found = sink_tokens(residuals(1.0, 2, 2, 20, 21, 2, 2999, 290, 300, 2999), [0, 7, 10], ratio=10)
    assert found.tolist() == [False, False, False, False, True, False, True, False, False, False]


def test_of_two_tokens_one_can_be_a_sink_and_of_one_token_none():
    assert sink_tokens(residuals(1.0, 11, 5), [0, 2, 3], ratio=10).tolist() == [False, True, False]


def test_some_token_of_each_window_is_kept():
    lengths = torch.rand(200, generator=torch.Generator().manual_seed(0)).mul(30).exp()
    bounds = [0, 1, 3, 10, 50, 200]
    found = sink_tokens(torch.diag(lengths), bounds, ratio=1.5)
    assert found.any()
    for first, stop in pairwise(bounds):
        assert not found[first:stop].all()


@pytest.mark.parametrize("length", [float("inf"), float("nan"), 3e38])
def test_a_length_that_is_not_finite_stays_to_be_seen(length):
    """The square of 3e38 is more than float32 holds."""
    assert sink_tokens(residuals(1.0, 1, 1, 1, length), [0, 5], ratio=10).tolist() == [False] * 5


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A random Llama in which the word `moon` has an embedding 1,000 times as long as the others, and a Top-K SAE."""
    root = tmp_path_factory.mktemp("sinks")
    save_llama(root / "model")
    weights = load_file(root / "model" / "model.safetensors")
    [token_id] = llama_tokenizer()(SINK, add_special_tokens=False).input_ids
    weights["model.embed_tokens.weight"][token_id] *= 1000
    save_file(weights, root / "model" / "model.safetensors", metadata={"format": "pt"})
    return root / "model", save_authors_sae(root / "sae.pth")


def extractor_of(paths, **switches):
    model, sae = paths
    return FeatureExtractor(
        ModelConfig(path=str(model), hook_layer=2), SaeConfig(path=str(sae)), MeasureConfig(**switches), device="cpu"
    )


def dense(features):
    scores = np.zeros(48)
    scores[features.feature_ids] = features.activations
    return scores


def test_a_sink_switches_nothing_on_and_is_counted(paths):
    """The sink comes last, so no other token sees it: without it the text measures as if it had never been there."""
    without, with_sink = extractor_of(paths).extract([(TEXT, None), (WITH_SINK, None)])
    np.testing.assert_allclose(dense(with_sink), dense(without), atol=1e-4)
    assert (without.num_sinks, with_sink.num_sinks) == (0, 1)
    assert with_sink.num_tokens == without.num_tokens
    assert with_sink.peak_end.max() <= len(TEXT)
    [pooled] = extractor_of(paths, sink_norm_ratio=False).extract([(WITH_SINK, None)])
    assert (pooled.num_tokens, pooled.num_sinks) == (with_sink.num_tokens + 1, 0)
    assert pooled.activations.max() > 10 * with_sink.activations.max()


def test_sinks_are_found_whatever_the_batch_the_windows_and_the_order(paths, monkeypatch):
    samples = [(f"the{SINK} {TEXT}", None), (TEXT, None), (f"{WITH_SINK} {TEXT} {TEXT}{SINK} bread", None)]
    extractor = extractor_of(paths)
    alone = [extractor.extract([sample])[0] for sample in samples]
    together = extractor.extract(samples[::-1])[::-1]
    monkeypatch.setattr("fac_ray.features.extractor.STRETCH_NUMBERS", {"cpu": 7 * 48, "cuda": 7 * 48})
    cut = extractor.extract(samples)
    for expected, *others in zip(alone, together, cut, strict=True):
        for found in others:
            np.testing.assert_allclose(dense(found), dense(expected), atol=1e-4, rtol=1e-5)
            assert (found.num_tokens, found.num_sinks) == (expected.num_tokens, expected.num_sinks)
    assert [found.num_sinks for found in alone] == [1, 0, 2]
    [windowed] = extractor_of(paths, window_tokens=48).extract(samples[2:])
    assert (windowed.num_tokens, windowed.num_sinks) == (alone[2].num_tokens, 2)


@pytest.mark.parametrize(("preset", "num_sinks"), [("corrected", 1), ("paper", 0), ("authors-code", 0)])
def test_only_the_corrected_preset_leaves_sinks_out(paths, preset, num_sinks):
    text = f"{TEXT} {TEXT} {WITH_SINK} bread"
    samples = {"sample_id": ["a", "b"], "text": [text, ""], "messages": pa.array([None, None], MESSAGES)}
    rows = extractor_of(paths, preset=preset).extract_table(pa.table(samples))
    assert rows["num_sinks"].to_pylist() == [num_sinks, 0]
    assert rows["error"].to_pylist() == [None, "the text is empty"]


def config_with(ratio):
    tree = {"name": "x", "model": {"path": "m", "hook_layer": 1}, "sae": {"path": "s"}, "corpora": {"a": {"path": "f"}}}
    return config_from_tree(tree, (f"measure.sink_norm_ratio={ratio}",))


@pytest.mark.parametrize("ratio", ["1", "0.5", "-3", "true", ".inf", ".nan"])
def test_a_ratio_that_leaves_no_token_or_says_nothing_is_refused(ratio):
    with pytest.raises(ConfigError, match=r"measure\.sink_norm_ratio"):
        config_with(ratio)


@pytest.mark.parametrize("ratio", ["false", "off", "0"])
def test_the_switch_can_be_off_where_the_preset_has_it_on(ratio):
    measure = config_with(ratio).measure.resolved()
    assert measure.sink_norm_ratio is False
    assert measure.resolved() == measure

"""Feature activations are maxima over the pooled tokens, whatever the batches, windows and stretches."""

from __future__ import annotations

import logging

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from tiny_llama import llama_tokenizer, save_authors_sae, save_llama

from fac_ray.config import ConfigError, MeasureConfig, ModelConfig, SaeConfig
from fac_ray.features import extractor as extractor_module
from fac_ray.features.batching import Limits
from fac_ray.features.chat import TEMPLATE_DATE
from fac_ray.features.extractor import FeatureExtractor
from fac_ray.features.lanes import Lanes
from fac_ray.schema import ACTIVATIONS, MESSAGES

D_MODEL, D_SAE, K, HOOK_LAYER = 32, 48, 4, 2
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "while", "cats", "moon", "bread", "dough"]
CHAT = [
    {"role": "system", "content": "speak of bread"},
    {"role": "user", "content": "how long  should the dough rest?"},
    {"role": "assistant", "content": "until\nthe moon jumps"},
]
CHAT_TEXT = "\n\n".join(message["content"] for message in CHAT)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Folder of a random Llama with a context of 1,024 tokens, and file of a random Top-K SAE."""
    root = tmp_path_factory.mktemp("extractor")
    return save_llama(root / "model", d_model=D_MODEL), save_authors_sae(root / "sae.pth", D_MODEL, D_SAE, K)


def extractor_of(paths, **switches):
    model, sae = paths
    return FeatureExtractor(
        ModelConfig(path=str(model), hook_layer=HOOK_LAYER),
        SaeConfig(path=str(sae)),
        MeasureConfig(**switches),
        device="cpu",
    )


@pytest.fixture(scope="module")
def corrected(paths):
    return extractor_of(paths)


def some_texts(num, seed=0, longest=40):
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(1, longest))) for _ in range(num)]


def straightforward_hidden(paths, token_ids):
    """Hidden state of the whole model for one row of ids."""
    model = transformers.AutoModelForCausalLM.from_pretrained(paths[0]).eval()
    with torch.no_grad():
        return model(torch.tensor([token_ids]), output_hidden_states=True).hidden_states[HOOK_LAYER][0]


def straightforward_scores(paths, hidden, k):
    """Top-k, ReLU, max over tokens, as one would write it down."""
    weight = torch.load(paths[1], weights_only=True)["weight"]
    h = (hidden - weight["b_dec"]) @ weight["W_enc"] + weight["b_enc"]
    kept = torch.zeros_like(h, dtype=torch.bool).scatter(1, h.topk(k).indices, True)
    return torch.where(kept, h, 0).relu().max(dim=0).values.numpy()


def dense(features):
    scores = np.zeros(D_SAE, dtype=np.float32)
    scores[features.feature_ids] = features.activations
    return scores


def assert_equal(found, expected, tolerance=1e-4):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a.num_tokens, a.truncated, a.error) == (b.num_tokens, b.truncated, b.error)
        np.testing.assert_allclose(dense(a), dense(b), atol=tolerance, rtol=tolerance)
        assert a.feature_ids.tolist() == sorted(a.feature_ids.tolist())


@pytest.mark.parametrize("num_words", [3, 30, 400])
def test_the_authors_preset_gives_what_the_authors_code_does(paths, num_words):
    text = " ".join(np.random.default_rng(num_words).choice(WORDS, num_words)) + " " + "moon " * 9
    tokenizer = llama_tokenizer()
    chat = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, date_string=TEMPLATE_DATE)
    token_ids = tokenizer(rendered).input_ids
    assert token_ids[:2] == [tokenizer.bos_token_id] * 2
    hidden = straightforward_hidden(paths, token_ids[:512])[31:]
    [found] = extractor_of(paths, preset="authors-code").extract([(text, None)])
    np.testing.assert_allclose(dense(found), straightforward_scores(paths, hidden, k=D_SAE), atol=1e-4)
    assert (found.num_tokens, found.truncated) == (len(hidden), len(token_ids) > 512)


def test_the_default_is_top_k_over_the_content_tokens(paths, corrected):
    tokenizer = llama_tokenizer()
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False, date_string=TEMPLATE_DATE)
    encoding = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    places = [(rendered.index(m["content"]), rendered.index(m["content"]) + len(m["content"])) for m in CHAT]
    pooled = [any(s < stop and e > start for start, stop in places) for s, e in encoding.offset_mapping]
    hidden = straightforward_hidden(paths, encoding.input_ids)[torch.tensor(pooled)]
    [found] = corrected.extract([(CHAT_TEXT, CHAT)])
    np.testing.assert_allclose(dense(found), straightforward_scores(paths, hidden, K), atol=1e-4)
    assert found.num_tokens == sum(pooled)


def test_a_peak_is_where_its_token_is_in_the_text(corrected):
    """What comes after a feature's peak token changes nothing, and without the peak token the activation is lower."""
    text = some_texts(1, seed=5, longest=30)[0]
    [whole] = corrected.extract([(text, None)])
    with_peak = corrected.extract([(text[:end], None) for end in whole.peak_end])
    without = corrected.extract([(text[:start], None) for start in whole.peak_start])
    for at, feature in enumerate(whole.feature_ids):
        assert whole.peak_start[at] < whole.peak_end[at]
        assert dense(with_peak[at])[feature] == pytest.approx(whole.activations[at], rel=1e-4)
        assert dense(without[at])[feature] < whole.activations[at]


def test_batches_and_order_do_not_show_in_the_result(paths, corrected):
    samples = [(text, None) for text in some_texts(40)] + [(CHAT_TEXT, CHAT)]
    alone = [corrected.extract([sample])[0] for sample in samples]
    assert_equal(corrected.extract(samples), alone)
    assert_equal(corrected.extract(samples[::-1])[::-1], alone)
    assert_equal(extractor_of(paths, batch_tokens=64).extract(samples), alone)


@pytest.mark.parametrize("switches", [{}, {"preset": "authors-code"}, {"window_tokens": 64}, {"tokens": "all"}])
def test_the_header_does_not_show_in_the_result(paths, switches):
    """Few samples with another header than the last one have theirs run with them."""
    spoken = [{"role": "system", "content": "be brief"}, *CHAT[1:]]
    spoken_text = "\n\n".join(message["content"] for message in spoken)
    samples = [(text, None) for text in some_texts(30, longest=90)] + [(CHAT_TEXT, CHAT)] * 3
    extractor, plain = extractor_of(paths, **switches), extractor_of(paths, **switches)
    plain.backbone.can_keep = False
    lengths = []
    extractor.backbone.model.register_forward_pre_hook(
        lambda _module, _args, given: lengths.append(given["input_ids"].shape), with_kwargs=True
    )
    for part in (samples, [(spoken_text, spoken)] * 9, samples[:2]):
        expected = plain.extract(part)
        lengths.clear()
        assert_equal(extractor.extract(part), expected)
        runs_a_header = lengths[0][0] == 1
        assert runs_a_header == (switches != {"tokens": "all"} and len(part) > 2)


def test_lanes_do_not_show_in_the_result(paths, corrected, monkeypatch, set_torch_threads):
    samples = [(text, None) for text in some_texts(60)]
    expected = [corrected.extract([sample])[0] for sample in samples]
    used, map_lanes = [], Lanes.map
    monkeypatch.setattr(Lanes, "map", lambda *args: used.append(args[-1]) or map_lanes(*args))
    set_torch_threads(3)
    extractor = extractor_of(paths, batch_tokens=64)
    set_torch_threads(1)  # of another part of the program: the extractor has its own
    assert_equal(extractor.extract(samples), expected)
    assert used == [3]


def test_all_lanes_together_have_the_budget_of_one_batch(corrected):
    assert corrected._limits() == Limits(num_tokens=4096, padding_tokens=32)
    assert corrected._limits(num_lanes=4) == Limits(num_tokens=1024, padding_tokens=32)


@pytest.mark.parametrize("activation", ["native", "dense"])
def test_stretches_of_the_sae_do_not_show_in_the_result(paths, monkeypatch, activation):
    extractor = extractor_of(paths, activation=activation)
    samples = [(text, None) for text in some_texts(12)]
    at_once = extractor.extract(samples)
    monkeypatch.setitem(extractor_module.STRETCH_NUMBERS, "cpu", 7 * D_SAE)
    assert_equal(extractor.extract(samples), at_once, tolerance=1e-5)  # a product of fewer rows may round otherwise


def test_a_text_shorter_than_a_window_does_not_depend_on_windows(paths, corrected):
    samples = [(text, None) for text in some_texts(10)]
    assert_equal(extractor_of(paths, window_tokens=512).extract(samples), corrected.extract(samples))


def test_windows_pool_the_tokens_that_the_whole_text_has(paths, corrected):
    text = " ".join(some_texts(8, longest=80))
    [whole], [windowed] = (
        corrected.extract([(text, None)]),
        extractor_of(paths, window_tokens=64).extract([(text, None)]),
    )
    assert windowed.num_tokens == whole.num_tokens
    assert not windowed.truncated
    assert windowed.peak_end.max() > len(text) * 3 // 4


def test_a_sample_that_cannot_be_measured_is_an_error_among_others(corrected):
    good = ("the moon", None)
    samples = [good, ("", None), (" ", None), ("x", [{"role": "wizard", "content": "x"}]), good]
    first, empty, blank, wizard, last = corrected.extract(samples)
    assert_equal([first, last], corrected.extract([good, good]))
    assert empty.error == blank.error == "the text is empty"
    assert "unknown role" in wizard.error
    assert wizard.num_tokens == len(wizard.feature_ids) == len(wizard.peak_end) == 0


def test_numbers_that_are_not_finite_are_an_error_of_their_sample_alone(corrected, monkeypatch):
    samples = [("the moon", None), ("bread dough", None)]
    expected = corrected.extract(samples)
    residual = corrected.backbone.residual
    marked = corrected.backbone.tokenizer(" dough", add_special_tokens=False).input_ids[0]

    def overflowing(token_ids, num_shared):
        is_marked = (token_ids == marked)[:, num_shared:, None]
        return residual(token_ids, num_shared).masked_fill(is_marked, float("inf"))

    monkeypatch.setattr(corrected.backbone, "residual", overflowing)
    whole, broken = corrected.extract(samples)
    assert_equal([whole], expected[:1])
    assert "not finite" in broken.error


def test_out_of_memory_halves_the_batch_and_says_so(paths, monkeypatch, caplog):
    extractor = extractor_of(paths)
    samples = [(text, None) for text in some_texts(20)]
    expected, sizes = extractor.extract(samples), []
    residual = extractor.backbone.residual

    def small_memory(token_ids, num_shared):
        sizes.append(token_ids.numel())
        if token_ids.numel() > 400:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return residual(token_ids, num_shared)

    monkeypatch.setattr(extractor.backbone, "residual", small_memory)
    with caplog.at_level(logging.WARNING):
        assert_equal(extractor.extract(samples), expected)
    assert max(sizes) > 400
    assert "out of memory" in caplog.text
    sizes.clear()
    extractor.extract(samples)
    assert max(sizes) <= 400


def test_a_window_that_never_fits_ends_the_run(paths, monkeypatch):
    extractor = extractor_of(paths)

    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(extractor.backbone, "residual", no_memory)
    with pytest.raises(RuntimeError, match=r"single window .* measure\.window_tokens"):
        extractor.extract([("the moon", None)])


def test_a_table_of_samples_becomes_a_table_of_activations(corrected):
    samples = pa.table(
        {
            "sample_id": ["a", "b", "c", "d"],
            "text": ["the moon", CHAT_TEXT, "", None],
            "messages": pa.array([None, CHAT, None, None], MESSAGES),
        }
    )
    found = corrected.extract_table(samples)
    moon, chat = corrected.extract([("the moon", None), (CHAT_TEXT, CHAT)])
    assert found.schema == ACTIVATIONS
    assert found["sample_id"].to_pylist() == ["a", "b", "c", "d"]
    assert found["feature_ids"].to_pylist() == [moon.feature_ids.tolist(), chat.feature_ids.tolist(), [], []]
    assert found["peak_end"].to_pylist()[1] == chat.peak_end.tolist()
    assert found["error"].to_pylist() == [None, None, "the text is empty", "the text is empty"]
    assert corrected.extract_table(samples.slice(0, 0)).num_rows == 0


def test_parts_that_do_not_fit_together_are_refused(paths, tmp_path):
    narrow = save_authors_sae(tmp_path / "narrow.pth", d_model=16)
    with pytest.raises(ConfigError, match=r"reads 16 numbers .* has 32"):
        extractor_of((paths[0], narrow))
    with pytest.raises(ConfigError, match=r"measure\.max_tokens 2000: the model's context is 1024"):
        extractor_of(paths, max_tokens=2000)

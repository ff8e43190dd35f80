"""Laws of SAE training, on a random model of a few thousand weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fac_ray.backbone import load_backbone
from fac_ray.config import MeasureConfig, ModelConfig, SaeConfig
from fac_ray.extractor import FeatureExtractor
from fac_ray.sae import load_sae
from fac_ray.sae_training import HELD_BACK, SaeRecipe, content_residual, train_sae

WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "bird", "runs", "sleeps", "sings"]
TEXTS = [f"{WORDS[i % 3]} {WORDS[3 + i % 5]} {WORDS[6 + i % 4]} {WORDS[i % 12]}" for i in range(200)]
RECIPE = SaeRecipe(d_sae=24, k=3, num_tokens=40_000, batch_tokens=100, learning_rate=3e-3, buffer_tokens=400)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a random two-block Llama that knows whole words and has a chat template."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<s>", "[u]", "<unk>", *WORDS])}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        unk_token="<unk>",
        additional_special_tokens=["[u]"],
        chat_template="{{ bos_token }}{% for m in messages %}[u]{{ m['content'] }}{% endfor %}",
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=15, max_position_embeddings=32, **sizes)).save_pretrained(folder)
    return ModelConfig(path=str(folder), hook_layer=1)


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sae")
    facts = train_sae(load_backbone(model, "cpu"), TEXTS, folder, RECIPE)
    return SimpleNamespace(folder=folder, facts=facts)


def test_saved_sae_loads_and_fits_the_model(model, trained):
    extractor = FeatureExtractor(model, SaeConfig(path=str(trained.folder)), MeasureConfig(), "cpu")
    assert extractor.d_sae == 24
    found = extractor.extract([(TEXTS[0], None)])[0]
    assert found.error is None
    assert found.num_tokens == 4
    assert 1 <= len(found.feature_ids) <= 4 * RECIPE.k


def test_facts_are_those_of_the_saved_sae_on_texts_that_were_held_back(model, trained):
    sae = load_sae(SaeConfig(path=str(trained.folder)), "cpu")
    x = torch.cat(list(content_residual(load_backbone(model, "cpu"), TEXTS[::HELD_BACK])))
    active = sae.encode(x, "native") > 0
    assert trained.facts["num_eval_tokens"] == len(x) == 4 * len(TEXTS[::HELD_BACK])
    assert trained.facts["l0"] == pytest.approx(float(active.sum(dim=1).float().mean()), abs=1e-3)
    assert trained.facts["l0"] <= RECIPE.k
    assert trained.facts["dead_fraction"] == pytest.approx(float((~active.any(dim=0)).float().mean()), abs=1e-4)


def test_training_explains_most_of_a_stream_of_few_words(trained):
    assert trained.facts["variance_explained"] > 0.8


def test_content_residual_is_that_of_the_content_tokens_alone(model):
    backbone = load_backbone(model, "cpu")
    alone = backbone.residual(torch.tensor([[0, 1, 3, 6]]))[0, 2:]  # <s> [u] red one
    found = torch.cat(list(content_residual(backbone, ["red one", "blue two three"])))
    assert found.shape == (5, 16)
    torch.testing.assert_close(found[:2], alone, atol=1e-5, rtol=1e-5)


def test_a_chat_is_read_with_all_its_contents(model):
    chat = [{"role": "user", "content": "red one"}, {"role": "assistant", "content": "blue"}]
    found = torch.cat(list(content_residual(load_backbone(model, "cpu"), [chat])))
    assert len(found) == 3


def test_same_recipe_gives_the_same_weights(model, trained, tmp_path):
    train_sae(load_backbone(model, "cpu"), TEXTS, tmp_path, RECIPE)
    first, again = (load_sae(SaeConfig(path=str(folder)), "cpu") for folder in (trained.folder, tmp_path))
    torch.testing.assert_close(first.W_enc, again.W_enc, atol=1e-5, rtol=1e-4)


def test_too_few_texts_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match="too few"):
        train_sae(load_backbone(model, "cpu"), TEXTS[:5], tmp_path, RECIPE)

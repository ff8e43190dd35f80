"""Every shipped config, from its model's layout to its SAE's format, on small random models and SAEs of the same kind.

The models have the layout, the number of blocks and the chat template's kind of the real ones, and small widths; the
SAE lies where and how the config says, and what comes from a hub is random numbers of the true shape. What the
extractor makes of a text is held against a few straightforward lines on the whole model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from test_configs import CONFIGS
from tiny_llama import llama_tokenizer, save_authors_sae
from tokenizers import processors

from fac_ray.config import ModelConfig, SaeConfig, load_config
from fac_ray.features.chat import TEMPLATE_DATE
from fac_ray.features.extractor import FeatureExtractor
from fac_ray.features.sae_origin import hook_layer_of, origin_of

CHAT = [
    {"role": "user", "content": "how long should the dough rest?"},
    {"role": "assistant", "content": "until the moon jumps over it"},
]
TEXT = "the quick brown fox jumps over the lazy dog"

# Alternating turns between [INST] and [/INST], nothing written for the assistant, and no system message.
INSTRUCTIONS = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{ ' [INST] ' + message['content'] + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}
    {%- else %}{{ raise_exception('only user and assistant') }}{% endif %}
{%- endfor %}"""

# No BOS, and a system message of the template's own where the chat has none.
OWN_SYSTEM = """\
{%- if messages[0]['role'] != 'system' %}{{ '<|s|>system\\nYou are helpful.<|e|>\\n' }}{% endif %}
{%- for message in messages %}{{ '<|s|>' + message['role'] + '\\n' + message['content'] + '<|e|>\\n' }}{% endfor %}"""


class Kind(NamedTuple):
    """A model like the one that a config names."""

    config: type
    num_blocks: int
    chat_template: str | None
    sizes: dict[str, Any]
    has_bos: bool = True


KINDS = {
    "meta-llama/Llama-3.1-8B-Instruct": Kind(transformers.LlamaConfig, 32, llama_tokenizer().chat_template, {}),
    "mistralai/Mistral-7B-Instruct-v0.2": Kind(transformers.MistralConfig, 32, INSTRUCTIONS, {"sliding_window": None}),
    "Qwen/Qwen2-7B-Instruct": Kind(transformers.Qwen2Config, 28, OWN_SYSTEM, {}, has_bos=False),
    "google/gemma-2-2b": Kind(
        transformers.Gemma2Config,
        26,
        None,
        {"hidden_size": 2304, "head_dim": 8, "max_position_embeddings": 8192, "sliding_window": 8},
    ),
    "../shared/models/stories260K": Kind(transformers.LlamaConfig, 5, None, {}),
}


def save_model(folder: Path, kind: Kind) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"num_hidden_layers": kind.num_blocks, "vocab_size": 384, "initializer_range": 0.1, **kind.sizes}
    settings = kind.config(**sizes, bos_token_id=0, eos_token_id=1, pad_token_id=0)
    transformers.AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
    tokenizer = llama_tokenizer(kind.chat_template)
    if not kind.has_bos:
        tokenizer.bos_token = None
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.save_pretrained(folder)
    return folder


def save_topk_folder(folder: Path, model_name: str, hook_layer: int) -> Path:
    """A SAELens folder such as jobs/train_sae.py writes."""
    import sae_lens

    sae = sae_lens.TopKSAE(sae_lens.TopKSAEConfig(d_in=32, d_sae=48, k=4))
    sae.cfg.metadata["model_name"], sae.cfg.metadata["hook_name"] = (
        model_name,
        f"blocks.{hook_layer - 1}.hook_resid_post",
    )
    sae.save_model(folder)
    return folder


def serve_gemma_scope(monkeypatch, folder: Path, repo_id: str, subfolder: str) -> None:
    """The hub's download of one SAE of Gemma Scope, with random numbers of its shapes (2,304 by 16,384)."""
    generator = torch.Generator().manual_seed(3)
    arrays = {
        "w_enc": torch.randn(2304, 16384, generator=generator) / 48,
        "w_dec": torch.zeros(16384, 2304),
        "b_enc": torch.randn(16384, generator=generator),
        "b_dec": torch.randn(2304, generator=generator),
        "threshold": 2 * torch.rand(16384, generator=generator),
    }
    file = folder / "params.npz"
    np.savez(file, **{name: array.numpy() for name, array in arrays.items()})

    def download(**asked: Any) -> str:
        named = {"repo_id": repo_id, "subfolder": subfolder, "filename": "params.npz", "force_download": False}
        assert asked == named
        return str(file)

    monkeypatch.setattr("sae_lens.loading.pretrained_sae_loaders.hf_hub_download", download)


def place_sae(sae: SaeConfig, model: ModelConfig, tmp_path: Path, monkeypatch) -> str:
    """Put an SAE of the config's format where its path, seen from `tmp_path`, says; returns the path."""
    if ":" in sae.path:
        from sae_lens.loading.pretrained_saes_directory import get_repo_id_and_folder_name

        serve_gemma_scope(monkeypatch, tmp_path, *get_repo_id_and_folder_name(*sae.path.split(":")))
        return sae.path
    place = tmp_path / sae.path
    place.parent.mkdir(parents=True)
    if place.suffix == ".pth":
        return str(save_authors_sae(place))
    return str(save_topk_folder(place, Path(model.path).name, model.hook_layer))


def straightforward(extractor: FeatureExtractor, folder: Path, hook_layer: int, sample) -> tuple[torch.Tensor, int]:
    """(max over content tokens of each feature, number of those tokens), from the whole model's hidden states."""
    text, messages = sample
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    contents = [text] if messages is None else [message["content"] for message in messages]
    rendered = text
    if tokenizer.chat_template:
        chat = messages or [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(chat, tokenize=False, date_string=TEMPLATE_DATE)
    encoding = tokenizer(
        rendered, add_special_tokens=not tokenizer.chat_template, return_offsets_mapping=True, return_tensors="pt"
    )
    places = [(rendered.index(content), rendered.index(content) + len(content)) for content in contents]
    offsets = encoding.offset_mapping[0].tolist()
    pooled = [any(s < stop and e > start for start, stop in places) for s, e in offsets]
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        hidden = model(encoding.input_ids, output_hidden_states=True).hidden_states[hook_layer][0]
    sae = extractor.sae
    h = (hidden[torch.tensor(pooled)] - sae.b_in) @ sae.W_enc + sae.b_enc
    kept = h > sae.threshold if sae.k is None else torch.zeros_like(h).scatter(1, h.topk(sae.k).indices, 1) > 0
    return torch.where(kept, h, 0).relu().max(dim=0).values, sum(pooled)


def test_there_is_a_small_model_like_that_of_every_config():
    assert {load_config(path).model.path for path in CONFIGS} == set(KINDS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_measures_what_the_whole_model_says(path, tmp_path, monkeypatch):
    config = load_config(path)
    kind = KINDS[config.model.path]
    folder = save_model(tmp_path / config.model.path.rpartition("/")[2], kind)
    sae = SaeConfig(path=place_sae(config.sae, config.model, tmp_path, monkeypatch))
    model = config.model.model_copy(update={"path": str(folder)})
    samples: list[tuple[str, Any]] = [(TEXT, None)]
    if kind.chat_template:
        samples.append(("\n\n".join(message["content"] for message in CHAT), CHAT))

    exact = FeatureExtractor(model.model_copy(update={"dtype": "float32"}), sae, config.measure, "cpu")
    for sample, found in zip(samples, exact.extract(samples), strict=True):
        expected, num_tokens = straightforward(exact, folder, model.hook_layer, sample)
        scores = np.zeros(exact.d_sae, dtype=np.float32)
        scores[found.feature_ids] = found.activations
        assert (found.error, found.num_tokens) == (None, num_tokens)
        assert 0 < len(found.feature_ids) < exact.d_sae
        np.testing.assert_allclose(scores, expected.numpy(), atol=2e-3, rtol=2e-3)

    as_shipped = FeatureExtractor(model, sae, config.measure, "cpu")
    assert next(as_shipped.backbone.parameters()).dtype == getattr(torch, config.model.dtype)
    assert [found.error for found in as_shipped.extract(samples)] == [None] * len(samples)
    if ":" in config.sae.path:
        assert as_shipped.window_tokens == 1024  # what Gemma Scope was trained on, not the model's 8,192


def test_the_hub_id_of_the_gemma_config_is_in_saelens_list_and_reads_the_hook_of_the_config():
    from sae_lens.loading.pretrained_sae_loaders import get_gemma_2_config_from_hf
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    config = next(load_config(path) for path in CONFIGS if path.stem == "gaps-gemma2-2b")
    release, _, sae_id = config.sae.path.partition(":")
    listed = get_pretrained_saes_directory()[release]
    assert listed.conversion_func == "gemma_2"
    settings = get_gemma_2_config_from_hf(listed.repo_id, listed.saes_map[sae_id], "cpu")
    origin = origin_of(settings)
    assert hook_layer_of(str(origin.hook_name)) == config.model.hook_layer
    assert origin.model_name == listed.model == Path(config.model.path).name
    assert (settings["d_in"], settings["d_sae"]) == (2304, 16384)

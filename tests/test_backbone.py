"""The cut model gives the whole model's hidden states, whatever the architecture, and refuses what it cannot serve."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_llama import llama_tokenizer, save_llama

from fac_ray.config import ConfigError, ModelConfig
from fac_ray.features.backbone import load_backbone

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "vocab_size": 384,
    "initializer_range": 0.3,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
SLIDING = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}
GEMMA = GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
LAYOUTS = {
    "Llama": GROUPED,
    "Mistral": GROUPED | {"sliding_window": 8},
    "Qwen2": GROUPED | SLIDING,
    "Qwen3": GROUPED | SLIDING | {"head_dim": 8},
    "Gemma2": GEMMA | {"layer_types": MIXED},
    "Gemma3Text": GEMMA | {"layer_types": MIXED},
    "Gemma3": {
        "text_config": GEMMA | {"layer_types": MIXED},
        "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "image_size": 28}
        | {"num_attention_heads": 2, "patch_size": 14},
        "mm_tokens_per_image": 4,
    },
    "GPTNeoX": SIZES,
    "GPT2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "vocab_size": 384, "initializer_range": 0.3},
}
"""Three small random blocks each; where a layout has sliding windows, they are shorter than the texts of the tests."""

TOKEN_IDS = torch.arange(5, 65).reshape(2, 30) * 7 % 384


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved random model of each layout."""
    root = tmp_path_factory.mktemp("models")
    for name, sizes in LAYOUTS.items():
        torch.manual_seed(0)
        settings = getattr(transformers, f"{name}Config")(**sizes, bos_token_id=0, eos_token_id=1, pad_token_id=0)
        kind = transformers.AutoModelForImageTextToText if name == "Gemma3" else transformers.AutoModelForCausalLM
        model = kind.from_config(settings)
        for weight in model.parameters():  # norms of gain 1 and biases of 0 would hide a norm or a bias left out
            weight.data += 0.2 * torch.randn(weight.shape)
        model.save_pretrained(root / name)
        llama_tokenizer().save_pretrained(root / name)
    return root


@pytest.mark.parametrize("hook_layer", [1, 2, 3])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_residual_stream_is_the_whole_models_hidden_state(folders, name, hook_layer):
    """The last of Hugging Face's hidden states is normed; the residual stream before the norm is what an SAE reads."""
    whole = transformers.AutoModel.from_pretrained(folders / name).eval()
    with torch.inference_mode():
        expected = whole(TOKEN_IDS, output_hidden_states=True).hidden_states[hook_layer]
    backbone = load_backbone(ModelConfig(path=str(folders / name), hook_layer=hook_layer), "cpu")
    assert (backbone.d_model, backbone.context_tokens) == (32, 128)
    found = backbone.residual(TOKEN_IDS)
    if hook_layer == 3:
        norms = {key.rpartition(".")[2]: module for key, module in whole.get_decoder().named_children()}
        final = next(norms[key] for key in ("norm", "final_layer_norm", "ln_f") if key in norms)
        assert not torch.allclose(found, expected, atol=1e-2)
        with torch.inference_mode():
            found = final(found)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name, sizes in LAYOUTS.items() if "sliding_window" in str(sizes)])
def test_a_sliding_window_shorter_than_the_text_is_seen(folders, name, tmp_path):
    """With the window as long as the context, the late tokens of the same weights come out otherwise."""
    shutil.copytree(folders / name, tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings.get("text_config", settings)["sliding_window"] = 128
    (tmp_path / "config.json").write_text(json.dumps(settings))
    short, long = (
        load_backbone(ModelConfig(path=str(path), hook_layer=3), "cpu").residual(TOKEN_IDS)
        for path in (folders / name, tmp_path)
    )
    torch.testing.assert_close(short[:, :8], long[:, :8], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(short[:, 20:], long[:, 20:], atol=1e-2)


def test_no_block_after_the_hook_is_loaded(folders, capfd):
    backbone = load_backbone(ModelConfig(path=str(folders / "Llama"), hook_layer=1), "cpu")
    names = [name for name, _ in backbone.named_parameters()]
    assert any("layers.0" in name for name in names)
    assert not [name for name in names if "layers.1" in name or "lm_head" in name]
    assert "UNEXPECTED" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("name", LAYOUTS)
def test_padding_on_the_right_changes_nothing_before_it(folders, name):
    backbone = load_backbone(ModelConfig(path=str(folders / name), hook_layer=3), "cpu")
    padded = torch.cat([TOKEN_IDS[:, :20], torch.zeros(2, 10, dtype=torch.long)], dim=1)
    alone = backbone.residual(TOKEN_IDS[:, :20])
    torch.testing.assert_close(backbone.residual(padded)[:, :20], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_shared", [1, 5, 20])
@pytest.mark.parametrize("name", LAYOUTS)
def test_shared_first_tokens_do_not_show_in_the_others(folders, name, num_shared):
    """Also where a sliding window ends within the shared tokens, or begins after them."""
    backbone = load_backbone(ModelConfig(path=str(folders / name), hook_layer=3), "cpu")
    assert backbone.can_keep
    expected = []
    for start in (100, 200, 200):
        token_ids = TOKEN_IDS.clone()
        token_ids[:, :num_shared] = torch.arange(start, start + num_shared)
        expected.append((token_ids, backbone.residual(token_ids)[:, num_shared:]))
    for token_ids, residual in expected:
        found = backbone.residual(token_ids, num_shared)
        torch.testing.assert_close(found, residual, atol=1e-4, rtol=1e-4)


def test_shared_tokens_that_the_last_call_had_are_not_run_again(folders):
    backbone = load_backbone(ModelConfig(path=str(folders / "Llama"), hook_layer=2), "cpu")
    lengths = []
    backbone.model.register_forward_pre_hook(
        lambda _module, _args, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    for first in (1, 1, 2):
        token_ids = torch.full((2, 12), first)
        assert backbone.residual(token_ids, num_shared=5).shape == (2, 7, 32)
        assert backbone.keeps(token_ids[0, :5].numpy())
    assert lengths == [5, 7, 7, 5, 7]


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_length_let_nothing_be_shared(folders, tmp_path, rope_type):
    shutil.copytree(folders / "Llama", tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["rope_parameters"] = {
        "rope_type": rope_type,
        "rope_theta": 1e4,
        "factor": 2.0,
        "original_max_position_embeddings": 64,
        **({"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if rope_type == "longrope" else {}),
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert not load_backbone(ModelConfig(path=str(tmp_path), hook_layer=2), "cpu").can_keep


def test_half_precision_comes_out_as_float32(folders):
    backbone = load_backbone(ModelConfig(path=str(folders / "Llama"), hook_layer=2, dtype="bfloat16"), "cpu")
    assert next(backbone.parameters()).dtype == torch.bfloat16
    assert backbone.residual(torch.arange(8)[None]).dtype == torch.float32


@pytest.mark.parametrize(("dtype", "reason"), [("float16", "set model.dtype bfloat16"), ("bfloat16", None)])
def test_a_model_that_overflows_in_float16_is_refused_with_what_to_set(tmp_path, dtype, reason):
    """Two factors of 6e4 make numbers above 65,504, the largest of float16; bfloat16 reaches as far as float32."""
    save_llama(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"] *= 6e4
    weights["model.layers.0.mlp.up_proj.weight"] *= 1e4
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = ModelConfig(path=str(tmp_path), hook_layer=2, dtype=dtype)
    if reason is None:
        assert load_backbone(model, "cpu").residual(torch.arange(8)[None]).isfinite().all()
    else:
        with pytest.raises(ConfigError, match=rf"model\.dtype {dtype}: .* overflows .* {reason}"):
            load_backbone(model, "cpu")


def test_a_model_whose_weights_are_broken_is_refused(tmp_path):
    save_llama(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="its weights give numbers that are not finite"):
        load_backbone(ModelConfig(path=str(tmp_path), hook_layer=2), "cpu")


def test_a_hook_beyond_the_last_block_is_refused(folders):
    with pytest.raises(ConfigError, match=r"hook_layer 4: .* 3 blocks; give 1 to 3"):
        load_backbone(ModelConfig(path=str(folders / "Llama"), hook_layer=4), "cpu")


def test_a_model_that_looks_ahead_is_refused(tmp_path):
    transformers.BertModel(transformers.BertConfig(**SIZES)).save_pretrained(tmp_path)
    llama_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="causal"):
        load_backbone(ModelConfig(path=str(tmp_path), hook_layer=2), "cpu")


def test_missing_weights_are_refused_and_never_made_up(tmp_path):
    save_llama(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 weights are missing, such as layers\.0\.mlp\.up_proj\.weight"):
        load_backbone(ModelConfig(path=str(tmp_path), hook_layer=2), "cpu")


@pytest.mark.parametrize("path", ["/no/such/folder", "./no-such-folder", "no-such-org/no-such-model"])
def test_a_path_to_nothing_is_refused(path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"model\.path"):
        load_backbone(ModelConfig(path=path, hook_layer=1), "cpu")

"""The cut model gives the whole model's hidden states, whatever the architecture, and refuses what it cannot serve."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_llama import llama_tokenizer, save_llama

from fac_ray.backbone import load_backbone
from fac_ray.config import ConfigError, ModelConfig

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "vocab_size": 384,
    "initializer_range": 0.3,
}
ARCHITECTURES = {
    "Llama": SIZES | {"num_key_value_heads": 2},
    "Qwen2": SIZES
    | {"num_key_value_heads": 2, "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
    "Gemma2": SIZES | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
    "GPTNeoX": SIZES,
    "GPT2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "vocab_size": 384, "initializer_range": 0.3},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved random model of each architecture."""
    root = tmp_path_factory.mktemp("models")
    for name, sizes in ARCHITECTURES.items():
        torch.manual_seed(0)
        settings = getattr(transformers, f"{name}Config")(**sizes, bos_token_id=0, eos_token_id=1, pad_token_id=0)
        transformers.AutoModelForCausalLM.from_config(settings).save_pretrained(root / name)
        llama_tokenizer().save_pretrained(root / name)
    return root


@pytest.mark.parametrize("hook_layer", [1, 2, 3])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_residual_stream_is_the_whole_models_hidden_state(folders, name, hook_layer):
    token_ids = torch.arange(5, 45).reshape(2, 20) * 7 % 384
    whole = transformers.AutoModel.from_pretrained(folders / name).eval()
    seen = []
    blocks = next(m for m in whole.modules() if isinstance(m, torch.nn.ModuleList))
    blocks[-1].register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.inference_mode():
        states = whole(token_ids, output_hidden_states=True).hidden_states
    expected = states[hook_layer] if hook_layer < 3 else seen[0]  # the last state is already normed
    backbone = load_backbone(ModelConfig(path=str(folders / name), hook_layer=hook_layer), "cpu")
    assert (backbone.d_model, backbone.context_tokens) == (32, 128)
    torch.testing.assert_close(backbone.residual(token_ids), expected, atol=1e-4, rtol=1e-4)


def test_no_block_after_the_hook_is_loaded(folders, capfd):
    backbone = load_backbone(ModelConfig(path=str(folders / "Llama"), hook_layer=1), "cpu")
    names = [name for name, _ in backbone.named_parameters()]
    assert any("layers.0" in name for name in names)
    assert not [name for name in names if "layers.1" in name or "lm_head" in name]
    assert "UNEXPECTED" not in "".join(capfd.readouterr())


def test_padding_on_the_right_changes_nothing_before_it(folders):
    backbone = load_backbone(ModelConfig(path=str(folders / "Llama"), hook_layer=2), "cpu")
    short, padded = torch.arange(9, 17)[None], torch.tensor([[*range(9, 17), 0, 0, 0, 0]])
    torch.testing.assert_close(backbone.residual(padded)[:, :8], backbone.residual(short), atol=1e-5, rtol=1e-5)


def test_half_precision_comes_out_as_float32(folders):
    backbone = load_backbone(ModelConfig(path=str(folders / "Llama"), hook_layer=2, dtype="bfloat16"), "cpu")
    assert next(backbone.parameters()).dtype == torch.bfloat16
    assert backbone.residual(torch.arange(8)[None]).dtype == torch.float32


def test_a_hook_beyond_the_last_block_is_refused(folders):
    with pytest.raises(ConfigError, match=r"hook_layer 4: .* 3 blocks; give 1 to 3"):
        load_backbone(ModelConfig(path=str(folders / "Llama"), hook_layer=4), "cpu")


def test_a_model_that_looks_ahead_is_refused(tmp_path):
    transformers.BertModel(transformers.BertConfig(**SIZES)).save_pretrained(tmp_path)
    llama_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="causal"):
        load_backbone(ModelConfig(path=str(tmp_path), hook_layer=2), "cpu")


def test_missing_weights_are_refused_and_never_made_up(tmp_path):
    from safetensors.torch import load_file, save_file

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

"""Encoders give the numbers worked out by hand, and those of SAELens for what SAELens has saved."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_llama import save_authors_sae

from fac_ray.config import ConfigError, ModelConfig, SaeConfig
from fac_ray.sae import SaeLensAutoencoder, SparseAutoencoder, hook_layer_of, load_sae, require_fit, sae_width

# x - b_dec = (3, 1) - (1, 0) = (2, 1)
# h = (2*1 + 1*0 + 0,  2*0 + 1*2 - 1,  2*-1 + 1*1 + 0.5) = (2, 1, -0.5)
X = torch.tensor([[3.0, 1.0]])
BY_HAND = {
    "W_enc": torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 1.0]]),
    "b_enc": torch.tensor([0.0, -1.0, 0.5]),
    "b_dec": torch.tensor([1.0, 0.0]),
    "mask": torch.ones(3),
}


def load(path):
    return load_sae(SaeConfig(path=str(path)), "cpu")


@pytest.mark.parametrize(("k", "native"), [(1, [2.0, 0.0, 0.0]), (2, [2.0, 1.0, 0.0]), (3, [2.0, 1.0, 0.0])])
def test_an_authors_file_encodes_as_worked_out_by_hand(tmp_path, k, native):
    sae = load(save_authors_sae(tmp_path / "sae.pth", k=k, **BY_HAND))
    assert sae.encode(X, "native").tolist() == [native]
    assert sae.encode(X, "dense").tolist() == [[2.0, 1.0, 0.0]]
    values, feature_ids = sae.top_k(X)
    assert torch.zeros(1, 3).scatter(1, feature_ids, values).tolist() == [native]


def test_a_masked_feature_of_an_authors_file_is_never_active(tmp_path):
    sae = load(save_authors_sae(tmp_path / "sae.pth", k=3, **BY_HAND | {"mask": torch.tensor([0.0, 1.0, 1.0])}))
    assert sae.encode(X, "native").tolist() == sae.encode(X, "dense").tolist() == [[0.0, 1.0, 0.0]]


def test_jumprelu_keeps_what_is_strictly_above_its_threshold():
    sae = SparseAutoencoder(
        BY_HAND["W_enc"], BY_HAND["b_enc"], BY_HAND["b_dec"], threshold=torch.tensor([1.5, 1.0, 0.0])
    )
    assert sae.encode(X, "native").tolist() == [[2.0, 0.0, 0.0]]
    assert sae.encode(X, "dense").tolist() == [[2.0, 1.0, 0.0]]


def saelens_folder(folder, architecture, **settings):
    """A random SAE, saved by SAELens."""
    sae_lens = pytest.importorskip("sae_lens")
    kind = {
        "standard": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig),
        "topk": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig),
        "jumprelu": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig),
        "gated": (sae_lens.GatedSAE, sae_lens.GatedSAEConfig),
    }[architecture]
    metadata = settings.pop("metadata", {})
    sae = kind[0](kind[1](d_in=16, d_sae=40, **settings))
    for name, value in metadata.items():
        sae.cfg.metadata[name] = value
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sae.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = values.abs() if name == "threshold" else values
    sae.save_model(folder)
    return folder


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("standard", {}),
        ("standard", {"normalize_activations": "layer_norm"}),
        ("topk", {"k": 5, "apply_b_dec_to_input": False}),
        ("topk", {"k": 5, "rescale_acts_by_decoder_norm": True, "normalize_activations": "constant_norm_rescale"}),
        ("jumprelu", {"apply_b_dec_to_input": True}),
        ("gated", {}),
    ],
)
def test_native_activations_are_those_of_saelens(tmp_path, architecture, settings):
    from sae_lens import SAE

    sae = load(saelens_folder(tmp_path, architecture, **settings))
    theirs = SAE.load_from_disk(tmp_path, device="cpu")
    x = 3 * torch.randn(50, 16, generator=torch.Generator().manual_seed(2))
    assert isinstance(sae, SaeLensAutoencoder if architecture == "gated" else SparseAutoencoder)
    assert (sae.d_model, sae.d_sae) == (16, 40)
    assert sae_width(SaeConfig(path=str(tmp_path))) == 40
    expected = theirs.encode(x).relu()
    assert (expected > 0).any()
    torch.testing.assert_close(sae.encode(x, "native"), expected, atol=1e-5, rtol=1e-5)


def test_a_folder_without_the_version_of_today_is_read_by_saelens_itself(tmp_path):
    new = load(saelens_folder(tmp_path, "standard"))
    x = torch.randn(5, 16)
    expected = new.encode(x, "native")
    old = {"d_in": 16, "d_sae": 40, "dtype": "float32", "hook_name": "blocks.1.hook_resid_post"}
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    sae = load(tmp_path)
    torch.testing.assert_close(sae.encode(x, "native"), expected)
    assert sae.hook_name == "blocks.1.hook_resid_post"


def test_dense_activations_of_another_architecture_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="not defined for a gated SAE"):
        load(saelens_folder(tmp_path, "gated")).encode(torch.zeros(1, 16), "dense")


def test_an_sae_whose_input_scale_is_lost_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected_average_only_in"):
        load(saelens_folder(tmp_path, "topk", k=3, normalize_activations="expected_average_only_in"))


@pytest.mark.parametrize(
    ("hook_name", "layer"),
    [
        ("blocks.15.hook_resid_post", 16),
        ("blocks.15.hook_resid_pre", 15),
        ("model.layers.15", 16),
        ("transformer.h.0", 1),
        ("something else", None),
    ],
)
def test_hook_names_are_counted_as_hook_layers(hook_name, layer):
    assert hook_layer_of(hook_name) == layer


@pytest.mark.parametrize("hook_name", ["blocks.3.attn.hook_z", "blocks.3.hook_mlp_out", "model.layers.3.mlp"])
def test_an_sae_of_something_else_than_the_residual_stream_is_refused(hook_name):
    with pytest.raises(ConfigError, match="residual stream"):
        hook_layer_of(hook_name)


def test_an_sae_that_contradicts_the_model_is_refused_with_both_numbers(tmp_path):
    saelens_folder(tmp_path, "standard", metadata={"hook_name": "blocks.1.hook_resid_post", "model_name": "m"})
    sae = load(tmp_path)
    with pytest.raises(ConfigError, match=r"reads 16 numbers .* has 64"):
        require_fit(sae, ModelConfig(path="m", hook_layer=2), d_model=64)
    with pytest.raises(ConfigError, match=r"hook_layer 3: .* hook_layer 2"):
        require_fit(sae, ModelConfig(path="m", hook_layer=3), d_model=16)
    require_fit(sae, ModelConfig(path="m", hook_layer=2), d_model=16)


@pytest.mark.parametrize("content", [b"", b"not an SAE", b"PK\x03\x04 not a zip either"])
def test_what_is_not_an_sae_file_is_refused(tmp_path, content):
    (tmp_path / "sae.pth").write_bytes(content)
    with pytest.raises(ConfigError, match="not an SAE file"):
        load(tmp_path / "sae.pth")


def test_a_file_with_shapes_that_disagree_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="do not agree"):
        load(save_authors_sae(tmp_path / "sae.pth", b_enc=torch.zeros(7)))


def test_an_sae_file_may_hold_tensors_only(tmp_path):
    torch.save({"weight": print, "config": {}}, tmp_path / "sae.pth")
    with pytest.raises(ConfigError, match="not an SAE file"):
        load(tmp_path / "sae.pth")


def test_a_path_to_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such folder or file"):
        load(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"cfg\.json"):
        load(tmp_path / "empty")

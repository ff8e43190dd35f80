"""Encoders give the numbers worked out by hand, and those of SAELens for what SAELens has saved."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch
from tiny_llama import save_authors_sae

from fac_ray.config import ConfigError, SaeConfig
from fac_ray.features.sae import SaeLensAutoencoder, SparseAutoencoder, load_sae, sae_width

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


CLASSES = {
    "standard": "Standard",
    "topk": "TopK",
    "jumprelu": "JumpReLU",
    "gated": "Gated",
    "abstopk": "AbsTopK",
    "matching_pursuit": "MatchingPursuit",
    "batchtopk": "BatchTopK",
    "matryoshka_batchtopk": "MatryoshkaBatchTopK",
}


def saelens_sae(architecture, training=False, metadata=None, **settings):
    """An SAE object of SAELens with random weights, thresholds above 0 and decoder rows of different norms."""
    import sae_lens

    name = CLASSES[architecture] + ("TrainingSAE" if training else "SAE")
    settings = {"d_in": 16, "d_sae": 40} | settings
    sae = getattr(sae_lens, name)(getattr(sae_lens, f"{name}Config")(**settings))
    for key, value in (metadata or {}).items():
        sae.cfg.metadata[key] = value
    generator = torch.Generator().manual_seed(1)
    for key, parameter in sae.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if "threshold" in key:
            values = values.abs() if key == "threshold" else values / 4
        parameter.data = (values / 4 if architecture == "matching_pursuit" else values).to(parameter.dtype)
    if hasattr(sae, "topk_threshold"):
        sae.topk_threshold.fill_(2.5)
    return sae


def some_input(seed=2):
    return 3 * torch.randn(50, 16, generator=torch.Generator().manual_seed(seed))


def assert_encodes_as(folder, theirs):
    """`native` is what the SAELens object puts out, negative activations set to 0, on some tokens."""
    sae, x = load(folder), some_input()
    expected = theirs.encode(x).relu()
    assert (expected > 0).any()
    assert (expected == 0).any()
    assert (sae.d_model, sae.d_sae) == (16, 40)
    assert sae_width(SaeConfig(path=str(folder))) == 40
    torch.testing.assert_close(sae.encode(x, "native"), expected, atol=1e-5, rtol=1e-5)
    return sae


def reread(folder):
    from sae_lens import SAE

    return SAE.load_from_disk(folder, device="cpu", dtype="float32")


ARCHITECTURES = {
    "standard": {},
    "topk": {"k": 5},
    "jumprelu": {},
    "gated": {},
    "abstopk": {"k": 5},
    "matching_pursuit": {"max_iterations": 4},
}
"""Every inference architecture of SAELens that encodes a residual stream token by token."""


def test_every_architecture_of_saelens_is_either_read_or_refused_by_name():
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

    from fac_ray.features.sae_formats import MATRIX_ARCHITECTURES, NOT_ENCODERS, SAELENS_ARCHITECTURES

    assert set(ARCHITECTURES) == {*MATRIX_ARCHITECTURES, *SAELENS_ARCHITECTURES}
    assert {*ARCHITECTURES, *NOT_ENCODERS} == {*SAE_CLASS_REGISTRY, *SAE_TRAINING_CLASS_REGISTRY}


@pytest.mark.parametrize(
    ("normalisation", "apply_b_dec_to_input", "dtype"),
    [
        *product(["none", "layer_norm", "constant_norm_rescale"], [True, False], ["float32"]),
        ("none", True, "bfloat16"),
        ("layer_norm", False, "float16"),
    ],
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_native_activations_are_those_of_saelens(tmp_path, architecture, normalisation, apply_b_dec_to_input, dtype):
    saelens_sae(
        architecture,
        normalize_activations=normalisation,
        apply_b_dec_to_input=apply_b_dec_to_input,
        dtype=dtype,
        **ARCHITECTURES[architecture],
    ).save_model(tmp_path)
    sae = assert_encodes_as(tmp_path, reread(tmp_path))
    one_product = architecture in ("standard", "topk", "jumprelu")
    assert isinstance(sae, SparseAutoencoder if one_product else SaeLensAutoencoder)


@pytest.mark.parametrize("normalisation", ["none", "constant_norm_rescale"])
def test_top_k_can_rank_by_the_norm_of_the_decoders_rows(tmp_path, normalisation):
    theirs = saelens_sae("topk", k=5, rescale_acts_by_decoder_norm=True, normalize_activations=normalisation)
    theirs.save_model(tmp_path)
    sae = assert_encodes_as(tmp_path, theirs)
    values, feature_ids = sae.top_k(some_input())
    torch.testing.assert_close(
        torch.zeros(50, 40).scatter(1, feature_ids, values), theirs.encode(some_input()), atol=1e-5, rtol=1e-5
    )


TRAINED = {
    "standard": {},
    "topk": {"k": 5},
    "jumprelu": {},
    "gated": {},
    "abstopk": {"k": 5},
    "matching_pursuit": {"max_iterations": 4, "decoder_init_norm": 1.0},
    "batchtopk": {"k": 5},
    "matryoshka_batchtopk": {"k": 5, "matryoshka_widths": [10, 40]},
}


@pytest.mark.parametrize("architecture", TRAINED)
def test_what_a_training_saves_for_inference_is_read(tmp_path, architecture):
    saelens_sae(architecture, training=True, **TRAINED[architecture]).save_inference_model(tmp_path)
    sae = assert_encodes_as(tmp_path, reread(tmp_path))
    if "batchtopk" in architecture:  # saved as JumpReLU, with one threshold for all features
        assert sae.threshold.unique().tolist() == [2.5]


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_a_training_checkpoint_that_saelens_cannot_run_is_refused_with_what_to_do(tmp_path, architecture):
    saelens_sae(architecture, training=True, **TRAINED[architecture]).save_model(tmp_path)
    with pytest.raises(ConfigError, match="checkpoint of a training; save it with save_inference_model"):
        load(tmp_path)


def checkpoint(folder, architecture, scaler, **settings):
    """A training's checkpoint, whose inputs are scaled by what lies beside it; returns the folded SAE of SAELens."""
    saelens_sae(architecture, **settings).save_model(folder)
    scaler.save(str(folder / "activation_scaler.json"))
    theirs = reread(folder)
    if scaler.scaling_factor is not None:
        theirs.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    if scaler.whitening is not None:
        whitening = scaler.whitening
        theirs.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)
    return theirs


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_scale_beside_a_checkpoint_is_honoured(tmp_path, architecture, apply_b_dec_to_input):
    from sae_lens.training.activation_scaler import ActivationScaler

    theirs = checkpoint(
        tmp_path,
        architecture,
        ActivationScaler(scaling_factor=0.4),
        normalize_activations="expected_average_only_in",
        apply_b_dec_to_input=apply_b_dec_to_input,
        **ARCHITECTURES[architecture],
    )
    assert_encodes_as(tmp_path, theirs)
    unscaled = saelens_sae(architecture, apply_b_dec_to_input=apply_b_dec_to_input, **ARCHITECTURES[architecture])
    if architecture != "matching_pursuit":  # its activations are in the units of its input
        scaled = load(tmp_path).encode(some_input(), "native")
        torch.testing.assert_close(scaled, unscaled.encode(0.4 * some_input()).relu(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rescale", [True, False])
def test_the_whitening_beside_a_checkpoint_is_honoured(tmp_path, rescale):
    from sae_lens.training.activation_scaler import ActivationScaler

    scaler = ActivationScaler()
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(16, 16, generator=generator)
    scaler.estimate_whitening(16, iter([torch.randn(400, 16, generator=generator) @ mixing + 1] * 4), 4)
    settings = {"k": 5, "rescale_acts_by_decoder_norm": rescale, "normalize_activations": "covariance_whitening"}
    theirs = checkpoint(tmp_path, "topk", scaler, **settings)
    assert_encodes_as(tmp_path, theirs)
    whitened = (some_input().double() - scaler.whitening.mean) @ scaler.whitening.matrix
    expected = saelens_sae("topk", **settings).encode(whitened.float())
    torch.testing.assert_close(load(tmp_path).encode(some_input(), "native"), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("normalisation", ["expected_average_only_in", "covariance_whitening"])
def test_an_sae_whose_input_scale_is_lost_is_refused(tmp_path, normalisation):
    saelens_sae("topk", k=3, normalize_activations=normalisation).save_model(tmp_path)
    with pytest.raises(ConfigError, match=f"{normalisation}.* activation_scaler.json"):
        load(tmp_path)


def test_an_activation_scaler_that_cannot_be_read_is_refused(tmp_path):
    saelens_sae("topk", k=3, normalize_activations="expected_average_only_in").save_model(tmp_path)
    (tmp_path / "activation_scaler.json").write_text("{")
    with pytest.raises(ConfigError, match=r"activation_scaler\.json cannot be used"):
        load(tmp_path)


@pytest.mark.parametrize("architecture", ["standard", "gated"])
def test_a_model_with_centred_writing_weights_is_made_up_for(tmp_path, architecture):
    """Such a model's residual stream is the ordinary one less its mean over the d_model numbers of each token."""
    theirs = saelens_sae(architecture, metadata={"model_from_pretrained_kwargs": {"center_writing_weights": True}})
    theirs.save_model(tmp_path)
    x = some_input() + 2
    expected = theirs.encode(x - x.mean(dim=-1, keepdim=True))
    assert not torch.allclose(expected, theirs.encode(x), atol=1e-2)
    torch.testing.assert_close(load(tmp_path).encode(x, "native"), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("k", [None, 5])
def test_a_folder_of_an_older_saelens_is_read_by_saelens_itself(tmp_path, k):
    saelens_sae("standard").save_model(tmp_path)
    kind = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": k}} if k else {}
    old = {"d_in": 16, "d_sae": 40, "dtype": "float32", "hook_name": "blocks.1.hook_resid_post", "context_size": 99}
    (tmp_path / "cfg.json").write_text(json.dumps(old | kind))
    sae = assert_encodes_as(tmp_path, reread(tmp_path))
    assert sae.k == k
    assert (sae.origin.hook_name, sae.origin.context_tokens) == ("blocks.1.hook_resid_post", 99)


@pytest.mark.parametrize("architecture", ["gated", "abstopk"])
def test_dense_activations_of_another_architecture_are_refused(tmp_path, architecture):
    saelens_sae(architecture).save_model(tmp_path)
    with pytest.raises(ConfigError, match=f"not defined for a {architecture} SAE"):
        load(tmp_path).encode(torch.zeros(1, 16), "dense")


def with_settings(folder, changes):
    """A standard SAE's folder whose cfg.json says something else than SAELens wrote."""
    saelens_sae("standard").save_model(folder)
    settings = json.loads((folder / "cfg.json").read_text()) | changes
    (folder / "cfg.json").write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    return folder


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architecture": "temporal"}, "reads a whole text at once"),
        ({"architecture": "jumprelu_transcoder"}, "reads the input of an MLP"),
        ({"architecture": "crystal"}, r"'crystal' cannot be used, it is not known here; usable are standard, topk"),
        ({"reshape_activations": "hook_z"}, "attention heads"),
        ({"metadata": {"sae_lens_version": "6.0.0", "hook_head_index": 3}}, "attention heads"),
        ({"architecture": "jumprelu"}, "lack threshold"),
        ({"d_sae": None}, "no d_sae"),
        ({"architecture": "gated"}, "SAELens cannot read it"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_with_the_reason(tmp_path, changes, reason):
    with pytest.raises(ConfigError, match=reason):
        load(with_settings(tmp_path, changes))


def test_weights_that_are_not_finite_are_refused(tmp_path):
    """1e5 is more than float16 can hold, and becomes infinite when such an SAE is saved."""
    sae = saelens_sae("standard", dtype="float16")
    sae.W_enc.data[0, 0] = torch.tensor(1e5).half()
    sae.save_model(tmp_path)
    with pytest.raises(ConfigError, match=r"W_enc .* not finite; save the SAE in float32"):
        load(tmp_path)


def test_a_hub_id_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="cannot be had from the hub: Release no-such-release not found"):
        load("no-such-release:no-such-sae")


def test_a_hub_id_without_a_network_is_refused_with_what_to_do(monkeypatch, tmp_path):
    """As the hub's client behaves when it is told to stay offline and has nothing in its cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"HF_HUB_OFFLINE.*without a network, take a folder"):
        load("gemma-scope-2b-pt-res-canonical:layer_12/width_16k/canonical")


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

"""The sparse autoencoder's encoder: residual stream in, feature activations out.

    h = (normalise(x) - b_dec) @ W_enc + b_enc
    native: relu | Top-K, then relu | JumpReLU, as the SAE was trained          dense: relu(h)

SAELens folders and the authors' `.pth` are read here. Architectures whose encoder is not this equation are run by
SAELens itself, which is imported only then.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fac_ray.config import ConfigError, ModelConfig, SaeConfig
from fac_ray.topk import TopKProduct, top_k

logger = logging.getLogger(__name__)

Activation = Literal["native", "dense"]
Normalisation = Literal["none", "layer_norm", "constant_norm_rescale"]

ARCHITECTURES = ("standard", "topk", "jumprelu")
"""SAELens architectures whose encoder is the equation above."""

NORMALISATIONS = ("none", "layer_norm", "constant_norm_rescale")
"""What can be done to the input of the encoder at run time."""


class SparseAutoencoder(nn.Module):
    """An encoder in float32. `k` set: Top-K; `threshold` set: JumpReLU; neither: ReLU."""

    W_enc: Tensor
    b_enc: Tensor
    b_in: Tensor
    threshold: Tensor | None

    def __init__(
        self,
        W_enc: Float[Tensor, "d_model d_sae"],
        b_enc: Float[Tensor, " d_sae"],
        b_in: Float[Tensor, " d_model"],
        k: int | None = None,
        threshold: Float[Tensor, " d_sae"] | None = None,
        normalisation: Normalisation = "none",
    ) -> None:
        """`b_in` is subtracted from the input before `W_enc`: b_dec, or zeros if the SAE was trained without."""
        super().__init__()
        self.d_model, self.d_sae = W_enc.shape
        self.k, self.normalisation = k, normalisation
        self.hook_name: str | None = None
        self.model_name: str | None = None
        self._product: TopKProduct | None = None
        for name, value in {"W_enc": W_enc, "b_enc": b_enc, "b_in": b_in, "threshold": threshold}.items():
            self.register_buffer(name, None if value is None else value.detach().float().contiguous())

    @torch.inference_mode()
    def encode(self, x: Float[Tensor, "N d_model"], activation: Activation) -> Float[Tensor, "N d_sae"]:
        """Feature activations, all >= 0: what the SAE outputs (`native`) or ReLU of all pre-activations (`dense`)."""
        h = self._pre_activations(x)
        if activation == "native" and self.k is not None:
            values, feature_ids = top_k(h, self.k)
            return torch.zeros_like(h).scatter_(-1, feature_ids, values.relu_())
        if activation == "native" and self.threshold is not None:
            h = h * (h > self.threshold)
        return h.relu_()

    @torch.inference_mode()
    def top_k(self, x: Float[Tensor, "N d_model"]) -> tuple[Float[Tensor, "N k"], Int[Tensor, "N k"]]:
        """(activations, feature ids) of the k largest pre-activations, ReLU applied: `encode` native without its zeros.

        Only where `k` is set.
        """
        assert self.k is not None
        if self._product is None and TopKProduct.pays(self.W_enc, self.k):
            self._product = TopKProduct(self.W_enc, self.b_enc, self.k)
            self.W_enc = self._product.by_feature.t()  # the same numbers, so that they lie in memory once
        found = self._product(self._input(x)) if self._product else top_k(self._pre_activations(x), self.k)
        return found[0].relu_(), found[1]

    def _pre_activations(self, x: Tensor) -> Tensor:
        return torch.addmm(self.b_enc, self._input(x), self.W_enc)

    def _input(self, x: Tensor) -> Tensor:
        x = x.float()
        if self.normalisation == "layer_norm":
            x = x - x.mean(dim=-1, keepdim=True)
            x = x / (x.std(dim=-1, keepdim=True) + 1e-5)
        elif self.normalisation == "constant_norm_rescale":
            x = x * (self.d_model**0.5 / x.norm(dim=-1, keepdim=True))
        return x - self.b_in


class SaeLensAutoencoder(nn.Module):
    """An SAE of another architecture, encoded by SAELens; it has no dense activations."""

    k = None

    def __init__(self, sae: Any) -> None:
        super().__init__()
        self.sae = sae
        self.d_model, self.d_sae = int(sae.cfg.d_in), int(sae.cfg.d_sae)
        self.hook_name: str | None = None
        self.model_name: str | None = None

    @torch.inference_mode()
    def encode(self, x: Float[Tensor, "N d_model"], activation: Activation) -> Float[Tensor, "N d_sae"]:
        """What the SAE outputs, negative activations set to 0.

        Raises:
            ConfigError: `activation` is `dense`.
        """
        if activation == "dense":
            raise ConfigError(
                f"measure.activation 'dense' is not defined for a {self.sae.cfg.architecture()} SAE; use 'native'"
            )
        return self.sae.encode(x.float()).relu()


def load_sae(sae: SaeConfig, device: str | torch.device | None = None) -> SparseAutoencoder | SaeLensAutoencoder:
    """The SAE of the config on `device` (None: a GPU if there is one).

    Raises:
        ConfigError: nothing readable is at `sae.path`, or the SAE there does not read a plain residual stream.
    """
    path = Path(sae.path).expanduser()
    if path.is_dir():
        loaded = _load_folder(path)
    elif path.is_file():
        loaded = _load_authors(path)
    else:
        loaded = _load_hub(sae.path)
    return loaded.requires_grad_(False).eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def sae_width(sae: SaeConfig) -> int:
    """Number of features d_sae, without loading the weights where they lie on disk.

    Raises:
        ConfigError: as `load_sae`.
    """
    path = Path(sae.path).expanduser()
    if path.is_dir():
        return int(_read_settings(path)["d_sae"])
    if path.is_file():
        return int(_read_authors(path)[0]["W_enc"].shape[1])
    return load_sae(sae, "cpu").d_sae


def require_fit(sae: SparseAutoencoder | SaeLensAutoencoder, model: ModelConfig, d_model: int) -> None:
    """Check that the SAE reads the residual stream that the model config names.

    Raises:
        ConfigError: the widths differ, or the SAE says that it was trained at another hook.
    """
    if sae.d_model != d_model:
        raise ConfigError(
            f"sae.path: the SAE reads {sae.d_model} numbers per token, but the residual stream of {model.path} has "
            f"{d_model}; take the SAE of this model"
        )
    trained_at = hook_layer_of(sae.hook_name) if sae.hook_name else None
    if trained_at is not None and trained_at != model.hook_layer:
        raise ConfigError(
            f"model.hook_layer {model.hook_layer}: the SAE was trained at {sae.hook_name!r}, which is hook_layer "
            f"{trained_at}"
        )
    names = [Path(name).name.lower() for name in (sae.model_name or "", model.path)]
    if all(names) and names[0] != names[1]:
        logger.warning("the SAE says that it was trained on %s; it is used on %s", sae.model_name, model.path)


def hook_layer_of(hook_name: str) -> int | None:
    """`hook_layer` in our counting of a hook named by TransformerLens or Hugging Face; None if the name says nothing.

    Raises:
        ConfigError: the name is that of something else than a residual stream between blocks.
    """
    if match := re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", hook_name):
        return int(match[1]) + (match[2] == "post")
    if match := re.fullmatch(r"(?:\w+\.)*(?:layers|h|blocks)\.(\d+)", hook_name):
        return int(match[1]) + 1
    if re.search(r"hook_z|hook_mlp|hook_attn|attn_out|mlp_out|resid_mid|self_attn|\.mlp", hook_name):
        raise ConfigError(f"sae.path: the SAE reads {hook_name!r}; only SAEs of the residual stream can be used")
    return None


# ---- SAELens ----


def _load_folder(path: Path) -> SparseAutoencoder | SaeLensAutoencoder:
    settings = _read_settings(path)
    version = str((settings.get("metadata") or {}).get("sae_lens_version") or "")
    if settings.get("architecture") in ARCHITECTURES and version and int(version.split(".")[0]) >= 6:
        return _from_saelens(settings, _read_weights(path), str(path))
    from sae_lens import SAE

    return _wrap(SAE.load_from_disk(path, device="cpu", dtype="float32"), str(path))


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path / "sae_weights.safetensors")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"sae.path {str(path)!r}: its sae_weights.safetensors cannot be read: {error}") from error


def _load_hub(path: str) -> SparseAutoencoder | SaeLensAutoencoder:
    release, colon, sae_id = path.partition(":")
    if not colon or path.startswith((".", "/", "~")):
        raise ConfigError(f"sae.path {path!r}: no such folder or file (an SAE on the hub is `release:sae_id`)")
    from sae_lens import SAE

    try:
        loaded = SAE.from_pretrained(release, sae_id, device="cpu")
    except (OSError, ValueError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"sae.path {path!r}: cannot be had from the hub: {first_line}") from error
    return _wrap(loaded, path)


def _wrap(loaded: Any, source: str) -> SparseAutoencoder | SaeLensAutoencoder:
    settings = loaded.cfg.to_dict()
    if settings["architecture"] in ARCHITECTURES:
        return _from_saelens(settings, loaded.state_dict(), source)
    _require_residual(settings, source)
    wrapped = SaeLensAutoencoder(loaded)
    return _named(wrapped, settings)


def _from_saelens(settings: Mapping[str, Any], weights: Mapping[str, Tensor], source: str) -> SparseAutoencoder:
    _require_residual(settings, source)
    W_enc, b_enc, b_dec = (weights[name].float() for name in ("W_enc", "b_enc", "b_dec"))
    if settings.get("rescale_acts_by_decoder_norm"):
        norms = weights["W_dec"].float().norm(dim=-1)
        W_enc, b_enc = W_enc * norms, b_enc * norms
    architecture = settings["architecture"]
    loaded = SparseAutoencoder(
        W_enc,
        b_enc,
        b_dec if settings.get("apply_b_dec_to_input", True) else torch.zeros_like(b_dec),
        k=int(settings["k"]) if architecture == "topk" else None,
        threshold=weights["threshold"] if architecture == "jumprelu" else None,
        normalisation=settings.get("normalize_activations", "none"),
    )
    return _named(loaded, settings)


def _require_residual(settings: Mapping[str, Any], source: str) -> None:
    if settings.get("reshape_activations", "none") != "none":
        raise ConfigError(f"sae.path {source!r}: the SAE reads attention heads, not the residual stream")
    if (normalisation := settings.get("normalize_activations", "none")) not in NORMALISATIONS:
        raise ConfigError(
            f"sae.path {source!r}: the SAE expects inputs scaled by {normalisation!r}, and the scale is not in its "
            "folder; fold it into the weights and save the SAE again"
        )


def _named(loaded: Any, settings: Mapping[str, Any]) -> Any:
    metadata = settings.get("metadata") or {}
    loaded.hook_name, loaded.model_name = metadata.get("hook_name"), metadata.get("model_name")
    return loaded


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / "cfg.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"sae.path {str(path)!r}: not a SAELens folder, its cfg.json cannot be read") from error


# ---- the authors' file ----


def _load_authors(path: Path) -> SparseAutoencoder:
    weight, k = _read_authors(path)
    W_enc, b_enc = weight["W_enc"], weight["b_enc"]
    if "mask" in weight and not weight["mask"].all():
        W_enc, b_enc = W_enc.float() * weight["mask"], b_enc.float() * weight["mask"]
    return SparseAutoencoder(W_enc, b_enc, weight["b_dec"], k=k)


def _read_authors(path: Path) -> tuple[dict[str, Tensor], int]:
    """(weights, k); tensors only, and mapped rather than read where the file allows it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        weight, k = state["weight"], int(state["config"]["topK"])
        shapes = {name: tuple(weight[name].shape) for name in ("W_enc", "b_enc", "b_dec")}
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, LookupError, TypeError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"sae.path {str(path)!r}: not an SAE file of the authors: {reason}") from error
    if shapes["W_enc"] != (*shapes["b_dec"], *shapes["b_enc"]) or not 1 <= k <= shapes["W_enc"][-1]:
        raise ConfigError(f"sae.path {str(path)!r}: its shapes {shapes} and topK {k} do not agree")
    return weight, k

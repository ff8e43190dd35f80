"""SAEs as they lie on disk or on the hub: SAELens folders of every kind, and the authors' `.pth`; out comes an encoder.

Architectures whose encoder is one matrix product (`MATRIX_ARCHITECTURES`) become an `Encoder`; those of
`SAELENS_ARCHITECTURES` stay SAELens objects, and SAELens is imported only for them, for the hub and for old folders.
"""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fac_ray.config import ConfigError
from fac_ray.features.sae_origin import Origin, origin_of

Normalisation = Literal["none", "layer_norm", "constant_norm_rescale"]

MATRIX_ARCHITECTURES = ("standard", "topk", "jumprelu")
"""Batch Top-K and Matryoshka SAEs are saved as jumprelu."""

SAELENS_ARCHITECTURES = ("gated", "abstopk", "matching_pursuit")

NOT_ENCODERS = {
    "temporal": "it reads a whole text at once and predicts each token from those before it",
    "transcoder": "it reads the input of an MLP, not the residual stream",
    "skip_transcoder": "it reads the input of an MLP, not the residual stream",
    "jumprelu_transcoder": "it reads the input of an MLP, not the residual stream",
    "jumprelu_skip_transcoder": "it reads the input of an MLP, not the residual stream",
    "batchtopk": "it is a checkpoint of a training; save it with save_inference_model",
    "matryoshka_batchtopk": "it is a checkpoint of a training; save it with save_inference_model",
}
"""Architectures of SAELens that cannot be used, and why."""

RUN_TIME_NORMALISATIONS = ("none", "layer_norm", "constant_norm_rescale")
"""What is computed from each token; other normalisations are constants, and are folded into the weights."""

UNREADABLE = (OSError, RuntimeError, SafetensorError, LookupError, TypeError, ValueError)
"""What SAELens and its parts raise at files that are not what they should be."""


class Encoder(NamedTuple):
    """The parts of `activation((normalise(x) - b_in) @ W_enc + b_enc)`, in any float format."""

    W_enc: Float[Tensor, "d_model d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    b_in: Float[Tensor, " d_model"]
    k: int | None = None
    threshold: Float[Tensor, " d_sae"] | None = None
    normalisation: Normalisation = "none"


def read_sae(path: str) -> tuple[Encoder | Any, Origin]:
    """The encoder at `path` (an `Encoder`, or an SAE object of SAELens) and what it was made for.

    Raises:
        ConfigError: nothing readable is there, or it does not encode a residual stream token by token.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        return _read_folder(place)
    return _read_authors(place) if place.is_file() else _read_hub(path)


def read_width(path: str) -> int:
    """Number of features d_sae, without reading the weights where they lie on disk.

    Raises:
        ConfigError: as `read_sae`.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        return int(_read_settings(place)["d_sae"])
    if place.is_file():
        return int(_read_tensors(place)[0]["W_enc"].shape[1])
    encoder, _ = _read_hub(path)
    return int(encoder.W_enc.shape[1] if isinstance(encoder, Encoder) else encoder.cfg.d_sae)


# ---- SAELens ----


def _read_folder(path: Path) -> tuple[Encoder | Any, Origin]:
    settings = _read_settings(path)
    _require_encoder(settings, str(path))
    major = str((settings.get("metadata") or {}).get("sae_lens_version") or "0").split(".")[0]
    as_written = settings.get("normalize_activations", "none") in RUN_TIME_NORMALISATIONS
    if int(major) >= 6 and as_written and settings["architecture"] in MATRIX_ARCHITECTURES:
        try:
            return _from_saelens(settings, load_file(path / "sae_weights.safetensors"), str(path))
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"sae.path {str(path)!r}: its sae_weights.safetensors cannot be read: {error}") from error
    from sae_lens import SAE

    try:
        sae = SAE.load_from_disk(path, device="cpu", dtype="float32")
    except UNREADABLE as error:
        raise ConfigError(f"sae.path {str(path)!r}: SAELens cannot read it: {_first_line(error)}") from error
    if sae.cfg.normalize_activations not in RUN_TIME_NORMALISATIONS:
        _fold_scale(sae, path)
    return _taken_over(sae, str(path))


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads((path / "cfg.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"sae.path {str(path)!r}: not a SAELens folder, its cfg.json cannot be read") from error
    if not isinstance(settings, dict) or "d_sae" not in settings:
        raise ConfigError(f"sae.path {str(path)!r}: its cfg.json is not that of a SAELens SAE, it has no d_sae")
    return settings


def _read_hub(path: str) -> tuple[Encoder | Any, Origin]:
    release, colon, sae_id = path.partition(":")
    if not colon or path.startswith((".", "/", "~")):
        raise ConfigError(f"sae.path {path!r}: no such folder or file (an SAE on the hub is `release:sae_id`)")
    from sae_lens import SAE

    try:
        sae = SAE.from_pretrained(release, sae_id, device="cpu")
    except UNREADABLE as error:
        raise ConfigError(
            f"sae.path {path!r}: cannot be had from the hub: {_first_line(error)}{_way_out(error)}"
        ) from error
    return _taken_over(sae, path)


def _way_out(error: BaseException) -> str:
    """What to do where the hub cannot be reached; empty if it was reached, or if SAELens does not know the name."""
    if not isinstance(error, OSError):
        return ""
    offline = " (hubs are switched off by HF_HUB_OFFLINE)" if os.environ.get("HF_HUB_OFFLINE") else ""
    return f"{offline}; without a network, take a folder that SAELens' save_model wrote elsewhere as sae.path"


def _fold_scale(sae: Any, path: Path) -> None:
    """Fold the constant scale or whitening of the inputs, which a checkpoint of a training has beside it."""
    from sae_lens.training.activation_scaler import ActivationScaler

    scaler, file = ActivationScaler(), path / "activation_scaler.json"
    try:
        scaler.load(file)
        if scaler.scaling_factor is not None:
            sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
        if scaler.whitening is not None:
            sae.fold_activation_whitening(
                scaler.whitening.mean, scaler.whitening.matrix, scaler.whitening.inverse_matrix
            )
    except FileNotFoundError:
        return  # `_require_encoder` says that the scale is lost
    except UNREADABLE as error:
        raise ConfigError(f"sae.path {str(path)!r}: its {file.name} cannot be used: {_first_line(error)}") from error


def _taken_over(sae: Any, source: str) -> tuple[Encoder | Any, Origin]:
    """An SAE that SAELens has loaded, as an `Encoder` where it is one."""
    settings = sae.cfg.to_dict()
    _require_encoder(settings, source)
    if (normalisation := settings["normalize_activations"]) not in RUN_TIME_NORMALISATIONS:
        raise ConfigError(
            f"sae.path {source!r}: the SAE expects inputs scaled by {normalisation!r}, and the scale is not in its "
            "folder; fold it into the weights and save the SAE again, or put its activation_scaler.json beside it"
        )
    if settings["architecture"] in MATRIX_ARCHITECTURES:
        return _from_saelens(settings, sae.state_dict(), source)
    return sae, origin_of(settings["metadata"])


def _from_saelens(settings: Mapping[str, Any], weights: Mapping[str, Tensor], source: str) -> tuple[Encoder, Origin]:
    architecture = settings["architecture"]
    needed = ["W_enc", "b_enc", "b_dec"] + ["threshold"] * (architecture == "jumprelu")
    if missing := [name for name in needed if name not in weights]:
        raise ConfigError(f"sae.path {source!r}: its weights lack {', '.join(missing)}")
    W_enc, b_enc, b_dec = (weights[name].float() for name in needed[:3])
    if settings.get("rescale_acts_by_decoder_norm"):
        norms = weights["W_dec"].float().norm(dim=-1)
        W_enc, b_enc = W_enc * norms, b_enc * norms
    encoder = Encoder(
        W_enc,
        b_enc,
        b_dec if settings.get("apply_b_dec_to_input", True) else torch.zeros_like(b_dec),
        k=int(settings["k"]) if architecture == "topk" else None,
        threshold=weights["threshold"] if architecture == "jumprelu" else None,
        normalisation=settings.get("normalize_activations", "none"),
    )
    return _sound(encoder, source), origin_of(settings.get("metadata") or {})


def _require_encoder(settings: Mapping[str, Any], source: str) -> None:
    """Refuse what does not encode a residual stream token by token."""
    architecture = settings.get("architecture", "standard")
    if architecture not in MATRIX_ARCHITECTURES + SAELENS_ARCHITECTURES:
        usable = ", ".join(MATRIX_ARCHITECTURES + SAELENS_ARCHITECTURES)
        why = NOT_ENCODERS.get(architecture, "it is not known here")
        raise ConfigError(
            f"sae.path {source!r}: an SAE of architecture {architecture!r} cannot be used, {why}; usable are {usable}"
        )
    head = (settings.get("metadata") or settings).get("hook_head_index")
    if settings.get("reshape_activations", "none") != "none" or head is not None:
        raise ConfigError(f"sae.path {source!r}: the SAE reads attention heads, not the residual stream")


# ---- the authors' file ----


def _read_authors(path: Path) -> tuple[Encoder, Origin]:
    weight, k = _read_tensors(path)
    W_enc, b_enc = weight["W_enc"], weight["b_enc"]
    if "mask" in weight and not weight["mask"].all():
        W_enc, b_enc = W_enc.float() * weight["mask"], b_enc.float() * weight["mask"]
    return _sound(Encoder(W_enc, b_enc, weight["b_dec"], k=k), str(path)), Origin(hook_name=path.name)


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], int]:
    """(weights, k); tensors only, and mapped rather than read where the file allows it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        weight, k = state["weight"], int(state["config"]["topK"])
        if missing := [name for name in ("W_enc", "b_enc", "b_dec") if name not in weight]:
            raise LookupError(f"it has no {', '.join(missing)}")
    except (*UNREADABLE, pickle.UnpicklingError, EOFError, AttributeError) as error:
        raise ConfigError(f"sae.path {str(path)!r}: not an SAE file of the authors: {_first_line(error)}") from error
    return weight, k


# ---- what holds for every file ----


def _sound(encoder: Encoder, source: str) -> Encoder:
    """The encoder, if its shapes agree and its numbers are finite.

    A float16 file can hold infinities where a number was too large for it.
    """
    d_model, d_sae = encoder.W_enc.shape
    shapes = {name: tuple(part.shape) for name, part in encoder._asdict().items() if isinstance(part, Tensor)}
    expected = {"W_enc": (d_model, d_sae), "b_enc": (d_sae,), "b_in": (d_model,), "threshold": (d_sae,)}
    if any(shape != expected[name] for name, shape in shapes.items()) or not 1 <= (encoder.k or 1) <= d_sae:
        raise ConfigError(f"sae.path {source!r}: its shapes {shapes} and k {encoder.k} do not agree")
    for name in shapes:
        if not getattr(encoder, name).isfinite().all():
            raise ConfigError(
                f"sae.path {source!r}: its {name} ({getattr(encoder, name).dtype}) holds numbers that are not finite; "
                "save the SAE in float32"
            )
    return encoder


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

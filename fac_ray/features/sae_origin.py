"""What an SAE was made for, and whether the config's model is that.

An SAE's numbers mean something only on the residual stream that it was trained on: the same model, block, width and
number format, and texts no longer than it has seen. What its files say of these is held against the config here.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fac_ray.config import ConfigError, MeasureConfig, ModelConfig, SaeConfig

logger = logging.getLogger(__name__)

ELSEWHERE = r"blocks\.\d+\.|(\w+\.)*(layers|h)\.\d+\.|hook_embed|hook_pos_embed|ln_final|unembed"
"""How names of places start that are not between two blocks."""


class Origin(NamedTuple):
    """What an SAE's files say of its making; None is what they do not say."""

    model_name: str | None = None
    """Hub id, or the name that TransformerLens has for the model."""
    hook_name: str | None = None
    """Where the SAE reads; of a file of the authors, its name, which says the layer."""
    context_tokens: int | None = None
    """Length of the texts that it was trained on."""
    model_dtype: str | None = None
    """Number format of the model that it was trained on."""
    centred: bool = False
    """Whether that model's residual stream had mean 0 at every token (TransformerLens' centred writing weights)."""


def origin_of(metadata: Mapping[str, Any]) -> Origin:
    """The origin in the `metadata` of a SAELens config."""
    loading = metadata.get("model_from_pretrained_kwargs") or {}
    dtype = loading.get("dtype") or loading.get("torch_dtype")
    context = metadata.get("context_size")
    return Origin(
        model_name=metadata.get("model_name"),
        hook_name=metadata.get("hook_name"),
        context_tokens=int(context) if context else None,
        model_dtype=str(dtype).removeprefix("torch.") if dtype else None,
        centred=bool(loading.get("center_writing_weights")),
    )


def hook_layer_of(hook_name: str) -> int | None:
    """`hook_layer` in our counting of a hook named by TransformerLens, Hugging Face or a file of the authors; None if
    the name says nothing.

    Raises:
        ConfigError: the name is that of something else than the residual stream after a block.
    """
    layer = None
    if match := re.fullmatch(r"blocks\.(\d+)\.hook_(?:resid_)?(pre|post|in|out)", hook_name):
        layer = int(match[1]) + (match[2] in ("post", "out"))
    elif match := re.fullmatch(r"(?:\w+\.)*(?:layers|h|blocks)\.(\d+)(?:\.output)?", hook_name):
        layer = int(match[1]) + 1
    elif match := re.fullmatch(r"TopK\d+_l(\d+)_h\d+(?:_\w+)?\.pth", hook_name):
        layer = int(match[1])
    if layer == 0 or (layer is None and re.match(ELSEWHERE, hook_name)):
        raise ConfigError(
            f"sae.path: the SAE reads {hook_name!r}; only SAEs of the residual stream after a block can be used"
        )
    return layer


def require_fit(
    origin: Origin, d_sae_input: int, sae: SaeConfig, model: ModelConfig, d_model: int, measure: MeasureConfig
) -> None:
    """Check that the SAE reads the residual stream that the config names.

    A width or a block that differs is always refused; another model, number format or a longer text only unless
    `sae.allow_mismatch` says that it is meant, and then it is a warning. `measure` has its switches resolved.

    Raises:
        ConfigError: something differs; the message says what to change.
    """
    if d_sae_input != d_model:
        raise ConfigError(
            f"sae.path: the SAE reads {d_sae_input} numbers per token, but the residual stream of {model.path} has "
            f"{d_model}; take the SAE of this model"
        )
    _require_hook(origin, model)
    found = (_other_model(origin, model), _other_dtype(origin, model), _longer_texts(origin, measure))
    problems = [problem for problem in found if problem]
    if problems and not sae.allow_mismatch:
        raise ConfigError("; ".join(problems) + "; or, if it is meant, set sae.allow_mismatch: true")
    for problem in problems:
        logger.warning("sae.allow_mismatch: %s", problem)


def _require_hook(origin: Origin, model: ModelConfig) -> None:
    if origin.hook_name is None:
        return
    layer = hook_layer_of(origin.hook_name)
    if layer is None:
        logger.warning(
            "the SAE reads %r; whether that is model.hook_layer %d is not known", origin.hook_name, model.hook_layer
        )
    elif layer != model.hook_layer:
        raise ConfigError(
            f"model.hook_layer {model.hook_layer}: the SAE was trained at {origin.hook_name!r}; set hook_layer {layer}"
        )


def _other_dtype(origin: Origin, model: ModelConfig) -> str | None:
    if origin.model_dtype in (None, model.dtype):
        return None
    return (
        f"model.dtype {model.dtype}: the SAE was trained on the model in {origin.model_dtype}; "
        f"set model.dtype: {origin.model_dtype}"
    )


def _longer_texts(origin: Origin, measure: MeasureConfig) -> str | None:
    """Windows are cut to the SAE's context by default; only a longer one that the config asks for is a problem."""
    key = "max_tokens" if measure.max_tokens is not None else "window_tokens"
    given = getattr(measure, key)
    if given is None or origin.context_tokens is None or given <= origin.context_tokens:
        return None
    return (
        f"measure.{key} {given}: the SAE was trained on texts of {origin.context_tokens} tokens; "
        f"give at most {origin.context_tokens}"
    )


# ---- names of models ----


def _other_model(origin: Origin, model: ModelConfig) -> str | None:
    """Why the SAE's model is known to be another one; None if it is the same, or if nothing is known."""
    names, certain = model_names(model)
    if origin.model_name is None or any(_same_model(origin.model_name, name) for name in names):
        return None
    if not certain and not any(_official_name(name) for name in names):
        logger.warning(
            "the SAE was trained on %s; whether the folder %s holds that model is not known",
            origin.model_name,
            model.path,
        )
        return None
    return (
        f"model.path {model.path!r}: the SAE was trained on {origin.model_name!r}; take that model or the SAE of this "
        "one"
    )


def model_names(model: ModelConfig) -> tuple[tuple[str, ...], bool]:
    """Names that the model goes by, and whether one of them is a hub id rather than only the name of a folder."""
    path = Path(model.path).expanduser()
    if not path.is_dir():
        return (model.path,), True
    path = path.absolute()
    hub_ids = [part.removeprefix("models--").replace("--", "/") for part in path.parts if part.startswith("models--")]
    try:
        noted = str(json.loads((path / "config.json").read_text()).get("_name_or_path") or "")
    except (OSError, ValueError):
        noted = ""  # the model itself cannot be loaded then, and that is reported where it is loaded
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", noted):
        hub_ids.append(noted)
    return (path.name, *hub_ids), bool(hub_ids)


def _same_model(first: str, second: str) -> bool:
    if _last_part(first) == _last_part(second):
        return True
    official = _official_name(first)
    return official is not None and official == _official_name(second)


def _last_part(name: str) -> str:
    """Hub ids without their owner: mirrors have other owners, and Meta's ids have lost a `Meta-`."""
    return name.rstrip("/").rpartition("/")[2].lower().removeprefix("meta-")


def _official_name(name: str) -> str | None:
    """Hub id of a published model that TransformerLens knows under this name or an alias, such as gpt2-small."""
    from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES

    wanted = _last_part(name)
    for official in OFFICIAL_MODEL_NAMES:
        if wanted in {_last_part(known) for known in (official, *MODEL_ALIASES.get(official, []))}:
            return official
    return None

"""The language model cut at the hook: token ids in, residual stream out.

Only the first `hook_layer` blocks are loaded: no later block and no head exists, so none is computed, and their weights
are never read.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    Cache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from fac_ray.config import ConfigError, ModelConfig
from fac_ray.features.headers import Header

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

NO_LIMIT_TOKENS = 1 << 20
"""A context length above this is how model files say "unknown"."""

CAUSALITY_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest change of the first tokens, relative to their size, when more tokens follow: rounding, nothing else."""


class Backbone(nn.Module):
    """The blocks up to the hook, with their tokenizer; made by `load_backbone`."""

    def __init__(self, model: PreTrainedModel, blocks: nn.ModuleList, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        text_config = model.config.get_text_config()
        self.d_model: int = text_config.hidden_size
        """Width of the residual stream."""
        self.context_tokens: int = _context_tokens(text_config, tokenizer)
        """Longest sequence that the model was made for."""
        blocks[-1].register_forward_hook(self._keep_residual)
        self._residual: Tensor | None = None
        self._header: Header | None = None
        self.can_keep = False
        """Whether `residual` may be told of shared tokens."""

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.model.parameters()).device

    @torch.inference_mode()
    def residual(self, token_ids: Int[Tensor, "B T"], num_shared: int = 0) -> Float[Tensor, "B T_new d_model"]:
        """Residual stream after the last block, float32: `hidden_states[hook_layer]` of the whole model, and where the
        hook is the very last block, the stream before the final norm.

        Short rows are padded on the right with any id: attention is causal, so what precedes the padding never
        sees it. The rows' own padding positions hold numbers without meaning.

        `num_shared`: so many first tokens are the same in all rows. They go through the model once, or not at all if
        those of the last call were the same, and the stream is that of the T_new = T - num_shared others.
        """
        if num_shared:
            header = self._kept_header(token_ids[0, :num_shared])
            self._run(token_ids[:, num_shared:], header.cache())
        else:
            self._run(token_ids)
        residual, self._residual = self._residual, None
        assert residual is not None, "the last block has not run"
        return residual.float()

    def keeps(self, token_ids: Int[np.ndarray, " P"]) -> bool:
        """Whether these are the shared tokens of the last call that had any."""
        return self._header is not None and np.array_equal(self._header.token_ids.numpy(), token_ids)

    def _kept_header(self, token_ids: Int[Tensor, " P"]) -> Header:
        if self._header is None or not self.keeps(token_ids.numpy()):
            self._header = Header(token_ids, self._run)
        return self._header

    def _run(self, token_ids: Int[Tensor, "B T"], past: Cache | None = None) -> None:
        known = {} if past is None else {"past_key_values": past}
        self.model(input_ids=token_ids.to(self.device), use_cache=False, **known)

    def sharing_weights(self) -> Backbone:
        """Modules of their own on the same tensors, for another thread: a forward pass leaves things in its modules."""
        shared = [self.tokenizer, *self.parameters(), *self.buffers()]
        return copy.deepcopy(self, {id(one): one for one in shared})

    def _keep_residual(self, _block: nn.Module, _inputs: Any, output: Any) -> None:
        self._residual = output if isinstance(output, Tensor) else output[0]


def load_backbone(model: ModelConfig, device: str | None = None) -> Backbone:
    """The model of the config, cut after block `hook_layer`, in evaluation mode; `device` None: a GPU if there is one.

    Raises:
        ConfigError: nothing usable is at `model.path`, the model has fewer blocks than `hook_layer`, some of its
            weights are missing, its attention is not causal, or its tokenizer is not a fast one.
    """
    try:
        network, tokenizer, missing = _load(model)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, ConfigError):
            raise
        offline = " (hubs are switched off by HF_HUB_OFFLINE)" if os.environ.get("HF_HUB_OFFLINE") else ""
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"model.path {model.path!r}: cannot be loaded{offline}: {reason}") from error
    if missing:
        raise ConfigError(f"model.path {model.path!r}: {len(missing)} weights are missing, such as {min(missing)}")
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(
            f"model.path {model.path!r}: {type(tokenizer).__name__} is not a fast tokenizer, and only those say which "
            "characters a token stands for; add a tokenizer.json"
        )
    backbone = Backbone(network, _blocks(network, model), tokenizer)
    backbone.eval().requires_grad_(False).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    token_ids = torch.arange(8)[None] % network.config.get_text_config().vocab_size
    token_ids[0, 0] = tokenizer.bos_token_id or 0
    residual = backbone.residual(token_ids)
    _require_sound(backbone, model, token_ids, residual)
    backbone.can_keep = _can_keep(backbone, token_ids, residual)
    return backbone


def _load(model: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Collection[str]]:
    """The cut model, its tokenizer, and the names of weights that the files lack."""
    path = Path(model.path).expanduser()
    if not path.is_dir() and not HUB_ID.fullmatch(model.path):
        raise ConfigError(f"model.path {model.path!r}: no such folder")
    source = str(path) if path.is_dir() else model.path
    options: dict[str, Any] = {"revision": model.revision or "main", "trust_remote_code": model.trust_remote_code}
    settings = AutoConfig.from_pretrained(source, **options)
    _cut(settings, model)
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    options |= {"config": settings, "dtype": getattr(torch, model.dtype)}
    with _quiet():
        network, loading = AutoModel.from_pretrained(source, output_loading_info=True, **options)
    return network, tokenizer, loading["missing_keys"]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the report of weights that are not needed, which are all of those after the cut."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _cut(settings: Any, model: ModelConfig) -> None:
    """Make the model's own config describe the cut model."""
    text = settings.get_text_config()
    num_blocks = getattr(text, "num_hidden_layers", None)
    if settings.is_encoder_decoder or num_blocks is None:
        raise ConfigError(f"model.path {model.path!r}: {settings.model_type} is not a decoder-only language model")
    if model.hook_layer > num_blocks:
        raise ConfigError(
            f"model.hook_layer {model.hook_layer}: {model.path} has {num_blocks} blocks; give 1 to {num_blocks}"
        )
    text.num_hidden_layers = model.hook_layer
    if getattr(text, "layer_types", None):
        text.layer_types = list(text.layer_types)[: model.hook_layer]


def _blocks(network: PreTrainedModel, model: ModelConfig) -> nn.ModuleList:
    """The list of blocks: the outermost module list of that length in the decoder."""
    for module in network.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.hook_layer:
            return module
    raise ConfigError(f"model.path {model.path!r}: no list of {model.hook_layer} blocks in {type(network).__name__}")


def _context_tokens(text_config: Any, tokenizer: PreTrainedTokenizerFast) -> int:
    for value in (getattr(text_config, "max_position_embeddings", None), tokenizer.model_max_length):
        if value is not None and 0 < value < NO_LIMIT_TOKENS:
            return int(value)
    return NO_LIMIT_TOKENS


def _require_sound(
    backbone: Backbone, model: ModelConfig, token_ids: Int[Tensor, "1 T"], residual: Float[Tensor, "1 T d_model"]
) -> None:
    """A few tokens before anything else, BOS first, where float16 overflows soonest; and no token may see a later one,
    or padding without a mask would be wrong."""
    alone, followed = backbone.residual(token_ids[:, :4]), residual[:, :4]
    if not (alone.isfinite().all() and followed.isfinite().all()):
        raise ConfigError(
            f"model.dtype {model.dtype}: the residual stream of {model.path} overflows within {model.hook_layer} "
            "blocks; set model.dtype bfloat16 or float32"
            if model.dtype == "float16"
            else f"model.path {model.path!r}: its weights give numbers that are not finite"
        )
    change = (alone - followed).abs().max() / alone.abs().max()
    if not change < CAUSALITY_TOLERANCE[getattr(torch, model.dtype)]:
        raise ConfigError(f"model.path {model.path!r}: its tokens see later ones; a causal language model is needed")


def _can_keep(backbone: Backbone, token_ids: Int[Tensor, "1 T"], residual: Float[Tensor, "1 T d_model"]) -> bool:
    """Whether the model goes on after kept keys and values as after the tokens themselves; foreign code may not, nor
    may positions whose meaning depends on the length of the text."""
    if any(kind in str(getattr(m, "rope_type", "")) for m in backbone.modules() for kind in ("dynamic", "longrope")):
        return False
    expected = residual[:, 4:]
    try:
        found = backbone.residual(token_ids, num_shared=4)
    except (AttributeError, IndexError, TypeError, ValueError, RuntimeError):
        return False
    change = (found - expected).abs().max() / expected.abs().max()
    return bool(change < CAUSALITY_TOLERANCE[next(backbone.parameters()).dtype])

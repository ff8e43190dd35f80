"""How good an SAE is, measured on texts that it was not trained on.

    variance_explained = 1 - sum |x - x'|^2 / sum |x - mean|^2                    x' = decode(encode(x))
    loss_recovered     = (CE(zeros) - CE(x')) / (CE(zeros) - CE(x))

CE(y) is the language model's mean next-token loss, in nats, with y in the place of the residual stream at the hook.
Only content tokens are replaced, but no attention sinks, because the SAE learnt only those. The loss is taken at all
content tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fac_ray.config import ModelConfig
from fac_ray.features.backbone import load_backbone
from fac_ray.features.chat import Window
from fac_ray.sae_training.stream import batched_by_length, content_tokens, content_windows, learnt_tokens, padded
from fac_ray.sae_training.texts import Text

BATCH_TOKENS = 2048
"""Tokens of one forward pass of the whole model, whose logits are as wide as its vocabulary."""

MAX_TOKENS = 200_000
"""Tokens after which no further text is measured."""


LOSSES = ("loss", "loss_with_sae", "loss_with_zeros", "loss_with_mean")
RECOVERED = {"loss_recovered": "loss_with_zeros", "loss_recovered_of_mean": "loss_with_mean"}


class Reconstruction(NamedTuple):
    """Sums over the content tokens of the held-back texts."""

    variance_explained: float
    dead_fraction: float
    """Share of the features that no token switches on."""
    l0: float
    """Mean number of active features at a token."""
    num_eval_tokens: int
    mean: Tensor
    """Mean residual, float32 [d_model]."""


def measure_sae(sae: Any, model: ModelConfig, texts: Sequence[Text], device: str) -> dict[str, float | int | None]:
    """All figures of an SAE of SAELens that takes raw activations. Those of the loss are None if the files of the
    model hold no head, or if zeros at the hook do not make its loss worse.

    Raises:
        ValueError: no text has a content token.
    """
    backbone = load_backbone(model, device)
    batches = _first_batches(backbone, texts)
    found = reconstruct(sae, (content_tokens(backbone, batch) for batch in batches), backbone.d_model)
    del backbone
    figures: dict[str, float | int | None] = {
        "variance_explained": round(found.variance_explained, 4),
        "dead_fraction": round(found.dead_fraction, 4),
        "l0": round(found.l0, 3),
        "num_eval_tokens": found.num_eval_tokens,
    }
    return figures | loss_figures(sae, model, batches, found.mean, device)


@torch.inference_mode()
def reconstruct(sae: Any, blocks: Iterable[Tensor], d_model: int) -> Reconstruction:
    """Variance explained, dead share and L0 over blocks of residuals [N, d_model]; sums are float64.

    Raises:
        ValueError: the blocks hold no token.
    """
    total, squares, error = torch.zeros(d_model, dtype=torch.float64), 0.0, 0.0
    num_tokens, num_active = 0, torch.zeros(int(sae.cfg.d_sae), dtype=torch.long)
    for x in blocks:
        features = sae.encode(x)
        error += float((sae.decode(features) - x).double().square().sum())
        num_active += (features > 0).sum(dim=0).cpu()
        total += x.double().sum(dim=0).cpu()
        squares += float(x.double().square().sum())
        num_tokens += len(x)
    if not num_tokens:
        raise ValueError("corpora: none of the held-back texts has a token to measure the SAE on")
    deviation = squares - float(total.square().sum()) / num_tokens
    return Reconstruction(
        variance_explained=1 - error / deviation if deviation > 0 else float(error == 0),
        dead_fraction=float((num_active == 0).double().mean()),
        l0=float(num_active.sum()) / num_tokens,
        num_eval_tokens=num_tokens,
        mean=(total / num_tokens).float(),
    )


def loss_figures(
    sae: Any, model: ModelConfig, batches: Sequence[Sequence[Window]], mean: Tensor, device: str
) -> dict[str, float | None]:
    """Next-token losses with the stream as it is, reconstructed, set to zero and to its mean, and what is recovered."""
    network = _whole_model(model, device)
    followed = any(window.pooled.min() + 1 < len(window.token_ids) for batch in batches for window in batch)
    if network is None or not followed:
        return dict.fromkeys([*LOSSES, *RECOVERED])
    replacements: list[Callable[[Tensor], Tensor]] = [
        lambda x: x,
        lambda x: sae.decode(sae.encode(x)),
        torch.zeros_like,
        lambda x: mean.to(x).expand_as(x),
    ]
    losses = {
        name: _loss(network, model.hook_layer, batches, replace)
        for name, replace in zip(LOSSES, replacements, strict=True)
    }
    figures: dict[str, float | None] = {name: round(loss, 4) for name, loss in losses.items()}
    return figures | {name: _recovered(losses, without) for name, without in RECOVERED.items()}


@torch.inference_mode()
def _loss(
    network: nn.Module, hook_layer: int, batches: Sequence[Sequence[Window]], replace: Callable[[Tensor], Tensor]
) -> float:
    """Mean loss, in nats, of the tokens that follow content tokens, with the residual at content tokens replaced."""
    device, total, num_tokens = next(network.parameters()).device, 0.0, 0
    for batch in batches:
        token_ids, content = (tensor.to(device) for tensor in padded(batch))
        handle = _block(network, hook_layer).register_forward_hook(_replacing(content, replace))
        try:
            logits = network(input_ids=token_ids, use_cache=False).logits
        finally:
            handle.remove()
        lengths = torch.tensor([len(window.token_ids) for window in batch], device=device)
        inside = torch.arange(1, token_ids.shape[1], device=device) < lengths[:, None]
        predicting = content[:, :-1] & inside
        total += float(
            nn.functional.cross_entropy(
                logits[:, :-1][predicting].float(), token_ids[:, 1:][predicting], reduction="sum"
            )
        )
        num_tokens += int(predicting.sum())
    return total / num_tokens


def _replacing(content: Tensor, replace: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def hook(_block: nn.Module, _inputs: Any, output: Any) -> Any:
        stream = (output if isinstance(output, Tensor) else output[0]).clone()
        found = stream[content].float()
        learnt = learnt_tokens(found, content)
        found[learnt] = replace(found[learnt])
        stream[content] = found.to(stream)
        return stream if isinstance(output, Tensor) else (stream, *output[1:])

    return hook


def _block(network: Any, hook_layer: int) -> nn.Module:
    num_blocks = network.config.get_text_config().num_hidden_layers
    lists = (m for m in network.get_decoder().modules() if isinstance(m, nn.ModuleList) and len(m) == num_blocks)
    return next(lists)[hook_layer - 1]


def _whole_model(model: ModelConfig, device: str) -> Any:
    """The model with its head, or None where its files hold none."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        model.path,
        revision=model.revision or "main",
        trust_remote_code=model.trust_remote_code,
        dtype=getattr(torch, model.dtype),
        output_loading_info=True,
    )
    network, loading = loaded
    return None if loading["missing_keys"] else network.eval().requires_grad_(False).to(device)


def _first_batches(backbone: Any, texts: Sequence[Text]) -> list[list[Window]]:
    """Windows of the texts, as many as hold MAX_TOKENS content tokens."""
    found, num_tokens = [], 0
    for window in content_windows(backbone, texts)[0]:
        if num_tokens >= MAX_TOKENS:
            break
        found.append(window)
        num_tokens += len(window.pooled)
    return list(batched_by_length(found, BATCH_TOKENS))


def _recovered(losses: dict[str, float], without: str) -> float | None:
    lost = losses[without] - losses["loss"]
    return round((losses[without] - losses["loss_with_sae"]) / lost, 4) if lost > 0 else None

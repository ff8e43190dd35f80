"""Train a Top-K SAE on the residual stream of any language model: texts in, a SAELens folder out.

The SAE learns exactly the tokens that coverage pools under the default preset: those inside message contents, in the
windows that extraction uses. Training is SAELens' own; this module feeds it and measures the result on texts that it
was not trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fac_ray.backbone import Backbone
from fac_ray.chat import Window, tokenize, windows
from fac_ray.config import MeasureConfig
from fac_ray.schema import Message

Text = str | Sequence[Message]
"""A plain text or a chat."""

TEXTS_PER_READ = 256
"""Texts that are tokenized and sorted by length together."""

HELD_BACK = 20
"""Every so many-th text is not trained on; the facts are measured on those."""


class SaeRecipe(NamedTuple):
    """How an SAE is trained. Tokens are counted with repetition: texts are read again until there are enough."""

    d_sae: int
    """Number of features."""
    k: int
    """Features that are active at each token."""
    num_tokens: int
    """Tokens to train on."""
    batch_tokens: int = 4096
    """Tokens of one optimizer step."""
    learning_rate: float = 1e-3
    buffer_tokens: int = 1 << 17
    """Tokens among which a batch is drawn; the memory is this times d_model times 4 bytes."""
    dead_steps: int = 100
    """A feature that was not active for so many steps is dead, and an auxiliary loss tries to revive it."""
    seed: int = 0


def train_sae(backbone: Backbone, texts: Sequence[Text], folder: Path, recipe: SaeRecipe) -> dict[str, Any]:
    """Variance explained, dead share and L0 of a Top-K SAE that is trained on `texts` and written to `folder`.

    The facts are measured on every 20th text, which training never reads: `variance_explained` = 1 - squared error /
    squared deviation from the mean; `dead_fraction`, the share of features that no token of them switches on;
    `l0`, the mean number of active features of a token; `num_eval_tokens`.

    Raises:
        ValueError: there are fewer than 20 texts, or a text cannot be tokenized.
    """
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.mixing_buffer import mixing_buffer
    from sae_lens.training.sae_trainer import SAETrainer

    if len(texts) < HELD_BACK:
        raise ValueError(f"{len(texts)} texts are too few to train an SAE on; give at least {HELD_BACK}")
    torch.manual_seed(recipe.seed)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(**_sae_settings(backbone, recipe)))
    num_steps = recipe.num_tokens // recipe.batch_tokens
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=num_steps * recipe.batch_tokens,
            train_batch_size_samples=recipe.batch_tokens,
            lr=recipe.learning_rate,
            lr_end=recipe.learning_rate,
            adam_beta2=0.99,  # a short training: the mean of squares must follow within a hundred steps
            lr_warm_up_steps=num_steps // 20,
            lr_decay_steps=num_steps // 4,
            device=str(backbone.device),
            autocast=True,  # matrix products in bfloat16, sums in float32
            dead_feature_window=recipe.dead_steps,
            n_batches_for_norm_estimate=8,
        ),
        sae=sae,
        data_provider=mixing_buffer(
            recipe.buffer_tokens, recipe.batch_tokens, _training_stream(backbone, texts, recipe)
        ),
    )
    trainer.fit()
    sae.fold_W_dec_norm()
    sae.save_inference_model(folder)
    return _facts(sae, backbone, texts[::HELD_BACK])


def content_residual(
    backbone: Backbone, texts: Sequence[Text], batch_tokens: int = 8192
) -> Iterator[Float[Tensor, "N d"]]:
    """Residual stream at the content tokens of the texts, a batch of similarly long windows at a time, float32.

    Raises:
        ValueError: a text is empty or the chat template refuses it.
    """
    measure = MeasureConfig().resolved()
    tokenizer, length = backbone.tokenizer, min(backbone.context_tokens, 4096)
    found: list[Window] = []
    for text in texts:
        chat = None if isinstance(text, str) else text
        plain = text if isinstance(text, str) else "\n\n".join(message["content"] for message in text)
        found += windows(tokenize(tokenizer, plain, chat, measure), length, tokenizer.bos_token_id)
    found.sort(key=lambda window: len(window.token_ids))
    first = 0
    while first < len(found):
        last = first + 1
        while last < len(found) and len(found[last].token_ids) * (last + 1 - first) <= batch_tokens:
            last += 1
        yield _residual_of(backbone, found[first:last])
        first = last


def _residual_of(backbone: Backbone, batch: Sequence[Window]) -> Float[Tensor, "N d"]:
    token_ids = torch.zeros(len(batch), len(batch[-1].token_ids), dtype=torch.long)
    pooled = torch.zeros(token_ids.shape, dtype=torch.bool)
    for row, window in enumerate(batch):
        token_ids[row, : len(window.token_ids)] = torch.from_numpy(window.token_ids)
        pooled[row, torch.from_numpy(window.pooled)] = True
    return backbone.residual(token_ids)[pooled.to(backbone.device)]


def _training_stream(backbone: Backbone, texts: Sequence[Text], recipe: SaeRecipe) -> Iterator[Float[Tensor, "N d"]]:
    """Endless: the texts in another order each time."""
    rng = Random(recipe.seed)
    rows = [row for row in range(len(texts)) if row % HELD_BACK]
    while True:
        rng.shuffle(rows)
        for first in range(0, len(rows), TEXTS_PER_READ):
            yield from content_residual(backbone, [texts[row] for row in rows[first : first + TEXTS_PER_READ]])


def _sae_settings(backbone: Backbone, recipe: SaeRecipe) -> dict[str, Any]:
    from sae_lens.saes.sae import SAEMetadata

    settings = backbone.model.config.get_text_config()
    return {
        "d_in": backbone.d_model,
        "d_sae": recipe.d_sae,
        "k": recipe.k,
        "device": str(backbone.device),
        "normalize_activations": "expected_average_only_in",
        "decoder_init_norm": 1.0,  # rows of 0.1, SAELens' default, turn by a third at each early step, and features die
        "metadata": SAEMetadata(
            model_name=Path(str(backbone.model.name_or_path)).name,
            hook_name=f"blocks.{settings.num_hidden_layers - 1}.hook_resid_post",
        ),
    }


@torch.inference_mode()
def _facts(sae: Any, backbone: Backbone, texts: Sequence[Text]) -> dict[str, Any]:
    sae.eval()
    x = torch.cat(list(content_residual(backbone, texts)))
    active = sae.encode(x) > 0
    error = (sae.decode(sae.encode(x)) - x).square().sum()
    return {
        "variance_explained": round(1 - float(error / (x - x.mean(dim=0)).square().sum()), 4),
        "dead_fraction": round(float((~active.any(dim=0)).float().mean()), 4),
        "l0": round(float(active.sum(dim=-1).float().mean()), 3),
        "num_eval_tokens": len(x),
    }

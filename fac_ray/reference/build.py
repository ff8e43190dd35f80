"""Train the embedded language model and its SAE: a folder in; `model/`, `sae/` and a card with measured figures out.

    python -m fac_ray.reference.build --folder DIR

A byte-level BPE tokenizer and a small Llama learn the chats of `chats.py`; a Top-K SAE learns the residual stream of
messages. Fixed seeds and a fixed order of steps: the same machine and versions give the same weights.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import click
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fac_ray.artifacts import write_text
from fac_ray.config import RunConfig, config_from_tree
from fac_ray.reference import HOOK_LAYER, MODEL
from fac_ray.reference.card import measure_concepts, write_card
from fac_ray.reference.chats import training_chat, training_message
from fac_ray.sae_training import train_sae
from fac_ray.schema import Message
from fac_ray.session import ray_session

log = logging.getLogger(__name__)

SPECIAL_TOKENS = ["<|bos|>", "<|eos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
VOCABULARY_SIZE = 2048
CONTEXT_TOKENS = 512
BATCH_TOKENS = 4096
NUM_STEPS = 1600
SAE_RECIPE = {
    "d_sae": 1024,
    "k": 3,
    "num_tokens": 2_500_000,
    "batch_tokens": 2048,
    "learning_rate": 2e-3,
    "dead_steps": 60,
}
NUM_SAE_MESSAGES = 40_000
POOL_CHATS = 4096
"""Chats that are sorted by length together, so that a batch holds little padding."""


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), required=True, help="Where model/, sae/ and the card go.")
@click.option("--steps", default=NUM_STEPS, show_default=True, help="Optimizer steps of the language model.")
@click.option("--threads", default=2, show_default=True, help="CPU threads.")
@click.option(
    "--keep-model", is_flag=True, help="Train the SAE alone, on the model that is in the folder with its card."
)
def main(folder: Path, steps: int, threads: int, keep_model: bool) -> None:
    """Train the embedded language model and its SAE."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(threads)
    if keep_model:
        model_facts = json.loads((folder / "card.json").read_text())["model"]
    else:
        tokenizer = train_tokenizer()
        model, model_facts = train_language_model(tokenizer, steps)
        model.config.use_cache = model.generation_config.use_cache = True
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
    scratch = folder / "sae_run"
    with ray_session():
        sae = train_sae(sae_config(scratch, [f"model.path={json.dumps(str(folder / 'model'))}"]))
    shutil.rmtree(folder / "sae", ignore_errors=True)
    os.replace(scratch / "sae", folder / "sae")
    shutil.rmtree(scratch)
    sae_facts = SAE_RECIPE | sae["figures"] | sae["training"]
    write_card(folder, model_facts, sae_facts, measure_concepts(folder))


def sae_config(folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of the embedded SAE's training, with its messages written to `folder`; the SAE goes to `folder/sae`.

    Raises:
        ConfigError: an override names an unknown key or a value out of bounds.
    """
    messages = folder / "messages.jsonl"
    tree = {
        "name": "reference-sae",
        "model": {"path": str(MODEL), "hook_layer": HOOK_LAYER},
        "sae": {"path": str(folder / "sae")},
        "corpora": {"messages": {"path": str(messages)}},
        "sae_training": SAE_RECIPE,
        "run": {"folder": str(folder)},
    }
    config = config_from_tree(tree, tuple(overrides), source="reference")
    if not messages.is_file():
        lines = (json.dumps({"text": training_message(n, "sae").text}) for n in range(NUM_SAE_MESSAGES))
        write_text(messages, "".join(f"{line}\n" for line in lines))
    return config


def train_tokenizer(num_chats: int = 20_000) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template; it puts BOS in front of every plain text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (turn["content"] for number in range(num_chats) for turn in training_chat(number, "tokenizer"))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.token_to_id("<|bos|>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def train_language_model(
    tokenizer: PreTrainedTokenizerFast, num_steps: int, learning_rate: float = 2e-3
) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """A small Llama after `num_steps` steps of about `BATCH_TOKENS` tokens each, with its facts."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(_llama_config(tokenizer))
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warmup_cosine(step, num_steps))
    started_s, num_tokens, batches = time.monotonic(), 0, training_batches(tokenizer)
    for step in range(num_steps):
        token_ids, labels = next(batches)
        loss = _loss(model, token_ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        num_tokens += int((labels >= 0).sum())
        if step % 25 == 0:
            log.info("step %d of %d: loss %.3f, %.0f s", step, num_steps, loss.item(), time.monotonic() - started_s)
    facts = {
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "num_steps": num_steps,
        "num_tokens": num_tokens,
        "seconds": round(time.monotonic() - started_s, 1),
        "fresh_loss_nats_per_token": round(_fresh_loss(model, tokenizer), 4),
    }
    return model.eval(), facts


def training_batches(
    tokenizer: PreTrainedTokenizerFast, stream: str = "train"
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches (token_ids, labels), both int64 [B, T], right padded; labels are -100 on padding."""
    rng, number = Random(f"batches {stream}"), 0
    while True:
        chats = [training_chat(number + place, stream) for place in range(POOL_CHATS)]
        number += POOL_CHATS
        rendered = [_rendered(tokenizer, chat) for chat in chats]
        encoded = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        batches = list(_batched_by_length([ids[:CONTEXT_TOKENS] for ids in encoded]))
        rng.shuffle(batches)
        for rows in batches:
            token_ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
            labels = torch.full_like(token_ids, -100)
            for place, row in enumerate(rows):
                token_ids[place, : len(row)] = labels[place, : len(row)] = torch.tensor(row)
            yield token_ids, labels


def _rendered(tokenizer: PreTrainedTokenizerFast, chat: list[Message]) -> str:
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in chat]
    return str(tokenizer.apply_chat_template(turns, tokenize=False))


def _batched_by_length(rows: list[list[int]]) -> Iterator[list[list[int]]]:
    batch: list[list[int]] = []
    for row in sorted(rows, key=len):
        if batch and len(row) * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    yield batch


def _llama_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=False,
    )


def _warmup_cosine(step: int, num_steps: int) -> float:
    warmup = max(1, num_steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def _loss(model: LlamaForCausalLM, token_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    with torch.autocast(token_ids.device.type, dtype=torch.bfloat16):
        logits = model(input_ids=token_ids).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


@torch.inference_mode()
def _fresh_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, num_batches: int = 8) -> float:
    batches = training_batches(tokenizer, "fresh")
    return sum(_loss(model, *next(batches)).item() for _ in range(num_batches)) / num_batches


if __name__ == "__main__":
    main()

"""What the benchmarks measure on: shape M (a random Llama, its tokenizer and a Top-K SAE) and real chats."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fac_ray.corpus.samples import join_contents, parse_transcript
from fac_ray.schema import Message, content_id, sample_id

CHATS = Path(__file__).parents[2] / "shared/data/hh-rlhf/harmless-base_test.jsonl.gz"

SPECIAL = ["<s>", "</s>", "<|role|>", "<|text|>", "<|end|>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|role|>{{ message['role'] }}<|text|>\n\n{{ message['content'] | trim }}<|end|>{% endfor %}"
)


class Shape(NamedTuple):
    """Sizes of a model and its SAE."""

    d_model: int = 1024
    d_mlp: int = 4096
    num_blocks: int = 16
    num_heads: int = 16
    num_kv_heads: int = 4
    hook_layer: int = 8
    d_sae: int = 16_384
    k: int = 20
    vocabulary: int = 32_000

    @property
    def block_weights(self) -> int:
        """Numbers in the matrices of one block."""
        kv = self.num_kv_heads * self.d_model // self.num_heads
        return 2 * self.d_model * (self.d_model + kv) + 3 * self.d_model * self.d_mlp


SHAPE_M = Shape()
SHAPES = {"m": SHAPE_M, "llama-3.1-8b": Shape(4096, 14_336, 32, 32, 8, 16, 65_536, 20, 128_256)}


def read_chats(path: Path, num_chats: int) -> list[list[Message]]:
    """The first chats of a transcript file that can be read as chats."""
    with gzip.open(path, "rt") as lines:
        rows = [json.loads(line)["chosen"] for line, _ in zip(lines, range(num_chats), strict=False)]
    return [parse_transcript(row) for row in rows]


def save_model(folder: Path, shape: Shape, chats: list[list[Message]]) -> Path:
    """Write a random Llama with a BPE made from the chats; in bfloat16: then all precisions read the same weights."""
    tokenizer = _tokenizer(chats)
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_mlp,
        num_hidden_layers=shape.num_blocks,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(settings).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_sae(folder: Path, shape: Shape) -> Path:
    """Write a random Top-K SAE as a SAELens folder."""
    from sae_lens import TopKSAE, TopKSAEConfig

    torch.manual_seed(1)
    sae = TopKSAE(TopKSAEConfig(d_in=shape.d_model, d_sae=shape.d_sae, k=shape.k, apply_b_dec_to_input=True))
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(shape.d_model, shape.d_sae) / shape.d_model**0.5)
        sae.b_dec.normal_(std=0.1)
        sae.b_enc.normal_(std=0.1)
    sae.save_model(folder)
    return folder


def load_whole_model(folder: Path, dtype: torch.dtype) -> LlamaForCausalLM:
    """The model with all its blocks and its head, as other tools run it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def as_samples(chats: list[list[Message]]) -> list[tuple[str, list[Message]]]:
    """Chats as the extractor takes them."""
    return [(join_contents(chat), chat) for chat in chats]


def sample_row(text: str, messages: list[Message], row: int) -> dict[str, Any]:
    """The SAMPLES row of a chat, as if it stood in that row of a file."""
    content = content_id(text, messages)
    place = {"source_file": "chats.jsonl", "source_row": row}
    ids = {"sample_id": sample_id("chats.jsonl", row, content), "content_id": content}
    return {**ids, "text": text, "messages": messages, "label": None, **place}


def _tokenizer(chats: list[list[Message]]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8192, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((join_contents(chat) for chat in chats), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", additional_special_tokens=SPECIAL[2:]
    )
    wrapped.chat_template = TEMPLATE
    return wrapped

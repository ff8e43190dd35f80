"""A random Llama of a few thousand weights with its own small tokenizer, for tests that need a real language model."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS = "<|begin_of_text|>"
SPECIAL = [BOS, "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]

TRAINED_ON = [
    "system user assistant\n\nKnowledge date: December 2023\nToday is 26 Jul 2024\n\n",
    "the quick brown fox jumps over the lazy dog while a small cat looks at the moon",
    "please tell me how to bake bread, and how long the dough should rest before it is baked",
]

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nKnowledge date: December 2023\\n' }}
{{- 'Today is ' + date_string + '\\n\\n' + system + '<|eot_id|>' }}
{%- for message in messages %}
    {%- if message['role'] not in ('user', 'assistant') %}{{ raise_exception('unknown role') }}{% endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}"""


def llama_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE that adds BOS, with a chat template that writes BOS, a system header and trimmed contents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TRAINED_ON * 2, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token="<|end_of_text|>",
        additional_special_tokens=SPECIAL[2:],
    )
    wrapped.chat_template = chat_template
    return wrapped


def save_llama(folder: Path, num_blocks: int = 3, d_model: int = 32, context_tokens: int = 1024, seed: int = 0) -> Path:
    """Write the model and its tokenizer; returns the folder."""
    tokenizer = llama_tokenizer()
    torch.manual_seed(seed)
    settings = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=d_model,
        intermediate_size=2 * d_model,
        num_hidden_layers=num_blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context_tokens,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_authors_sae(
    path: Path, d_model: int = 32, d_sae: int = 48, k: int = 4, seed: int = 0, **weight: torch.Tensor
) -> Path:
    """Write a random SAE in the authors' format, with the tensors of `weight` in place of the random ones."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "mask": torch.ones(d_sae),
        "W_enc": torch.randn(d_model, d_sae, generator=generator),
        "b_enc": torch.randn(d_sae, generator=generator),
        "b_dec": torch.randn(d_model, generator=generator),
        **weight,
    }
    d_model, d_sae = tensors["W_enc"].shape
    torch.save({"weight": tensors, "config": {"d_inp": d_model, "d_hide": d_sae, "topK": k}}, path)
    return path

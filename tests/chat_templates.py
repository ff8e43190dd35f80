"""The chat formats of the families that are measured, each with a small tokenizer that has the family's control tokens.

A tokenizer reads the words it is given as one token each and spells everything else, so a test can say every token.
Control tokens are only marked as special, as in published files: `all_special_ids` holds BOS and EOS alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

LLAMA_31 = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n' }}
{{- 'Today Date: ' + date_string + '\\n\\n' + system + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}"""

MISTRAL_02 = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] + '\\n\\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 is even) %}{{ raise_exception('no alternation') }}{% endif %}
    {%- if message['role'] == 'user' %}
        {{- ' [INST] ' + (system if loop.first and system is defined else '') + message['content'] + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}"""

# The system message stands in the last user turn: behind contents that come after it in the chat.
MISTRAL_03 = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] + '\\n\\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- set last = (messages | selectattr('role', 'equalto', 'user') | list | length) * 2 - 2 %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + (system if loop.index0 == last and system is defined else '') }}
        {{- message['content'] + '[/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}"""

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}"""

QWEN_25 = (
    """\
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou help the user.<|im_end|>\\n' }}
{%- endif %}"""
    + CHATML
)

GEMMA_2 = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{%- for message in messages %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}"""

# Roles are plain words here, and the template speaks first.
VICUNA = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- (system if system is defined else 'The user asks, and you help.') + ' ' }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- 'USER: ' + message['content'].strip() + ' ' }}
    {%- else %}
        {{- 'ASSISTANT: ' + message['content'].strip() + eos_token }}
    {%- endif %}
{%- endfor %}"""

TEMPLATES = {
    "llama 3.1": LLAMA_31,
    "mistral 0.2": MISTRAL_02,
    "mistral 0.3": MISTRAL_03,
    "qwen 2.5": QWEN_25,
    "gemma 2": GEMMA_2,
    "chatml": CHATML,
    "vicuna": VICUNA,
}

WORDS = ["system", "user", "assistant", "model", "USER", "ASSISTANT", "hello", "moon", "bread", "bake", "how", "date"]
WORDS += [
    "Knowledge",
    "Date",
    "December",
    "Today",
    "Jul",
    "You",
    "The",
    "you",
    "help",
    "the",
    "asks",
    "and",
    "be",
    "kind",
]
SPELT_WITH = ["Cut", "ting", "INST"]
"""Parts of longer words; reached by merges, from left to right."""

# Letters with what stands before them, up to three digits, signs, line breaks with blanks before them, other blanks.
BYTE_LEVEL_PIECES = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def chat_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A tokenizer with the family's template, control tokens and way with blanks."""
    if family in ("llama 3.1", "qwen 2.5", "chatml"):
        llama = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
        qwen = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
        tokenizer, control = _byte_level(), llama if family == "llama 3.1" else qwen
    elif family == "gemma 2":
        tokenizer, control = _metaspace("never"), ["<bos>", "<eos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    else:
        tokenizer = _metaspace("first" if family == "mistral 0.3" else "always")
        control = ["<s>", "</s>", "<unk>", *(["[INST]", "[/INST]"] if family == "mistral 0.3" else [])]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    bos = None if family in ("qwen 2.5", "chatml") else control[0]
    if bos:
        special = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=special)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=control[1])
    wrapped.chat_template = TEMPLATES[family]
    return wrapped


def _byte_level() -> Tokenizer:
    """As Llama 3 and Qwen: the bytes of pieces of text; a blank belongs to the word behind it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(_model(letters, [*WORDS, *("\u0120" + word for word in WORDS), "202", "26", "\u010a\u010a"]))
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(BYTE_LEVEL_PIECES, "isolated"), bytes_])
    return tokenizer


def _metaspace(prepend_scheme: str) -> Tokenizer:
    """As Mistral and Gemma: words with the blank before them; a character without a token is spelt in bytes."""
    letters = [chr(code) for code in range(33, 127)] + ["\n", "\u2581"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    words = [*WORDS, *("\u2581" + word for word in WORDS)]
    tokenizer = Tokenizer(_model([*letters, *bytes_], words, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    return tokenizer


def _model(letters: Sequence[str], words: Sequence[str], **switches: object) -> models.BPE:
    merges = {(part[:i], part[i]): part[: i + 1] for part in SPELT_WITH for i in range(1, len(part))}
    tokens = dict.fromkeys([*(["<unk>"] if switches else []), *letters, *merges.values(), *words])
    return models.BPE({token: i for i, token in enumerate(tokens)}, list(merges), ignore_merges=True, **switches)

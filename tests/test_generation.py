"""The generator with a real engine: a random two-layer Llama, vLLM, and a Ray actor around them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fac_ray.config import ModelConfig, SynthesisConfig
from fac_ray.schema import Message
from fac_ray.synthesis.generation import ENGINE_ENV, GenerationRequest, Generator

CONTEXT_TOKENS = 128


def random_llama(folder: Path, context_tokens: int = CONTEXT_TOKENS) -> Path:
    """A Llama with random weights that writes bytes; its heads are of 32, vLLM's least on a CPU."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=context_tokens,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def generator(ray_cluster, tmp_path_factory):
    folder = random_llama(tmp_path_factory.mktemp("llama"))
    model = ModelConfig(path=str(folder), hook_layer=1)
    actor = (
        ray_cluster.remote(Generator)
        .options(num_cpus=1, max_restarts=3, max_task_retries=3, runtime_env={"env_vars": ENGINE_ENV})
        .remote(SynthesisConfig(), model)
    )
    yield actor
    ray_cluster.kill(actor)


def request(content: str, seed: int = 0, temperature: float = 0.8) -> GenerationRequest:
    return GenerationRequest([Message(role="user", content=content)], seed, temperature, 0.9, 24)


REQUESTS = [request("a"), request("a", seed=1), request("b" * 200), request("c", seed=2)]


@pytest.mark.engine
def test_a_request_is_answered_by_its_seed_alone(ray_cluster, generator):
    together = ray_cluster.get(generator.generate.remote(REQUESTS))
    alone = [ray_cluster.get(generator.generate.remote([r]))[0] for r in REQUESTS]
    assert together == alone
    assert together[0].text != together[1].text
    assert all(generation.text == generation.text.strip() for generation in together)


@pytest.mark.engine
def test_more_prompt_tokens_than_fit_into_one_step_are_served(ray_cluster, generator):
    # 48 prompts of 97 tokens are more than the 4,096 that vLLM takes at once
    generations = ray_cluster.get(generator.generate.remote([request("d" * 80, seed=i) for i in range(48)]))
    assert {generation.error for generation in generations} == {None}
    assert len({generation.text for generation in generations}) > 40


@pytest.mark.engine
def test_a_prompt_that_does_not_fit_is_an_error_of_its_own_row(ray_cluster, generator):
    generations = ray_cluster.get(generator.generate.remote(REQUESTS))
    # <s> + "user:" + 200 bytes + newline + "assistant:" = 1 + 5 + 200 + 1 + 10 tokens
    assert generations[2].text == ""
    assert generations[2].error == "the prompt has 217 tokens; with 24 new ones it exceeds the context of 128"
    assert [g.error for i, g in enumerate(generations) if i != 2] == [None, None, None]


@pytest.mark.engine
def test_temperature_zero_ignores_the_seed(ray_cluster, generator):
    first, second = ray_cluster.get(
        generator.generate.remote([request("a", 1, temperature=0), request("a", 2, temperature=0)])
    )
    assert first == second


@pytest.mark.engine
def test_nothing_to_generate_is_no_generation(ray_cluster, generator):
    assert ray_cluster.get(generator.generate.remote([])) == []


@pytest.mark.engine
def test_no_process_is_left_by_the_engine(ray_cluster, generator):
    process = ray_cluster.get(generator.process_id.remote())
    assert children(process) == []
    ray_cluster.get(generator.shutdown.remote())
    ray_cluster.get(generator.shutdown.remote())  # a second time is no error
    ray_cluster.kill(generator)
    wait_until_gone(process)


def children(process: int) -> list[int]:
    """Ids of the processes that a process has started and that still run (Linux)."""
    listed = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for path in listed for child in path.read_text().split()]


def wait_until_gone(process: int) -> None:
    for _ in range(100):
        if not Path(f"/proc/{process}").exists():
            return
        time.sleep(0.1)
    pytest.fail(f"process {process} is still there")

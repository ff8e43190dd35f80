"""Texts from a language model: chat requests in, one generation for each request out, by vLLM.

`Generator` is a plain class that holds the engine; `engines.py` makes it a Ray actor. The engine runs inside the
actor's own process, not in a child of it, so whatever ends the actor ends the engine and frees its memory.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from fac_ray.config import ModelConfig, SynthesisConfig
from fac_ray.schema import Message

logger = logging.getLogger(__name__)

ENGINE_ENV: dict[str, str] = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: nothing is orphaned when it dies
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; without it vLLM asks for a share of the machine's memory
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # Ray places processes; vLLM must not pin threads to cores
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
"""Environment that the process of a `Generator` needs before vLLM is imported (the actor's `runtime_env`)."""

PROMPT_TOKENS = 4096
"""Room for the prompt in the engine's context, unless the model's own context is shorter."""


class GenerationRequest(NamedTuple):
    """One text that is asked for."""

    messages: Sequence[Message]
    seed: int
    """Seed of this request alone, in [0, 2**31)."""
    temperature: float
    top_p: float
    max_new_tokens: int


class Generation(NamedTuple):
    """What a request gave: the text, without white space around it, or why there is none."""

    text: str
    error: str | None


class Generator:
    """A vLLM engine that answers seeded chat requests.

    Each request has its own random numbers and the prefix cache is emptied between calls, so what a call returns
    depends on its requests alone. Within a call vLLM computes requests together, and rounding may differ with
    the company that a request keeps; see docs/synthesis.md.
    """

    def __init__(self, synthesis: SynthesisConfig, model: ModelConfig) -> None:
        """Load `synthesis.generator`, or `model.path` where that is None, and generate one token with it: some models
        load and then cannot run. vLLM is imported here, with `ENGINE_ENV` set.

        Raises:
            ValueError, OSError, RuntimeError: the model cannot be used; the message is vLLM's or transformers'.
        """
        source = _source(synthesis, model)
        self._context_tokens = _context_tokens(source, synthesis.max_new_tokens)
        from vllm import LLM, SamplingParams
        from vllm.platforms import current_platform

        on_cpu = current_platform.is_cpu()
        self._engine: Any = LLM(
            model=source["path"],
            revision=source["revision"],
            trust_remote_code=source["trust_remote_code"],
            dtype="float32" if on_cpu else model.dtype,
            max_model_len=self._context_tokens,
            tensor_parallel_size=synthesis.tensor_parallel,
            distributed_executor_backend="uni" if synthesis.tensor_parallel == 1 else "ray",
            gpu_memory_utilization=synthesis.gpu_memory_fraction,
            enforce_eager=on_cpu,  # no compiler is needed on a CPU; on a GPU CUDA graphs are worth their time
            enable_chunked_prefill=not on_cpu,  # vLLM cannot rewind the random numbers of a half-read prompt on a CPU
            disable_log_stats=True,
        )
        self._tokenizer: Any = self._engine.get_tokenizer()
        self._engine.generate({"prompt_token_ids": [0]}, SamplingParams(max_tokens=1), use_tqdm=False)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """One generation for each request, in the same order.

        A request that cannot be served has its reason in `error`. If the engine itself fails, its state is unknown
        and the process exits: Ray then starts the actor again and repeats the call.
        """
        from vllm import SamplingParams

        prompts = [self._token_ids(request.messages) for request in requests]
        errors = [self._problem(ids, request) for ids, request in zip(prompts, requests, strict=True)]
        served = [i for i, error in enumerate(errors) if error is None]
        sampling = [
            SamplingParams(temperature=r.temperature, top_p=r.top_p, max_tokens=r.max_new_tokens, seed=r.seed)
            for r in (requests[i] for i in served)
        ]
        texts = dict(zip(served, self._texts([prompts[i] for i in served], sampling), strict=True))
        return [Generation(texts.get(i, ""), error) for i, error in enumerate(errors)]

    def process_id(self) -> int:
        """Id of the process that holds the engine."""
        return os.getpid()

    def shutdown(self) -> None:
        """End the engine and give back its memory; the generator cannot be used afterwards."""
        if self._engine is None:
            return
        import torch

        self._engine.llm_engine.engine_core.shutdown()
        self._engine = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def __ray_shutdown__(self) -> None:
        self.shutdown()

    def _token_ids(self, messages: Sequence[Message]) -> list[int]:
        if getattr(self._tokenizer, "chat_template", None) is None:
            return self._tokenizer.encode("\n\n".join(message["content"] for message in messages))
        return self._tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, tokenize=True, return_dict=False
        )

    def _problem(self, token_ids: list[int], request: GenerationRequest) -> str | None:
        if not token_ids:
            return "the prompt is empty"
        if len(token_ids) + request.max_new_tokens <= self._context_tokens:
            return None
        return (
            f"the prompt has {len(token_ids)} tokens; with {request.max_new_tokens} new ones "
            f"it exceeds the context of {self._context_tokens}"
        )

    def _texts(self, prompts: list[list[int]], sampling: list) -> list[str]:
        if not prompts:
            return []
        try:
            self._engine.reset_prefix_cache()
            outputs = self._engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        except Exception:
            logger.exception("the engine failed; this process exits so that it is started anew")
            logging.shutdown()
            os._exit(1)
        return [output.outputs[0].text.strip() for output in outputs]


def _source(synthesis: SynthesisConfig, model: ModelConfig) -> dict:
    """Where the weights are. Revision and trust belong to `model.path`; another generator has neither."""
    if synthesis.generator is None or synthesis.generator == model.path:
        return model.model_dump(include={"path", "revision", "trust_remote_code"})
    return {"path": synthesis.generator, "revision": None, "trust_remote_code": False}


def _context_tokens(source: dict, max_new_tokens: int) -> int:
    """The engine's context: the cache of a long-context model at full length may not fit beside the extractor."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        source["path"], revision=source["revision"], trust_remote_code=source["trust_remote_code"]
    )
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or PROMPT_TOKENS
    return min(longest, PROMPT_TOKENS + max_new_tokens)

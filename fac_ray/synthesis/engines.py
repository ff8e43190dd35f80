"""Generators and verifiers as Ray actors: chunks of requests go in, replies come out as they are done.

A worker is one generator (vLLM) and one verifier (the feature extractor of the batch pipeline). Texts go from the one
to the other through Ray's object store, and a bounded number of chunks is on its way at any time. Actors that die
are started again and repeat their chunk; when the block ends, however it ends, all of them are gone.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fac_ray.config import MeasureConfig, ModelConfig, RunConfig, SaeConfig, SynthesisConfig
from fac_ray.synthesis.candidates import Reply, Request
from fac_ray.synthesis.generation import ENGINE_ENV, Generation, GenerationRequest, Generator

if TYPE_CHECKING:
    from fac_ray.features.extractor import SampleFeatures

logger = logging.getLogger(__name__)

Produce = Callable[[Sequence[Sequence[Request]]], Iterator[tuple[int, list[Reply]]]]
"""Chunks of requests in; (index of the chunk, one reply for each request) out, in any order of chunks."""

CHUNKS_ON_THE_WAY = 2
"""Chunks that a worker holds: while one is measured, the next is generated."""

SHUTDOWN_S = 30.0
"""How long generators may take to end by themselves before they are killed."""

RESTARTS: dict[str, Any] = {"max_restarts": 3, "max_task_retries": 3}


class Verifier:
    """The feature extractor, asked for one feature of each text."""

    def __init__(self, model: ModelConfig, sae: SaeConfig, measure: MeasureConfig) -> None:
        from fac_ray.features.extractor import FeatureExtractor

        self._extractor = FeatureExtractor(model, sae, measure)

    def replies(self, generations: Sequence[Generation], feature_ids: Sequence[int | None]) -> list[Reply]:
        """One reply for each generation: with the activation of its feature where there is a text and a feature."""
        measured = [
            i
            for i, (generation, feature_id) in enumerate(zip(generations, feature_ids, strict=True))
            if generation.text and feature_id is not None
        ]
        replies = [_unmeasured(generation) for generation in generations]
        features = self._extractor.extract([(generations[i].text, None) for i in measured]) if measured else []
        for i, sample in zip(measured, features, strict=True):
            replies[i] = _measured(generations[i].text, feature_ids[i], sample)
        return replies


class Actors(NamedTuple):
    """What a pool has started, in the order in which it is ended; generator i hands its texts to verifier i."""

    generators: list[Any]
    verifiers: list[Any]
    placements: list[Any]
    """Placement groups of generators on several GPUs."""


@contextmanager
def engine_pool(config: RunConfig) -> Iterator[Produce]:
    """A `Produce` on `synthesis.num_actors` generators, which start with the first chunk and end with the block.

    Raises:
        RuntimeError: an actor could not be started, or died more often than it is started again.
    """
    actors = Actors([], [], [])

    def produce(chunks: Sequence[Sequence[Request]]) -> Iterator[tuple[int, list[Reply]]]:
        import ray

        try:
            if not actors.generators:
                _start(actors, config)
            yield from _stream(chunks, actors, config)
        except ray.exceptions.RayActorError as error:
            raise RuntimeError(
                "synthesis: a generator or verifier could not be started, or ended "
                f"{RESTARTS['max_restarts'] + 1} times; finished chunks are kept. {_last_line(error)}"
            ) from error

    try:
        yield produce
    finally:
        if actors.generators or actors.placements:
            _end(actors)


def _stream(
    chunks: Sequence[Sequence[Request]], actors: Actors, config: RunConfig
) -> Iterator[tuple[int, list[Reply]]]:
    import ray

    waiting = deque(range(len(chunks)))
    running: dict[Any, tuple[int, int]] = {}

    def submit(worker: int) -> None:
        if waiting:
            index = waiting.popleft()
            running[_submit(chunks[index], actors.generators[worker], actors.verifiers[worker], config)] = index, worker

    for worker in [*range(len(actors.generators))] * CHUNKS_ON_THE_WAY:
        submit(worker)
    while running:
        [done], _ = ray.wait(list(running), num_returns=1)
        index, worker = running.pop(done)
        submit(worker)
        yield index, ray.get(done)


def _submit(chunk: Sequence[Request], generator: Any, verifier: Any, config: RunConfig) -> Any:
    assert config.synthesis is not None
    sampling = (config.synthesis.temperature, config.synthesis.top_p, config.synthesis.max_new_tokens)
    requests = [GenerationRequest(request.messages, request.seed, *sampling) for request in chunk]
    return verifier.replies.remote(generator.generate.remote(requests), [request.feature_id for request in chunk])


def _start(actors: Actors, config: RunConfig) -> None:
    """Generators first: vLLM measures the free memory of its GPU while it starts, and nothing may change it then."""
    import ray

    assert config.synthesis is not None
    logger.info("starting %d generators", config.synthesis.num_actors)
    for _ in range(config.synthesis.num_actors):
        options = generator_options(config.synthesis, ray.cluster_resources())
        if config.synthesis.tensor_parallel > 1:
            actors.placements.append(_placement(config.synthesis.tensor_parallel))
            options |= {"scheduling_strategy": _inside(actors.placements[-1])}
        actors.generators.append(ray.remote(Generator).options(**options).remote(config.synthesis, config.model))
    ray.get([generator.__ray_ready__.remote() for generator in actors.generators])
    measuring = ray.remote(Verifier).options(**verifier_options(config.synthesis, ray.cluster_resources()))
    for _ in actors.generators:
        actors.verifiers.append(measuring.remote(config.model, config.sae, config.measure))
    ray.get([verifier.__ray_ready__.remote() for verifier in actors.verifiers])


def _last_line(error: BaseException) -> str:
    """What went wrong in the actor, without the way there (that is in the cause of the exception)."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _end(actors: Actors) -> None:
    import ray

    try:
        ray.get([generator.shutdown.remote() for generator in actors.generators], timeout=SHUTDOWN_S)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
        logger.info("a generator did not answer and is killed: %s", type(error).__name__)
    for actor in [*actors.generators, *actors.verifiers]:
        ray.kill(actor)
    for placement in actors.placements:
        ray.util.remove_placement_group(placement)


# ---- where the actors run ----


def generator_options(synthesis: SynthesisConfig, cluster: Mapping[str, float]) -> dict[str, Any]:
    """Ray options of a generator, given the cluster's resources.

    On one GPU it takes `gpu_memory_fraction` of it and its verifier takes the rest. On several GPUs the actor itself
    takes none: the ranks that vLLM starts take the GPUs of the placement group around it.
    """
    options = {"num_cpus": _cpus(synthesis, cluster), "runtime_env": {"env_vars": ENGINE_ENV}, **RESTARTS}
    if synthesis.tensor_parallel > 1:
        return options | {"num_cpus": 1, "num_gpus": 0}
    return options | {"num_gpus": synthesis.gpu_memory_fraction if cluster.get("GPU", 0) else 0}


def verifier_options(synthesis: SynthesisConfig, cluster: Mapping[str, float]) -> dict[str, Any]:
    """Ray options of a verifier: the rest of its generator's GPU, or a GPU of its own where there is no rest."""
    rest = 0.0 if synthesis.tensor_parallel > 1 else round(1 - synthesis.gpu_memory_fraction, 4)
    num_gpus = (rest or 1) if cluster.get("GPU", 0) else 0
    return {"num_cpus": _cpus(synthesis, cluster), "num_gpus": num_gpus, **RESTARTS}


def _cpus(synthesis: SynthesisConfig, cluster: Mapping[str, float]) -> float:
    """One CPU for each actor, or less where the cluster has too few, so that none waits for ever."""
    return min(1.0, math.floor(cluster.get("CPU", 1) / (2 * synthesis.num_actors) * 1e4) / 1e4)


def _placement(num_gpus: int) -> Any:
    from ray.util.placement_group import placement_group

    return placement_group([{"GPU": 1, "CPU": 1}] * num_gpus, strategy="PACK")


def _inside(placement: Any) -> Any:
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    return PlacementGroupSchedulingStrategy(placement, placement_group_capture_child_tasks=True)


def _unmeasured(generation: Generation) -> Reply:
    error = None if generation.error is None else f"generation error: {generation.error}"
    return Reply(generation.text, None, error)


def _measured(text: str, feature_id: int | None, features: SampleFeatures) -> Reply:
    if features.error is not None:
        return Reply(text, None, f"measurement error: {features.error}")
    at = np.flatnonzero(features.feature_ids == feature_id)
    return Reply(text, float(features.activations[at[0]]) if len(at) else 0.0, None)

"""The stages from gaps to compared arms: synthesis, training, evaluation. Each first does what is missing before it."""

from __future__ import annotations

import fac_ray
from fac_ray.artifacts import Stage, fingerprint, read_table, write_json
from fac_ray.config import ConfigError, CorpusConfig, RunConfig
from fac_ray.progress import Progress
from fac_ray.run_folder import state_of
from fac_ray.stages.measurement import coverage_stage, gaps_stage, samples_stage
from fac_ray.tasks import load_task


def synthesis_stage(config: RunConfig) -> Stage:
    from fac_ray.synthesis.loop import synthesize

    if config.synthesis is None:
        raise ConfigError("synthesis: the config says null; give the section (it may be empty: {})")
    gaps = gaps_stage(config)
    seed = samples_stage(config, "seed", config.corpora["seed"])
    generator = config.synthesis.generator or config.model.path
    stage = Stage(
        config.folder / "synthesis",
        fingerprint(
            stage="synthesis",
            version=fac_ray.__version__,
            gaps=gaps.identity,
            seed_samples=seed.identity,
            generator=[generator, state_of(generator)],
            card=load_task(config.synthesis.task).model_dump(),
            synthesis=config.synthesis.model_dump(exclude={"num_actors", "tensor_parallel", "gpu_memory_fraction"}),
            positive=config.relevance.positive,
            seed=config.run.seed,
        ),
        needs=(gaps, seed),
    )
    if not stage.finished:
        with Progress("synthesis", unit="candidates") as progress:
            folder = stage.begin(keep_partial=True)
            table = read_table(gaps.folder / "gaps.parquet")
            stage.finish(**synthesize(config, table, read_table(seed.folder), folder, progress))
    for name, num_samples in (("targeted", "num_accepted"), ("untargeted", "num_untargeted")):
        if stage.facts[num_samples]:
            corpus = CorpusConfig(path=str(stage.folder / f"{name}.parquet"), text="text", label="label")
            coverage_stage(config, name, corpus, needs=(stage,))
    return stage


def training_stage(config: RunConfig) -> Stage:
    from fac_ray.training import build_arms, train_arms

    if config.training is None:
        raise ConfigError("training: the config says null; give the section (it may be empty: {})")
    heldout_name = config.evaluation.heldout
    if heldout_name not in config.corpora:
        raise ConfigError(f"evaluation.heldout: no corpus named {heldout_name!r}; given: {sorted(config.corpora)}")
    synthesis = synthesis_stage(config)
    corpora = {name: samples_stage(config, name, config.corpora[name]) for name in ("seed", "anchor", heldout_name)}
    model = config.training.model or config.model.path
    stage = Stage(
        config.folder / "training",
        fingerprint(
            stage="training",
            version=fac_ray.__version__,
            synthesis=synthesis.identity,
            samples=[samples.identity for samples in corpora.values()],
            model=[model, state_of(model)],
            training=config.training.model_dump(),
            positive=config.relevance.positive,
            seed=config.run.seed,
        ),
        needs=(synthesis, *corpora.values()),
    )
    if not stage.finished:
        tables = {name: read_table(samples.folder) for name, samples in corpora.items()}
        synthetic = {name: read_table(synthesis.folder / f"{name}.parquet") for name in ("targeted", "untargeted")}
        with Progress(
            "training", total=len(config.training.arms) * len(config.training.seeds), unit="fits"
        ) as progress:
            folder = stage.begin(keep_partial=True)
            arms = build_arms(
                tables["seed"],
                tables["anchor"],
                synthetic["targeted"],
                synthetic["untargeted"],
                config.relevance.positive,
                config.training.arms,
                config.run.seed,
                tables[heldout_name],
            )
            stage.finish(**train_arms(config, arms, tables[heldout_name], folder, progress))
    return stage


def evaluation_stage(config: RunConfig) -> Stage:
    from fac_ray.evaluation import summarise_arms

    training = training_stage(config)
    identity = fingerprint(stage="evaluation", training=training.identity)
    stage = Stage(config.folder / "evaluation", identity, needs=(training,))
    if not stage.finished:
        folder = stage.begin()
        write_json(folder / "arms.json", summarise_arms(training.folder))
        stage.finish()
    return stage

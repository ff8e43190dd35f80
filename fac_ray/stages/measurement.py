"""The stages from a corpus to its gaps: the config comes in, the finished `Stage` goes out, run first if it is missing.

Whatever a stage's result depends on is in its fingerprint. What can be kept of an unfinished one is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import fac_ray
from fac_ray.artifacts import Stage, fingerprint, read_table, reading, storing, write_json, write_table
from fac_ray.config import PRESETS, ConfigError, CorpusConfig, RunConfig
from fac_ray.progress import Progress
from fac_ray.run_folder import state_of


def samples_stage(config: RunConfig, name: str, corpus: CorpusConfig, needs: Sequence[Stage] = ()) -> Stage:
    from fac_ray.corpus.ingestion import ingest_corpus, source_fingerprint

    rows = fingerprint(stage="samples", version=fac_ray.__version__)  # a piece of a file knows itself what it is
    identity = fingerprint(
        rows=rows,
        source=source_fingerprint(corpus),
        corpus=corpus.model_dump(),
        max_rejected_fraction=config.run.max_rejected_fraction,
    )
    stage = Stage(config.folder / "samples" / name, identity, needs, rows=rows)
    rejected = Stage(config.folder / "rejected" / name, identity, rows=rows)
    if not (stage.finished and rejected.finished):
        with Progress(f"samples/{name}", unit="rows") as progress, storing(stage.folder):
            folders = stage.begin(keep_partial=True), rejected.begin(keep_partial=True)
            facts = ingest_corpus(corpus, *folders, config.run.max_rejected_fraction, progress)
            rejected.finish()
            stage.finish(**facts)
    return stage


def activations_stage(config: RunConfig, name: str, corpus: CorpusConfig, needs: Sequence[Stage] = ()) -> Stage:
    from fac_ray.activations.measuring import extract_activations
    from fac_ray.corpus.ingestion import source_fingerprint

    samples = samples_stage(config, name, corpus, needs)
    measure = config.measure.resolved()
    rows = fingerprint(  # a row belongs to a sample_id, which holds the sample's content
        stage="activations",
        version=fac_ray.__version__,
        model=[config.model.model_dump(), state_of(config.model.path)],
        sae=[config.sae.model_dump(), state_of(config.sae.path)],
        switches=measure.model_dump(include={*PRESETS["corrected"], "window_tokens"}),
    )
    stage = Stage(
        config.folder / "activations" / name,
        fingerprint(
            rows=rows,
            source=source_fingerprint(corpus),  # not the label: a new label needs no model
            content=corpus.model_dump(exclude={"label"}),
        ),
        needs,
        rows=rows,
    )
    if not stage.finished:
        total = samples.facts["num_samples"]
        with (
            Progress(f"activations/{name}", total=total, unit="samples") as progress,
            storing(stage.folder),
            reading(stage.folder, samples.folder),
        ):
            folder = stage.begin(keep_partial=True)
            stage.finish(**extract_activations(samples.folder, folder, config, progress))
    return stage


def coverage_stage(config: RunConfig, name: str, corpus: CorpusConfig, needs: Sequence[Stage] = ()) -> Stage:
    from fac_ray.coverage.reduction import reduce_coverage
    from fac_ray.features.sae import sae_width

    activations = activations_stage(config, name, corpus, needs)
    samples = samples_stage(config, name, corpus, needs)
    rows = fingerprint(  # of the corpus only which parts are counted already, and a tally knows those
        stage="coverage",
        activations=activations.rows,
        measure=config.measure.model_dump(include={"threshold", "thresholds", "num_exemplars", "span_words"}),
        positive=config.relevance.positive,
    )
    stage = Stage(
        config.folder / "coverage" / name,
        fingerprint(rows=rows, samples=samples.identity, activations=activations.identity),
        needs=(samples, activations),
        rows=rows,
    )
    if not stage.finished:
        total, sources = samples.facts["num_samples"], (activations.folder, samples.folder)
        with Progress(f"coverage/{name}", total=total, unit="samples") as progress, reading(*sources):
            folder = stage.begin(keep_partial=True)
            facts = reduce_coverage(
                activations.folder,
                samples.folder,
                folder,
                config.measure,
                sae_width(config.sae),
                config.relevance.positive,
                progress,
            )
            stage.finish(**facts)
    return stage


def relevance_stage(config: RunConfig) -> Stage:
    from fac_ray.coverage.reduction import load_coverage
    from fac_ray.coverage.relevance import relevance_from_coverage

    names = [name for name in ("anchor", "background") if name in config.corpora]
    if "anchor" not in names:
        raise ConfigError(f"corpora: relevance needs a corpus named anchor; given: {sorted(config.corpora)}")
    corpora = {name: coverage_stage(config, name, config.corpora[name]) for name in names}
    stage = Stage(
        config.folder / "relevance",
        fingerprint(
            stage="relevance",
            coverage=[corpora[name].identity for name in names],
            relevance=config.relevance.model_dump(),
        ),
        needs=tuple(corpora.values()),
    )
    if not stage.finished:
        loaded = {name: load_coverage(corpus.folder) for name, corpus in corpora.items()}
        folder = stage.begin()
        features = relevance_from_coverage(
            loaded["anchor"], loaded.get("background"), config.measure.threshold, config.relevance
        )
        write_table(folder / "features.parquet", features)
        stage.finish(num_relevant=int(features["relevant"].to_numpy().sum()))
    return stage


def gaps_stage(config: RunConfig) -> Stage:
    from fac_ray.coverage.gaps import find_gaps
    from fac_ray.coverage.reduction import load_coverage, load_exemplars

    if missing := {"anchor", "seed"} - set(config.corpora):
        raise ConfigError(f"corpora: gaps need anchor and seed; {sorted(missing)} not in {sorted(config.corpora)}")
    relevance = relevance_stage(config)
    anchor = coverage_stage(config, "anchor", config.corpora["anchor"])
    seed = coverage_stage(config, "seed", config.corpora["seed"])
    stage = Stage(
        config.folder / "gaps",
        fingerprint(stage="gaps", relevance=relevance.identity, anchor=anchor.identity, seed=seed.identity),
        needs=(relevance, anchor, seed),
    )
    if not stage.finished:
        folder = stage.begin()
        table = find_gaps(
            read_table(relevance.folder / "features.parquet"),
            load_coverage(anchor.folder),
            load_coverage(seed.folder),
            load_exemplars(anchor.folder),
            config.measure.threshold,
        )
        write_table(folder / "gaps.parquet", table)
        stage.finish(num_gaps=table.num_rows)
    if config.evaluation.truth is not None:
        truth_stage(config, stage)
    return stage


def truth_stage(config: RunConfig, gaps: Stage) -> Stage:
    """How well the missing features name the concepts that are truly missing; nothing but the report reads it."""
    from fac_ray.reference.truth import score_truth

    truth = Path(config.evaluation.truth or "")
    identity = fingerprint(stage="truth", gaps=gaps.identity, truth=state_of(truth))
    stage = Stage(config.folder / "truth", identity, needs=(gaps,))
    if not stage.finished:
        folder = stage.begin()
        table = read_table(gaps.folder / "gaps.parquet")
        samples, activations = config.folder / "samples" / "anchor", config.folder / "activations" / "anchor"
        write_json(folder / "truth.json", score_truth(truth, samples, activations, table, config.measure.threshold))
        stage.finish()
    return stage


def selection_stage(config: RunConfig, name: str) -> Stage:
    from fac_ray.coverage.reduction import load_coverage
    from fac_ray.decisions.pool import Pool, feature_weights
    from fac_ray.decisions.selection import select_samples

    wanted, threshold = config.selection, config.measure.threshold
    corpora = [coverage_stage(config, one, config.corpora[one]) for one in (name, wanted.base) if one is not None]
    relevance = [] if wanted.weights == "all" else [relevance_stage(config)]
    needs = (*corpora, *relevance)
    stage = Stage(
        config.folder / "selection" / name,
        fingerprint(
            stage="selection",
            needs=[need.identity for need in needs],
            threshold=threshold,
            selection=wanted.model_dump(),
        ),
        needs,
    )
    if not stage.finished:
        with Progress(f"selection/{name}", total=corpora[0].facts["num_samples"], unit="samples") as progress:
            folder = stage.begin()
            coverage = load_coverage(corpora[0].folder)
            base = load_coverage(corpora[1].folder).active(threshold) if wanted.base else None
            features = read_table(relevance[0].folder / "features.parquet") if relevance else None
            weights = feature_weights(features, wanted.weights, coverage.d_sae)
            activations, samples = (config.folder / kind / name for kind in ("activations", "samples"))
            pool = Pool(activations, samples, coverage, threshold, weights, base)
            stage.finish(**select_samples(config, name, pool, folder, progress))
    return stage

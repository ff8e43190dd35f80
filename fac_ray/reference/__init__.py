"""The embedded default: a small world with known concepts, and a language model and an SAE trained on it.

In: a folder. Out: corpora on disk (`write_world`) and the config of a run on them (`default_config`). With it the
whole pipeline runs and can be checked against the truth, without a download or a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fac_ray.config import RunConfig, config_from_tree
from fac_ray.reference.world import write_world

__all__ = ["MODEL", "SAE", "default_config", "write_world"]

MODEL = Path(__file__).parent / "model"
"""Folder of the language model, in the Hugging Face format."""

SAE = Path(__file__).parent / "sae"
"""Folder of its SAE, in the SAELens format."""

HOOK_LAYER = 3
"""Blocks of the language model before the residual stream that the SAE reads."""

THRESHOLD = 38.0
"""Activation above which a feature counts as active. Chosen on the worlds of seeds 3 to 6, where 34 to 44 do as well:
this SAE's features answer weakly to shared words and strongly to a concept."""


def default_config(folder: Path, seed: int = 0, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of the default run, with `section.key=value` overrides laid over it.

    The corpora are those that `write_world(folder / "world", seed)` writes; this function writes nothing.

    Raises:
        ConfigError: an override names an unknown key or a value out of bounds.
    """
    world = Path(folder) / "world"
    corpora = {name: {"path": str(world / f"{name}.jsonl"), "label": "label"} for name in ("anchor", "seed", "heldout")}
    tree = {
        "name": "reference",
        "model": {"path": str(MODEL), "hook_layer": HOOK_LAYER},
        "sae": {"path": str(SAE)},
        "corpora": {**corpora, "background": {"path": str(world / "background.jsonl")}},
        "measure": {"threshold": THRESHOLD, "thresholds": [0, 10, 20, 25, 30, 35, 40, 45]},
        "synthesis": {"task": "customer-policy", "samples_per_feature": 4, "max_attempts": 6},
        "training": {"epochs": 2, "learning_rate": 1e-3, "zero_stage": 0},  # docs/training.md, "The embedded world"
        "evaluation": {"heldout": "heldout", "truth": str(world / "truth.json")},
        "run": {"folder": str(folder), "seed": seed},
    }
    return config_from_tree(tree, tuple(overrides), source="reference")

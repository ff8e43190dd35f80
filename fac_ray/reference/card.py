"""What the embedded model and SAE can do, measured: their folder in, `card.json` and `card.md` out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fac_ray.artifacts import write_json, write_text
from fac_ray.config import MeasureConfig, ModelConfig, SaeConfig
from fac_ray.features.extractor import FeatureExtractor
from fac_ray.reference import HOOK_LAYER
from fac_ray.reference.chats import training_message
from fac_ray.reference.truth import concept_auc
from fac_ray.reference.world import concepts


def measure_concepts(folder: Path, num_messages: int = 4000) -> dict[str, float]:
    """ROC-AUC of the best single feature for each concept, by its activation on messages that neither training saw."""
    extractor = FeatureExtractor(
        ModelConfig(path=str(folder / "model"), hook_layer=HOOK_LAYER),
        SaeConfig(path=str(folder / "sae")),
        MeasureConfig(),
    )
    messages = [training_message(number, "card") for number in range(num_messages)]
    activations = np.zeros((num_messages, extractor.d_sae), dtype=np.float32)
    for row, found in enumerate(extractor.extract([(message.text, None) for message in messages])):
        activations[row, found.feature_ids] = found.activations
    present = np.array([[concept.name in message.concepts for message in messages] for concept in concepts()])
    best = concept_auc(activations, present).max(axis=1)
    return {concept.name: round(float(value), 4) for concept, value in zip(concepts(), best, strict=True)}


def write_card(folder: Path, model: dict[str, Any], sae: dict[str, Any], auc: dict[str, float]) -> None:
    """`card.json` with all figures, `card.md` with the same for people."""
    files = [*sorted((folder / "model").iterdir()), *sorted((folder / "sae").iterdir())]
    sizes = {f"{path.parent.name}/{path.name}": path.stat().st_size for path in files}
    write_json(folder / "card.json", {"model": model, "sae": sae, "best_feature_auc": auc, "size_bytes": sizes})
    write_text(folder / "card.md", _page(model, sae, auc, sizes))


def _page(model: dict[str, Any], sae: dict[str, Any], auc: dict[str, float], sizes: dict[str, int]) -> str:
    policy = {concept.name: auc[concept.name] for concept in concepts() if concept.policy}
    ordinary = {concept.name: auc[concept.name] for concept in concepts() if not concept.policy}
    parts = [
        "# The embedded language model and SAE",
        "Made by `python -m fac_ray.reference.build` from the phrasings in `world.yaml` on a CPU. All text is made up. "
        "Both serve to check the pipeline against known concepts and are of no other use.",
        "## Language model",
        _table(model),
        "## SAE",
        f"Top-K on the residual stream after block {HOOK_LAYER}, content tokens of messages alone.",
        _table(sae),
        "## Best single feature",
        "ROC-AUC of the feature whose largest activation tells best whether a fresh message holds the concept.",
        _table(
            {
                "policy concepts, mean": round(float(np.mean(list(policy.values()))), 4),
                "policy concepts, lowest": min(policy.values()),
                "ordinary concepts, mean": round(float(np.mean(list(ordinary.values()))), 4),
                **policy,
            }
        ),
        "## Files",
        _table({name: f"{size:,} bytes" for name, size in sizes.items()}),
    ]
    return "\n\n".join(parts) + "\n"


def _table(facts: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())])

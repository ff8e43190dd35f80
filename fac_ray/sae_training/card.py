"""The card of a trained SAE: what it is, how it was made and how good it is, in `card.json` and `card.md` beside it."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

from fac_ray import __version__
from fac_ray.artifacts import write_json, write_text

VERSIONED = ("sae-lens", "torch", "transformers", "ray")
"""Packages whose versions the card holds."""

MEANING = {
    "variance_explained": "1 - squared error of the reconstruction / squared deviation from the mean",
    "dead_fraction": "share of the features that no token of the held-back texts switches on",
    "l0": "mean number of active features at a token",
    "loss_recovered": "1: the model predicts as well from the reconstruction as from the stream; 0: as badly as from "
    "zeros",
    "loss_recovered_of_mean": "the same, against the mean in the place of the stream",
    "loss": "next-token loss in nats at content tokens",
    "loss_with_sae": "the same, with the reconstruction in the place of the stream there",
    "loss_with_zeros": "with zeros there",
    "loss_with_mean": "with the mean there",
    "num_eval_tokens": "content tokens of held-back texts that all of this was measured on",
}


def write_card(folder: Path, card: dict[str, Any]) -> dict[str, Any]:
    """Write both files; returns the card with versions and file sizes added."""
    versions = {"fac-ray": __version__} | {name: metadata.version(name) for name in VERSIONED}
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.stem != "card"}
    card = card | {"versions": versions, "size_bytes": sizes}
    write_text(folder / "card.md", _page(card))
    write_json(folder / "card.json", card)
    return card


def _page(card: dict[str, Any]) -> str:
    figures = [f"| {name} | {_shown(card['figures'][name])} | {meaning} |" for name, meaning in MEANING.items()]
    parts = [
        f"# SAE of {card['model']['name']}, residual stream after block {card['model']['hook_layer']}",
        "Made by `fac-ray sae train`. Loads with SAELens' `SAE.load_from_disk` and as `sae.path` of a run.",
        "## Figures",
        "On texts that training never read.",
        "\n".join(["| | | |", "|---|---|---|", *figures]),
        "## Recipe",
        _table(card["recipe"]),
        "## Training",
        _table(card["training"]),
        "## Corpora",
        _table({name: path for name, path in card["corpora"].items()}),
        "## Versions and files",
        _table(card["versions"] | {name: f"{size:,} bytes" for name, size in card["size_bytes"].items()}),
    ]
    return "\n\n".join(parts) + "\n"


def _table(facts: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_shown(value)} |" for name, value in facts.items())])


def _shown(value: Any) -> str:
    return "not measured" if value is None else str(value)

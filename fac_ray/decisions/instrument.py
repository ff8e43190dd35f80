"""What a run measures with: model, SAE, switches and threshold. Figures of two runs are compared only if they agree.

In: a run's config and manifest. Out: named values, and the differences between two runs. Files are recognised by their
contents, not by their path or date, because the same model lies elsewhere on another machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fac_ray.artifacts import fingerprint
from fac_ray.config import ConfigError, RunConfig, config_from_tree
from fac_ray.schema import hash_of

SAME_FIGURES = {"preset", "batch_tokens", "thresholds", "num_exemplars", "span_words", "num_actors"}
"""Keys of `measure` that change no activation: they say how it is counted, or how fast."""
SAMPLED_BYTES = 1 << 16
"""What is read at the beginning, in the middle and at the end of each file."""


def digest_of(path: str | Path) -> str | None:
    """Hash of names, sizes and some contents of a file, or of a folder's files; None for a hub id.

    Three stretches of each file are read, so that a model of many gigabytes costs a moment: other weights of the
    same shape differ everywhere, so they are told apart. It is not a checksum against a single changed byte.
    """
    root = Path(path)
    if not root.exists():
        return None
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    return fingerprint(files=[[str(p.relative_to(root)), *_contents(p)] for p in files])


def instrument_of(config: RunConfig, manifest: dict[str, Any]) -> dict[str, Any]:
    """Config key to value, for everything that decides what an activation above the threshold is."""
    measure = config.measure.resolved().model_dump(mode="json", exclude=SAME_FIGURES)
    return {
        "model.path": _identity(config.model.path, manifest.get("model")),
        "model.revision": config.model.revision,
        "model.hook_layer": config.model.hook_layer,
        "model.dtype": config.model.dtype,
        "sae.path": _identity(config.sae.path, manifest.get("sae")),
        **{f"measure.{key}": value for key, value in measure.items()},
    }


def own_instrument(config: RunConfig) -> dict[str, Any]:
    """`instrument_of` a run with the model and the SAE as they lie here now."""
    files = {"model": config.model.path, "sae": config.sae.path}
    return instrument_of(config, {name: {"digest": digest_of(path)} for name, path in files.items()})


def read_instrument(folder: Path) -> dict[str, Any]:
    """`instrument_of` a run folder, as it was recorded there.

    Raises:
        ConfigError: there is no run in the folder.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder}: no run here (config.json is missing); name the folder of a run")
    config = config_from_tree(json.loads(path.read_text()), source=str(path))
    manifest = folder / "manifest.json"
    return instrument_of(config, json.loads(manifest.read_text()) if manifest.is_file() else {})


def require_same(mine: dict[str, Any], theirs: dict[str, Any], folder: Path) -> None:
    """Refuse a run that was measured with something else.

    Raises:
        ConfigError: what differs, with both values.
    """
    different = [key for key in sorted({*mine, *theirs}) if not _agree(mine.get(key), theirs.get(key))]
    if different:
        listed = "; ".join(f"{key}: {_show(mine.get(key))} here, {_show(theirs.get(key))} there" for key in different)
        raise ConfigError(f"{folder}: measured with something else, so its figures cannot be compared: {listed}")


def _identity(path: str, recorded: dict[str, Any] | None) -> dict[str, Any]:
    return {"path": path, "digest": (recorded or {}).get("digest")}


def _agree(mine: Any, theirs: Any) -> bool:
    """Equal; of files, equal contents wherever they lie, and equal paths where a run did not record its contents."""
    digests = [one.get("digest") if isinstance(one, dict) else None for one in (mine, theirs)]
    if None in digests and isinstance(mine, dict) and isinstance(theirs, dict) and "path" in mine:
        return mine["path"] == theirs.get("path")
    return digests[0] == digests[1] if digests[0] is not None else mine == theirs


def _show(value: Any) -> str:
    if isinstance(value, dict) and "digest" in value:
        return value["path"] + (f" (contents {value['digest'][:8]})" if value["digest"] else "")
    return json.dumps(value)


def _contents(path: Path) -> tuple[int, str]:
    size = path.stat().st_size
    with path.open("rb") as file:
        stretches = []
        for start in sorted({0, max(0, (size - SAMPLED_BYTES) // 2), max(0, size - SAMPLED_BYTES)}):
            file.seek(start)
            stretches.append(file.read(SAMPLED_BYTES).hex())
    return size, hash_of(*stretches)

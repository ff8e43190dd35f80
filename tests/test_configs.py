"""Every config that is shipped can be used, and reading one needs no library that computes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fac_ray.config import PRESETS, load_config
from fac_ray.tasks import load_task

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "jobs" / "configs").glob("*.yaml"))


def test_there_are_configs_to_test():
    assert {path.stem for path in CONFIGS} >= {
        "toxicity-llama",
        "toxicity-mistral",
        "toxicity-qwen2",
        "gaps-gemma2-2b",
        "hh-rlhf-stories260k",
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_loads_and_is_named_like_its_file(path):
    config = load_config(path)
    assert config.name == path.stem
    assert config.folder.name == path.stem
    assert {"anchor", "seed"} <= set(config.corpora)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_asks_for_nothing_that_its_run_would_refuse(path):
    config = load_config(path)
    if config.synthesis is not None:
        card = load_task(config.synthesis.task)
        assert config.synthesis.allow_harmful or not card.harmful
        assert card.label in config.relevance.positive
    if config.training is not None:
        assert config.evaluation.heldout in config.corpora
        assert config.training.batch_size % config.training.num_workers == 0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_fits_every_shipped_config(path, preset):
    measure = load_config(path, (f"measure.preset={preset}",)).measure.resolved()
    assert measure.activation is not None
    assert measure.tokens is not None


@pytest.mark.usefixtures("ray_cluster")
def test_the_public_data_that_a_config_names_has_the_columns_it_names(tmp_path):
    from fac_ray.corpus.ingestion import ingest_corpus
    from fac_ray.progress import Progress

    config = load_config(ROOT / "jobs" / "configs" / "hh-rlhf-stories260k.yaml")
    for name, corpus in config.corpora.items():
        path = ROOT / str(corpus.path)
        if not path.exists():
            pytest.skip(f"{path} is not here; the project ships no data set")
        few = corpus.model_copy(update={"path": str(path), "limit": 20})
        facts = ingest_corpus(few, tmp_path / name, tmp_path / f"{name}-rejected", 0.0, Progress.silent())
        assert (facts["num_samples"], facts["num_rejected"]) == (20, 0)


@pytest.mark.parametrize(
    "module", ["config", "schema", "artifacts", "tasks", "synthesis.prompts", "progress", "headline", "doctor"]
)
def test_reading_a_config_loads_no_library_that_computes(module):
    code = f"import sys, fac_ray.{module}; print(sorted({{'torch', 'ray', 'vllm', 'deepspeed'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

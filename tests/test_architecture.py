"""Imports point one way, and what needs no torch or ray does not load them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fac_ray"
STAGES = {"corpus.ingestion", "activations.measuring", "coverage.reduction", "decisions.selection", "synthesis.loop"}
TORCH_MODULES = {f"features.{path.stem}" for path in (PACKAGE / "features").glob("[!_]*.py")}
NUMBERS = {
    *(f"coverage.{name}" for name in ("counts", "exemplars", "relevance", "gaps")),
    *(f"statistics.{name}" for name in ("intervals", "richness", "resampling", "diversity", "ngrams")),
    *(f"decisions.{name}" for name in ("greedy", "pool", "markdown", "pages")),
    "synthesis.prompts",
}


def source_of(module: str) -> Path:
    return PACKAGE.joinpath(*module.split(".")).with_suffix(".py")


def imports_of(path: Path) -> set[str]:
    """Every module that the file imports, at its top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("module", ["config", "schema", "artifacts", "decisions.questions", "pipeline", "cli"])
def test_the_spine_and_the_command_line_load_neither_torch_nor_ray(module):
    code = f"import sys, fac_ray.{module}; print(sorted({{'torch', 'ray', 'vllm', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", sorted(TORCH_MODULES | NUMBERS))
def test_models_and_numbers_know_no_ray(module):
    assert not {name for name in imports_of(source_of(module)) if name.split(".")[0] == "ray"}


@pytest.mark.parametrize("module", sorted(NUMBERS))
def test_numbers_know_no_torch(module):
    assert not {name for name in imports_of(source_of(module)) if name.split(".")[0] == "torch"}


@pytest.mark.parametrize("module", sorted(STAGES))
def test_a_stage_knows_no_other_stage(module):
    others = {f"fac_ray.{name}" for name in (STAGES - {module}) | {"pipeline", "stages", "training", "report", "cli"}}
    assert not imports_of(source_of(module)) & others


def test_the_library_knows_neither_its_jobs_nor_its_tests():
    for path in PACKAGE.rglob("*.py"):
        roots = {name.split(".")[0] for name in imports_of(path)}
        assert not roots & {"jobs", "serve", "tests", "benchmarks"}, path


def test_only_the_reference_and_the_report_of_truth_know_the_truth():
    """No stage may see the concepts of the reference world: only the pipeline's truth check and the package itself."""
    allowed = {"measurement.py", "invocation.py", "doctor.py"}
    for path in PACKAGE.rglob("*.py"):
        if "reference" in path.parts or path.name in allowed:
            continue
        assert not {name for name in imports_of(path) if name.startswith("fac_ray.reference")}, path

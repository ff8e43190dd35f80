"""What cannot be answered is refused at once, with what was given and what there is; nothing is measured for it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner
from measured_run import write_run

from fac_ray.artifacts import MARKER, write_json
from fac_ray.cli import main
from fac_ray.config import ConfigError, config_from_tree
from fac_ray.decisions.questions import require_check, require_comparison, require_selection

RELEVANT = {0, 1}
CORPORA = {"anchor": [{0, 1}], "seed": [{0}]}
OTHER_INSTRUMENTS = pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"measure": {"threshold": 0.7, "thresholds": [0.5]}}, r"measure\.threshold: 0\.5 here, 0\.7 there"),
        ({"measure": {"threshold": 0.5, "preset": "paper"}}, r"measure\.max_tokens: null here, 512 there"),
        ({"model": {"path": "m", "hook_layer": 2}}, r"model\.hook_layer: 1 here, 2 there"),
        ({"sae": {"path": "another"}}, r"sae\.path: s here, another .* there"),
    ],
)


def run_of(folder, **sections):
    return write_run(folder, CORPORA, RELEVANT, **sections)


def test_a_corpus_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    config = run_of(tmp_path / "run")
    for names, said in (
        (("anchor", "sed"), "sed: no corpus of that name in .*; there are: anchor, seed"),
        (("anchor", f"{tmp_path / 'nowhere'}:seed"), "no run here"),
        (("seed", "seed"), "two or more different"),
        (("seed",), "two or more different"),
    ):
        with pytest.raises(ConfigError, match=said):
            require_comparison(config, names)


def test_a_corpus_of_the_config_need_not_be_measured_yet_and_one_of_another_run_must(tmp_path):
    finished = run_of(tmp_path / "run")
    new = config_from_tree(finished.model_dump(), (f"run.folder={tmp_path / 'new'}",))
    write_json(new.folder / "config.json", new.model_dump(mode="json"))
    require_comparison(new, ("seed", f"{finished.folder}:seed"))
    with pytest.raises(ConfigError, match="there are: none"):
        require_comparison(finished, ("seed", f"{new.folder}:seed"))
    (finished.folder / "coverage" / "seed" / MARKER).unlink()
    with pytest.raises(ConfigError, match=r"there are: anchor$"):
        require_comparison(new, ("seed", f"{finished.folder}:seed"))


@OTHER_INSTRUMENTS
def test_another_instrument_is_refused_with_what_differs(tmp_path, section, said):
    mine = run_of(tmp_path / "run", check={"baseline": str(tmp_path / "other")})
    run_of(tmp_path / "other", **section)
    with pytest.raises(ConfigError, match=said):
        require_comparison(mine, ("seed", f"{tmp_path / 'other'}:seed"))
    with pytest.raises(ConfigError, match=said):
        require_check(mine)


def test_a_selection_needs_a_limit_a_known_corpus_and_an_anchor_that_says_what_is_relevant(tmp_path):
    with pytest.raises(ConfigError, match="--k N"):
        require_selection(run_of(tmp_path), "seed")
    limited = {"num_samples": 1}
    with pytest.raises(ConfigError, match="no corpus named pool; there are: anchor, seed"):
        require_selection(run_of(tmp_path, selection=limited), "pool")
    with pytest.raises(ConfigError, match="no corpus named sed;"):
        require_selection(run_of(tmp_path, selection=limited | {"base": "sed"}), "seed")
    alone = config_from_tree(run_of(tmp_path, selection=limited).model_dump() | {"corpora": {"seed": {"path": "a"}}})
    with pytest.raises(ConfigError, match=r"needs a corpus named anchor.*--weights all"):
        require_selection(alone, "seed")
    require_selection(config_from_tree(alone.model_dump(), ("selection.weights=all",)), "seed")


def test_a_check_that_could_not_fail_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--min-fac X, --baseline RUN"):
        require_check(run_of(tmp_path))
    require_check(run_of(tmp_path, check={"min_fac": 0}))


def test_a_baseline_without_a_seed_and_the_run_itself_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="this run itself"):
        require_check(run_of(tmp_path / "run", check={"baseline": str(tmp_path / "run")}))
    write_run(tmp_path / "main", {"anchor": [{0}]}, RELEVANT)
    with pytest.raises(ConfigError, match="its seed is not measured"):
        require_check(run_of(tmp_path / "run", check={"baseline": str(tmp_path / "main")}))


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [(["compare", "anchor", "sed"], 1), (["select", "anchor"], 1), (["check", "--baseline", "nowhere"], 2)],
)
def test_a_refusal_is_one_line_and_an_exit_code(tmp_path, arguments, exit_code):
    (tmp_path / "run.yaml").write_text(json.dumps(run_of(tmp_path / "run").model_dump(mode="json")))
    result = CliRunner().invoke(main, [*arguments, "--config", str(tmp_path / "run.yaml")])
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert result.stderr.startswith("fac-ray: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [["compare", "anchor", "seed"], ["select", "anchor", "--k", "1"], ["check", "--min-fac", "0.5"], ["gaps"]],
)
def test_no_command_loads_ray_before_the_session_has_closed_its_cluster_to_others(tmp_path, arguments):
    """How Ray authenticates is read when it is imported, so an earlier import would leave a private cluster open."""
    (tmp_path / "run.yaml").write_text(json.dumps(run_of(tmp_path / "run").model_dump(mode="json")))
    code = (
        "import sys, fac_ray.session\n"
        "def session(verbose): print('ray' in sys.modules); raise SystemExit\n"
        "fac_ray.session.ray_session = session\n"
        "from fac_ray.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, *arguments, "--config", str(tmp_path / "run.yaml")]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert shown.stdout == "False\n", shown.stderr

"""The command line: what it says, how it ends, and which run it works on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from fac_ray import cli, pipeline
from fac_ray.artifacts import write_json
from fac_ray.cli import main
from fac_ray.config import ConfigError
from fac_ray.headline import headline
from fac_ray.invocation import config_of, is_expected, reason_of

MINIMAL = "name: tiny\nmodel: {path: m, hook_layer: 2}\nsae: {path: s}\ncorpora: {anchor: {path: a.jsonl}}\n"
STAGES = ["run", "measure", "gaps", "synthesize", "train", "evaluate", "report"]


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL + f"run: {{folder: {tmp_path / 'out'}}}\n")
    return path


def fac_ray(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fac_ray.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


@pytest.mark.parametrize("command", [*STAGES, "compare", "select", "check", "doctor"])
def test_every_command_shows_an_example(command):
    result = CliRunner().invoke(main, [command, "--help"])
    assert result.exit_code == 0
    assert f"Example: fac-ray {command}" in result.output


@pytest.mark.parametrize("command", STAGES)
def test_every_stage_takes_the_same_options(command):
    names = {name for option in main.commands[command].params for name in option.opts}
    assert names == {"--config", "--set", "--folder", "--world-seed", "--verbose"}


def test_help_loads_neither_torch_nor_ray():
    code = (
        "import sys; from fac_ray.cli import main\n"
        "main(['run', '--help'], standalone_mode=False)\n"
        "print({'torch', 'ray', 'vllm', 'numpy', 'pandas'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines()[-1] == "set()"


def test_a_mistake_in_the_config_is_one_line_without_traceback(config_file):
    result = fac_ray("measure", "--config", str(config_file), "--set", "model.hook_layr=3")
    assert result.returncode == 1
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("fac-ray: ")
    assert "model.hook_layr" in line


def test_verbose_adds_the_traceback(config_file):
    options = {"env": {**os.environ, "FAC_RAY_DEBUG": "1"}}
    for result in (
        fac_ray("run", "--config", str(config_file), "--set", "name=", "--verbose"),
        fac_ray("run", "--config", str(config_file), "--set", "name=", **options),
    ):
        assert result.returncode == 1
        assert "Traceback" in result.stderr


def test_options_of_the_embedded_world_are_refused_beside_a_config(config_file):
    with pytest.raises(ConfigError, match=r"run\.folder"):
        config_of(str(config_file), (), "somewhere", None)
    with pytest.raises(ConfigError, match="--world-seed"):
        config_of(str(config_file), (), None, 0)


def test_without_a_config_the_run_is_the_embedded_world(tmp_path):
    config = config_of(None, ("synthesis.max_features=3",), str(tmp_path), 5)
    assert config.folder == tmp_path
    assert config.run.seed == 5
    assert config.synthesis is not None
    assert config.synthesis.max_features == 3
    assert (tmp_path / "world" / "anchor.jsonl").is_file()


def test_the_embedded_world_is_written_once_for_each_seed(tmp_path):
    anchor = tmp_path / "world" / "anchor.jsonl"
    config_of(None, (), str(tmp_path), 1)
    first, written_ns = anchor.read_bytes(), anchor.stat().st_mtime_ns
    config_of(None, (), str(tmp_path), 1)
    assert anchor.stat().st_mtime_ns == written_ns
    config_of(None, (), str(tmp_path), 2)
    assert anchor.read_bytes() != first


def test_a_stage_gets_the_config_and_its_headline_is_shown(config_file, tmp_path, monkeypatch):
    seen = []

    def report(config):
        seen.append(config)
        write_json(config.folder / "report.json", {})
        return {"name": config.name, "threshold": 0.5, "preset": "corrected", "corpora": {"anchor": {"num_samples": 7}}}

    monkeypatch.setattr(pipeline, "report", report)
    result = CliRunner().invoke(main, ["report", "--config", str(config_file), "--set", "measure.threshold=0.5"])
    assert result.exit_code == 0, result.output
    assert seen[0].measure.threshold == 0.5
    assert "tiny: threshold 0.5, preset corrected" in result.output
    assert f"Report: {tmp_path / 'out' / 'report.html'}" in result.output


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "the same command goes on from here"),
        (RuntimeError("the pool is gone"), 1, "fac-ray: the pool is gone (--verbose shows where)"),
        (FileNotFoundError(2, "No such file", "a.jsonl"), 1, "a.jsonl"),
    ],
)
def test_what_ends_a_stage_decides_the_exit_code(config_file, monkeypatch, error, code, said):
    def fails(_):
        raise error

    monkeypatch.setattr(pipeline, "report", fails)
    result = CliRunner().invoke(main, ["report", "--config", str(config_file)])
    assert result.exit_code == code
    assert said in result.stderr


def test_a_mistake_in_the_program_keeps_its_traceback(config_file, monkeypatch):
    monkeypatch.setattr(pipeline, "report", lambda _: {}["no such key"])
    result = CliRunner().invoke(main, ["report", "--config", str(config_file)])
    assert isinstance(result.exception, KeyError)


def test_the_reason_of_a_remote_failure_is_what_the_task_raised(ray_cluster):
    def fails():
        raise ValueError("row 7 has no text")

    with pytest.raises(ray_cluster.exceptions.RayTaskError) as caught:
        ray_cluster.get(ray_cluster.remote(max_retries=0)(fails).remote())
    assert is_expected(caught.value)
    assert reason_of(caught.value) == "row 7 has no text"


def test_ctrl_c_ends_the_process_with_130():
    waits = "with reported():\n    print('ready', flush=True)\n    time.sleep(60)"
    code = f"import time\nfrom fac_ray.invocation import reported\n{waits}"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; the same command goes on from here" in said
    assert "Traceback" not in said


REPORT = {
    "name": "tiny",
    "threshold": 0.0,
    "preset": "corrected",
    "corpora": {"anchor": {"num_samples": 4000, "num_tokens": 51234, "num_active_features": 900}},
    "relevant_features": 50,
    "reachable_features": 40,
    "covered_features": 30,
    "missing_features": 10,
    "switched_on_features": 8,
    "fac": {"anchor": 1.0, "seed": 0.75, "untargeted": 0.8, "final": 0.95},
    "fac_missing": 0.8,
    "fac_missing_untargeted": 0.2,
    "truth": {"precision": 0.9, "recall": 1.0},
    "arms": {"seed": {"auprc": {"mean": 0.8125, "std": None, "values": [0.8125]}}},
}


def test_the_headline_holds_every_number_that_the_run_is_made_for():
    assert headline(REPORT) == [
        "tiny: threshold 0, preset corrected",
        "",
        "corpus  samples  tokens  active features",
        "anchor    4,000  51,234              900",
        "",
        "50 relevant features, 40 of them in the anchor, 10 missing in the seed",
        "                   covered    fac  fac_missing",
        "seed                    30  0.750",
        "seed + untargeted           0.800        0.200",
        "seed + targeted         38  0.950        0.800",
        "",
        "missing concepts found: precision 0.900, recall 1.000",
        "",
        "trained on  held-out AUPRC  std  fits",
        "seed                 0.812    -     1",
    ]


def test_the_headline_of_a_run_that_has_just_begun_is_short():
    assert headline({"name": "tiny", "threshold": 0.5, "preset": "paper"}) == ["tiny: threshold 0.5, preset paper"]


def test_the_commands_are_click_commands_that_jobs_can_call():
    for name in STAGES:
        assert isinstance(getattr(cli, name), click.Command)

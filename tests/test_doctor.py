"""What the doctor finds, and that what it finds is true."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from fac_ray import doctor
from fac_ray.cli import check_line, main
from fac_ray.doctor import Check, check_disk, check_shared_memory, check_start, check_version, required_versions


def test_a_library_that_starts_says_what_it_did():
    check = check_start("tiny", "print('first'); print('second')", limit_s=30)
    assert (check.ok, check.found) == (True, "second")


def test_a_library_that_fails_shows_its_last_line_and_what_to_do():
    check = check_start("sae-lens", "raise ImportError('no such symbol')", limit_s=30)
    assert not check.ok
    assert check.needed
    assert check.found == "ImportError: no such symbol"
    assert "torchvision" in check.advice


def test_a_library_that_hangs_is_given_up():
    check = check_start("tiny", "import time; time.sleep(60)", limit_s=0.5)
    assert not check.ok
    assert "no answer" in check.found


def test_a_crash_of_a_library_does_not_take_the_doctor_down():
    check = check_start("tiny", "import os; os.abort()", limit_s=30)
    assert not check.ok
    assert check.found == "exit code -6"


def test_another_version_than_the_tested_one_is_a_note_with_the_tested_one(monkeypatch):
    monkeypatch.setattr(doctor, "installed_version", lambda _: "1.2.3")
    check = check_version("ray")
    assert not check.ok
    assert not check.needed
    assert required_versions()["ray"] in check.advice


def test_a_local_build_of_the_tested_version_is_the_tested_version(monkeypatch):
    monkeypatch.setattr(doctor, "installed_version", lambda _: required_versions()["torch"] + "+cpu")
    assert check_version("torch").ok


def test_a_missing_package_is_needed(monkeypatch):
    monkeypatch.setattr(doctor, "installed_version", lambda _: None)
    check = check_version("ray")
    assert not check.ok
    assert check.needed


def test_the_disk_of_a_folder_that_does_not_exist_yet_is_its_parents(tmp_path):
    assert check_disk(tmp_path / "not" / "yet").found.endswith(f"free in {tmp_path}")


def test_missing_shared_memory_is_a_note(tmp_path):
    check = check_shared_memory(tmp_path / "shm")
    assert not check.ok
    assert not check.needed


def test_advice_stands_below_a_failed_check_only():
    assert "mend" not in check_line(Check("gpus", True, "none", "mend it"))
    assert "mend" in check_line(Check("gpus", False, "broken", "mend it"))


@pytest.mark.parametrize(("needed", "code"), [(True, 1), (False, 0)])
def test_only_a_failed_check_that_is_needed_makes_the_command_fail(monkeypatch, needed, code):
    monkeypatch.setattr(doctor, "examine", lambda *_: [Check("part", False, "broken", "mend it", needed)])
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == code
    assert "mend it" in result.output


def test_ray_and_deepspeed_really_start():
    assert check_start("ray", doctor.QUICK["ray"], limit_s=120) == Check("ray", True, "a worker answers")
    engine = check_start("deepspeed engine", doctor.DEEP["deepspeed engine"], limit_s=120)
    assert engine.ok, engine.found


def test_the_doctor_imports_neither_torch_nor_ray():
    check = check_start(
        "imports", "import sys, fac_ray.doctor; print({'torch', 'ray', 'vllm'} & set(sys.modules))", limit_s=60
    )
    assert check.found == "set()"

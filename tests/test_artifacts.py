"""A stage is finished when its marker says so with the same fingerprint, and never half way."""

from __future__ import annotations

import pyarrow as pa
import pytest

from fac_ray.artifacts import Stage, current_marker, fingerprint, parquet_files, read_table, write_json, write_table


def test_a_stage_is_finished_only_with_its_own_fingerprint(tmp_path):
    stage = Stage(tmp_path / "gaps", fingerprint(threshold=0.0))
    assert not stage.finished
    stage.begin()
    assert not stage.finished
    stage.finish(num_gaps=3)
    assert stage.finished
    assert stage.facts["num_gaps"] == 3
    assert not Stage(tmp_path / "gaps", fingerprint(threshold=1.0)).finished


def test_another_fingerprint_clears_the_folder(tmp_path):
    old = Stage(tmp_path / "s", "old")
    (old.begin() / "part.txt").write_text("old")
    old.finish()
    folder = Stage(tmp_path / "s", "new").begin(keep_partial=True)
    assert not (folder / "part.txt").exists()


def test_an_interrupted_stage_keeps_its_parts_where_asked(tmp_path):
    (Stage(tmp_path / "s", "same").begin() / "part.txt").write_text("kept")
    assert (Stage(tmp_path / "s", "same").begin(keep_partial=True) / "part.txt").read_text() == "kept"
    assert not (Stage(tmp_path / "s", "same").begin() / "part.txt").exists()


def test_a_folder_of_other_files_is_never_removed(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "mine.csv").write_text("kept")
    with pytest.raises(FileExistsError, match=r"choose another run\.folder"):
        Stage(tmp_path / "samples", "a").begin()
    assert (tmp_path / "samples" / "mine.csv").read_text() == "kept"


def test_fingerprints_depend_on_every_part_and_not_on_its_order():
    assert fingerprint(a=1, b=[2]) == fingerprint(b=[2], a=1)
    assert fingerprint(a=1, b=[2]) != fingerprint(a=1, b=[3])
    assert fingerprint(a="1") != fingerprint(a=1)


def test_an_interrupted_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "report.json"
    write_json(path, {"fac": 0.5})
    with pytest.raises(TypeError):
        write_json(path, {"fac": object()})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"fac": float("nan")})
    assert path.read_text() == '{\n  "fac": 0.5\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_tables_are_read_in_the_order_of_their_names(tmp_path):
    for name, value in (("b", 2), ("a", 1)):
        write_table(tmp_path / f"{name}.parquet", pa.table({"x": [value]}))
    assert read_table(tmp_path)["x"].to_pylist() == [1, 2]
    assert len(parquet_files(tmp_path)) == 2
    with pytest.raises(FileNotFoundError):
        read_table(tmp_path / "none")


def test_a_stage_is_current_only_while_what_it_was_made_from_is(tmp_path):
    gaps = Stage(tmp_path / "gaps", "a")
    synthesis = Stage(tmp_path / "synthesis", "s", needs=(gaps,))
    training = Stage(tmp_path / "training", "t", needs=(synthesis,))
    for stage in (gaps, synthesis, training):
        stage.begin()
        stage.finish()
    marker = current_marker(training.folder)
    assert marker is not None
    assert marker["fingerprint"] == "t"
    changed = Stage(tmp_path / "gaps", "b")
    changed.begin()
    changed.finish()
    assert current_marker(training.folder) is None
    assert current_marker(changed.folder) is not None

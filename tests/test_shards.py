"""A corpus that gets, loses or changes files costs those files and nothing else, and ends as if read at once."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from test_pipeline import numbers, text_of
from tiny_llama import save_authors_sae, save_llama

from fac_ray import pipeline
from fac_ray.activations import parts
from fac_ray.activations.parts import CHECKPOINT_FOLDER, PENDING, committed_ids, unmeasured_parts
from fac_ray.artifacts import parquet_files, read_table, write_table
from fac_ray.config import CorpusConfig, config_from_tree
from fac_ray.corpus.ingestion import ingest_corpus
from fac_ray.coverage import reduction
from fac_ray.progress import Progress
from fac_ray.schema import content_id, sample_id


def write_shard(path: Path, rows: range) -> None:
    lines = [json.dumps({"text": f"{text_of(n)} {n}", "label": str(int(n % 3 == 0))}) for n in rows]
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join([*lines, "not json"]) + "\n")


def ingest(corpus: CorpusConfig, folder: Path) -> dict[str, int]:
    return ingest_corpus(corpus, folder / "samples", folder / "rejected", 1.0, Progress.silent())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}


def inodes(folder: Path) -> dict[str, tuple[int, int]]:
    """Key of each part to which file it is and when it was written; a rename changes neither."""
    parts = parquet_files(folder / "samples")
    return {p.stem.rpartition("-")[2]: (p.stat().st_ino, p.stat().st_mtime_ns) for p in parts}


@pytest.mark.usefixtures("ray_cluster")
def test_only_files_that_came_or_changed_are_read_and_the_parts_are_those_of_one_reading(tmp_path):
    data, grown = tmp_path / "data", tmp_path / "grown"
    corpus = CorpusConfig(path=str(data), label="label")
    write_shard(data / "b.jsonl", range(10))
    write_shard(data / "c.jsonl", range(10, 30))
    assert ingest(corpus, grown)["num_samples"] == 30
    before = inodes(grown)
    write_shard(data / "a.jsonl", range(40, 45))  # it comes first, so every other part gets another place
    write_shard(data / "c.jsonl", range(10, 31))
    facts = ingest(corpus, grown)
    after = inodes(grown)
    assert set(before.items()) & set(after.items()) == {item for item in after.items() if item[0] in before}
    assert len(before.keys() & after.keys()) == 1  # b
    assert facts == ingest(corpus, tmp_path / "once")
    assert facts == {"num_rows": 39, "num_samples": 36, "num_rejected": 3, "num_duplicates": 0}
    assert contents(grown) == contents(tmp_path / "once")
    (data / "b.jsonl").unlink()
    ingest(corpus, grown)
    ingest(corpus, tmp_path / "again")
    assert contents(grown) == contents(tmp_path / "again")


@pytest.mark.usefixtures("ray_cluster")
def test_pieces_of_a_large_file_and_of_a_limit_are_those_of_one_reading(tmp_path, monkeypatch):
    monkeypatch.setattr("fac_ray.corpus.ingestion.SHARD_BYTES", 1000)
    data = tmp_path / "data"
    for limit in (None, 45):
        corpus = CorpusConfig(path=str(data), limit=limit)
        write_shard(data / "b.jsonl", range(50))  # some thousand bytes: several pieces
        ingest(corpus, tmp_path / f"grown{limit}")
        write_shard(data / "a.jsonl", range(60, 66))
        facts = ingest(corpus, tmp_path / f"grown{limit}")
        assert facts["num_rows"] == (limit or 58)
        assert facts == ingest(corpus, tmp_path / f"once{limit}")
        assert contents(tmp_path / f"grown{limit}") == contents(tmp_path / f"once{limit}")
        (data / "a.jsonl").unlink()


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9])])
@pytest.mark.parametrize("kind", ["samples", "rejected"])
def test_a_part_that_was_lost_or_cut_is_written_again(tmp_path, harm, kind):
    corpus = CorpusConfig(path=str(tmp_path / "data"))
    for name in "ab":
        write_shard(tmp_path / "data" / f"{name}.jsonl", range(5))
    ingest(corpus, tmp_path / "run")
    before = contents(tmp_path / "run")
    harm(parquet_files(tmp_path / "run" / kind)[1])
    ingest(corpus, tmp_path / "run")
    assert contents(tmp_path / "run") == before


def id_of(number: int) -> str:
    return sample_id("f", number, content_id(str(number)))


def write_ids(path: Path, numbers: range | list[int]) -> Path:
    write_table(path, pa.table({"sample_id": [id_of(number) for number in numbers]}))
    return path


@pytest.fixture
def stored(tmp_path) -> Path:
    """A folder with the rows of samples 0 to 19 in two committed parts, and a part that was never committed."""
    for name, rows in (("a", range(10)), ("b", range(10, 20)), ("c", range(20, 30))):
        write_ids(tmp_path / f"{name}-0.parquet", rows)
        ids = f"{name}.parquet" if name != "c" else f"c{PENDING}"
        write_ids(tmp_path / CHECKPOINT_FOLDER / ids, rows)
    return tmp_path


def stored_ids(folder: Path) -> list[str]:
    """Ids of all rows in the folder, which are those that are committed."""
    rows = [i for part in parquet_files(folder) for i in read_table(part)["sample_id"].to_pylist()]
    assert sorted(rows) == sorted(i for ids in committed_ids(folder) for i in read_table(ids)["sample_id"].to_pylist())
    return sorted(rows)


def test_rows_of_samples_that_are_gone_are_removed_and_samples_without_a_row_are_named(stored, tmp_path):
    samples = [write_ids(tmp_path / "s" / f"{n}.parquet", rows) for n, rows in enumerate(([2, 3], [14, 25, 26]))]
    assert unmeasured_parts(stored, samples) == [(samples[1], 2)]
    assert stored_ids(stored) == sorted(map(id_of, (2, 3, 14)))


@pytest.mark.parametrize("harm", [Path.unlink, lambda part: part.write_bytes(part.read_bytes()[:50])])
def test_samples_of_a_damaged_part_count_as_unmeasured(stored, tmp_path, harm):
    harm(stored / "b-0.parquet")
    samples = [write_ids(tmp_path / "s" / "0.parquet", range(20))]
    assert unmeasured_parts(stored, samples) == [(samples[0], 10)]
    assert stored_ids(stored) == sorted(map(id_of, range(10)))


@pytest.mark.parametrize("step", range(7))
def test_an_interruption_while_rows_are_removed_never_leaves_one_twice(stored, tmp_path, monkeypatch, step):
    steps = iter(range(step))

    def interrupted(operation):
        def run(*args, **kwargs):
            if next(steps, None) is None:
                raise KeyboardInterrupt
            return operation(*args, **kwargs)

        return run

    samples = [write_ids(tmp_path / "s" / "0.parquet", range(5, 20))]
    with monkeypatch.context() as patch:
        patch.setattr(parts, "write_table", interrupted(write_table))
        for name in ("unlink", "rename"):
            patch.setattr(Path, name, interrupted(getattr(Path, name)))
        with pytest.raises(KeyboardInterrupt):
            unmeasured_parts(stored, samples)
    num_left = sum(num for _, num in unmeasured_parts(stored, samples))
    assert num_left in (0, 5)
    assert stored_ids(stored) == sorted(map(id_of, range(5 if num_left == 0 else 10, 20)))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    return {
        "name": "shards",
        "model": {"path": str(save_llama(root / "model")), "hook_layer": 2},
        "sae": {"path": str(save_authors_sae(root / "sae.pth"))},
        "corpora": {"a": {"path": str(root / "data"), "label": "label"}},
        "run": {"folder": str(root / "run"), "max_rejected_fraction": 0.5},
    }


@pytest.mark.usefixtures("ray_cluster")
def test_an_added_shard_costs_its_own_samples_and_gives_the_numbers_of_one_run(tree, monkeypatch):
    data, run = Path(tree["corpora"]["a"]["path"]), Path(tree["run"]["folder"])
    for shard in range(3):
        write_shard(data / f"{shard}.jsonl", range(100 * shard, 100 * shard + 100))
    pipeline.measure(config_from_tree(tree))
    first = committed_ids(run / "activations" / "a")
    write_shard(data / "0b.jsonl", range(900, 930))
    folded: list[str] = []
    map_parts = reduction._map_parts

    def noting(paths, function):
        folded.extend(path.name for path in paths if path.parent.parent.name == "activations")
        return map_parts(paths, function)

    monkeypatch.setattr(reduction, "_map_parts", noting)
    assert pipeline.measure(config_from_tree(tree))["corpora"]["a"]["num_samples"] == 330
    added = set(committed_ids(run / "activations" / "a")) - set(first)
    assert {Path(file).name for file in measured_files(run, added)} == {"0b.jsonl"}
    assert sum(len(read_table(ids)) for ids in added) == 30
    assert {name.rpartition("-")[0] for name in folded} == {ids.stem for ids in added}

    (data / "1.jsonl").unlink()
    write_shard(data / "2.jsonl", range(200, 350))
    grown = numbers(pipeline.measure(config_from_tree(tree)))
    assert grown["corpora"]["a"]["num_samples"] == 280
    once = numbers(pipeline.measure(config_from_tree(tree, (f"run.folder={run}-once",))))
    assert grown == once


def measured_files(run: Path, ids: set[Path]) -> set[str]:
    """The source files of the samples whose ids are committed there."""
    samples = read_table(run / "samples" / "a", columns=["sample_id", "source_file"]).to_pylist()
    file_of = {row["sample_id"]: row["source_file"] for row in samples}
    return {file_of[i] for path in ids for i in read_table(path)["sample_id"].to_pylist()}

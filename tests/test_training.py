"""Real Ray Train and DeepSpeed on a random two-block Llama: it learns, it continues, it survives a killed worker."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fac_ray.artifacts import MARKER, read_table
from fac_ray.config import ConfigError, RunConfig, TrainingConfig, config_from_tree
from fac_ray.evaluation import summarise_arms
from fac_ray.progress import Progress
from fac_ray.training import train_arms, worker
from fac_ray.training.arms import ARM
from fac_ray.training.batches import encode, epoch_batches, pad, pieces, scoring_batches
from fac_ray.training.engine import deepspeed_config, learning_rate_factor, training_dtype
from fac_ray.training.worker import Encoded

KEYWORDS = ("refund", "parcel")
FILLER = tuple(f"word{number}" for number in range(40))
TEMPLATE = "<bos> {% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}"


# ---- batches ----


def test_every_epoch_holds_every_row_and_fills_its_last_batch():
    batches = epoch_batches(num_samples=10, batch_size=4, seed=3, epoch=0)
    assert batches.shape == (3, 4)
    assert sorted(batches.ravel()[:10]) == list(range(10))
    np.testing.assert_array_equal(batches.ravel()[10:], batches.ravel()[:2])


def test_the_order_changes_with_seed_and_epoch_alone():
    first = epoch_batches(20, 4, seed=0, epoch=0)
    np.testing.assert_array_equal(first, epoch_batches(20, 4, seed=0, epoch=0))
    assert (first != epoch_batches(20, 4, seed=1, epoch=0)).any()
    assert (first != epoch_batches(20, 4, seed=0, epoch=1)).any()


def test_fewer_rows_than_a_batch_are_repeated():
    assert sorted(epoch_batches(2, 4, seed=0, epoch=0)[0]) == [0, 0, 1, 1]


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_workers_score_every_row_in_equally_many_batches(num_workers):
    lengths = [5, 1, 4, 2, 9, 7, 3]
    shares = [scoring_batches(lengths, 2, rank, num_workers) for rank in range(num_workers)]
    assert len({len(share) for share in shares}) == 1
    assert {row for share in shares for batch in share for row in batch} == set(range(7))


def test_short_rows_are_filled_and_masked_on_the_right():
    token_ids, mask = pad([[5, 6, 7], [8]], fill=2)
    assert token_ids.tolist() == [[5, 6, 7], [8, 2, 2]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


@given(st.lists(st.integers(1, 500), min_size=1, max_size=70))
def test_pieces_hold_the_rows_of_a_batch_once_and_the_short_ones_first(lengths):
    rows = np.arange(len(lengths))[::-1]
    parts = pieces(np.array(lengths), rows)
    assert 1 <= len(parts) <= 4
    assert all(len(part) for part in parts)
    together = np.concatenate(parts)
    assert sorted(together) == sorted(rows)
    assert [lengths[row] for row in together] == sorted(lengths)


@pytest.mark.parametrize(("template", "prefix"), [(None, []), (TEMPLATE, ["<bos>", "user"])])
def test_a_text_is_encoded_as_one_user_message_and_cut_at_its_end(template, prefix):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    (whole,) = encode(tokenizer, ["refund parcel"], max_tokens=8)
    assert tokenizer.convert_ids_to_tokens(whole) == [*prefix, "refund", "parcel"]
    long, unreadable = encode(tokenizer, ["refund " * 20, " "], max_tokens=8)
    assert long == whole[: len(prefix)] + [tokenizer.vocab["refund"]] * (8 - len(prefix))
    assert unreadable == [tokenizer.pad_token_id]


# ---- optimizer ----


def test_the_learning_rate_rises_and_falls_linearly():
    factors = [learning_rate_factor(step, num_steps=10, num_warmup=2) for step in range(11)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert np.diff(factors[2:]) == pytest.approx([-0.125] * 8)
    assert factors[10] == 0


@pytest.mark.parametrize(("capable", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_auto_takes_bfloat16_where_the_cpu_has_it(monkeypatch, capable, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": capable})
    assert training_dtype("auto", torch.device("cpu")) == expected
    assert training_dtype("auto", torch.device("cuda")) == "bfloat16"
    assert training_dtype("float32", torch.device("cuda")) == "float32"


def test_a_batch_is_shared_by_the_workers():
    config = deepspeed_config(TrainingConfig(batch_size=12, num_workers=3, zero_stage=3), num_parameters=100)
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"]) == (12, 4)
    assert config["zero_optimization"]["stage"] == 3


# ---- what is refused before any worker starts ----


def test_a_batch_that_workers_cannot_share_is_refused(tmp_path):
    config = run_config(tmp_path, batch_size=8, num_workers=3)
    with pytest.raises(ConfigError, match=r"training\.batch_size: 8 cannot be shared equally by 3 workers"):
        train_arms(config, {"seed": arm(8, 0)}, heldout(8), tmp_path, Progress.silent())


def test_a_held_out_text_in_an_arm_is_refused(tmp_path):
    rows = heldout(8)
    leaking = arm(8, 0).set_column(1, "text", rows["text"])
    with pytest.raises(ValueError, match="arm seed: 8 samples have the text of a held-out one"):
        train_arms(run_config(tmp_path), {"seed": leaking}, rows, tmp_path, Progress.silent())


def test_a_model_that_is_not_there_is_refused(tmp_path):
    config = run_config(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"model\.path .*none': cannot be loaded"):
        train_arms(config, {"seed": arm(8, 0)}, heldout(8), tmp_path, Progress.silent())


@pytest.mark.parametrize(("label", "message"), [("1", "of one class"), (None, "no sample has a label")])
def test_a_held_out_corpus_needs_both_classes(tmp_path, label, message):
    rows = heldout(8)
    rows = rows.set_column(2, "label", pa.array([label] * 8, pa.string()))
    with pytest.raises(ValueError, match=message):
        train_arms(run_config(tmp_path), {"seed": arm(8, 0)}, rows, tmp_path, Progress.silent())


# ---- real training ----


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_batch_in_parts_has_the_gradient_of_the_whole(model_folder):
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = 0
    token_ids = [[1 + (row + place) % 9 for place in range(2 + 3 * row)] for row in range(10)]
    samples = Encoded([str(row) for row in range(10)], token_ids, np.arange(10) % 2)
    rows = np.array([7, 0, 9, 3, 5, 1, 8, 2, 6, 4])
    gradients = []
    for parts in ([rows], pieces(samples.lengths, rows)):
        model.zero_grad()
        worker._loss(model, samples, parts, 0, torch.device("cpu")).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def undisturbed(ray_cluster, model_folder, tmp_path_factory) -> tuple[Path, dict]:
    assert ray_cluster.is_initialized()
    folder = tmp_path_factory.mktemp("undisturbed")
    facts = train_arms(run_config(model_folder), arms(), heldout(150), folder, Progress.silent())
    return folder, facts


def test_each_fit_learns_the_keywords_and_leaves_its_scores(undisturbed):
    folder, facts = undisturbed
    assert (facts["num_fits"], facts["num_skipped"], facts["num_workers"]) == (2, 0, 2)
    assert facts["arms"]["targeted"] == {"num_samples": 120, "num_positive": 60, "origins": {"made": 120}}
    for name in ("seed", "targeted"):
        metrics = json.loads((folder / f"{name}-seed0" / "metrics.json").read_text())
        assert metrics["auprc"] > 0.9
        assert metrics["loss"][-1] < metrics["loss"][0]
        assert (metrics["num_samples"], metrics["num_heldout"], metrics["num_steps"]) == (120, 150, 24)
        scores = read_table(folder / f"{name}-seed0" / "scores.parquet")
        assert scores["sample_id"].to_pylist() == heldout(150)["sample_id"].to_pylist()
        assert len(set(scores["score"].to_pylist())) > 100  # not rounded into ties
    assert not (folder / "ray").exists()
    assert set(summarise_arms(folder)["arms"]) == {"seed", "targeted"}


def test_finished_fits_are_kept_and_only_the_others_run(undisturbed, model_folder):
    folder, _ = undisturbed
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*-seed0/*")}
    progress = Progress.silent()
    facts = train_arms(run_config(model_folder, seeds=[0, 1]), arms(), heldout(150), folder, progress)
    assert (facts["num_fits"], facts["num_skipped"], progress.count) == (4, 2, 4)
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*-seed0/*")}
    assert (scores_of(folder / "seed-seed1") != scores_of(folder / "seed-seed0")).any()
    again = train_arms(run_config(model_folder, seeds=[0, 1]), arms(), heldout(150), folder, progress)
    assert again["num_skipped"] == 4


def test_a_killed_worker_costs_nothing_but_time(undisturbed, model_folder, tmp_path):
    ended = threading.Event()
    killer = threading.Thread(target=kill_a_worker, args=(tmp_path, ended))
    killer.start()
    try:
        train_arms(run_config(model_folder), arms(), heldout(150), tmp_path, Progress.silent())
    finally:
        ended.set()
        killer.join()
    assert (tmp_path / "killed").is_file()
    for name in ("seed-seed0", "targeted-seed0"):
        np.testing.assert_array_equal(scores_of(tmp_path / name), scores_of(undisturbed[0] / name))


def kill_a_worker(folder: Path, ended: threading.Event) -> None:
    """Kill one training worker of this test's own Ray after the first of two fits; leave a file that says so."""
    first, second = (folder / name / MARKER for name in ("seed-seed0", "targeted-seed0"))
    while not first.is_file():
        if ended.wait(0.01):
            return
    workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in p.name()]
    max(workers, key=lambda process: process.pid).kill()
    if not second.is_file():
        (folder / "killed").touch()


def scores_of(folder: Path) -> np.ndarray:
    return read_table(folder / "scores.parquet")["score"].to_numpy()


def run_config(model: Path, **training) -> RunConfig:
    settings = {"seeds": [0], "num_workers": 2, "epochs": 3, "learning_rate": 5e-3, "batch_size": 16}
    return config_from_tree(
        {
            "name": "keywords",
            "model": {"path": str(model), "hook_layer": 1},
            "sae": {"path": "unused"},
            "corpora": {"seed": {"path": "unused"}},
            "training": settings | training,
        }
    )


def arms() -> dict[str, pa.Table]:
    return {"seed": arm(120, 1), "targeted": arm(120, 2)}


def arm(num_samples: int, seed: int) -> pa.Table:
    ids, texts, labels = written(num_samples, seed)
    return pa.table([ids, texts, labels, ["made"] * num_samples], schema=ARM)


def heldout(num_samples: int) -> pa.Table:
    ids, texts, labels = written(num_samples, seed=99)
    return pa.table({"sample_id": ids, "text": texts, "label": [str(label) for label in labels]})


def written(num_samples: int, seed: int) -> tuple[list[str], list[str], list[int]]:
    """Every second text holds keywords among its words and is positive."""
    rng = np.random.default_rng(seed)
    texts = []
    for row in range(num_samples):
        words = rng.choice(FILLER, size=rng.integers(8, 14)).astype(object)
        if row % 2 == 0:
            words[rng.choice(len(words), 3, replace=False)] = rng.choice(KEYWORDS)
        texts.append(" ".join(words))
    return [f"{seed}-{row:04}" for row in range(num_samples)], texts, [1 - row % 2 for row in range(num_samples)]


def word_tokenizer():
    """One token for each word; BOS and padding, no EOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ("<unk>", "<bos>", "<pad>", "user", *KEYWORDS, *FILLER)
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>", pad_token="<pad>")

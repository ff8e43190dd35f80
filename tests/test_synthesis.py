"""The closed loop: its rules on hand-made candidates, its laws on a keyword world, and once with real engines.

In the keyword world feature i is active in a text as often as the word `word<i>` stands in it, and the "generator"
draws words by the request's own seed. It disturbs nothing that the loop decides: only where texts come from.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from test_generation import random_llama

from fac_ray.artifacts import read_table
from fac_ray.config import ConfigError, RunConfig, SynthesisConfig, config_from_tree
from fac_ray.progress import Progress
from fac_ray.schema import CANDIDATES, GAPS, SAMPLES, SYNTHETIC
from fac_ray.synthesis import loop as synthesis
from fac_ray.synthesis.candidates import (
    Reply,
    Target,
    contrast_pair,
    first_requests,
    judge_attempt,
    rules_of,
    second_requests,
    text_key,
    untargeted_requests,
)
from fac_ray.synthesis.engines import engine_pool, generator_options, verifier_options

NUM_FEATURES = 6
WORDS = ["please", "order", "my", "card", "money", "back", *(f"word{i}" for i in range(NUM_FEATURES - 1))]
# no text ever holds word5: feature 5 cannot be filled


# ---- the keyword world ----


def config_of(**changes) -> RunConfig:
    few: dict[str, object] = {
        "first_candidates": 3,
        "second_candidates": 3,
        "samples_per_feature": 2,
        "max_attempts": 3,
    }
    tree = {
        "name": "keywords",
        "model": {"path": "unused", "hook_layer": 1},
        "sae": {"path": "unused"},
        "corpora": {"seed": {"path": "unused"}},
        "synthesis": few | changes,
    }
    return config_from_tree(tree)


def write_words(request) -> Reply:
    """Four to eight words drawn by the request's seed; now and then a refusal, an empty text or an error."""
    draw = random.Random(request.seed)
    kind = draw.random()
    if kind < 0.05:
        return Reply("", None, "generation error: too long")
    text = "I cannot help with that" if kind < 0.1 else " ".join(draw.choices(WORDS, k=draw.randint(4, 8)))
    num = float(text.split().count(f"word{request.feature_id}"))
    return Reply(text, None if request.feature_id is None else num, None)


def keyword_world(chunks):
    for index in reversed(range(len(chunks))):
        yield index, [write_words(request) for request in chunks[index]]


class PowerCut(RuntimeError):
    pass


def stopping_after(num_chunks: int):
    """The keyword world, until the power fails: at most `num_chunks` chunks are ever produced."""
    left = [num_chunks]

    def produce(chunks):
        for reply in keyword_world(chunks):
            if left[0] == 0:
                raise PowerCut
            left[0] -= 1
            yield reply

    return produce


def unreachable(_chunks):
    pytest.fail("nothing was to be produced")


TARGETS = [Target(i, tuple(f"word{i} span {j}" for j in range(5)), "") for i in range(NUM_FEATURES)]
SEED_TEXTS = ["give me  my money back", "order my card please", "please please please please"]


def close_gaps(folder: Path, produce=keyword_world, targets=TARGETS, **changes):
    loop = synthesis.Loop(rules_of(config_of(**changes)), folder, Progress.silent(), produce)
    return synthesis.close_gaps(loop, targets, SEED_TEXTS, SEED_TEXTS)


def tables(folder: Path) -> dict[str, pa.Table]:
    paths = sorted(folder.rglob("*.parquet"))
    return {str(path.relative_to(folder)): read_table(path) for path in paths}


# ---- laws of the loop ----


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, close_gaps(folder)


def test_accepted_samples_are_active_and_unique(uninterrupted):
    targeted = read_table(uninterrupted[0] / "targeted.parquet").to_pylist()
    assert targeted
    for row in targeted:
        assert row["text"].split().count(f"word{row['feature_id']}") == row["activation"] > 0
        assert (row["label"], row["harmful"]) == ("1", False)
    keys = [text_key(row["text"]) for row in targeted] + [text_key(text) for text in SEED_TEXTS]
    assert len(keys) == len(set(keys))


def test_every_request_is_stored_once_with_a_status(uninterrupted):
    folder, facts = uninterrupted
    rows = read_table(folder / "candidates").to_pylist()
    assert max(Counter(row["candidate_id"] for row in rows).values()) == 1
    assert {row["status"] for row in rows} == {"accepted", "rejected", "scored"}
    assert all((row["reason"] is not None) == (row["status"] == "rejected") for row in rows)
    targeted = [row for row in rows if row["feature_id"] is not None]
    assert len(targeted) == facts["num_requests"]
    assert {row["candidate_id"] for row in rows if row["status"] == "accepted"} == {
        row["sample_id"]
        for name in ("targeted", "untargeted")
        for row in read_table(folder / f"{name}.parquet").to_pylist()
    }
    assert not list((folder / "candidates" / "parts").glob("*"))


def test_facts_count_the_rows(uninterrupted):
    folder, facts = uninterrupted
    rows = [row for row in read_table(folder / "candidates").to_pylist() if row["feature_id"] is not None]
    accepted = Counter(row["feature_id"] for row in rows if row["status"] == "accepted")
    assert facts["num_features"] == NUM_FEATURES
    assert facts["num_filled"] == sum(num == 2 for num in accepted.values())
    assert facts["num_accepted"] == accepted.total()
    assert facts["num_rejected"] == sum(facts["rejected_by_reason"].values())
    assert facts["num_rejected"] == sum(row["status"] == "rejected" for row in rows)
    assert {"feature inactive", "refusal", "generation error"} <= set(facts["rejected_by_reason"])


def test_a_feature_is_asked_for_until_it_is_filled_or_given_up(uninterrupted):
    rows = [row for row in read_table(uninterrupted[0] / "candidates").to_pylist() if row["feature_id"] is not None]
    for feature_id in range(NUM_FEATURES):
        mine = [row for row in rows if row["feature_id"] == feature_id]
        num_attempts = 1 + max(row["attempt"] for row in mine)
        for attempt in range(num_attempts):
            before = sum(row["status"] == "accepted" for row in mine if row["attempt"] < attempt)
            assert before < 2
            assert sum(row["attempt"] == attempt and row["step"] == 1 for row in mine) == 3
        accepted = sum(row["status"] == "accepted" for row in mine)
        assert accepted == 2 or num_attempts == 3
    assert not any(row["status"] == "accepted" for row in rows if row["feature_id"] == 5)


def test_both_arms_have_as_many_samples(uninterrupted):
    targeted, untargeted = (read_table(uninterrupted[0] / f"{name}.parquet") for name in ("targeted", "untargeted"))
    assert targeted.num_rows == untargeted.num_rows == uninterrupted[1]["num_untargeted"]
    assert untargeted["feature_id"].null_count == untargeted["activation"].null_count == untargeted.num_rows
    assert targeted.schema.equals(SYNTHETIC)


def test_the_control_asks_no_more_often_than_the_targeted_arm(tmp_path):
    # Every untargeted text is the same: one is accepted, and no number of requests brings a second.
    def monotonous(chunks):
        for index, replies in keyword_world(chunks):
            same = Reply("always the very same words", None, None)
            pairs = zip(chunks[index], replies, strict=True)
            yield index, [same if request.feature_id is None else reply for request, reply in pairs]

    facts = close_gaps(tmp_path, monotonous)
    rows = read_table(tmp_path / "candidates").to_pylist()
    assert facts["num_accepted"] > facts["num_untargeted"] == 1
    assert sum(row["feature_id"] is None for row in rows) == facts["num_requests"]


def test_stopped_after_any_chunk_and_continued_equals_uninterrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(synthesis, "CHUNK_REQUESTS", 5)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    facts = close_gaps(whole)
    num_cuts = until_done(lambda _: close_gaps(cut, stopping_after(1)))
    assert num_cuts > 10
    assert close_gaps(cut, unreachable) == facts
    assert tables(cut) == tables(whole)


def test_stopped_after_any_file_and_continued_equals_uninterrupted(tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    facts = close_gaps(whole)
    write, left = synthesis.write_table, [0]

    def write_and_stop(path, table):
        write(path, table)
        left[0] -= 1
        if left[0] == 0:
            raise PowerCut

    def live(life: int):
        left[0] = life
        return close_gaps(cut)

    monkeypatch.setattr(synthesis, "write_table", write_and_stop)
    num_cuts = until_done(lambda life: live(1 + life % 3))
    assert num_cuts > 5
    left[0] = -1
    assert close_gaps(cut, unreachable) == facts
    assert tables(cut) == tables(whole)


def until_done(live) -> int:
    """How many lives end early before one comes through."""
    for life in range(200):
        try:
            live(life)
        except PowerCut:
            continue
        return life
    pytest.fail("it never comes through")


def test_a_finished_loop_produces_nothing_again(uninterrupted):
    folder, facts = uninterrupted
    before = tables(folder)
    assert close_gaps(folder, unreachable) == facts
    assert tables(folder) == before


def test_the_cut_into_chunks_changes_no_number(tmp_path, monkeypatch, uninterrupted):
    with pytest.raises(PowerCut):
        close_gaps(tmp_path, stopping_after(1), num_actors=4)
    monkeypatch.setattr(synthesis, "CHUNK_REQUESTS", 7)
    assert close_gaps(tmp_path) == uninterrupted[1]
    assert tables(tmp_path) == tables(uninterrupted[0])


def test_no_gap_starts_nothing(tmp_path):
    nothing = {name: schema.empty_table() for name, schema in {"gaps": GAPS, "seed": SAMPLES}.items()}
    facts = synthesis.synthesize(config_of(), nothing["gaps"], nothing["seed"], tmp_path, Progress.silent())
    assert (facts["num_features"], facts["num_requests"], facts["num_untargeted"]) == (0, 0, 0)
    for name, schema in {"targeted": SYNTHETIC, "untargeted": SYNTHETIC, "candidates": CANDIDATES}.items():
        path = tmp_path / (name if name == "candidates" else f"{name}.parquet")
        assert read_table(path).equals(schema.empty_table())


# ---- rules ----


RULES = rules_of(config_of())
TARGET = TARGETS[0]


def row(text: str, activation: float | None, step: int = 2, reason: str | None = None, name: str = "") -> dict:
    return {
        "candidate_id": name or text,
        "text": text,
        "activation": activation,
        "step": step,
        "status": "scored",
        "reason": reason,
    }


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        (row("a good text of word0", 1.0), None),
        (row("a text of nothing here", 0.0), "feature inactive"),
        (row("", None), "empty"),
        (row("I Cannot help with THAT word0", 1.0), "refusal"),
        (row("some word0 here.  More like: this", 1.0), "echo of the prompt"),
        (row("more and more like word0", 1.0), None),
        (row("only three words", 1.0), "too short"),
        (row("word0 " * 91, 1.0), "too long"),
        (row("word0  span\n0 ", 1.0), "too short"),
        (row("one  two three\nfour", 1.0), "duplicate"),
        (row("", None, reason="generation error: the prompt is empty"), "generation error: the prompt is empty"),
        (row("some text of four", None, reason="measurement error: x"), "measurement error: x"),
        (row("judged once and judged again", 1.0, reason="surplus"), None),
    ],
)
def test_a_candidate_is_rejected_for_a_reason(candidate, reason):
    [judged] = judge_attempt(TARGET, [candidate], 1, {text_key("one two three four")}, RULES)
    assert (judged["status"], judged["reason"]) == ("rejected" if reason else "accepted", reason)


def test_the_text_of_an_exemplar_is_no_sample():
    target = TARGET._replace(exemplars=("word0 in a longer span",))
    [judged] = judge_attempt(target, [row("word0 in a\nlonger span", 3.0)], 1, set(), RULES)
    assert judged["reason"] == "copy of an exemplar"


def test_activity_is_strict():
    rules = RULES._replace(threshold=0.5)
    judged = judge_attempt(TARGET, [row("at the very threshold", 0.5), row("just a bit above", 0.51)], 2, set(), rules)
    assert [r["status"] for r in judged] == ["rejected", "accepted"]


def test_the_strongest_are_accepted():
    rows = [row(f"text number {n} of word0", a) for n, a in enumerate([1.0, 3.0, 2.0, 3.0])]
    judged = judge_attempt(TARGET, rows, 2, set(), RULES)
    assert [r["status"] for r in judged] == ["rejected", "accepted", "rejected", "accepted"]
    assert [r["reason"] for r in judged] == ["surplus", None, "surplus", None]


def test_step_1_is_accepted_only_where_step_2_gives_nothing():
    first, second = row("first step with word0", 9.0, step=1), row("second step with word0", 1.0)
    fails = row("second step with nothing", 0.0)
    both = judge_attempt(TARGET, [first, second], 2, set(), RULES)
    assert [(r["step"], r["status"]) for r in both] == [(1, "scored"), (2, "accepted")]
    alone = judge_attempt(TARGET, [first, fails], 2, set(), RULES)
    assert [(r["step"], r["status"]) for r in alone] == [(1, "accepted"), (2, "rejected")]


def test_the_contrast_pair_is_the_strongest_and_the_weakest():
    rows = [row("middle", 2.0, 1), row("strong", 5.0, 1), row("weak", 1.0, 1), row("unmeasured", None, 1)]
    assert contrast_pair(TARGET, rows, RULES) == (("strong", "strong"), ("weak", "weak"))


def test_without_an_active_candidate_the_strongest_exemplar_stands_in():
    rows = [row("one", 0.0, 1), row("two", 0.0, 1)]
    assert contrast_pair(TARGET, rows, RULES) == (("exemplar:0", "word0 span 0"), ("one", "one"))
    requests = second_requests(TARGET, 0, rows, RULES)
    assert {(r.positive_id, r.negative_id) for r in requests} == {("exemplar:0", "one")}
    assert "More like: word0 span 0 Less like: one" in requests[0].messages[-1]["content"]


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [row("unmeasured", None, 1)],
        [row("alone", 2.0, 1)],
        [row("the same", 2.0, 1), row("the  same", 2.0, 1, name="other")],
        [row("strong", 2.0, 1), row("cannot help with that", 0.0, 1)],
    ],
)
def test_without_a_second_text_there_is_no_pair_and_no_step_2(rows):
    assert contrast_pair(TARGET, rows, RULES) is None
    assert second_requests(TARGET, 0, rows, RULES) == []


def test_requests_have_their_own_seeds_and_ids():
    requests = [r for target in TARGETS for attempt in range(3) for r in first_requests(target, attempt, RULES)]
    requests += untargeted_requests(SEED_TEXTS, 0, 20, RULES)
    assert len({r.candidate_id for r in requests}) == len({r.seed for r in requests}) == len(requests) == 74
    assert all(0 <= r.seed < 2**31 for r in requests)
    assert first_requests(TARGET, 0, RULES) == first_requests(TARGET, 0, RULES)
    assert first_requests(TARGET, 0, RULES) != first_requests(TARGET, 0, RULES._replace(seed=1))


def test_a_first_attempt_shows_the_strongest_spans_and_a_retry_others():
    shown = [first_requests(TARGET, attempt, RULES)[0].messages[-1]["content"] for attempt in range(6)]
    assert shown[0] == "Write a message like: word0 span 0 | word0 span 1 | word0 span 2"
    assert len(set(shown)) > 1


def test_untargeted_requests_draw_different_examples():
    shown = {r.messages[-1]["content"] for r in untargeted_requests([f"text {i}" for i in range(50)], 0, 20, RULES)}
    assert len(shown) == 20
    assert all(len(set(prompt.split(": ")[1].split(" | "))) == 3 for prompt in shown)


def test_harmful_texts_need_consent():
    with pytest.raises(ConfigError, match="allow_harmful"):
        rules_of(config_of(task="toxicity"))
    assert rules_of(config_of(task="toxicity", allow_harmful=True)).card.harmful


def test_examples_are_the_positive_seed_samples_cut_to_the_longest_allowed_text():
    samples = pa.Table.from_pylist(
        [
            {"sample_id": "b", "text": "yes " * 200, "label": "1"},
            {"sample_id": "a", "text": " short  yes", "label": "true"},
            {"sample_id": "c", "text": "no", "label": "0"},
        ],
        schema=SAMPLES,
    )
    assert synthesis._examples(samples, ["1", "true"], RULES) == ["short yes", " ".join(["yes"] * 90)]
    assert len(synthesis._examples(samples, ["other"], RULES)) == 3


def test_a_gap_without_exemplars_is_an_error(tmp_path):
    gaps = pa.Table.from_pylist([{"feature_id": 3, "rank": 0, "exemplars": []}], schema=GAPS)
    with pytest.raises(ValueError, match=r"features \[3\] have no exemplar"):
        synthesis.synthesize(config_of(), gaps, SAMPLES.empty_table(), tmp_path, Progress.silent())


# ---- where actors run ----


def test_a_generator_and_its_verifier_share_a_gpu():
    one = SynthesisConfig(gpu_memory_fraction=0.7)
    gpus = {"GPU": 1.0, "CPU": 4.0}
    assert generator_options(one, gpus)["num_gpus"] + verifier_options(one, gpus)["num_gpus"] == 1
    whole = SynthesisConfig(gpu_memory_fraction=1.0)
    assert (generator_options(whole, gpus)["num_gpus"], verifier_options(whole, gpus)["num_gpus"]) == (1, 1)
    parallel = SynthesisConfig(tensor_parallel=4)
    assert (generator_options(parallel, gpus)["num_gpus"], verifier_options(parallel, gpus)["num_gpus"]) == (0, 1)


def test_actors_fit_a_machine_with_few_cpus_and_no_gpu():
    three = SynthesisConfig(num_actors=3)
    options = [make(three, {"CPU": 2.0}) for make in (generator_options, verifier_options)]
    assert sum(3 * option["num_cpus"] for option in options) <= 2
    assert [option["num_gpus"] for option in options] == [0, 0]


# ---- once with real engines ----


@pytest.fixture(scope="module")
def random_world(tmp_path_factory) -> tuple[RunConfig, pa.Table, pa.Table]:
    """A random language model, a random Top-K SAE of 24 features, a lenient card, five gaps and twenty seed samples."""
    import torch
    import yaml

    folder = tmp_path_factory.mktemp("random")
    draw = torch.Generator().manual_seed(0)
    weight = {"W_enc": torch.randn(64, 24, generator=draw), "b_enc": torch.zeros(24), "b_dec": torch.zeros(64)}
    torch.save({"weight": weight, "config": {"d_inp": 64, "d_hide": 24, "topK": 2}}, folder / "sae.pth")
    card = {"name": "any", "description": "Any text.", "min_words": 1, "max_words": 60, "targeted": "Like: {spans}"}
    card |= {"contrast": "Like: {spans} + {positive} - {negative}", "untargeted": "Like: {spans}"}
    (folder / "any.yaml").write_text(yaml.safe_dump(card))
    tree = {
        "name": "random",
        "model": {"path": str(random_llama(folder / "model", context_tokens=1024)), "hook_layer": 1},
        "sae": {"path": str(folder / "sae.pth")},
        "corpora": {"seed": {"path": "unused"}},
        "synthesis": {
            "task": str(folder / "any.yaml"),
            "first_candidates": 3,
            "second_candidates": 3,
            "samples_per_feature": 2,
            "max_attempts": 2,
            "max_new_tokens": 24,
            "temperature": 1.0,
        },
    }
    gaps = [{"feature_id": 4 * i, "rank": i, "exemplars": [f"span {i} {j}" for j in range(4)]} for i in range(5)]
    seed = [{"sample_id": f"{i}", "text": f"seed text {i}", "label": "1"} for i in range(20)]
    return config_from_tree(tree), pa.Table.from_pylist(gaps, GAPS), pa.Table.from_pylist(seed, SAMPLES)


@pytest.mark.engine
@pytest.mark.timeout(900)  # two starts of vLLM, on whatever machine
@pytest.mark.usefixtures("ray_cluster")
def test_a_generator_that_dies_in_the_middle_changes_no_number(random_world, tmp_path, monkeypatch):
    config, gaps, seed = random_world
    monkeypatch.setattr(synthesis, "CHUNK_REQUESTS", 4)
    killed: list[int] = []

    def kill_once(_num: int = 1) -> None:
        """After the first chunk is stored, while the second and third are on their way."""
        if not killed:
            killed.extend(processes_of("ray::Generator"))
            for process in killed:
                os.kill(process, signal.SIGKILL)

    targets = [Target(row["feature_id"], tuple(row["exemplars"]), "") for row in gaps.to_pylist()]
    texts = seed["text"].to_pylist()
    with engine_pool(config) as produce:
        whole = synthesis.Loop(rules_of(config), tmp_path / "whole", Progress.silent(), produce)
        facts = synthesis.close_gaps(whole, targets, texts, texts)
        hurt = whole._replace(folder=tmp_path / "hurt", progress=Progress.silent())
        monkeypatch.setattr(hurt.progress, "advance", kill_once)
        assert synthesis.close_gaps(hurt, targets, texts, texts) == facts
    assert len(killed) == 1
    assert tables(hurt.folder) == tables(whole.folder)
    assert facts["num_accepted"] == facts["num_untargeted"] > 0
    assert synthesis.synthesize(config, gaps, seed, hurt.folder, Progress.silent()) == facts  # no engine is needed
    wait_until_none_is_left()


@pytest.mark.engine
@pytest.mark.usefixtures("ray_cluster")
def test_a_model_that_cannot_be_loaded_is_named_and_leaves_no_actor(random_world, tmp_path):
    config, gaps, seed = random_world
    absent = config.model_copy(update={"synthesis": config.synthesis.model_copy(update={"generator": "/no/such"})})
    with pytest.raises(RuntimeError, match=r"could not be started.*'/no/such'"):
        synthesis.synthesize(absent, gaps, seed, tmp_path, Progress.silent())
    wait_until_none_is_left()


def processes_of(title: str) -> list[int]:
    """Ids of the descendants of this process whose title starts so (Linux)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_text().startswith(title) and os.getpid() in ancestors(int(folder.name)):
                found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
    return found


def ancestors(process: int) -> Iterator[int]:
    while process > 1:
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        yield process


def wait_until_none_is_left() -> None:
    for _ in range(100):
        if not processes_of("ray::Generator") and not processes_of("ray::Verifier"):
            return
        time.sleep(0.1)
    pytest.fail("an actor is still there")

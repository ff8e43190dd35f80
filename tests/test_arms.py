"""Laws of the controlled experiment: arms are equal in everything but the samples that were replaced."""

from __future__ import annotations

import pyarrow as pa
import pytest

from fac_ray.schema import SAMPLES, SYNTHETIC, content_id, hash_of
from fac_ray.training.arms import ARM, build_arms

NAMES = ("seed", "untargeted", "targeted", "anchor")


def samples(prefix: str, labels: list[str | None]) -> pa.Table:
    rows = [
        {
            "sample_id": f"{prefix}-{row:03}",
            "content_id": content_id(f"{prefix} text {row}"),
            "text": f"{prefix} text {row}",
            "label": label,
            "source_file": f"{prefix}.jsonl",
            "source_row": row,
        }
        for row, label in enumerate(labels)
    ]
    return pa.Table.from_pylist(rows, schema=SAMPLES)


def synthetic(prefix: str, num_rows: int, label: str | None = "1") -> pa.Table:
    rows = [
        {
            "sample_id": f"{prefix}-{row:03}",
            "content_id": content_id(f"{prefix} text {row}"),
            "text": f"{prefix} text {row}",
            "label": label,
        }
        for row in range(num_rows)
    ]
    return pa.Table.from_pylist(rows, schema=SYNTHETIC)


SEED = samples("seed", ["1", "0", "0", None, "1", "0", "1", "1"])  # 7 labelled, 4 of them positive
BY_CONTENT = (6, 1, 4, 2, 0, 7, 5)
"""The labelled rows of the seed by the hash of their text."""
LABELS = [1, 0, 1, 0, 1, 1, 0]
ANCHOR = samples("anchor", ["1", "0"] * 10)


def built(num_targeted: int = 2, num_untargeted: int = 2, seed_value: int = 0, **changed) -> dict[str, pa.Table]:
    given = {
        "seed": SEED,
        "anchor": ANCHOR,
        "targeted": synthetic("targeted", num_targeted),
        "untargeted": synthetic("untargeted", num_untargeted),
        "positive": ("1",),
        "names": NAMES,
        "seed_value": seed_value,
    }
    return build_arms(**{**given, **changed})


def moved(rows: pa.Table) -> pa.Table:
    """The same samples with other ids, in another order."""
    ids = [hash_of(one) for one in rows["sample_id"].to_pylist()]
    return rows.set_column(0, "sample_id", pa.array(ids)).sort_by("sample_id")


def test_arms_do_not_depend_on_where_the_files_lie():
    elsewhere = built(
        seed=moved(SEED), anchor=moved(ANCHOR), targeted=moved(synthetic("targeted", 3)), num_untargeted=3
    )
    for name, arm in built(num_targeted=3, num_untargeted=3).items():
        assert arm["text"].to_pylist() == elsewhere[name]["text"].to_pylist()


def test_arms_have_the_rows_and_labels_of_the_labelled_seed():
    arms = built()
    assert list(arms) == list(NAMES)
    assert arms["seed"]["sample_id"].to_pylist() == [f"seed-{row:03}" for row in BY_CONTENT]
    for arm in arms.values():
        assert arm.schema.equals(ARM)
        assert arm["label"].to_pylist() == LABELS
        assert len(set(arm["sample_id"].to_pylist())) == 7


@pytest.mark.parametrize("seed_value", range(5))
def test_synthesized_arms_differ_from_the_seed_in_the_same_rows_only(seed_value):
    arms = {name: arm.to_pylist() for name, arm in built(seed_value=seed_value).items()}
    replaced = [row for row in range(7) if arms["targeted"][row] != arms["seed"][row]]
    assert len(replaced) == 2
    assert replaced == [row for row in range(7) if arms["untargeted"][row] != arms["seed"][row]]
    for name in ("targeted", "untargeted"):
        assert {arms[name][row]["origin"] for row in replaced} == {name}
        assert all(arms[name][row]["label"] == 1 for row in replaced)


def test_the_smaller_synthetic_set_decides_how_many_rows_are_replaced():
    arms = built(num_targeted=3, num_untargeted=1)
    assert [arms[name]["origin"].to_pylist().count(name) for name in ("targeted", "untargeted")] == [1, 1]


def test_an_arm_that_is_not_asked_for_limits_nothing():
    arms = built(num_targeted=3, num_untargeted=1, names=("seed", "targeted"))
    assert arms["targeted"]["origin"].to_pylist().count("targeted") == 3


def test_no_more_rows_are_replaced_than_the_seed_has_positives():
    arm = built(num_targeted=9, num_untargeted=9)["targeted"]
    assert arm["origin"].to_pylist() == ["targeted" if label else "seed" for label in LABELS]


def test_without_synthetic_samples_the_arms_equal_the_seed():
    arms = built(num_targeted=0, num_untargeted=0)
    assert arms["targeted"].equals(arms["seed"])


def test_synthetic_rows_without_a_positive_label_are_not_used():
    mixed = pa.concat_tables([synthetic("bad", 3, label="0"), synthetic("none", 2, label=None), synthetic("good", 1)])
    ids = built(targeted=mixed)["targeted"]["sample_id"].to_pylist()
    assert [one for one in ids if not one.startswith("seed")] == ["good-000"]


def test_the_draw_depends_on_the_seed_value_and_not_on_the_order_of_rows():
    forward = built(num_targeted=3)
    backward = built(
        targeted=synthetic("targeted", 3).take([2, 1, 0]),
        seed=SEED.take(list(range(8))[::-1]),
        anchor=ANCHOR.take(list(range(20))[::-1]),
    )
    assert all(forward[name].equals(backward[name]) for name in NAMES)
    others = [built(seed_value=other) for other in range(1, 6)]
    assert any(not other["targeted"].equals(forward["targeted"]) for other in others)
    assert any(not other["anchor"].equals(forward["anchor"]) for other in others)


def test_held_out_contents_are_in_no_arm():
    heldout = pa.concat_tables([SEED.slice(0, 1), ANCHOR.slice(0, 12)])
    with_synthetic = heldout.select(["text"]).append_column("content_id", heldout["content_id"])
    repeated = synthetic("targeted", 1).select(["text", "content_id"])
    arms = built(heldout=pa.concat_tables([with_synthetic, repeated]))
    texts = {text for arm in arms.values() for text in arm["text"].to_pylist()}
    assert texts.isdisjoint(with_synthetic["text"].to_pylist() + repeated["text"].to_pylist())
    assert {arm.num_rows for arm in arms.values()} == {6}
    assert arms["targeted"]["origin"].to_pylist().count("targeted") == 1


def test_a_held_out_chat_blocks_the_same_words_as_a_plain_text():
    chat = pa.table({"text": ["seed text 0"], "content_id": ["another-id"]})
    assert "seed text 0" not in built(heldout=chat)["seed"]["text"].to_pylist()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": samples("seed", [None, None])}, r"seed: no sample has a label.*corpora\.seed\.label"),
        ({"seed": samples("seed", ["0", "0"])}, r"seed: none of 2 labelled samples is positive; relevance\.positive"),
        ({"seed": samples("seed", ["1", "1"])}, r"seed: none of 2 labelled samples is negative"),
        ({"anchor": samples("anchor", [None] * 9)}, r"anchor: no sample has a label"),
        ({"anchor": samples("anchor", ["1", "0", "0", "0"])}, r"anchor: it has 1 positive samples.* needs 4"),
    ],
)
def test_unusable_tables_are_refused_with_what_to_change(changed, message):
    with pytest.raises(ValueError, match=message):
        built(**changed)

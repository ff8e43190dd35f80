"""Two runs measure with the same instrument, or what differs is said."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from fac_ray.config import ConfigError, config_from_tree
from fac_ray.decisions.instrument import SAMPLED_BYTES, digest_of, instrument_of, require_same

TREE = {
    "name": "one",
    "model": {"path": "m", "hook_layer": 1},
    "sae": {"path": "s"},
    "corpora": {"anchor": {"path": "a"}},
}


def instrument(*overrides, model=None, sae=None):
    return instrument_of(config_from_tree(TREE, overrides), {"model": {"digest": model}, "sae": {"digest": sae}})


def test_what_changes_no_activation_is_no_difference():
    others = (
        "name=two",
        "measure.num_exemplars=3",
        "measure.thresholds=[0,9]",
        "measure.batch_tokens=64",
        "run.seed=5",
    )
    require_same(instrument(), instrument(*others), Path("other"))
    require_same(instrument(), instrument("measure.tokens=content"), Path("other"))  # what the preset says anyway


@pytest.mark.parametrize("key", ["model.hook_layer=2", "model.dtype=bfloat16", "measure.threshold=1", "model.path=n"])
def test_what_changes_an_activation_is_named_with_both_values(key):
    with pytest.raises(ConfigError, match=rf"other: .*{key.partition('=')[0]}: \S+ here, \S+ there"):
        require_same(instrument(), instrument(key), Path("other"))


def test_files_are_the_same_by_their_contents_wherever_they_lie():
    mine = instrument(model="aaaa", sae="bbbb")
    require_same(mine, instrument("model.path=elsewhere", model="aaaa", sae="bbbb"), Path("other"))
    with pytest.raises(ConfigError, match=r"sae\.path: s \(contents bbbb\) here, s \(contents cccc\) there"):
        require_same(mine, instrument(model="aaaa", sae="cccc"), Path("other"))
    require_same(mine, instrument(), Path("older run, without contents"))


def test_a_digest_holds_for_a_copy_and_not_for_other_weights(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "weights").write_bytes(bytes(4 * SAMPLED_BYTES))
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    os.utime(tmp_path / "copy" / "weights", (0, 0))
    assert digest_of(tmp_path / "one") == digest_of(tmp_path / "two") == digest_of(tmp_path / "copy")
    for change in (lambda b: b"x" + b[1:], lambda b: b[:-1] + b"x", lambda b: b + b"x"):
        (tmp_path / "two" / "weights").write_bytes(change(bytes(4 * SAMPLED_BYTES)))
        assert digest_of(tmp_path / "two") != digest_of(tmp_path / "one")
    assert digest_of("a-hub/id") is None

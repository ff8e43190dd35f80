"""Lanes give what one thread gives, each with modules of its own on the same weights."""

from __future__ import annotations

import threading

import pytest
import torch
from tiny_llama import save_llama

from fac_ray.config import ModelConfig
from fac_ray.features.backbone import load_backbone
from fac_ray.features.lanes import Lanes, plan_lanes


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return load_backbone(ModelConfig(path=str(save_llama(tmp_path_factory.mktemp("llama"))), hook_layer=2), "cpu")


@pytest.mark.parametrize(
    ("num_threads", "num_batches", "num_lanes"),
    [
        (1, 100, 1),
        (2, 7, 1),
        (2, 8, 2),
        (6, 8, 2),
        (6, 12, 3),
        (6, 23, 3),
        (6, 24, 6),
        (7, 27, 1),
        (16, 40, 8),
        (4, 0, 1),
    ],
)
def test_each_lane_has_some_batches_and_all_lanes_as_many_threads(num_threads, num_batches, num_lanes):
    assert plan_lanes(num_threads, num_batches) == num_lanes


def test_batches_run_side_by_side_and_come_back_in_their_order(backbone, set_torch_threads):
    together = threading.Barrier(2, timeout=60)
    batches = [torch.arange(8)[None] + first for first in range(6)]

    def run(own, batch):
        together.wait()  # passes only if two batches are under way
        return own, torch.get_num_threads(), own.residual(batch)

    set_torch_threads(4)
    found = list(Lanes(backbone, 4).map(run, batches, num_lanes=2))
    assert torch.get_num_threads() == 4
    assert _threads_of_a_new_thread() == 4
    for (_, num_threads, residual), batch in zip(found, batches, strict=True):
        assert num_threads == 2
        torch.testing.assert_close(residual, backbone.residual(batch))
    owners = {id(own): own for own, _, _ in found}
    assert len(owners) == 2
    assert id(backbone) in owners
    weights = [[tensor.data_ptr() for tensor in own.parameters()] for own in owners.values()]
    assert weights[0] == weights[1]


def test_an_error_of_one_batch_ends_the_work_and_leaves_torch_as_it_was(backbone, set_torch_threads):
    def run(_own, batch):
        if batch == 3:
            raise ValueError("batch 3")
        return batch

    lanes = Lanes(backbone, 2)
    set_torch_threads(2)
    with pytest.raises(ValueError, match="batch 3"):
        list(lanes.map(run, range(20), num_lanes=2))
    assert torch.get_num_threads() == _threads_of_a_new_thread() == 2
    assert list(lanes.map(lambda _own, batch: batch, range(20), num_lanes=2)) == list(range(20))


def _threads_of_a_new_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]

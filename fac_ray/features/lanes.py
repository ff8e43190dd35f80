"""Batches side by side on the cores of a CPU, a lane for each: modules of its own on the same weights.

Threads that share every product wait for each other after each, and what cannot be shared leaves all but one of them
idle. Lanes meet only when the work is done. The price is that the last batches may leave some of them without work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

import torch

from fac_ray.features.backbone import Backbone

Batch = TypeVar("Batch")
Result = TypeVar("Result")

MIN_BATCHES = 4
"""Batches for each lane: with fewer, the lanes that end first would wait long for the last."""


class Lanes:
    """The lanes of one backbone, which are made when they are first needed, and stay: a new thread is slow to find its
    memory, and an old one leaves its own behind."""

    def __init__(self, backbone: Backbone, num_threads: int) -> None:
        """`backbone`: on a CPU; `num_threads`: of torch, which the lanes share."""
        self._backbones, self._num_threads = [backbone], num_threads
        self._threads: ThreadPoolExecutor | None = None

    def map(
        self, function: Callable[[Backbone, Batch], Result], batches: Sequence[Batch], num_lanes: int
    ) -> Iterator[Result]:
        """`function(backbone, batch)` of each batch, in the order of the batches."""
        self._backbones += [self._backbones[0].sharing_weights() for _ in range(num_lanes - len(self._backbones))]
        self._threads = self._threads or ThreadPoolExecutor(self._num_threads, "lane")
        free: SimpleQueue[Backbone] = SimpleQueue()
        for backbone in self._backbones[:num_lanes]:
            free.put(backbone)

        def run(batch: Batch) -> Result:
            backbone = free.get()
            torch.set_num_threads(self._num_threads // num_lanes)
            try:
                return function(backbone, batch)
            finally:
                free.put(backbone)

        try:
            yield from self._threads.map(run, batches)
        finally:
            torch.set_num_threads(self._num_threads)  # threads that start later take the number that was set last


def plan_lanes(num_threads: int, num_batches: int) -> int:
    """Number of lanes: the largest divisor of the number of threads that leaves each lane `MIN_BATCHES` batches."""
    return max(
        n for n in range(1, num_threads + 1) if num_threads % n == 0 and (n == 1 or n * MIN_BATCHES <= num_batches)
    )

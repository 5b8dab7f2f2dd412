"""Several threads at once on one build of the kernels get the same as one after another.

The pipeline prepares the policy's picture in one thread and the segmenter's in another, and programs ask from threads
of their own. On a device all of them share one stream, one pool of memory, one staging area and the loaded kernels.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from host_device import HostDriver
from kernel_builds import BUILDS, kernel_build

from segzero_rt.answer_format import VISION_REASONER
from segzero_rt.device import Device
from segzero_rt.kernels import backend
from segzero_rt.kernels.backend import Kernels, resolve_kernels
from segzero_rt.kernels.parse_prompts import parse_prompts
from segzero_rt.kernels.postprocess_masks import postprocess_masks
from segzero_rt.kernels.preprocess import Frame, InputTensor, preprocess
from segzero_rt.kernels.sample_token import sample_token

NORMAL: dict[str, Any] = {"image_mean": (0.5, 0.4, 0.3), "image_std": (0.2, 0.3, 0.25)}
PATCHES = InputTensor(size_hw=(28, 42), patch_size=7, merge_size=2, **NORMAL)
PLANES = InputTensor(size_hw=(33, 31), **NORMAL)
ROUNDS, THREADS = 6, 4
Job = Callable[[Kernels], list[np.ndarray]]


@pytest.fixture(autouse=True)
def _threads_take_turns_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def _picture(size_hw: tuple[int, int], tensor: InputTensor) -> Job:
    frame = Frame.rgb(np.random.default_rng(size_hw[0]).integers(0, 256, (*size_hw, 3), np.uint8))
    return lambda kernels: [preprocess(frame, tensor, kernels=kernels)]


def _replies(count: int) -> Job:
    texts = [
        f'<think>{"x" * n}</think><answer>[{{"bbox_2d": [{n}, 2, {n + 50}, 90], "point_2d": [{n + 3}, 9]}}]'.encode()
        for n in range(count)
    ]

    def read(kernels: Kernels) -> list[np.ndarray]:
        parsed = parse_prompts(
            texts, answer_format=VISION_REASONER, input_size_hw=(99, 99), source_size_hw=(333, 101), kernels=kernels
        )
        return [parsed.status, parsed.thinking_spans, parsed.boxes_xyxy, parsed.points_xy, parsed.point_offsets]

    return read


def _masks(size_hw: tuple[int, int]) -> Job:
    logits = np.random.default_rng(size_hw[1]).normal(0, 2, (2, 19, 23)).astype(np.float32)

    def make(kernels: Kernels) -> list[np.ndarray]:
        made = postprocess_masks(logits, size_hw, max_hole_area=3, max_sprinkle_area=3, kernels=kernels)
        return [made.masks, made.boxes_xyxy, made.areas, made.stability, np.array(made.rle_counts)]

    return make


def _tokens(kernels: Kernels) -> list[np.ndarray]:
    logits = np.random.default_rng(8).normal(0, 3, (3, 301)).astype(np.float32)
    drawn = sample_token(logits, temperature=0.9, top_p=0.8, seeds=np.arange(3, dtype=np.uint64), kernels=kernels)
    return [drawn.token_ids, drawn.states]


JOBS: list[Job] = [
    *(_picture((57, 43), PATCHES), _picture((91, 64), PLANES), _picture((20, 88), PATCHES)),
    *(_replies(3), _replies(40), _masks((61, 47)), _masks((5, 200)), _tokens),
]


@pytest.mark.parametrize("build", BUILDS)
def test_threads_get_what_one_would(build: str) -> None:
    kernels = kernel_build(build)
    expected = [job(kernels) for job in JOBS]
    with ThreadPoolExecutor(THREADS) as pool:
        tasks = [(index, pool.submit(JOBS[index], kernels)) for _ in range(ROUNDS) for index in range(len(JOBS))]
    for index, task in tasks:
        for one, other in zip(task.result(), expected[index], strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("build", [param for param in BUILDS if param.values[0] not in ("reference", "host")])
def test_waits_of_all_threads_are_counted_and_memory_is_taken_again(build: str) -> None:
    kernels = kernel_build(build)
    assert kernels.device is not None
    device = kernels.device.device
    before = device.num_host_waits
    for job in JOBS:
        job(kernels)
    of_one_round = device.num_host_waits - before
    with ThreadPoolExecutor(THREADS) as pool:  # so that the pool has settled
        list(pool.map(lambda job: job(kernels), JOBS * ROUNDS))
    before, allocations = device.num_host_waits, device.num_allocations
    for _ in range(ROUNDS):
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda job: job(kernels), JOBS))
    assert device.num_host_waits - before == ROUNDS * of_one_round
    most_at_once = THREADS * 40  # buffers of one job
    assert device.num_allocations - allocations < most_at_once, "threads share the pool; nothing is lost"


def test_no_wait_is_lost_where_threads_change_while_one_is_counted() -> None:
    class SlowToSay(HostDriver):
        def is_pinned(self, array: np.ndarray) -> bool:
            time.sleep(1e-4)
            return super().is_pinned(array)

    device, values = Device(SlowToSay()), np.arange(9)
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda _: device.to_device(values), range(100)))
    assert device.num_host_waits == 100


def test_threads_that_ask_first_get_one_build(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Kernels] = []
    together = threading.Barrier(THREADS)

    def open_device() -> Kernels:
        opened.append(Kernels(name="cuda", detail=f"device {len(opened)}"))
        return opened[-1]

    def ask(_: int) -> Kernels:
        together.wait()
        return resolve_kernels("cuda")

    monkeypatch.setattr(backend, "open_device", open_device)
    for _ in range(20):
        backend.chosen_kernels.cache_clear()
        opened.clear()
        with ThreadPoolExecutor(THREADS) as pool:
            assert len({id(kernels) for kernels in pool.map(ask, range(THREADS))}) == len(opened) == 1
    backend.chosen_kernels.cache_clear()

"""parse_prompts on much at once: many objects, many threads, and time that grows with the text and no faster."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import pytest
from kernel_builds import NEEDS_COMPILER

from benchmarks.answer_mutants import mutants
from benchmarks.kernel_fuzz import FIELDS, seeds
from segzero_rt.answer_format import VISION_REASONER
from segzero_rt.answer_parser import MAX_OBJECTS, MODES
from segzero_rt.kernels.backend import Kernels, resolve_kernels
from segzero_rt.kernels.parse_prompts import parse_prompts

SQUARE: dict[str, Any] = {"answer_format": VISION_REASONER, "input_size_hw": (840, 840), "source_size_hw": (840, 840)}
OBJECT = '{"bbox_2d": [120, 130, 260, 340], "point_2d": [190, 235]}'


@pytest.fixture(scope="module")
def host() -> Kernels:
    return resolve_kernels("host")


@NEEDS_COMPILER
def test_results_grow_with_the_batch(host: Kernels) -> None:
    many = f"<answer>[{', '.join([OBJECT] * MAX_OBJECTS)}]</answer>".encode()
    read = parse_prompts([many] * 300, **SQUARE, kernels=host)
    assert read.object_offsets[-1] == 300 * MAX_OBJECTS and (read.boxes_xyxy == read.boxes_xyxy[0]).all()


@NEEDS_COMPILER
def test_threads_do_not_share_memory(host: Kernels) -> None:
    replies = list(islice(mutants(seeds(), 5), 400))
    expected = parse_prompts(replies, **SQUARE, kernels=host)
    with ThreadPoolExecutor(4) as pool:
        for read in pool.map(lambda _: parse_prompts(replies, **SQUARE, kernels=host), range(16)):
            assert all(np.array_equal(getattr(read, field), getattr(expected, field)) for field in FIELDS)


@NEEDS_COMPILER
@pytest.mark.parametrize(
    "unit", ["[", "[{", "<answer>", "<", '<answer>["', '" ', "\\", "[x ", "[/* ", "{}", '"point":1,', '{"a":']
)
def test_time_is_linear(unit: str, host: Kernels) -> None:
    reply = b"<answer>[" + (unit * (2_000_000 // len(unit))).encode()
    for mode in MODES:
        begin = time.process_time()
        parse_prompts([reply], **SQUARE, mode=mode, kernels=host)
        # Two megabytes take milliseconds; anything quadratic would take minutes.
        assert time.process_time() - begin < 5, mode

"""The whole pipeline gives the same on every build of the kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_builds import BUILDS, forced_kernels

from segzero_rt.pipeline import SegZero
from segzero_rt.policy import Generation

PICTURE = np.random.default_rng(0).integers(0, 256, (91, 121, 3), np.uint8)
REPLIES = {
    "two objects": '<think> é </think><answer>[{"bbox_2d": [5, 6, 60, 40], "point_2d": [20, 20]}, '
    '{"bbox_2d": [1, 2, 30, 50]}]</answer>',
    "none": "<think>nothing</think><answer>[]</answer>",
    "no answer": "I do not know.",
}
_first: dict[str, dict[str, Any]] = {}
"""What the first build said, by reply."""


@pytest.fixture(scope="module")
def pipeline(tiny_bundle_path: Path) -> SegZero:
    return SegZero.load(tiny_bundle_path, backend="cpu", threads=1)


@pytest.fixture
def saying(pipeline: SegZero, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], SegZero]:
    """The pipeline with a policy whose reply is given; all else is real."""

    def make(text: str) -> SegZero:
        def ask(view: object, question: str, **options: object) -> Generation:
            return Generation(text=text, token_ids=(), finished=True, timings_ms={"question": 1.0, "decode": 2.0})

        monkeypatch.setattr(pipeline.policy, "ask", ask)
        return pipeline

    return make


@pytest.mark.parametrize("name", REPLIES)
@pytest.mark.parametrize("build", BUILDS)
def test_answers_masks_and_run_lengths_are_the_same(build: str, name: str, saying: Callable[[str], SegZero]) -> None:
    with forced_kernels(build):
        result = saying(REPLIES[name])(PICTURE, "the red mug")
        document = result.to_json()
    del document["timings_ms"]
    document["masks"] = result.masks.tobytes()
    assert document == _first.setdefault(name, document)
    assert len(result) == {"two objects": 2}.get(name, 0)

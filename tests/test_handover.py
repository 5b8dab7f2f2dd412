"""What lies between the operations: the device's kernels do what the reference and the host's pipeline do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernel_builds import DEVICE_BUILDS, kernel_build

from segzero_rt.answer import Prompt
from segzero_rt.answer_format import FORMATS
from segzero_rt.answer_geometry import MAX_POINTS
from segzero_rt.kernels.device_kernels import DeviceKernels
from segzero_rt.kernels.handover import choose_masks, labels_of, place_prompts
from segzero_rt.kernels.handover_device import enqueue_choose_masks, enqueue_place_prompts
from segzero_rt.kernels.parse_prompts_device import PROMPT, REPLY
from segzero_rt.segmenter import choose_masks as choose_on_host
from segzero_rt.segmenter import points_of
from segzero_rt.segmenter_prompt import SegmenterPrompt


@pytest.fixture(scope="module", params=DEVICE_BUILDS)
def kernels(request: pytest.FixtureRequest) -> DeviceKernels:
    found = kernel_build(request.param).device
    assert found is not None
    return found


def packed(prompts: list[Prompt], num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """A reply with these prompts as a parser on a device leaves it; noise behind them."""
    head, rows = np.zeros(1, REPLY), np.frombuffer(b"\x5a" * (num_rows * PROMPT.itemsize), PROMPT).copy()
    head["num_prompts"] = len(prompts)
    for row, prompt in zip(rows, prompts, strict=False):
        row["box_xyxy"], row["num_points"] = prompt.box_xyxy, len(prompt.points_xy)
        row["points_xy"][: len(prompt.points_xy)] = np.array(prompt.points_xy).reshape(-1, 2)
    return head, rows


BOXES = [(0, 0, 1, 1), (3, 5, 639, 479), (100, 0, 101, 480), (7, 7, 9, 1 << 20)]
SIZES = [((384, 384), (480, 640)), ((64, 64), (1, 1)), ((1024, 1024), (4319, 7679)), ((63, 1021), (333, 1 << 20))]


@pytest.mark.parametrize(("input_size_hw", "source_size_hw"), SIZES)
@pytest.mark.parametrize("num_points", [0, 1, 2, MAX_POINTS])
def test_whole_prompts_are_placed_as_the_host_places_them(
    input_size_hw: tuple[int, int], source_size_hw: tuple[int, int], num_points: int, kernels: DeviceKernels
) -> None:
    prompts = [
        Prompt(box_xyxy=box, points_xy=tuple((box[0] + k, box[1] + 3 * k) for k in range(num_points))) for box in BOXES
    ]
    for num_rows in (1, 3, 4, 7):
        head, rows = packed(prompts, num_rows)
        sizes: dict[str, Any] = {"input_size_hw": input_size_hw, "source_size_hw": source_size_hw}
        placed = place_prompts(head, rows, num_points=num_points, **sizes)
        known = [SegmenterPrompt.of(prompt) for prompt in prompts[:num_rows]]
        np.testing.assert_array_equal(placed[: len(known)], points_of(known, input_size_hw, source_size_hw))
        assert known[0].labels == labels_of(num_points)
        assert np.isfinite(placed).all()
        np.testing.assert_array_equal(on_device(kernels, head, rows, num_points, sizes), placed)


def on_device(
    kernels: DeviceKernels, head: np.ndarray, rows: np.ndarray, num_points: int, sizes: dict[str, Any]
) -> np.ndarray:
    device = kernels.device
    points_xy = device.empty((len(rows), num_points + 3, 2), np.float32)
    enqueue_place_prompts(kernels, device.to_device(head), device.to_device(rows), points_xy=points_xy, **sizes)
    return device.to_host(points_xy)[0]


def test_prompts_that_are_not_whole_are_filled_up_alike(kernels: DeviceKernels) -> None:
    prompts = [
        Prompt(box_xyxy=(10, 20, 31, 40)),
        Prompt(box_xyxy=(1, 2, 3, 4), points_xy=((1, 2),)),
        Prompt(box_xyxy=(1, 2, 9, 9), points_xy=((2, 3), (4, 5), (6, 7))),
    ]
    sizes: dict[str, Any] = {"input_size_hw": (64, 64), "source_size_hw": (128, 128)}
    head, rows = packed(prompts, 5)
    placed = place_prompts(head, rows, num_points=2, **sizes)
    assert placed[0, 2:].tolist() == [[10, 15], [10, 15], [0, 0]], "the box's middle"
    assert placed[1, 2:].tolist() == [[0.5, 1], [0.5, 1], [0, 0]], "the last point once more"
    assert placed[2, 2:].tolist() == [[1, 1.5], [2, 2.5], [0, 0]], "no more than there are places"
    assert placed[4].tolist() == [[0, 0], [64, 64], [32, 32], [32, 32], [0, 0]], "the whole picture"
    np.testing.assert_array_equal(on_device(kernels, head, rows, 2, sizes), placed)


@pytest.mark.parametrize("num_points", [-1, MAX_POINTS + 1])
def test_more_points_than_a_prompt_holds_are_refused(num_points: int, kernels: DeviceKernels) -> None:
    head, rows = packed([], 2)
    sizes: dict[str, Any] = {"input_size_hw": (64, 64), "source_size_hw": (128, 128)}
    with pytest.raises(ValueError, match=f"up to {MAX_POINTS} points"):
        place_prompts(head, rows, num_points=num_points, **sizes)
    with pytest.raises(ValueError, match=f"up to {MAX_POINTS} points"):
        on_device(kernels, head, rows, num_points, sizes)


SCORES = [
    ("best in the middle", [0.1, 0.2, 0.9, 0.3]),
    ("mask 0 never", [0.9, 0.2, 0.1, 0.3]),
    ("of equals the first", [0.5, 0.4, 0.4, 0.4]),
    ("below zero", [-1.0, -3.0, -2.0, -2.5]),
    ("infinite", [0.0, -np.inf, np.inf, np.inf]),
    ("no number counts as the largest", [0.0, 0.9, np.nan, 1.0]),
    ("no numbers at all", [np.nan] * 4),
]


@pytest.mark.parametrize("size_hw", [(1, 1), (5, 7), (16, 16), (33, 31)])
def test_the_best_of_three_masks_is_chosen(size_hw: tuple[int, int], kernels: DeviceKernels) -> None:
    device = kernels.device
    scores = np.array([row for _, row in SCORES], np.float32)
    masks = np.random.default_rng(0).normal(size=(len(scores), 4, *size_hw)).astype(np.float32)
    expected = choose_masks(masks, scores)
    for one, other in zip(expected, choose_on_host(masks, scores, multimask=True), strict=True):
        np.testing.assert_array_equal(one, other)
    logits, chosen = device.empty((len(scores), *size_hw), np.float32), device.empty((len(scores),), np.float32)
    enqueue_choose_masks(kernels, device.to_device(masks), device.to_device(scores), logits=logits, scores=chosen)
    for found, wanted in zip(device.to_host(logits, chosen), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_formats_ask_for_points_that_a_prompt_holds() -> None:
    assert all(form.max_points <= MAX_POINTS for form in FORMATS.values())

"""Overlay pictures: any size, any text, nothing found; and what is drawn lies where the result says."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from segzero_rt.answer import Answer, AnswerStatus, Prompt
from segzero_rt.caption import drawable, load_font, wrap
from segzero_rt.overlay import MIN_SIDE_PX, draw_overlay, instance_color


def result(masks: np.ndarray, boxes: list[tuple[float, float, float, float]] | None = None, **answer: Any) -> Any:
    """A stand-in with the fields of `Segmentation` that are drawn."""
    if boxes is None:
        boxes = [
            (float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1))
            for ys, xs in (np.nonzero(mask) for mask in masks)
        ]
    prompts = tuple(Prompt(box_xyxy=box, points_xy=(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2),)) for box in boxes)
    answer = {"status": AnswerStatus.OK if prompts else AnswerStatus.NONE_FOUND, "prompts": prompts, **answer}
    return SimpleNamespace(
        masks=masks,
        boxes_xyxy=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        scores=np.full(len(boxes), 0.9, dtype=np.float32),
        answer=Answer(**answer),
    )


def nothing(size_hw: tuple[int, int], **answer: Any) -> Any:
    return result(np.zeros((0, *size_hw), dtype=bool), **answer)


@pytest.mark.parametrize("size_hw", [(1, 1), (1, 2), (2, 1), (1, 1000), (1000, 1), (7, 13), (280, 280), (719, 721)])
@pytest.mark.parametrize("found", [0, 1, 3])
def test_any_size(size_hw: tuple[int, int], found: int) -> None:
    image = np.full((*size_hw, 3), 128, dtype=np.uint8)
    before = image.copy()
    drawn = draw_overlay(image, result(np.ones((found, *size_hw), dtype=bool), thinking="because"), "the thing")
    assert drawn.dtype == np.uint8 and drawn.ndim == 3 and drawn.shape[2] == 3
    assert max(drawn.shape[:2]) >= MIN_SIDE_PX
    np.testing.assert_array_equal(image, before)


def test_4k_is_drawn_at_its_size_within_seconds() -> None:
    mask = np.zeros((1, 2160, 3840), dtype=bool)
    mask[0, 500:1500, 1000:2500] = True
    start = time.perf_counter()
    drawn = draw_overlay(np.full((2160, 3840, 3), 90, dtype=np.uint8), result(mask), "x", caption=False)
    assert drawn.shape == (2160, 3840, 3)
    assert time.perf_counter() - start < 30  # 2 s on an idle core; a pass over the whole picture per step is minutes


def test_fills_the_mask_and_leaves_the_rest_untinted() -> None:
    mask = np.zeros((1, 800, 1000), dtype=bool)
    mask[0, 200:600, 300:700] = True
    image = np.full((800, 1000, 3), 100, dtype=np.uint8)
    drawn = draw_overlay(image, result(mask), caption=False)
    assert drawn.shape == image.shape
    tint = np.array(instance_color(0), dtype=float)
    np.testing.assert_allclose(drawn[300, 400], 100 + (tint - 100) * 0.4, atol=2)
    outside = drawn[700:, :].reshape(-1, 3)
    assert (outside == outside[0]).all() and 70 <= outside[0, 0] <= 85 and outside[0].std() == 0
    edge = drawn[200:202, 400:450].reshape(-1, 3)
    np.testing.assert_allclose(edge.mean(axis=0), tint, atol=40)


def test_instances_have_colours_of_their_own() -> None:
    colors = [instance_color(index) for index in range(24)]
    assert len(set(colors)) == 24
    assert all(max(color) > 180 for color in colors)
    masks = np.zeros((2, 720, 720), dtype=bool)
    masks[0, 100:300, 100:300] = True
    masks[1, 400:600, 400:600] = True
    drawn = draw_overlay(np.zeros((720, 720, 3), dtype=np.uint8), result(masks), caption=False)
    np.testing.assert_allclose(drawn[150, 150], np.array(colors[0]) * 0.4, atol=2)
    np.testing.assert_allclose(drawn[550, 450], np.array(colors[1]) * 0.4, atol=2)


def test_nothing_found_changes_the_corner_note_only() -> None:
    image = np.random.default_rng(0).integers(0, 255, (720, 900, 3), dtype=np.uint8)
    drawn = draw_overlay(image, nothing((720, 900)), caption=False)
    changed = (drawn != image).any(axis=2)
    assert changed[:60, :300].any()
    changed[:60, :300] = False
    assert not changed.any()


@pytest.mark.parametrize("status", [one for one in AnswerStatus if one is not AnswerStatus.OK])
def test_every_other_status_is_noted(status: AnswerStatus) -> None:
    image = np.zeros((720, 720, 3), dtype=np.uint8)
    assert draw_overlay(image, nothing((720, 720), status=status), caption=False).any()


@pytest.mark.parametrize(
    "box",
    [(-50.0, -50.0, 5000.0, 5000.0), (900.0, 900.0, 901.0, 901.0), (3.0, 3.0, 3.25, 3.25), (-1e9, -1e9, 1e9, 1e9)],
    ids=["larger than the picture", "outside", "thinner than a pixel", "far outside"],
)
def test_boxes_and_points_outside_the_picture(box: tuple[float, float, float, float]) -> None:
    masks = np.zeros((1, 50, 60), dtype=bool)  # the segmenter found no pixel for the prompt
    drawn = draw_overlay(np.zeros((50, 60, 3), dtype=np.uint8), result(masks, [box]))
    assert drawn.any()


def test_points_far_outside_are_left_out() -> None:
    prompt = Prompt(box_xyxy=(1, 1, 5, 5), points_xy=((1e9, 3), (-1e30, 1e30), (3, 3)))
    found = result(np.zeros((1, 50, 60), dtype=bool), [(1, 1, 5, 5)], prompts=(prompt,))
    assert draw_overlay(np.zeros((50, 60, 3), dtype=np.uint8), found).any()


def test_caption_grows_with_the_text_but_not_without_end() -> None:
    image, found = np.zeros((720, 720, 3), dtype=np.uint8), nothing((720, 720))
    heights = [draw_overlay(image, found, question).shape[0] for question in ("", "a mug", "a mug " * 30, "x" * 10_000)]
    assert heights[0] == 720 < heights[1] < heights[2] <= heights[3] < 1000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("  two\n\twords \x00\x1b", "two words"),
        ("größte Tasse \u2013 é", "grosste Tasse - e"),
        ("车🚗", "??"),
        ("right\u202eleft", "rightleft"),
        ("e\u0301", "e"),
        ("\ud800", ""),
        ("", ""),
    ],
    ids=["ascii", "controls", "accents", "no glyph", "direction mark", "combining", "surrogate", "empty"],
)
def test_text_becomes_drawable(text: str, expected: str) -> None:
    assert drawable(text).rstrip() == expected


def test_lines_fit_their_width() -> None:
    text = "the quick brown fox " * 20 + "w" * 200
    lines = wrap(text, size_px=16, width_px=200, max_lines=1000)
    assert all(load_font(16).getlength(line) <= 200 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    cut = wrap(text, size_px=16, width_px=200, max_lines=3)
    assert len(cut) == 3 and cut[-1].endswith("...") and load_font(16).getlength(cut[-1]) <= 200
    assert wrap("mmm", size_px=16, width_px=1, max_lines=9) == ["m", "m", "m"]


@pytest.mark.parametrize(
    ("image", "masks"),
    [
        (np.zeros((4, 4), dtype=np.uint8), np.zeros((0, 4, 4), dtype=bool)),
        (np.zeros((4, 4, 3), dtype=np.float32), np.zeros((0, 4, 4), dtype=bool)),
        (np.zeros((4, 4, 3), dtype=np.uint8), np.zeros((0, 4, 5), dtype=bool)),
    ],
    ids=["grey", "float", "masks of another size"],
)
def test_refuses_what_it_cannot_draw(image: np.ndarray, masks: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected"):
        draw_overlay(image, result(masks))

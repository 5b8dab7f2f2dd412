"""From an object as the policy wrote it to a prompt in the source picture. The same rules for every mode and format.

Swapped corners are put in order. The box is clipped to the policy's picture; an object with an infinite number, or with
less than one pixel left in width or height, is no object. Points outside the clipped box are dropped: a box alone is a
sound prompt, a wrong point is not. Then come source pixels, by the format's rounding; a box that rounds to nothing
keeps one pixel, since the object does lie there.
"""

from __future__ import annotations

import math

from segzero_rt.answer import Prompt
from segzero_rt.answer_format import AnswerFormat
from segzero_rt.answer_objects import RawObject

MAX_POINTS = 8
"""Points kept of one object."""


def to_prompt(
    raw: RawObject, answer_format: AnswerFormat, input_size_hw: tuple[int, int], source_size_hw: tuple[int, int]
) -> Prompt | None:
    """Orders, clips and scales one object; None if nothing of it lies in the picture."""
    if not all(map(math.isfinite, raw.box)):
        return None
    (height, width), (source_height, source_width) = input_size_hw, source_size_hw
    left, right = _clipped_span(raw.box[0], raw.box[2], width)
    top, bottom = _clipped_span(raw.box[1], raw.box[3], height)
    if right - left < 1 or bottom - top < 1:
        return None
    x_factor, y_factor = source_width / width, source_height / height
    to_source = answer_format.to_source
    x0, x1 = _pixel_span(to_source(left, x_factor), to_source(right, x_factor), source_width)
    y0, y1 = _pixel_span(to_source(top, y_factor), to_source(bottom, y_factor), source_height)
    points = [
        (float(min(to_source(x, x_factor), source_width - 1)), float(min(to_source(y, y_factor), source_height - 1)))
        for x, y in raw.points
        if left <= x <= right and top <= y <= bottom
    ]
    return Prompt(box_xyxy=(float(x0), float(y0), float(x1), float(y1)), points_xy=tuple(points[:MAX_POINTS]))


def _clipped_span(first: float, second: float, size: int) -> tuple[float, float]:
    low, high = (first, second) if first <= second else (second, first)
    return min(max(low, 0.0), float(size)), min(max(high, 0.0), float(size))


def _pixel_span(low: int, high: int, size: int) -> tuple[int, int]:
    """Keeps a span inside the picture and at least one pixel wide."""
    low = min(low, size - 1)
    return low, min(max(high, low + 1), size)

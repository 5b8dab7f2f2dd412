"""What a policy says, as values: `Prompt` (one object), `Answer` (the whole reply), `AnswerStatus` (how it went)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from segzero_rt.errors import PromptError


class AnswerStatus(str, Enum):
    """Closed set of outcomes. A policy's text never raises; it gets one of these."""

    OK = "ok"
    """At least one object was named."""
    NONE_FOUND = "none_found"
    """The policy said, in its format, that there is no such object."""
    TRUNCATED = "truncated"
    """The token budget ended before the answer was complete."""
    MALFORMED = "malformed"
    """The text ended by itself, but holds no answer that can be trusted."""
    CANCELLED = "cancelled"
    """The caller stopped the generation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One object for the segmenter, in pixels of the source picture.

    Raises:
        PromptError: a coordinate is not finite, the box is empty or its corners are swapped.
    """

    box_xyxy: tuple[float, float, float, float]
    """Left, top, right, bottom; `left < right` and `top < bottom`."""
    points_xy: tuple[tuple[float, float], ...] = ()
    """Positive clicks inside the object, any number."""

    def __post_init__(self) -> None:
        if len(self.box_xyxy) != 4 or any(len(point) != 2 for point in self.points_xy):
            raise PromptError(f"expected a box of 4 numbers and points of 2, got {self.box_xyxy} and {self.points_xy}")
        numbers = [*self.box_xyxy, *(value for point in self.points_xy for value in point)]
        if not all(math.isfinite(number) for number in numbers):
            raise PromptError(f"expected finite coordinates, got box {self.box_xyxy} and points {self.points_xy}")
        left, top, right, bottom = self.box_xyxy
        if left >= right or top >= bottom:
            raise PromptError(
                f"expected a box as left,top,right,bottom with left < right and top < bottom, got {self.box_xyxy}; "
                "swap the corners"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A policy's reply, parsed. `prompts` is non-empty exactly when `status` is `ok`."""

    status: AnswerStatus
    thinking: str = ""
    prompts: tuple[Prompt, ...] = ()
    text: str = ""
    """The reply as generated, for logs and rewards."""

    def __post_init__(self) -> None:
        if (self.status is AnswerStatus.OK) != bool(self.prompts):
            raise ValueError(
                f"status {self.status.value} with {len(self.prompts)} prompts: `ok` and prompts go together"
            )

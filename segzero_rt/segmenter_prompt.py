"""`SegmenterPrompt`: what SAM 2 can be asked with: a box, points on and off the object, a rough mask, or all."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from segzero_rt.answer import Prompt
from segzero_rt.errors import PromptError
from segzero_rt.graph_spec_segmenter import (
    LABEL_BOTTOM_RIGHT,
    LABEL_INSIDE,
    LABEL_NOTHING,
    LABEL_OUTSIDE,
    LABEL_TOP_LEFT,
)

MASK_LOGIT = 10.0
"""What a mask given as yes or no says to the decoder, + or -: SAM 2's own scale for masks given by hand."""

PointsXy = tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SegmenterPrompt:
    """One object, in pixels of the source picture. A policy's `Prompt` is the case of a box and points inside.

    Raises:
        PromptError: nothing is given, a coordinate is not finite, the box is empty or its corners are swapped, or the
            mask is no float32 [h, w] of finite numbers.
    """

    box_xyxy: tuple[float, float, float, float] | None = None
    """Left, top, right, bottom; `left < right` and `top < bottom`."""
    points_xy: PointsXy = ()
    """On the object."""
    outside_xy: PointsXy = ()
    """On what is not the object."""
    mask_logits: NDArray[np.float32] | None = None
    """float32 [h, w] at the decoder's own size: `MaskPrediction.logits` of an earlier answer, or `logits_of_mask`."""

    def __post_init__(self) -> None:
        if self.box_xyxy is not None:
            Prompt(box_xyxy=self.box_xyxy)  # its checks are the box's
        elif not self.points_xy and not self.outside_xy and self.mask_logits is None:
            raise PromptError("expected a box, a point or a mask, got none; say what to segment")
        for point in (*self.points_xy, *self.outside_xy):
            if len(point) != 2 or not all(map(math.isfinite, point)):
                raise PromptError(f"expected points as two finite numbers, got {point}")
        mask = self.mask_logits
        if mask is not None and (mask.ndim != 2 or mask.dtype != np.float32 or not np.isfinite(mask).all()):
            raise PromptError(f"expected a mask as finite float32 [h, w], got {mask.dtype} {list(mask.shape)}")

    @classmethod
    def of(cls, prompt: Prompt | SegmenterPrompt) -> SegmenterPrompt:
        """A policy's prompt as one of these; one of these as it is."""
        if isinstance(prompt, SegmenterPrompt):
            return prompt
        return cls(box_xyxy=prompt.box_xyxy, points_xy=prompt.points_xy)

    @property
    def labels(self) -> tuple[int, ...]:
        """What each of `labelled_xy` says."""
        return tuple(label for label, _ in self._labelled())

    @property
    def labelled_xy(self) -> PointsXy:
        """Box corners, points on the object, points off it, and the filler; nothing for a mask alone."""
        return tuple(point for _, point in self._labelled())

    def _labelled(self) -> list[tuple[int, tuple[float, float]]]:
        labelled: list[tuple[int, tuple[float, float]]] = []
        if self.box_xyxy is not None:
            left, top, right, bottom = self.box_xyxy
            labelled = [(LABEL_TOP_LEFT, (left, top)), (LABEL_BOTTOM_RIGHT, (right, bottom))]
        labelled += [(LABEL_INSIDE, point) for point in self.points_xy]
        labelled += [(LABEL_OUTSIDE, point) for point in self.outside_xy]
        # SAM 2's own predictor adds the filler to points and boxes, and none where there is neither.
        return [*labelled, (LABEL_NOTHING, (0.0, 0.0))] if labelled else []


def logits_of_mask(mask: NDArray[np.bool_], mask_size_hw: tuple[int, int]) -> NDArray[np.float32]:
    """A mask bool [H, W] of the source picture as float32 logits [h, w] for `SegmenterPrompt.mask_logits`.

    Raises:
        PromptError: not bool [H, W], or empty.
    """
    if mask.ndim != 2 or mask.dtype != np.bool_ or not mask.size:
        raise PromptError(f"expected a mask as bool [H, W], got {mask.dtype} {list(mask.shape)}")
    height, width = mask_size_hw
    shrinks = height <= mask.shape[0] and width <= mask.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    share = cv2.resize(mask.astype(np.float32), (width, height), interpolation=method)
    return np.asarray((2 * share - 1) * MASK_LOGIT, np.float32)

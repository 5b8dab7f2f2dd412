"""handover: what lies between the other operations when a question stays on the device.

**Contracts**, the same numbers in every build:

* *place_prompts*: a parsed reply's prompts to what a mask decoder takes. Row k has prompt k's box as two labelled
  corners, its points and the filler, in the order of `SegmenterPrompt`; coordinates times the input's over the source's
  size in float64, rounded once to float32. A row beyond the prompts is the whole picture with points in its middle, so
  that a run for a fixed number of rows is defined. A prompt with fewer points than the row has places is filled up with
  its last one, or its box's middle, and is *not* to be used: `ParsedReplies` says how many points it has.
* *choose_masks*: of four masks of each object, the best scored of masks 1 to 3, of equals the first
  (`segmenter.choose_masks`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from segzero_rt.answer_geometry import MAX_POINTS
from segzero_rt.graph_spec_segmenter import LABEL_BOTTOM_RIGHT, LABEL_INSIDE, LABEL_NOTHING, LABEL_TOP_LEFT


def labels_of(num_points: int) -> tuple[int, ...]:
    """Labels of a row of `place_prompts`: a box, points on the object, the filler."""
    return (LABEL_TOP_LEFT, LABEL_BOTTOM_RIGHT, *[LABEL_INSIDE] * num_points, LABEL_NOTHING)


def place_prompts(
    reply: NDArray[Any],
    prompts: NDArray[Any],
    *,
    num_points: int,
    input_size_hw: tuple[int, int],
    source_size_hw: tuple[int, int],
) -> NDArray[np.float32]:
    """Points for a mask decoder.

    Args:
        reply: `parse_prompts_device.REPLY` [1].
        prompts: `parse_prompts_device.PROMPT` [rows].
        num_points: of a prompt that is whole.
        input_size_hw: of the segmenter.
        source_size_hw: of the picture that the prompts refer to.

    Returns:
        float32 [rows, 2 + num_points + 1, 2]; the labels are `labels_of(num_points)` in each row.

    Raises:
        ValueError: more points than a prompt holds.
    """
    if not 0 <= num_points <= MAX_POINTS:
        raise ValueError(f"expected up to {MAX_POINTS} points, got {num_points}")
    height, width = source_size_hw
    scale_xy = np.array([input_size_hw[1] / width, input_size_hw[0] / height])
    placed = np.zeros((len(prompts), 2 + num_points + 1, 2), np.float64)
    for index, (row, prompt) in enumerate(zip(placed, prompts, strict=True)):
        named = index < reply["num_prompts"][0]
        box = prompt["box_xyxy"] if named else np.array([0, 0, width, height], np.int32)
        given = min(int(prompt["num_points"]), num_points) if named else 0
        points = prompt["points_xy"][:given]
        last = points[-1] if given else (box[:2].astype(np.int64) + box[2:]) // 2
        row[:2] = box.reshape(2, 2)
        row[2:-1] = last
        row[2 : 2 + given] = points
        row[:-1] *= scale_xy
    return placed.astype(np.float32)


def choose_masks(
    mask_logits: NDArray[np.float32], iou_scores: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Float32 [N, 4, h, w] and [N, 4] to [N, h, w] and [N]."""
    every = np.arange(len(mask_logits))
    chosen = 1 + iou_scores[:, 1:].argmax(axis=1)
    return mask_logits[every, chosen], iou_scores[every, chosen]

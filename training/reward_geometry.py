"""How far predicted boxes and points are from the true ones, by the rules of the two papers' code.

Both families count a box's last pixel as its own: a side is `right - left + 1` long. They differ where boxes touch:
Seg-Zero calls boxes that share no area disjoint, VisionReasoner gives touching ones their common row of pixels.

Their thresholds are pixels of an 840 x 840 picture; `pixel_scale` takes them to other inputs.

Sources: `dvlab-research/Seg-Zero` 77f9ea5 (Seg-Zero) and 42a3345 (VisionReasoner).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from segzero_rt.answer_objects import RawBox, RawPoint

PAPER_SIDE = 840
"""Side of the picture whose pixels the papers' thresholds are."""
MIN_BOX_IOU = 0.5
"""A box counts as found above this IoU, in both families."""
BOX_L1_PX = 10.0
"""… and as close below this mean absolute difference of its four numbers."""
TWO_POINTS_PX = 100.0
"""Seg-Zero: its two points together count as close below this mean distance."""
POINT_PX = 30.0
"""VisionReasoner: its point counts as close below this distance."""
POINT_REACH = 3.0
"""Without thresholds a point is worth something up to so many times `POINT_PX` away."""
NUM_CRITERIA = 3
"""A pair of objects is held to box IoU, box difference and point distance, one point each."""

Floats = NDArray[np.float64]


def pixel_scale(input_size_hw: tuple[int, int]) -> float:
    """What a threshold of the papers is multiplied by for this input; 1 at 840 x 840, 0.2 at 168 x 168.

    Of an input that is not square the geometric mean of the sides counts.
    """
    return math.sqrt(input_size_hw[0] * input_size_hw[1]) / PAPER_SIDE


def seg_zero_box_iou(predicted: RawBox, truth: RawBox) -> float:
    """IoU of two boxes, last pixels included; NaN where infinite numbers leave none. May exceed [0, 1] for a predicted
    box with swapped corners, as in the original.
    """
    left, top = max(predicted[0], truth[0]), max(predicted[1], truth[1])
    right, bottom = min(predicted[2], truth[2]), min(predicted[3], truth[3])
    shared = (right - left + 1) * (bottom - top + 1) if left < right and top < bottom else 0.0
    union = _area(predicted) + _area(truth) - shared
    return shared / union if union else math.nan


def box_l1(predicted: RawBox, truth: RawBox) -> float:
    """Mean absolute difference of the four coordinates, in pixels."""
    return sum(abs(one - other) for one, other in zip(predicted, truth, strict=True)) / 4


def two_points_distance(predicted: tuple[RawPoint, RawPoint], truth: tuple[RawPoint, RawPoint]) -> float:
    """Mean Euclidean distance of two points to two others, in the better of the two pairings."""
    (one, other), (first, second) = predicted, truth
    straight = math.dist(one, first) + math.dist(other, second)
    crossed = math.dist(one, second) + math.dist(other, first)
    return min(straight, crossed) / 2


def is_in_box(point: RawPoint, box: RawBox) -> bool:
    """Whether the point lies in the box, edges included."""
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def vision_reasoner_ious(predicted: Floats, truth: Floats) -> Floats:
    """IoU of M predicted with N true boxes, last pixels included.

    Args:
        predicted: float64 [M, 4].
        truth: float64 [N, 4].

    Returns:
        float64 [M, N], NaN where infinite numbers leave no IoU.
    """
    one, other = predicted[:, None, :], truth[None, :, :]
    sides = np.minimum(one[..., 2:], other[..., 2:]) - np.maximum(one[..., :2], other[..., :2]) + 1
    shared = np.maximum(sides, 0).prod(axis=-1)
    areas = (predicted[:, 2:] - predicted[:, :2] + 1).prod(axis=-1)[:, None]
    union = areas + (truth[:, 2:] - truth[:, :2] + 1).prod(axis=-1)[None] - shared
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(shared / union, np.float64)


def pair_scores(
    boxes: Floats, points: Floats, true_boxes: Floats, true_points: Floats, *, scale: float = 1.0
) -> Floats:
    """How many of VisionReasoner's three criteria each predicted object meets with each true one.

    Args:
        boxes: float64 [M, 4], M ≥ 1; any finite or infinite numbers.
        points: float64 [M, 2]; NaN for an object without a point.
        true_boxes: float64 [N, 4], N ≥ 1.
        true_points: float64 [N, 2].
        scale: `pixel_scale` of the input that all numbers are pixels of.

    Returns:
        float64 [M, N] of 0, 1, 2 or 3.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        found = vision_reasoner_ious(boxes, true_boxes) > MIN_BOX_IOU
        close = np.abs(boxes[:, None] - true_boxes[None]).mean(axis=-1) < BOX_L1_PX * scale
        distances = np.sqrt(((points[:, None] - true_points[None]) ** 2).sum(axis=-1))
        inside = np.all((points >= boxes[:, :2]) & (points <= boxes[:, 2:]), axis=1, keepdims=True)
    pointed = (distances < POINT_PX * scale) & inside
    return np.asarray(found.astype(np.float64) + close + pointed, np.float64)


def pair_closeness(
    boxes: Floats, points: Floats, true_boxes: Floats, true_points: Floats, *, scale: float = 1.0
) -> Floats:
    """How close each predicted object is to each true one, by degrees: twice the box IoU, and how near the point is.

    A threshold that digits cross by chance makes as much difference as the right object does; closeness does not.

    Args:
        boxes, points, true_boxes, true_points, scale: as `pair_scores`.

    Returns:
        float64 [M, N] in 0 … 3; a point outside its own box adds nothing.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        ious = np.nan_to_num(vision_reasoner_ious(boxes, true_boxes), nan=0.0).clip(0, 1)
        distances = np.sqrt(((points[:, None] - true_points[None]) ** 2).sum(axis=-1))
        inside = np.all((points >= boxes[:, :2]) & (points <= boxes[:, 2:]), axis=1, keepdims=True)
    nearness = 1 - distances / (POINT_REACH * POINT_PX * scale)
    return np.asarray(2 * ious + inside * np.nan_to_num(nearness, nan=0.0).clip(0, 1), np.float64)


def matched_score(scores: Floats) -> float:
    """The best total of a one-to-one matching over max(M, N), so that missing and surplus objects cost alike.

    Args:
        scores: float64 [M, N] of `pair_scores` or `pair_closeness`.

    Returns:
        0 … `NUM_CRITERIA`.
    """
    rows, columns = linear_sum_assignment(scores, maximize=True)
    total: float = scores[rows, columns].sum()
    return float(total / max(scores.shape[0], scores.shape[1]))


def _area(box: RawBox) -> float:
    return (box[2] - box[0] + 1) * (box[3] - box[1] + 1)

"""The box and the two points that a mask is asked for with: its extent, and the centres of two inscribed circles.

Seg-Zero's preparation of data: the first point is the maximum of the distance transform, the second its maximum among
the pixels at or beyond the median distance from the first. (`dvlab-research/Seg-Zero` 77f9ea5, data preparation.)
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

PixelBox = tuple[int, int, int, int]
PixelPoints = tuple[tuple[int, int], tuple[int, int]]


def box_and_points(mask: NDArray[np.bool_]) -> tuple[PixelBox, PixelPoints]:
    """Box and points of one mask, in its own pixels.

    Args:
        mask: bool [H, W] with at least one pixel. What lies beyond its edges counts as outside.

    Returns:
        Left, top, right, bottom (the last two exclusive), and two points x, y (indices of pixels of the mask; the same
        pixel twice where there is but one).

    Raises:
        ValueError: a mask without a pixel.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        raise ValueError("expected a mask with at least one pixel, got an empty one")
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    crop = np.pad(mask[box[1] : box[3], box[0] : box[2]], 1).astype(np.uint8)
    inner = cv2.distanceTransform(crop, cv2.DIST_L2, 3)[1:-1, 1:-1]
    first = np.unravel_index(int(inner.argmax()), inner.shape)
    ys, xs = np.nonzero(crop[1:-1, 1:-1])
    away = np.hypot(ys - first[0], xs - first[1])
    far = away >= np.median(away)
    second = int(np.argmax(inner[ys[far], xs[far]]))
    points = (
        (int(first[1]) + box[0], int(first[0]) + box[1]),
        (int(xs[far][second]) + box[0], int(ys[far][second]) + box[1]),
    )
    return box, points

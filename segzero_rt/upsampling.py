"""From the segmenter's coarse logits to the source picture's size, with pinned rounding: the same bits everywhere.

Bilinear, pixel centres at halves (`align_corners=False`), no antialiasing, as SAM 2 does it. The arithmetic is
PyTorch's for contiguous float32 tensors on processors with fused multiply-add (ATen/native/cpu/UpSampleKernel.cpp),
operation by operation, because OpenCV's differs from one build to the next: a mask must not depend on the machine.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

# How far OpenCV's result can be from the pinned one, as a share of the largest logit: both place pixels in float32,
# to 1.5e-5 of a logit's width at 256 logits, and round a few times. Seen were 6e-5 (tests/test_upsampling.py).
_NEAR = 1e-3


def fused(one: Float32, other: Float32, added: Float32) -> Float32:
    """`one * other + added` rounded once, float32, as the processor's fused multiply-add gives it.

    The product of two float32 is exact in float64. The sum is rounded to odd there (Boldo and Melquiond, 2008), after
    which rounding to float32 is right.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        product = one.astype(np.float64) * other
        total = product + added
        part = total - product
        rest = (product - (total - part)) + (added - part)  # what rounding the sum lost, exactly (Knuth)
        even = (total.view(np.int64) & 1) == 0
        lost = np.isfinite(rest) & (rest != 0) & even
        odd = np.nextafter(total, np.where(rest > 0, np.inf, -np.inf))
        return np.where(lost, odd, total).astype(np.float32)


class AxisSamples(NamedTuple):
    """Where pixels read along one axis of logits, and how much of each of their two neighbours: [fine] each."""

    near: NDArray[np.intp]
    far: NDArray[np.intp]
    near_weight: Float32
    far_weight: Float32


def axis_samples(coarse: int, fine: int) -> AxisSamples:
    """The samples of `fine` pixels along an axis of `coarse` logits."""
    scale = np.full(fine, np.float32(coarse) / np.float32(max(fine, 1)), np.float32)
    centres = np.arange(fine, dtype=np.float32) + np.float32(0.5)
    place = np.maximum(fused(scale, centres, np.full(fine, -0.5, np.float32)), np.float32(0))
    near = np.minimum(place.astype(np.intp), coarse - 1)
    far = np.minimum(near + 1, coarse - 1)
    far_weight = np.clip(place - near.astype(np.float32), np.float32(0), np.float32(1))
    return AxisSamples(near, far, np.float32(1) - far_weight, far_weight)


def blend(near: Float32, near_weight: Float32, far: Float32, far_weight: Float32) -> Float32:
    """The weighted sum of two neighbours: the far one's product is rounded, the near one's is fused."""
    with np.errstate(invalid="ignore"):  # an infinite logit beside a weight of 0
        return fused(near, np.broadcast_to(near_weight, near.shape), far * far_weight)


def upsample_logits(logits: Float32, size_hw: tuple[int, int]) -> Float32:
    """The definition: float32 [N, h, w] to float32 [N, H, W]. Exact, and slow in NumPy.

    Args:
        logits: float32 [N, h, w], one logit at least in each direction.
        size_hw: of the source picture.
    """
    rows, columns = axis_samples(logits.shape[1], size_hw[0]), axis_samples(logits.shape[2], size_hw[1])
    resized = np.empty((len(logits), *size_hw), np.float32)
    for coarse, fine in zip(logits, resized, strict=True):
        wide = blend(coarse[:, columns.near], columns.near_weight, coarse[:, columns.far], columns.far_weight)
        fine[:] = blend(wide[rows.near], rows.near_weight[:, None], wide[rows.far], rows.far_weight[:, None])
    return resized


def upsampled_above(logits: Float32, size_hw: tuple[int, int], threshold: float) -> NDArray[np.bool_]:
    """`upsample_logits(logits, size_hw) > threshold` for one picture [h, w]: bool [H, W], the same bits in less time.

    OpenCV decides all pixels but those whose value comes near the threshold.
    """
    height, width = size_hw
    if height == 0 or width == 0:
        return np.zeros(size_hw, np.bool_)
    fast = cv2.resize(logits, (width, height), interpolation=cv2.INTER_LINEAR)
    mask = np.greater(fast, np.float32(threshold))
    with np.errstate(invalid="ignore", over="ignore"):
        distance = np.abs(fast - np.float32(threshold))
    near = ~(distance > _NEAR * float(np.abs(logits).max()) + 1e-30)  # also where it is not a number
    ys, xs = np.nonzero(near)
    if len(ys):
        mask[ys, xs] = _at(logits, size_hw, ys, xs) > np.float32(threshold)
    return mask


def _at(logits: Float32, size_hw: tuple[int, int], ys: NDArray[np.intp], xs: NDArray[np.intp]) -> Float32:
    """The definition at single pixels: float32 [P]."""
    rows, columns = axis_samples(logits.shape[0], size_hw[0]), axis_samples(logits.shape[1], size_hw[1])
    near, far, near_weight, far_weight = (
        columns.near[xs],
        columns.far[xs],
        columns.near_weight[xs],
        columns.far_weight[xs],
    )
    upper, lower = (
        blend(logits[row, near], near_weight, logits[row, far], far_weight) for row in (rows.near[ys], rows.far[ys])
    )
    return blend(upper, rows.near_weight[ys], lower, rows.far_weight[ys])

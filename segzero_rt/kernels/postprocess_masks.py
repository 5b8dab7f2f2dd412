"""postprocess_masks: coarse logits to masks in the source picture's size, with boxes, areas, stability and run lengths.

**Contract.** For each of N pictures of logits, bit for bit in every build:

* *Stability*: of the logits as they came, how many lie above `threshold + stability_delta` over how many lie above
  `threshold - stability_delta`; 1 where there are none (SAM 2's rule for choosing among its masks).
* *Cleaning*: components are 8-connected. A component of logits at or below the threshold with at most `max_hole_area`
  pixels becomes `threshold + 10`, one above it with at most `max_sprinkle_area` pixels becomes `threshold - 10`. Both
  are labelled on the logits as they came, so that neither sees what the other did (`SAM2Transforms.postprocess_masks`).
  `"before_upsampling"` is SAM 2's order, areas in pixels of the logits; `"after_upsampling"` does the same to the mask,
  areas in pixels of the source. An area of 0 switches a rule off. Logits that are no number belong to no component.
* *Upsampling*: `upsampling.upsample_logits`. A pixel belongs to the mask if its value is greater than the threshold.
* *Boxes* around the pixels, right and bottom exclusive; zeros for a mask without one. *Areas* in pixels. *Run lengths*
  as `mask.encode_rle` writes them.

Any size is taken, odd ones and empty ones too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from segzero_rt.kernels.backend import Kernels, resolve_kernels
from segzero_rt.mask import MASK_THRESHOLD, encode_rle_reference, tight_boxes
from segzero_rt.upsampling import upsampled_above

CleanOrder = Literal["before_upsampling", "after_upsampling"]
CLEAN_ORDERS: tuple[CleanOrder, ...] = ("before_upsampling", "after_upsampling")
FILL = 10.0
"""How far from the threshold a cleaned logit is put, on the other side of it."""
STABILITY_DELTA = 0.05
"""SAM 2's `dynamic_multimask_stability_delta`."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ProcessedMasks:
    """N masks and what is known of them."""

    masks: NDArray[np.bool_]
    """bool [N, H, W]."""
    boxes_xyxy: NDArray[np.int32]
    """int32 [N, 4]: left, top, right, bottom, the last two exclusive; zeros for an empty mask."""
    areas: NDArray[np.int64]
    """int64 [N] pixels."""
    stability: NDArray[np.float32]
    """float32 [N] in [0, 1]."""
    rle_counts: tuple[str, ...]
    """Compressed COCO run lengths, one text per mask; none where they were not asked for."""

    @property
    def rles(self) -> list[dict[str, Any]]:
        """The masks as `{"size": [H, W], "counts": text}`."""
        size = [int(side) for side in self.masks.shape[1:]]
        return [{"size": size, "counts": counts} for counts in self.rle_counts]


def postprocess_masks(
    logits: NDArray[np.float32],
    size_hw: tuple[int, int],
    *,
    threshold: float = MASK_THRESHOLD,
    max_hole_area: int = 0,
    max_sprinkle_area: int = 0,
    order: CleanOrder = "before_upsampling",
    stability_delta: float = STABILITY_DELTA,
    run_lengths: bool = True,
    kernels: Kernels | None = None,
) -> ProcessedMasks:
    """Makes masks by the contract above.

    Args:
        logits: float32 [N, h, w], h and w from 1.
        size_hw: height and width of the source picture, from 0.
        threshold: logits above it belong to the object.
        max_hole_area: holes up to this many pixels are filled; 0 for none.
        max_sprinkle_area: islands up to this many pixels are removed; 0 for none.
        order: a name of `CLEAN_ORDERS`.
        stability_delta: distance from the threshold for the stability score.
        run_lengths: whether `rle_counts` is wanted.
        kernels: the build to use; by default what `resolve_kernels` gives.

    Raises:
        ValueError: logits of another dtype or shape, a negative size or area, an unknown order.
    """
    if logits.dtype != np.float32:
        raise ValueError(f"expected logits as float32 [N, h, w], got {logits.dtype} {list(logits.shape)}")
    check_request(logits.shape, size_hw, max_hole_area, max_sprinkle_area, order)
    limits = (max_hole_area, max_sprinkle_area)
    chosen = kernels or resolve_kernels()
    if chosen.device is not None:
        from segzero_rt.kernels.postprocess_masks_device import postprocess_with_device

        return postprocess_with_device(
            chosen.device,
            logits,
            size_hw,
            threshold=threshold,
            max_hole_area=max_hole_area,
            max_sprinkle_area=max_sprinkle_area,
            order=order,
            stability_delta=stability_delta,
            run_lengths=run_lengths,
        )
    if chosen.library is not None:
        from segzero_rt.kernels.postprocess_masks_host import postprocess_on_host

        return postprocess_on_host(
            chosen.library, logits, size_hw, threshold, limits, order, stability_delta, run_lengths
        )
    return _reference(logits, size_hw, threshold, limits, order, stability_delta, run_lengths)


def check_request(
    shape: tuple[int, ...], size_hw: tuple[int, int], max_hole_area: int, max_sprinkle_area: int, order: str
) -> None:
    """Raises:
    ValueError: logits of another shape, a negative size or area, an unknown order.
    """
    if len(shape) != 3 or 0 in shape[1:]:
        raise ValueError(f"expected logits as float32 [N, h, w], got float32 {list(shape)}")
    if min(size_hw) < 0 or max_hole_area < 0 or max_sprinkle_area < 0:
        raise ValueError(f"expected no negative size or area, got {size_hw}, {max_hole_area} and {max_sprinkle_area}")
    if order not in CLEAN_ORDERS:
        raise ValueError(f"expected an order of {', '.join(CLEAN_ORDERS)}, got {order!r}")


def _reference(
    logits: NDArray[np.float32],
    size_hw: tuple[int, int],
    threshold: float,
    limits: tuple[int, int],
    order: CleanOrder,
    stability_delta: float,
    run_lengths: bool,
) -> ProcessedMasks:
    masks = np.zeros((len(logits), *size_hw), np.bool_)
    for coarse, mask in zip(logits, masks, strict=True):
        if order == "before_upsampling":
            mask[:] = upsampled_above(_cleaned_logits(coarse, threshold, limits), size_hw, threshold)
        else:
            mask[:] = upsampled_above(coarse, size_hw, threshold)
            holes, sprinkles = small_components(~mask, limits[0]), small_components(mask, limits[1])
            mask[:] = (mask | holes) & ~sprinkles
    return ProcessedMasks(
        masks=masks,
        boxes_xyxy=tight_boxes(masks).astype(np.int32),
        areas=np.count_nonzero(masks, axis=(1, 2)).astype(np.int64).reshape(len(masks)),
        stability=_stability(logits, threshold, stability_delta),
        rle_counts=tuple(encode_rle_reference(mask)["counts"] for mask in masks) if run_lengths else (),
    )


def small_components(pixels: NDArray[np.bool_], max_area: int) -> NDArray[np.bool_]:
    """The 8-connected components of at most `max_area` pixels: bool [h, w], as the input."""
    if max_area <= 0 or pixels.size == 0:
        return np.zeros(pixels.shape, np.bool_)
    _, labels = cv2.connectedComponents(pixels.astype(np.uint8), connectivity=8)
    small = np.bincount(labels.ravel()) <= max_area
    small[0] = False  # what is in no component
    return np.asarray(small[labels], np.bool_)


def _cleaned_logits(coarse: NDArray[np.float32], threshold: float, limits: Sequence[int]) -> NDArray[np.float32]:
    level = np.float32(threshold)
    holes, sprinkles = small_components(coarse <= level, limits[0]), small_components(coarse > level, limits[1])
    filled = np.where(holes, np.float32(threshold + FILL), coarse)
    return np.where(sprinkles, np.float32(threshold - FILL), filled)


def _stability(logits: NDArray[np.float32], threshold: float, delta: float) -> NDArray[np.float32]:
    smaller = np.count_nonzero(logits > np.float32(threshold + delta), axis=(1, 2)).astype(np.float32)
    larger = np.count_nonzero(logits > np.float32(threshold - delta), axis=(1, 2)).astype(np.float32)
    return np.asarray(np.divide(smaller, larger, out=np.ones_like(larger), where=larger > 0), np.float32)

"""postprocess_masks on the host's build: makes room, calls the library, wraps the results."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
from numpy.typing import NDArray

from segzero_rt.kernels.postprocess_masks import FILL, ProcessedMasks

_DONE, _NO_ROOM, _NO_MEMORY = 0, 1, 2
_RLE_BYTES = 16 << 10
"""First guess of a mask's run lengths; a real outline takes a few kilobytes."""


class MaskJob(ctypes.Structure):
    """`MaskJob` of postprocess_masks.cu; a device's kernels take it too."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("coarse_height", "coarse_width", "height", "width")),
        *((name, ctypes.c_int64) for name in ("max_hole_area", "max_sprinkle_area")),
        ("clean_after", ctypes.c_int32),
        *((name, ctypes.c_float) for name in ("threshold", "hole_value", "sprinkle_value")),
        *((name, ctypes.c_float) for name in ("stable_above", "stable_below")),
        *((name, ctypes.c_void_p) for name in ("masks", "boxes_xyxy", "areas", "stability", "rle_ends", "rle_text")),
        *((name, ctypes.c_int64) for name in ("rle_capacity", "rle_used")),
    )


def postprocess_on_host(
    library: ctypes.CDLL,
    logits: NDArray[np.float32],
    size_hw: tuple[int, int],
    threshold: float,
    limits: tuple[int, int],
    order: str,
    stability_delta: float,
    run_lengths: bool,
) -> ProcessedMasks:
    """See `postprocess_masks.postprocess_masks`, which has checked the arguments."""
    count = len(logits)
    logits = np.ascontiguousarray(logits)
    masks = np.empty((count, *size_hw), np.bool_)
    boxes, areas = np.empty((count, 4), np.int32), np.empty(count, np.int64)
    stability, rle_ends = np.empty(count, np.float32), np.zeros(count, np.int64)
    text = np.empty(_RLE_BYTES * count if run_lengths else 0, np.uint8)
    job = mask_job(logits.shape, size_hw, threshold, limits, order, stability_delta)
    job.logits, job.masks = logits.ctypes.data, masks.ctypes.data
    job.boxes_xyxy, job.areas, job.stability = boxes.ctypes.data, areas.ctypes.data, stability.ctypes.data
    job.rle_ends = rle_ends.ctypes.data if run_lengths else None
    outcome = _NO_ROOM
    while outcome == _NO_ROOM:  # at most twice: the first round says how much is needed
        job.rle_text, job.rle_capacity = text.ctypes.data, len(text)
        outcome = library.segzero_postprocess_masks(ctypes.byref(job))
        if outcome == _NO_ROOM:
            text = np.empty(job.rle_used, np.uint8)
    if outcome == _NO_MEMORY:
        raise MemoryError(f"no memory to make {count} masks of {size_hw[0]} x {size_hw[1]}")
    whole = text[: job.rle_used].tobytes().decode("ascii")
    bounds = [0, *rle_ends.tolist()]
    counts = tuple(whole[begin:end] for begin, end in itertools.pairwise(bounds)) if run_lengths else ()
    return ProcessedMasks(masks=masks, boxes_xyxy=boxes, areas=areas, stability=stability, rle_counts=counts)


def mask_job(
    shape: tuple[int, ...],
    size_hw: tuple[int, int],
    threshold: float,
    limits: tuple[int, int],
    order: str,
    stability_delta: float,
) -> MaskJob:
    """A job without its addresses, for logits of that shape."""
    return MaskJob(
        count=shape[0],
        coarse_height=shape[1],
        coarse_width=shape[2],
        height=size_hw[0],
        width=size_hw[1],
        max_hole_area=limits[0],
        max_sprinkle_area=limits[1],
        clean_after=order == "after_upsampling",
        threshold=threshold,
        hole_value=threshold + FILL,
        sprinkle_value=threshold - FILL,
        stable_above=threshold + stability_delta,
        stable_below=threshold - stability_delta,
    )


def encode_on_host(library: ctypes.CDLL, mask: NDArray[np.bool_]) -> str:
    """Compressed COCO run lengths of one mask, bool [H, W]."""
    mask = np.ascontiguousarray(mask)
    function = library.segzero_encode_rle
    function.restype = ctypes.c_int64
    needed = capacity = _RLE_BYTES
    while needed >= capacity:
        capacity = needed + 1
        text = np.empty(capacity, np.uint8)
        needed = function(
            ctypes.c_void_p(mask.ctypes.data),
            ctypes.c_int32(mask.shape[0]),
            ctypes.c_int32(mask.shape[1]),
            ctypes.c_void_p(text.ctypes.data),
            ctypes.c_int64(capacity),
        )
    if needed < 0:
        raise MemoryError(f"no memory to encode a mask of {mask.shape[0]} x {mask.shape[1]}")
    return text[:needed].tobytes().decode("ascii")

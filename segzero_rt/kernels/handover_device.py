"""handover on a device: launches, by the contracts of `handover`."""

from __future__ import annotations

import ctypes
import math

import numpy as np

from segzero_rt.answer_geometry import MAX_POINTS
from segzero_rt.device import DeviceArray
from segzero_rt.kernels.device_kernels import THREADS, DeviceKernels, blocks
from segzero_rt.kernels.parse_prompts_device import PROMPT, REPLY

_NUM_MASKS = 4


class _Placing(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("rows", "num_points", "source_height", "source_width")),
        *((name, ctypes.c_double) for name in ("scale_x", "scale_y")),
    )


def enqueue_place_prompts(
    kernels: DeviceKernels,
    reply: DeviceArray,
    prompts: DeviceArray,
    *,
    input_size_hw: tuple[int, int],
    source_size_hw: tuple[int, int],
    points_xy: DeviceArray,
) -> None:
    """Enqueues placing a reply's first prompts.

    Args:
        reply: `REPLY` [1].
        prompts: `PROMPT` [rows].
        input_size_hw: of the segmenter.
        source_size_hw: of the picture that the prompts refer to.
        points_xy: float32 [rows, 2 + points + 1, 2], written; points are those of a prompt that is whole.

    Raises:
        ValueError: another dtype or shape, or more points than a prompt holds.
    """
    num_rows, num_points = len(prompts), points_xy.shape[1] - 3
    if not 0 <= num_points <= MAX_POINTS:
        raise ValueError(f"expected rows of up to {MAX_POINTS} points, got {num_points}")
    placing = _Placing(
        rows=num_rows,
        num_points=num_points,
        source_height=source_size_hw[0],
        source_width=source_size_hw[1],
        scale_x=input_size_hw[1] / source_size_hw[1],
        scale_y=input_size_hw[0] / source_size_hw[0],
    )
    kernels.launch(
        "place_prompts_kernel",
        (blocks(num_rows, THREADS),),
        (THREADS,),
        reply.expect("reply", (1,), REPLY),
        prompts.expect("prompts", (num_rows,), PROMPT),
        placing,
        points_xy.expect("points_xy", (num_rows, num_points + 3, 2), np.float32),
    )


def enqueue_choose_masks(
    kernels: DeviceKernels,
    mask_logits: DeviceArray,
    iou_scores: DeviceArray,
    *,
    logits: DeviceArray,
    scores: DeviceArray,
) -> None:
    """Enqueues choosing one of four masks of each object.

    Args:
        mask_logits: float32 [N, 4, h, w].
        iou_scores: float32 [N, 4].
        logits: float32 [N, h, w], written.
        scores: float32 [N], written.

    Raises:
        ValueError: another dtype or shape.
    """
    count, size_hw = len(mask_logits), mask_logits.shape[2:]
    pixels = math.prod(size_hw)
    kernels.launch(
        "choose_masks_kernel",
        (blocks(pixels, THREADS), count),
        (THREADS,),
        mask_logits.expect("mask_logits", (count, _NUM_MASKS, *size_hw), np.float32),
        iou_scores.expect("iou_scores", (count, _NUM_MASKS), np.float32),
        ctypes.c_int64(pixels),
        logits.expect("logits", (count, *size_hw), np.float32),
        scores.expect("scores", (count,), np.float32),
    )

"""Masks as arrays: from the segmenter's coarse logits, COCO's run-length text and back, boxes, IoU.

The run-length text is the compressed form of the COCO API (pycocotools): runs down the columns, every run from the
fourth on written as its difference to the one two before, five bits to a character. Written anew in NumPy from that
description; tests hold it to pycocotools byte by byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

MASK_THRESHOLD = 0.0
"""Logits above it belong to the object (SAM 2's `mask_threshold`)."""

MAX_RLE_PIXELS = 1 << 28
"""Larger pictures are refused when decoding: a few bytes of text could otherwise claim any amount of memory."""

_MAX_RUN_CHARACTERS = 7  # 35 bits hold any run of MAX_RLE_PIXELS with its sign


def masks_from_logits(logits: NDArray[np.float32], size_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """Logits float32 [N, h, w] -> masks bool [N, H, W] in the source picture's size: where they lie above 0.

    `upsampling` says how, to the bit; by the kernels' host build where there is one.
    """
    from segzero_rt.kernels.postprocess_masks import postprocess_masks  # which takes run lengths from here

    return postprocess_masks(logits, size_hw, run_lengths=False).masks


def encode_rle(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """A mask as compressed COCO run lengths, ready for JSON: `{"size": [H, W], "counts": text}`.

    Raises:
        ValueError: not a bool array [H, W].
    """
    if mask.ndim != 2 or mask.dtype != np.bool_:
        raise ValueError(f"expected a mask as bool [height, width], got {mask.dtype} {mask.shape}")
    from segzero_rt.kernels.backend import resolve_kernels

    library = resolve_kernels().library
    if library is None:
        return encode_rle_reference(mask)
    from segzero_rt.kernels.postprocess_masks_host import encode_on_host

    return {"size": [int(mask.shape[0]), int(mask.shape[1])], "counts": encode_on_host(library, mask)}


def encode_rle_reference(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """What `encode_rle` gives, in NumPy: the definition."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    edges = np.concatenate([[0], changes, [flat.size]])
    runs = np.diff(edges)
    if flat.size and flat[0]:  # the first run counts zeros, and may be empty
        runs = np.concatenate([[0], runs])
    return {"size": [int(mask.shape[0]), int(mask.shape[1])], "counts": _runs_to_text(runs)}


def _runs_to_text(runs: NDArray[np.int64]) -> str:
    numbers = runs.astype(np.int64)
    numbers[3:] -= runs[1:-2]
    columns: list[NDArray[np.int64]] = []
    alive = np.ones(len(numbers), np.bool_)
    written: list[NDArray[np.bool_]] = []
    while alive.any():
        chunk = numbers & 0x1F
        numbers >>= 5
        more = np.where(chunk & 0x10, numbers != -1, numbers != 0)
        columns.append(np.where(more, chunk | 0x20, chunk) + 48)
        written.append(alive)
        alive = alive & more
    characters = np.stack(columns, axis=1)[np.stack(written, axis=1)]
    return characters.astype(np.uint8).tobytes().decode("ascii")


def decode_rle(rle: Mapping[str, Any]) -> NDArray[np.bool_]:
    """Compressed COCO run lengths -> bool [H, W]. The counts may be `str` or `bytes`.

    Raises:
        ValueError: the size is no pair of sensible numbers, the text is not run lengths, or they do not fill the size.
    """
    height, width = _checked_size(rle.get("size"))
    runs = _text_to_runs(rle.get("counts"))
    if (runs < 0).any() or (runs > height * width).any() or int(runs.sum()) != height * width:
        raise ValueError(
            f"expected run lengths that add up to {height} x {width} pixels, got others; write the mask again"
        )
    values = np.arange(len(runs)) % 2 == 1
    return np.ascontiguousarray(np.repeat(values, runs).reshape((height, width), order="F"))


def _checked_size(size: object) -> tuple[int, int]:
    if not isinstance(size, (list, tuple)) or len(size) != 2 or any(type(length) is not int for length in size):
        raise ValueError(f"expected a mask's size as [height, width], got {size!r:.60}")
    height, width = size
    if height < 0 or width < 0 or height * width > MAX_RLE_PIXELS:
        raise ValueError(f"expected a mask of 0 to {MAX_RLE_PIXELS} pixels, got {height} x {width}")
    return height, width


def _text_to_runs(text: object) -> NDArray[np.int64]:
    if isinstance(text, str):
        text = text.encode("utf-8", "surrogatepass")
    if not isinstance(text, bytes):
        raise ValueError(f"expected compressed run lengths as text, got {type(text).__name__}; compress them first")
    codes = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if codes.size == 0:
        return np.zeros(0, np.int64)
    last = (codes & 0x20) == 0
    if (codes < 0).any() or (codes > 63).any() or not last[-1]:
        raise ValueError(
            "expected the characters of compressed run lengths, got others or a cut-off text; write the mask again"
        )
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > _MAX_RUN_CHARACTERS:
        raise ValueError(f"expected run lengths of at most {_MAX_RUN_CHARACTERS} characters, got {lengths.max()}")
    place = np.arange(len(codes)) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((codes & 0x1F) << (5 * place), starts)
    numbers = np.where(codes[ends] & 0x10, numbers - (np.int64(1) << (5 * lengths)), numbers)
    runs = numbers.copy()
    runs[1::2] = np.cumsum(numbers[1::2])
    runs[2::2] = np.cumsum(numbers[2::2])
    return runs


def tight_boxes(masks: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Boxes around masks bool [N, H, W]: float32 [N, 4] as left, top, right, bottom, the last two exclusive.

    A mask without a pixel gets zeros.
    """
    boxes = np.zeros((len(masks), 4), np.float32)
    for mask, box in zip(masks, boxes, strict=True):
        columns = np.flatnonzero(mask.any(axis=0))
        if columns.size:
            rows = np.flatnonzero(mask.any(axis=1))
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes


def mask_iou(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Shared over joint pixels of two masks bool [H, W], 0..1; two empty masks agree (1).

    Raises:
        ValueError: the masks differ in size.
    """
    if one.shape != other.shape:
        raise ValueError(f"expected two masks of one size, got {one.shape} and {other.shape}")
    joint = int(np.count_nonzero(one | other))
    return 1.0 if joint == 0 else int(np.count_nonzero(one & other)) / joint

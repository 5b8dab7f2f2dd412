"""preprocess on the host's build: tells the library where the rows are."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from segzero_rt.kernels.preprocess import PIXEL_FORMATS, YUV_RULES, Frame, InputTensor, PixelFormat, YuvColours

_NO_MEMORY = 2


class FrameJob(ctypes.Structure):
    """`FrameJob` of preprocess.cu; a device's kernels take it too."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("first", "second")),
        *((name, ctypes.c_int64) for name in ("first_pitch", "second_pitch")),
        *((name, ctypes.c_int32) for name in ("height", "width", "pixel_format", "cubic")),
        ("yuv", ctypes.c_int32 * 6),
        *((name, ctypes.c_int32) for name in ("to_height", "to_width", "patch", "merge")),
        ("places", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("mean", ctypes.c_float * 3),
        ("deviation", ctypes.c_float * 3),
        ("out", ctypes.c_void_p),
    )


def preprocess_on_host(
    library: ctypes.CDLL, frame: Frame, tensor: InputTensor, places: NDArray[np.int32] | None
) -> NDArray[np.float32]:
    """See `preprocess.preprocess`, which has checked the arguments; `places` tells where each patch goes."""
    planes = [_with_plain_rows(plane) for plane in frame.planes]
    values = np.empty(tensor.shape, np.float32)
    job = frame_job(frame.pixel_format, frame.size_hw, frame.colours, tensor)
    job.first, job.second = planes[0].ctypes.data, planes[-1].ctypes.data
    job.first_pitch, job.second_pitch = planes[0].strides[0], planes[-1].strides[0]
    job.places = None if places is None else places.ctypes.data
    job.out = values.ctypes.data
    if library.segzero_preprocess(ctypes.byref(job)) == _NO_MEMORY:
        raise MemoryError(f"no memory to resize a frame of {frame.size_hw[0]} x {frame.size_hw[1]}")
    return values


def frame_job(
    pixel_format: PixelFormat, size_hw: tuple[int, int], colours: YuvColours, tensor: InputTensor
) -> FrameJob:
    """A job without its addresses and pitches."""
    return FrameJob(
        height=size_hw[0],
        width=size_hw[1],
        pixel_format=PIXEL_FORMATS.index(pixel_format),
        cubic=tensor.resampler == "pillow_bicubic",
        yuv=YUV_RULES[colours],
        to_height=tensor.size_hw[0],
        to_width=tensor.size_hw[1],
        patch=tensor.patch_size,
        merge=tensor.merge_size,
        scale=1 / 255,
        mean=tensor.image_mean,
        deviation=tensor.image_std,
    )


def _with_plain_rows(plane: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The plane itself where the bytes of each row follow each other, whatever lies between rows; else a copy."""
    packed, step = True, 1
    for length, stride in zip(plane.shape[:0:-1], plane.strides[:0:-1], strict=True):
        packed &= stride == step or length == 1
        step *= length
    return plane if packed else np.ascontiguousarray(plane)

"""preprocess on a device: a frame that lies there becomes a tensor there."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from segzero_rt.device import DeviceArray
from segzero_rt.device_memory import Memory
from segzero_rt.kernels.device_kernels import DeviceKernels, blocks
from segzero_rt.kernels.preprocess import (
    PIXEL_FORMATS,
    YUV_RULES,
    Frame,
    InputTensor,
    PixelFormat,
    YuvColours,
    places_of,
)
from segzero_rt.kernels.preprocess_host import frame_job

_BLOCK = (32, 8)
_AXIS_THREADS = 128
_TAPS_BYTES = 16
_FRAME_SIZES_KEPT = 4


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DeviceFrame:
    """A picture on a device, not copied: its rows may lie any number of bytes apart, forwards.

    Raises:
        ValueError: planes, pitches or a size that do not fit the format or each other.
    """

    pixel_format: PixelFormat
    size_hw: tuple[int, int]
    planes: tuple[Memory, ...]
    """Rows of three bytes a pixel; of NV12 rows of luma, and rows of U and V at half the resolution, rounded up."""
    pitches_bytes: tuple[int, ...]
    """From row to row, of each plane."""
    colours: YuvColours = "bt601"
    """Of NV12."""

    def __post_init__(self) -> None:
        if self.pixel_format not in PIXEL_FORMATS or self.colours not in YUV_RULES or min(self.size_hw) < 1:
            raise ValueError(
                f"expected a format of {', '.join(PIXEL_FORMATS)}, colours of {', '.join(YUV_RULES)} and a positive "
                f"size, got {self.pixel_format!r}, {self.colours!r} and {self.size_hw}"
            )
        height, width = self.size_hw
        rows = [(height, 3 * width)]
        if self.pixel_format == "nv12":
            rows = [(height, width), ((height + 1) // 2, (width + 1) // 2 * 2)]
        if not len(rows) == len(self.planes) == len(self.pitches_bytes):
            raise ValueError(f"expected {len(rows)} planes and as many pitches, got {len(self.planes)} planes")
        for (count, row_bytes), plane, pitch in zip(rows, self.planes, self.pitches_bytes, strict=True):
            if pitch < row_bytes or plane.num_bytes < (count - 1) * pitch + row_bytes:
                raise ValueError(
                    f"expected {count} rows of {row_bytes} bytes at least {row_bytes} apart, got a pitch of {pitch} in "
                    f"{plane.num_bytes} bytes"
                )


class DevicePreprocessor:
    """Makes tensors of frames on a device by `preprocess`' contract. One call at a time."""

    def __init__(
        self, kernels: DeviceKernels, tensor: InputTensor, *, order: NDArray[np.integer] | None = None
    ) -> None:
        """Args:
            kernels: of the device that frames are on.
            tensor: what the model takes.
            order: int [patches], which patch stands at each place; by default they stand token by token.

        Raises:
            ValueError: an order that does not name each patch once.
        """
        self._kernels, self.tensor = kernels, tensor
        self._places = None if order is None else kernels.device.to_device(places_of(order, tensor.num_patches))
        self._axes = functools.lru_cache(maxsize=2 * _FRAME_SIZES_KEPT)(self._axis)
        self._middle: DeviceArray | None = None

    def enqueue(self, frame: DeviceFrame, out: DeviceArray) -> None:
        """Enqueues making the tensor. A frame of a size that was not met lately takes one more kernel for each axis.

        Args:
            frame: of any size.
            out: float32 in `tensor.shape`.

        Raises:
            ValueError: `out` does not fit.
            BackendError: the device has no room for the rows between the two passes.
        """
        tensor, (height, width) = self.tensor, frame.size_hw
        to_height, to_width = tensor.size_hw
        job = frame_job(frame.pixel_format, frame.size_hw, frame.colours, tensor)
        job.first, job.second = frame.planes[0].address, frame.planes[-1].address
        job.first_pitch, job.second_pitch = frame.pitches_bytes[0], frame.pitches_bytes[-1]
        job.places = None if self._places is None else self._places.address
        job.out = out.expect("out", tensor.shape, np.float32).address
        across, down = self._axes(width, to_width), self._axes(height, to_height)
        if self._middle is None or self._middle.shape[0] < height:
            self._middle = self._kernels.device.empty((height, to_width), np.uint32)
        passes = (("resample_columns_kernel", across, height), ("resample_rows_kernel", down, to_height))
        for name, axis, rows in passes:
            grid = (blocks(to_width, _BLOCK[0]), blocks(rows, _BLOCK[1]))
            self._kernels.launch(name, grid, _BLOCK, job, *axis, self._middle)

    def _axis(self, length: int, to: int) -> tuple[DeviceArray, DeviceArray]:
        """Neighbours and weights of an axis, on the device."""
        cubic = self.tensor.resampler == "pillow_bicubic"
        room = int(2.0 * (2.0 if cubic else 1.0) * max(length / to, 1.0)) + 2  # `most_taps` of resample.cuh
        device = self._kernels.device
        taps, weights = device.empty((to, _TAPS_BYTES), np.uint8), device.empty((to, room), np.int32)
        numbers = [ctypes.c_int32(number) for number in (length, to, cubic, room)]
        grid = (blocks(to, _AXIS_THREADS),)
        self._kernels.launch("axis_taps_kernel", grid, (_AXIS_THREADS,), *numbers, taps, weights)
        return taps, weights


def preprocess_with_device(
    kernels: DeviceKernels, frame: Frame, tensor: InputTensor, order: NDArray[np.integer] | None
) -> NDArray[np.float32]:
    """See `preprocess.preprocess`, which has checked the arguments: copies there and back."""
    device = kernels.device
    with device.current():
        planes = tuple(device.to_device(plane) for plane in frame.planes)
        resident = DeviceFrame(
            pixel_format=frame.pixel_format,
            size_hw=frame.size_hw,
            planes=planes,
            pitches_bytes=tuple(plane.num_bytes // plane.shape[0] for plane in planes),
            colours=frame.colours,
        )
        out = device.empty(tensor.shape, np.float32)
        DevicePreprocessor(kernels, tensor, order=order).enqueue(resident, out)
        (values,) = device.to_host(out)
    return values

"""Rows of device arrays, and the way up for small arrays of a question."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segzero_rt.device import Device, DeviceArray, Event

_ALIGNED_BYTES = 64
_FIRST_BYTES = 64 << 10


def rows(array: DeviceArray, begin: int, end: int) -> DeviceArray:
    """Entries `begin` to `end` of the first axis.

    Raises:
        ValueError: there are not so many.
    """
    if not 0 <= begin <= end <= len(array):
        raise ValueError(f"expected rows within {len(array)}, got {begin} to {end}")
    row_bytes = math.prod(array.shape[1:]) * array.dtype.itemsize
    return array.view((end - begin, *array.shape[1:]), offset_bytes=begin * row_bytes)


class Staging:
    """Page-locked memory for what goes to a device within a question: from any other memory the host would wait."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._block = device.pinned((_FIRST_BYTES,), np.uint8)
        self._used = 0
        self._full: list[NDArray[np.uint8]] = []  # blocks that copies may still read
        self._last: Event | None = None
        self._holding = False

    def hold(self, values: NDArray[Any]) -> NDArray[Any]:
        """The values in page-locked memory, for copies that are enqueued before the next `release`."""
        if not self._holding and self._last is not None and self.device.reached(self._last):
            self._used, self._last = 0, None
            self._full.clear()
        self._holding = True
        begin = -(-self._used // _ALIGNED_BYTES) * _ALIGNED_BYTES
        if begin + values.nbytes > self._block.nbytes:
            self._full.append(self._block)
            self._block, begin = self.device.pinned((max(2 * self._block.nbytes, values.nbytes),), np.uint8), 0
        self._used = begin + values.nbytes
        held = self._block[begin : self._used].view(values.dtype).reshape(values.shape)
        held[...] = values
        return held

    def release(self) -> None:
        """Says that every copy of what is held has been enqueued: behind them the memory serves again."""
        self._last, self._holding = self.device.record(), False

    def upload(self, values: NDArray[Any], memory: DeviceArray) -> None:
        """Enqueues a copy of an array, which may change as soon as this returns."""
        self.device.upload(self.hold(values), memory)
        self.release()

    def to_device(self, values: NDArray[Any]) -> DeviceArray:
        """A copy of an array on the device."""
        made = self.device.empty(values.shape, values.dtype)
        self.upload(values, made)
        return made

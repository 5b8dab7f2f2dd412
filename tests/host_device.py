"""A device whose memory is the host's and whose kernels are compiled by g++: what is enqueued happens at once.

It runs the same launch wrappers, argument packing, grids and kernels' code as a CUDA device does. It cannot show what
only real ones do: threads that run at the same time and in any order, caches, what nvcc makes of floating point.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from segzero_rt.device import Dimensions

GUARD_BYTES = 64
GUARD = 0xC7
FRESH = 0xA5
"""What fresh memory holds: a kernel that relies on zeros is found."""
_ONE_AT_A_TIME = threading.Lock()
"""The compiled kernels keep `threadIdx` and shared memory in globals, and ctypes lets other Python threads run: the
pipeline prepares the policy's picture in one and the segmenter's in another. A device's stream takes both in turn."""


class HostAllocation:
    """Memory between two guards."""

    def __init__(self, num_bytes: int) -> None:
        self.memory = np.full(num_bytes + 2 * GUARD_BYTES + 256, GUARD, np.uint8)
        begin = self.memory.ctypes.data + GUARD_BYTES
        self.begin = begin + -begin % 256  # as CUDA aligns
        self.num_bytes = num_bytes
        ctypes.memset(self.begin, FRESH, num_bytes)
        first, end = self.memory.ctypes.data, self.begin + num_bytes
        last = first + self.memory.nbytes
        self._guards = tuple(
            (at, bytes([GUARD]) * size) for at, size in ((first, self.begin - first), (end, last - end))
        )

    def __int__(self) -> int:
        return self.begin

    def check(self) -> None:
        # Some million times in a run of the tests: plain bytes are compared in a tenth of NumPy's time.
        for at, guard in self._guards:
            intact = ctypes.string_at(at, len(guard)) == guard
            assert intact, f"something was written beside {self.num_bytes} bytes of device memory"


class PageLocked(np.ndarray):
    """An array that counts as page-locked, and so do its views."""


class HostDriver:
    """A `segzero_rt.device.Driver` on the host."""

    name = "the host as a device"
    capability = "0.0"
    num_multiprocessors = 2
    stream_handle = 0

    def __init__(self) -> None:
        self.allocations: list[HostAllocation] = []
        self.launches: list[str] = []
        """Names of the kernels that ran, in order."""
        self._marks = 0

    @contextmanager
    def current(self) -> Iterator[None]:
        yield

    def allocate(self, num_bytes: int) -> HostAllocation:
        self.allocations.append(HostAllocation(num_bytes))
        return self.allocations[-1]

    def pinned(self, num_bytes: int) -> np.ndarray:
        return np.full(num_bytes, FRESH, np.uint8).view(PageLocked)

    def is_pinned(self, array: np.ndarray) -> bool:
        return isinstance(array, PageLocked)

    def copy_in(self, address: int, array: np.ndarray) -> None:
        self._check(address, array.nbytes)
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def copy_out(self, array: np.ndarray, address: int) -> None:
        self._check(address, array.nbytes)
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def copy_within(self, to: int, source: int, num_bytes: int) -> None:
        self._check(source, num_bytes)
        self._check(to, num_bytes)
        ctypes.memmove(to, source, num_bytes)

    def copy_rows(self, to: int, to_pitch: int, source: int, pitch: int, row_bytes: int, rows: int) -> None:
        for row in range(rows):
            self.copy_within(to + row * to_pitch, source + row * pitch, row_bytes)

    def fill(self, address: int, value: int, num_bytes: int) -> None:
        self._check(address, num_bytes)
        ctypes.memset(address, value, num_bytes)

    def load(self, image: bytes) -> ctypes.CDLL:
        """`image` is the path of a library that tests/cuda_on_host.hpp made of kernels."""
        return ctypes.CDLL(image.decode())

    def find(self, module: ctypes.CDLL, name: str) -> tuple[str, Any]:
        return name, getattr(module, f"launch_{name}")

    def launch(
        self, function: tuple[str, Any], grid: Dimensions, block: Dimensions, packed: bytes, shared_bytes: int
    ) -> None:
        assert shared_bytes == 0, "dynamic shared memory is not there on the host"
        name, entry = function
        self.launches.append(name)
        with _ONE_AT_A_TIME:
            taken = entry((ctypes.c_uint32 * 3)(*grid), (ctypes.c_uint32 * 3)(*block), packed)
        assert taken == len(packed), f"{name} takes {taken} bytes of arguments, got {len(packed)}"

    def call(self, work: Callable[[], None]) -> None:
        work()

    def fork(self) -> HostDriver:
        other = HostDriver()
        other.allocations = self.allocations
        return other

    def record(self) -> int:
        self._marks += 1
        return self._marks

    def done(self, event: int) -> bool:
        return event > 0

    def wait_for(self, event: int) -> None:
        assert event > 0

    def elapsed_ms(self, start: int, end: int) -> float:
        return float(end - start)

    def synchronize(self) -> None:
        for allocation in self.allocations:
            allocation.check()

    def _check(self, address: int, num_bytes: int) -> None:
        inside = any(a.begin <= address and address + num_bytes <= a.begin + a.num_bytes for a in self.allocations)
        assert inside, f"{num_bytes} bytes at {address:#x} are not in the device's memory"

"""A device in host memory whose stream is a thread: whoever enqueues runs ahead of it, as on a GPU.

A loop that reads what the stream has not done yet finds fresh memory's bytes here too; and a test can hold the stream,
to see how far the host goes without it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
from host_device import HostDriver

from segzero_rt.device import Device, Dimensions

_ONE_LAUNCH = threading.Lock()
"""Kernels by g++ have one `threadIdx` for all, so that two streams take turns."""


class StreamDriver(HostDriver):
    """Does what a `HostDriver` does, later. Work behind work that failed is not done; a failure is told once."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = ThreadPoolExecutor(1, "host-stream")
        self._last: Future[None] | None = None
        self._told: list[BaseException] = []
        self._free = threading.Event()
        self._free.set()
        self.num_enqueued = 0
        self.num_pinned = 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within it the stream does nothing."""
        self._free.clear()
        try:
            yield
        finally:
            self._free.set()

    def pinned(self, num_bytes: int) -> np.ndarray:
        self.num_pinned += 1
        return super().pinned(num_bytes)

    def copy_in(self, address: int, array: np.ndarray) -> None:
        self._later(lambda: HostDriver.copy_in(self, address, array))

    def copy_out(self, array: np.ndarray, address: int) -> None:
        self._later(lambda: HostDriver.copy_out(self, array, address))

    def copy_within(self, to: int, source: int, num_bytes: int) -> None:
        self._later(lambda: HostDriver.copy_within(self, to, source, num_bytes))

    def copy_rows(self, to: int, to_pitch: int, source: int, pitch: int, row_bytes: int, rows: int) -> None:
        for row in range(rows):
            self.copy_within(to + row * to_pitch, source + row * pitch, row_bytes)

    def fill(self, address: int, value: int, num_bytes: int) -> None:
        self._later(lambda: HostDriver.fill(self, address, value, num_bytes))

    def launch(
        self, function: tuple[str, Any], grid: Dimensions, block: Dimensions, packed: bytes, shared_bytes: int
    ) -> None:
        def run() -> None:
            with _ONE_LAUNCH:
                HostDriver.launch(self, function, grid, block, packed, shared_bytes)

        self._later(run)

    def call(self, work: Callable[[], None]) -> None:
        self._later(work)

    def fork(self) -> StreamDriver:
        other = StreamDriver()
        other.allocations = self.allocations
        return other

    def record(self) -> Future[None] | None:
        return self._last

    def done(self, event: Future[None] | None) -> bool:
        if event is not None and not event.done():
            return False
        self._tell(event)
        return True

    def wait_for(self, event: Future[None] | None) -> None:
        if event is not None:
            self._later(event.result)

    def synchronize(self) -> None:
        self._tell(self._last)

    def _tell(self, work: Future[None] | None) -> None:
        failure = None if work is None else work.exception()
        if failure is not None and failure not in self._told:
            self._told.append(failure)
            self._last = None
            raise failure

    def _later(self, work: Callable[[], None]) -> None:
        self.num_enqueued += 1
        self._last = self._thread.submit(self._do, self._last, work)

    def _do(self, before: Future[None] | None, work: Callable[[], None]) -> None:
        self._free.wait()
        if before is not None:
            before.result()
        work()


def host_stream() -> tuple[Device, StreamDriver]:
    driver = StreamDriver()
    return Device(driver), driver

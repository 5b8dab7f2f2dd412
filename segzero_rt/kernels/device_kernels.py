"""The kernels on one device: each source is loaded when a kernel of it is first launched."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from segzero_rt.device import Device, Dimensions, Kernel
from segzero_rt.kernels.device_build import DEVICE_SOURCES, device_code

THREADS = 256
"""Threads of a block where nothing speaks for another number."""


class DeviceKernels:
    """Launches kernels by name on a device."""

    def __init__(self, device: Device, code: Callable[[str], bytes] | None = None) -> None:
        """Args:
        device: where they run.
        code: machine code of a file of `DEVICE_SOURCES`; by default nvcc's, see `device_code`.
        """
        self.device = device
        self._code = code or (lambda source: device_code(source, device.capability))
        self._kernels: dict[str, Kernel] = {}
        self._lock = threading.Lock()

    def launch(self, name: str, grid: Dimensions, block: Dimensions, *arguments: Any) -> None:
        """Enqueues a kernel, see `Device.launch`.

        Raises:
            BackendError: its source cannot be compiled or loaded.
        """
        self.device.launch(self._kernel(name), grid, block, *arguments)

    def load(self) -> None:
        """Loads all of them now; compiles what is not compiled yet."""
        for names in DEVICE_SOURCES.values():
            self._kernel(names[0])

    def _kernel(self, name: str) -> Kernel:
        with self._lock:
            if name not in self._kernels:
                source, names = next((source, names) for source, names in DEVICE_SOURCES.items() if name in names)
                self._kernels.update(self.device.load_module(self._code(source), names))
            return self._kernels[name]


def blocks(count: int, threads: int) -> int:
    """How many blocks of so many threads cover a number of things."""
    return -(-count // threads)

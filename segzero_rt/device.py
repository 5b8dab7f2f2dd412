"""All of pycuda: one CUDA device, memory on it, a stream. Nothing else in this package calls CUDA.

The device's primary context is used, so that ONNX Runtime, TensorRT and own kernels share memory and streams. pycuda
has no wheels: it compiles on the target, against the toolkit there, and is imported when a device is opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segzero_rt.errors import BackendError


class Device:
    """A CUDA device with one stream. Use `Device.open`."""

    def __init__(self, cuda: Any, context: Any, capability: str) -> None:
        self._cuda, self._context = cuda, context
        self.capability = capability
        """Compute capability, such as "8.7"."""
        with self.current():
            self._stream = cuda.Stream()

    @classmethod
    def open(cls, index: int = 0) -> Device:
        """Opens a device on its primary context.

        Raises:
            BackendError: pycuda is not installed, or there is no such device.
        """
        try:
            import pycuda.driver as cuda
        except ImportError as error:
            raise BackendError(
                f"expected pycuda, which cannot be imported ({error}); install segzero-rt[cuda], which needs the CUDA "
                "toolkit"
            ) from error
        try:
            cuda.init()
            device = cuda.Device(index)
            major, minor = device.compute_capability()
            return cls(cuda, device.retain_primary_context(), f"{major}.{minor}")
        except cuda.Error as error:
            raise BackendError(f"expected CUDA device {index}, the driver says: {error}; check nvidia-smi") from error

    @property
    def stream_handle(self) -> int:
        """The stream as the driver's number, which TensorRT takes."""
        return int(self._stream.handle)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Makes the device the calling thread's; every use of its memory happens inside."""
        self._context.push()
        try:
            yield
        finally:
            self._context.pop()

    def allocate(self, num_bytes: int) -> DeviceBuffer:
        """Memory on the device, at least one byte; contents are not set.

        Raises:
            BackendError: the device has no room for it.
        """
        with self.current():
            try:
                return DeviceBuffer(self._cuda.mem_alloc(max(1, num_bytes)), max(1, num_bytes))
            except self._cuda.MemoryError as error:
                free, total = self._cuda.mem_get_info()
                raise BackendError(
                    f"expected {num_bytes} bytes of device memory, got {free} free of {total}; close other programs"
                ) from error

    def upload(self, array: NDArray[Any], buffer: DeviceBuffer) -> None:
        """Enqueues a copy of a contiguous array into a buffer that is large enough; the array must stay as it is."""
        if array.nbytes:
            self._cuda.memcpy_htod_async(buffer.allocation, array, self._stream)

    def download(self, buffer: DeviceBuffer, array: NDArray[Any]) -> None:
        """Enqueues a copy of a buffer's beginning into a contiguous array; read it after `wait`."""
        if array.nbytes:
            self._cuda.memcpy_dtoh_async(array, buffer.allocation, self._stream)

    def wait(self) -> None:
        """Waits until all that was enqueued is done."""
        self._stream.synchronize()


class DeviceBuffer:
    """Memory on the device; freed with the object."""

    def __init__(self, allocation: Any, num_bytes: int) -> None:
        self.allocation, self.num_bytes = allocation, num_bytes

    @property
    def address(self) -> int:
        """Where it begins, as TensorRT takes it."""
        return int(self.allocation)


def largest_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of an array of that shape."""
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize

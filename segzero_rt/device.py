"""One CUDA device: memory, one stream, kernels, events. All of pycuda is in this file, and nothing else calls CUDA.

The device's primary context is used, so that ONNX Runtime, TensorRT and own kernels share memory and streams. pycuda
has no wheels: it compiles on the target, against the toolkit there, and is imported when a device is opened.

Work is enqueued and nothing waits, unless it is said: `Device.num_host_waits` counts every time that the host waits for
the device through this file. Copies from or to memory that is not page-locked count as well, since there the driver
waits. Memory is taken from the driver once and kept: freeing it would make the host wait for all that runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, SupportsInt

import numpy as np
from numpy.typing import NDArray

from segzero_rt.device_memory import DeviceArray, DeviceBuffer, Memory, MemoryPool, pack_arguments
from segzero_rt.errors import BackendError

__all__ = ["Device", "DeviceArray", "DeviceBuffer", "Driver", "Event", "Kernel", "largest_bytes"]

MAX_BLOCK_THREADS = 1024
MAX_GRID = ((1 << 31) - 1, 65535, 65535)
"""Blocks along x, y and z that any CUDA device takes."""
_ALIGNED_BYTES = 64
Dimensions = tuple[int, ...]
"""Blocks of a grid or threads of a block, along x and, where given, y and z."""


class Driver(Protocol):
    """What a device has to do. `CudaDriver` does it by pycuda; tests have one whose memory is the host's."""

    name: str
    capability: str
    """Compute capability, such as "8.7"."""
    num_multiprocessors: int
    stream_handle: int

    def current(self) -> AbstractContextManager[None]: ...
    def allocate(self, num_bytes: int) -> SupportsInt: ...
    def pinned(self, num_bytes: int) -> NDArray[np.uint8]: ...
    def is_pinned(self, array: NDArray[Any]) -> bool: ...
    def copy_in(self, address: int, array: NDArray[Any]) -> None: ...
    def copy_out(self, array: NDArray[Any], address: int) -> None: ...
    def copy_within(self, to: int, source: int, num_bytes: int) -> None: ...
    def copy_rows(self, to: int, to_pitch: int, source: int, pitch: int, row_bytes: int, rows: int) -> None: ...
    def fill(self, address: int, value: int, num_bytes: int) -> None: ...
    def load(self, image: bytes) -> Any: ...
    def find(self, module: Any, name: str) -> Any: ...
    def launch(self, function: Any, grid: Dimensions, block: Dimensions, packed: bytes, shared_bytes: int) -> None: ...
    def call(self, work: Callable[[], None]) -> None: ...
    def fork(self) -> Driver: ...
    def record(self) -> Any: ...
    def done(self, event: Any) -> bool: ...
    def wait_for(self, event: Any) -> None: ...
    def elapsed_ms(self, start: Any, end: Any) -> float: ...
    def synchronize(self) -> None: ...


class Event:
    """A mark in a device's stream. Use `Device.record`."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle


class Kernel:
    """One entry of a loaded module. Use `Device.load_module`."""

    def __init__(self, name: str, function: Any) -> None:
        self.name, self.function = name, function


class Device:
    """A CUDA device with one stream. Use `Device.open`."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.num_host_waits = 0
        """How often the host has waited for the device. Callers take differences."""
        self._waits_lock = threading.Lock()  # a picture for the policy and one for the segmenter come from two threads
        self._depth = threading.local()
        self._pool = MemoryPool(self._allocate)
        # Page-locking takes longer than most copies: what `to_host` reads through is kept.
        self._staging: NDArray[np.uint8] | None = None
        self._staging_lock = threading.Lock()

    @classmethod
    def open(cls, index: int = 0) -> Device:
        """Opens a device on its primary context.

        Raises:
            BackendError: pycuda is not installed, or there is no such device.
        """
        return cls(CudaDriver.open(index))

    def __str__(self) -> str:
        return self.driver.name

    @property
    def capability(self) -> str:
        """Compute capability, such as "8.7"."""
        return self.driver.capability

    @property
    def num_multiprocessors(self) -> int:
        return self.driver.num_multiprocessors

    @property
    def stream_handle(self) -> int:
        """The stream as the driver's number, which TensorRT and ONNX Runtime take."""
        return self.driver.stream_handle

    @property
    def num_allocations(self) -> int:
        """How often the driver was asked for memory; a loop that has settled asks no more."""
        return self._pool.num_allocations

    @contextmanager
    def current(self) -> Iterator[None]:
        """Makes the device the calling thread's. Each method does it by itself; around many it is done once."""
        depth = getattr(self._depth, "value", 0)
        self._depth.value = depth + 1
        try:
            if depth:
                yield
            else:
                with self.driver.current():
                    yield
        finally:
            self._depth.value = depth

    def allocate(self, num_bytes: int) -> DeviceBuffer:
        """Memory on the device, at least one byte; contents are not set. It goes back into the pool with the object, so
        that what is enqueued later may get it: safe within one stream.

        Raises:
            BackendError: the device has no room for it.
        """
        return self._pool.take(max(1, num_bytes))

    def empty(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        """Memory for an array; contents are not set.

        Raises:
            BackendError: as `allocate`.
        """
        return DeviceArray(self.allocate(largest_bytes(shape, dtype)), shape, dtype)

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """A page-locked array on the host: copies from and to it are enqueued without a wait."""
        num_bytes = largest_bytes(shape, dtype)
        with self.current():
            memory = self.driver.pinned(max(1, num_bytes))
        array: NDArray[Any] = memory[:num_bytes].view(dtype).reshape(shape)
        return array

    def upload(self, array: NDArray[Any], memory: Memory) -> None:
        """Enqueues a copy of a contiguous array into memory that is large enough. A page-locked array must stay as it
        is until the copy is done; from any other the driver first takes what it needs, which counts as a wait.

        Raises:
            ValueError: an array that is not contiguous or is larger than the memory.
        """
        _check_copy(array, memory)
        if array.nbytes:
            self._count_wait(not self.driver.is_pinned(array))
            with self.current():
                self.driver.copy_in(memory.address, array)

    def to_device(self, array: NDArray[Any]) -> DeviceArray:
        """A copy of an array on the device; see `upload`."""
        array = np.ascontiguousarray(array)
        copy = self.empty(array.shape, array.dtype)
        self.upload(array, copy)
        return copy

    def download(self, memory: Memory, array: NDArray[Any]) -> None:
        """Enqueues a copy of the memory's beginning into a contiguous array; read it after `synchronize`. Where the
        array is not page-locked the host waits.

        Raises:
            ValueError: an array that is not contiguous or is larger than the memory.
        """
        _check_copy(array, memory)
        if array.nbytes:
            self._count_wait(not self.driver.is_pinned(array))
            with self.current():
                self.driver.copy_out(array, memory.address)

    def to_host(self, *arrays: DeviceArray) -> list[NDArray[Any]]:
        """Copies of device arrays: one wait for all of them."""
        sizes = [-(-array.num_bytes // _ALIGNED_BYTES) * _ALIGNED_BYTES for array in arrays]
        with self._staging_lock:
            if self._staging is None or self._staging.nbytes < sum(sizes):
                self._staging = self.pinned((sum(sizes),), np.uint8)
            parts, begin = [], 0
            for array, size in zip(arrays, sizes, strict=True):
                part = self._staging[begin : begin + array.num_bytes].view(array.dtype).reshape(array.shape)
                self.download(array, part)
                parts.append(part)
                begin += size
            self.synchronize()
            return [part.copy() for part in parts]

    def copy(self, source: Memory, memory: Memory) -> None:
        """Enqueues a copy of all of `source` to the beginning of other memory of the device.

        Raises:
            ValueError: there is less memory than in `source`.
        """
        if memory.num_bytes < source.num_bytes:
            raise ValueError(f"expected memory for {source.num_bytes} bytes, got {memory.num_bytes}")
        with self.current():
            self.driver.copy_within(memory.address, source.address, source.num_bytes)

    def copy_rows(
        self, source: Memory, memory: Memory, *, row_bytes: int, rows: int, pitch_bytes: int, offset_bytes: int = 0
    ) -> None:
        """Enqueues a copy of rows that lie one after another to rows that lie `pitch_bytes` apart.

        Raises:
            ValueError: less memory than that on either side, or rows that would overlap.
        """
        end = offset_bytes + (rows - 1) * pitch_bytes + row_bytes
        if row_bytes > pitch_bytes or offset_bytes < 0 or rows * row_bytes > source.num_bytes or end > memory.num_bytes:
            raise ValueError(
                f"expected {rows} rows of {row_bytes} bytes, {pitch_bytes} apart from {offset_bytes} on, to fit from "
                f"{source.num_bytes} bytes into {memory.num_bytes}"
            )
        to = memory.address + offset_bytes
        with self.current():
            self.driver.copy_rows(to, pitch_bytes, source.address, row_bytes, row_bytes, rows)

    def fill(self, memory: Memory, value: int = 0) -> None:
        """Enqueues setting every byte of the memory to a value from 0 to 255."""
        if memory.num_bytes:
            with self.current():
                self.driver.fill(memory.address, value, memory.num_bytes)

    def load_module(self, image: bytes, names: tuple[str, ...]) -> dict[str, Kernel]:
        """Kernels of compiled code (cubin, fatbin or PTX) by name.

        Raises:
            BackendError: the driver refuses the code, or one of the kernels is not in it.
        """
        with self.current():
            module = self.driver.load(image)
            return {name: Kernel(name, self.driver.find(module, name)) for name in names}

    def launch(
        self, kernel: Kernel, grid: Dimensions, block: Dimensions, *arguments: Any, shared_bytes: int = 0
    ) -> None:
        """Enqueues a kernel; a grid without blocks is left out.

        Args:
            kernel: of `load_module`.
            grid: blocks along x, y, z.
            block: threads of a block along x, y, z.
            arguments: in the kernel's order: `ctypes` numbers and structures by value, memory as its address, None for
                a null pointer.
            shared_bytes: dynamic shared memory of a block.

        Raises:
            ValueError: more blocks or threads than a device takes.
            TypeError: an argument of another type.
            BackendError: the driver refuses the launch.
        """
        grid, block = (*grid, 1, 1)[:3], (*block, 1, 1)[:3]
        if min(block) < 1 or np.prod(block, dtype=np.int64) > MAX_BLOCK_THREADS or min(grid) < 0:
            raise ValueError(f"expected blocks of 1 to {MAX_BLOCK_THREADS} threads, got {block} in a grid of {grid}")
        if any(number > most for number, most in zip(grid, MAX_GRID, strict=True)):
            raise ValueError(f"expected a grid of up to {MAX_GRID} blocks for {kernel.name}, got {grid}")
        packed = pack_arguments(arguments)
        if 0 in grid:
            return
        with self.current():
            self.driver.launch(kernel.function, grid, block, packed, shared_bytes)

    def call(self, work: Callable[[], None]) -> None:
        """Calls what enqueues another library's work on this stream, such as a graph's run."""
        with self.current():
            self.driver.call(work)

    def fork(self) -> Device:
        """The same device with another stream, and a pool and count of its own."""
        with self.current():
            return Device(self.driver.fork())

    def record(self) -> Event:
        """A mark behind all that has been enqueued."""
        with self.current():
            return Event(self.driver.record())

    def reached(self, event: Event) -> bool:
        """Whether all before a mark is done. Never waits.

        Raises:
            BackendError: something before it has failed.
        """
        with self.current():
            return self.driver.done(event.handle)

    def wait_for(self, event: Event) -> None:
        """Enqueues that the stream waits for another device object's mark; the host does not."""
        with self.current():
            self.driver.wait_for(event.handle)

    def elapsed_ms(self, start: Event, end: Event) -> float:
        """Milliseconds on the device between two marks; waits for the second."""
        self._count_wait()
        with self.current():
            return self.driver.elapsed_ms(start.handle, end.handle)

    def synchronize(self) -> None:
        """Waits until all that was enqueued is done.

        Raises:
            BackendError: something that was enqueued has failed.
        """
        self._count_wait()
        with self.current():
            self.driver.synchronize()

    def _count_wait(self, waits: bool = True) -> None:
        with self._waits_lock:
            self.num_host_waits += waits

    def _allocate(self, num_bytes: int) -> SupportsInt:
        with self.current():
            return self.driver.allocate(num_bytes)


class CudaDriver:
    """A device through pycuda, with a stream of its own on the primary context."""

    def __init__(self, cuda: Any, device: Any) -> None:
        self._cuda, self._handle, self._context = cuda, device, device.retain_primary_context()
        self.name = str(device.name())
        major, minor = device.compute_capability()
        self.capability = f"{major}.{minor}"
        self.num_multiprocessors = int(device.get_attribute(cuda.device_attribute.MULTIPROCESSOR_COUNT))
        with self.current():
            self._stream = cuda.Stream()
        self.stream_handle = int(self._stream.handle)

    @classmethod
    def open(cls, index: int) -> CudaDriver:
        """See `Device.open`."""
        try:
            import pycuda.driver as cuda
        except ImportError as error:
            raise BackendError(
                f"expected pycuda, which cannot be imported ({error}); install segzero-rt[cuda], which needs the CUDA "
                "toolkit"
            ) from error
        try:
            cuda.init()
            return cls(cuda, cuda.Device(index))
        except cuda.Error as error:
            raise BackendError(f"expected CUDA device {index}, the driver says: {error}; check nvidia-smi") from error

    @contextmanager
    def current(self) -> Iterator[None]:
        self._context.push()
        try:
            yield
        except self._cuda.Error as error:
            raise BackendError(f"expected {self.name} to work, the CUDA driver says: {error}") from error
        finally:
            self._context.pop()

    def allocate(self, num_bytes: int) -> SupportsInt:
        try:
            allocation: SupportsInt = self._cuda.mem_alloc(num_bytes)
        except self._cuda.MemoryError as error:
            free, total = self._cuda.mem_get_info()
            raise BackendError(
                f"expected {num_bytes} bytes of device memory, got {free} free of {total}; close other programs"
            ) from error
        return allocation

    def pinned(self, num_bytes: int) -> NDArray[np.uint8]:
        array: NDArray[np.uint8] = self._cuda.pagelocked_empty(num_bytes, np.uint8)
        return array

    def is_pinned(self, array: NDArray[Any]) -> bool:
        base: object = array
        while isinstance(base, np.ndarray):
            base = base.base
        return isinstance(base, self._cuda.PagelockedHostAllocation)

    def copy_in(self, address: int, array: NDArray[Any]) -> None:
        self._cuda.memcpy_htod_async(address, array, self._stream)

    def copy_out(self, array: NDArray[Any], address: int) -> None:
        self._cuda.memcpy_dtoh_async(array, address, self._stream)

    def copy_within(self, to: int, source: int, num_bytes: int) -> None:
        self._cuda.memcpy_dtod_async(to, source, num_bytes, self._stream)

    def copy_rows(self, to: int, to_pitch: int, source: int, pitch: int, row_bytes: int, rows: int) -> None:
        copy = self._cuda.Memcpy2D()
        copy.set_src_device(source)
        copy.set_dst_device(to)
        copy.src_pitch, copy.dst_pitch = pitch, to_pitch
        copy.width_in_bytes, copy.height = row_bytes, rows
        copy(self._stream)

    def fill(self, address: int, value: int, num_bytes: int) -> None:
        self._cuda.memset_d8_async(address, value, num_bytes, self._stream)

    def load(self, image: bytes) -> Any:
        return self._cuda.module_from_buffer(image)

    def find(self, module: Any, name: str) -> Any:
        return module.get_function(name)

    def launch(self, function: Any, grid: Dimensions, block: Dimensions, packed: bytes, shared_bytes: int) -> None:
        function.prepare([f"{len(packed)}s"])
        function.prepared_async_call(grid, block, self._stream, packed, shared_size=shared_bytes)

    def call(self, work: Callable[[], None]) -> None:
        work()

    def fork(self) -> CudaDriver:
        return CudaDriver(self._cuda, self._handle)

    def record(self) -> Any:
        return self._cuda.Event().record(self._stream)

    def done(self, event: Any) -> bool:
        return bool(event.query())

    def wait_for(self, event: Any) -> None:
        self._stream.wait_for_event(event)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        end.synchronize()
        return float(end.time_since(start))

    def synchronize(self) -> None:
        self._stream.synchronize()


def _check_copy(array: NDArray[Any], memory: Memory) -> None:
    if not array.flags.c_contiguous or array.nbytes > memory.num_bytes:
        kind = "contiguous" if array.flags.c_contiguous else "not contiguous"
        raise ValueError(
            f"expected a contiguous array of up to {memory.num_bytes} bytes, got {array.nbytes} bytes, {kind}"
        )


def largest_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes of an array of that shape."""
    return int(np.prod(shape, dtype=np.int64)) * int(np.dtype(dtype).itemsize)

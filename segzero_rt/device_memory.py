"""Memory of a device as values, the pool it comes from, and arguments as kernels take them. No CUDA is called here."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol, SupportsInt

import numpy as np

_LEAST_BYTES = 512
"""Of an allocation: what CUDA aligns to is at least 256."""


class Memory(Protocol):
    """Anything on the device that can be copied from and to."""

    @property
    def address(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...


class DeviceBuffer:
    """Memory on the device; it goes back where it came from with the object."""

    def __init__(self, allocation: SupportsInt, num_bytes: int, give_back: Callable[[SupportsInt], None]) -> None:
        self.address, self.num_bytes = int(allocation), num_bytes
        """Where it begins, as TensorRT takes it; and how many bytes were asked for."""
        self._allocation, self._give_back = allocation, give_back

    def __del__(self) -> None:
        self._give_back(self._allocation)


class DeviceArray:
    """An array on the device, C-contiguous, in a buffer that it keeps alive. Others read it without a copy through
    `__cuda_array_interface__` (CuPy, PyTorch, Numba)."""

    def __init__(self, owner: Any, shape: tuple[int, ...], dtype: Any, *, offset_bytes: int = 0) -> None:
        """Args:
            owner: a `DeviceBuffer`, or another object with `address` and `num_bytes` that keeps its memory.
            shape: lengths.
            dtype: NumPy's.
            offset_bytes: where the array begins in it.

        Raises:
            ValueError: it does not lie in the memory, or is not aligned to its items.
        """
        self.owner, self.shape, self.dtype = owner, tuple(map(int, shape)), np.dtype(dtype)
        self.num_bytes = int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize
        self.address = owner.address + offset_bytes
        if offset_bytes < 0 or offset_bytes + self.num_bytes > owner.num_bytes or self.address % self.dtype.alignment:
            raise ValueError(
                f"expected {self.dtype} {list(self.shape)} inside {owner.num_bytes} bytes, aligned, got offset "
                f"{offset_bytes}"
            )

    def __len__(self) -> int:
        return self.shape[0]

    def view(self, shape: tuple[int, ...], dtype: Any = None, *, offset_bytes: int = 0) -> DeviceArray:
        """Other lengths of the same memory, from a number of bytes on.

        Raises:
            ValueError: it does not lie in the array.
        """
        return DeviceArray(self, shape, self.dtype if dtype is None else dtype, offset_bytes=offset_bytes)

    def expect(self, name: str, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        """The array itself.

        Raises:
            ValueError: it has another shape or dtype.
        """
        if self.shape != shape or self.dtype != np.dtype(dtype):
            raise ValueError(
                f"expected {name} as {np.dtype(dtype)} {list(shape)} on the device, got {self.dtype} {list(self.shape)}"
            )
        return self

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address if self.num_bytes else 0, False),
            "strides": None,
            "version": 3,
        }


class ForeignMemory:
    """Memory of another library, by its `__cuda_array_interface__`, which is kept alive.

    Raises:
        ValueError: not contiguous, or no such interface.
    """

    def __init__(self, source: Any) -> None:
        interface = getattr(source, "__cuda_array_interface__", None)
        if interface is None:
            raise ValueError(f"expected an array on the device, got {type(source).__name__}")
        dtype = np.dtype(interface["typestr"])
        self.shape, self.dtype = tuple(interface["shape"]), dtype
        packed, step = [], dtype.itemsize
        for length in reversed(self.shape):
            packed.append(step)
            step *= length
        strides = interface.get("strides")
        if strides is not None and tuple(strides) != tuple(reversed(packed)) and 0 not in self.shape:
            raise ValueError(f"expected a contiguous array on the device, got strides {tuple(strides)} of {self.shape}")
        self.source, self.address, self.num_bytes = source, int(interface["data"][0]), step


def borrow(source: Any) -> DeviceArray:
    """An array of another library without a copy. Its contents must be ready on this device's stream.

    Raises:
        ValueError: no `__cuda_array_interface__`, or it is not contiguous.
    """
    memory = ForeignMemory(source)
    return DeviceArray(memory, memory.shape, memory.dtype)


class MemoryPool:
    """Allocations by size class, kept when they are given back: in one stream the next user comes after the last."""

    def __init__(self, allocate: Callable[[int], SupportsInt]) -> None:
        self._allocate = allocate
        self._free: dict[int, list[SupportsInt]] = {}
        # Buffers are given back by the garbage collector too, which may run while the lock is held.
        self._lock = threading.RLock()
        self.num_allocations = 0

    def take(self, num_bytes: int) -> DeviceBuffer:
        """A buffer of at least so many bytes."""
        size = size_class(num_bytes)
        with self._lock:
            kept = self._free.setdefault(size, [])
            allocation = kept.pop() if kept else None
        if allocation is None:
            allocation = self._allocate(size)
            with self._lock:
                self.num_allocations += 1
        return DeviceBuffer(allocation, num_bytes, self._free[size].append)


def size_class(num_bytes: int) -> int:
    """The least of 512, 640, 768, 896, 1024, 1280, ... that is enough: a quarter is lost at most."""
    if num_bytes <= _LEAST_BYTES:
        return _LEAST_BYTES
    step = 1 << max(0, (num_bytes - 1).bit_length() - 3)
    return -(-num_bytes // step) * step


def pack_arguments(arguments: Sequence[Any]) -> bytes:
    """Arguments of a kernel one after another, each aligned as CUDA and C++ align its type.

    Raises:
        TypeError: an argument that is no `ctypes` value, no memory and not None.
    """
    packed = bytearray()
    for index, argument in enumerate(arguments):
        value = argument
        if argument is None:
            value = ctypes.c_void_p(None)
        elif isinstance(argument, (DeviceBuffer, DeviceArray)):
            value = ctypes.c_void_p(argument.address)
        if not isinstance(value, (ctypes.Structure, ctypes._SimpleCData)):
            raise TypeError(f"expected argument {index} as a ctypes value or memory, got {type(argument).__name__}")
        packed += bytes(-len(packed) % ctypes.alignment(type(value))) + bytes(value)
    return bytes(packed)

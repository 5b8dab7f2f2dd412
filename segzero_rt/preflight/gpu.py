"""CUDA devices of this machine, asked of the driver itself: no toolkit, no pycuda, no context, nothing allocated.

`libcuda` tells name, compute capability and memory on workstations and on Jetsons alike. What is free is told by NVML,
which Jetsons lack: their GPU uses the system's memory, and the system says how much of that is left.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from segzero_rt.errors import BackendError

_LIBCUDA, _NVML = "libcuda.so.1", "libnvidia-ml.so.1"
_CAPABILITY_MAJOR, _CAPABILITY_MINOR, _INTEGRATED, _PROCESSORS = 75, 76, 18, 16
"""CUdevice_attribute, from the CUDA driver API's documentation."""
_NAME_BYTES = 256

Loader = Callable[[str], Any]
"""Loads a shared object by name, as `ctypes.CDLL`; raises OSError where there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One CUDA device."""

    name: str
    capability: str
    """Compute capability, such as "8.7"."""
    multiprocessors: int
    memory_bytes: int
    integrated: bool
    """Shares the system's memory, as on a Jetson."""
    free_bytes: int | None = None
    """Of its own memory; None where the driver does not tell, or the memory is the system's."""


class _MemoryInfo(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


def read_gpus(load: Loader = ctypes.CDLL) -> tuple[Gpu, ...]:
    """All CUDA devices that this process may use; none where there is no driver.

    Raises:
        BackendError: there is a driver, but it fails, as one that does not fit its kernel module does.
    """
    try:
        cuda = load(_LIBCUDA)
    except OSError:
        return ()
    count = ctypes.c_int()
    status = cuda.cuInit(0)
    if status == 100:  # CUDA_ERROR_NO_DEVICE
        return ()
    if status or cuda.cuDeviceGetCount(ctypes.byref(count)):
        raise BackendError(f"expected a CUDA driver that starts, cuInit says {status}; reinstall it, or reboot")
    free = _free_bytes(load)
    return tuple(_read(cuda, index, free) for index in range(count.value))


def driver_cuda_version(load: Loader = ctypes.CDLL) -> str | None:
    """Newest CUDA that the driver serves, such as "12.6"; None without a driver."""
    version = ctypes.c_int()
    try:
        failed = load(_LIBCUDA).cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return None
    return None if failed else f"{version.value // 1000}.{version.value % 1000 // 10}"


def _read(cuda: Any, index: int, free: dict[str, int]) -> Gpu:
    device, total = ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(_NAME_BYTES)
    identity = (ctypes.c_ubyte * 16)()
    failed = (
        cuda.cuDeviceGet(ctypes.byref(device), index)
        or cuda.cuDeviceGetName(name, _NAME_BYTES, device)
        or cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device)
        or cuda.cuDeviceGetUuid(identity, device)
    )
    if failed:
        raise BackendError(f"expected CUDA device {index} to tell what it is, the driver says {failed}; reboot")

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return value.value

    integrated = bool(attribute(_INTEGRATED))
    return Gpu(
        name=name.value.decode(errors="replace"),
        capability=f"{attribute(_CAPABILITY_MAJOR)}.{attribute(_CAPABILITY_MINOR)}",
        multiprocessors=attribute(_PROCESSORS),
        memory_bytes=total.value,
        integrated=integrated,
        free_bytes=None if integrated else free.get(bytes(identity).hex()),
    )


def _free_bytes(load: Loader) -> dict[str, int]:
    """UUID in hexadecimal digits to free memory, from NVML; empty where it is absent or refuses."""
    try:
        nvml = load(_NVML)
    except OSError:
        return {}
    if nvml.nvmlInit_v2():
        return {}
    count, found = ctypes.c_uint(), {}
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    for index in range(count.value):
        device, info = ctypes.c_void_p(), _MemoryInfo()
        identity = ctypes.create_string_buffer(96)
        failed = (
            nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device))
            or nvml.nvmlDeviceGetUUID(device, identity, 96)
            or nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(info))
        )
        if not failed:  # "GPU-" and the UUID with dashes
            found[identity.value.decode().removeprefix("GPU-").replace("-", "")] = info.free
    nvml.nvmlShutdown()
    return found

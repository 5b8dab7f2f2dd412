"""DLPack for arrays on a device, both ways, without a copy and without another library.

The structures are those of DLPack 0.8 (dmlc/dlpack, include/dlpack/dlpack.h), which every consumer still takes.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from segzero_rt.device import DeviceArray

CPU, CUDA = 1, 2
"""`kDLCPU`, `kDLCUDA`."""
_NAME = b"dltensor"
_CODES = {"i": 0, "u": 1, "f": 2}
_KINDS = {code: kind for kind, code in _CODES.items()}


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_Callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_lent: dict[int, tuple[object, ...]] = {}
"""What consumers still use, by the address of its structure."""


def _forget(managed: int) -> None:
    _lent.pop(managed, None)


def _drop(capsule: int) -> None:
    """A consumer renames what it takes; nobody took a capsule that still has its name."""
    if _capsule_call("IsValid", ctypes.c_int)(capsule, _NAME):
        _forget(_capsule_call("GetPointer", ctypes.c_void_p)(capsule, _NAME))


_give_back, _drop_capsule = _Callback(_forget), _Callback(_drop)


def _capsule_call(name: str, result: Any) -> Any:
    return ctypes.PYFUNCTYPE(result, ctypes.c_void_p, ctypes.c_char_p)((f"PyCapsule_{name}", ctypes.pythonapi))


class SharedArray(DeviceArray):
    """A `DeviceArray` that others take by DLPack as well (`torch.from_dlpack`, `cupy.from_dlpack`, ...).

    Its contents are there when it is handed out, so that no stream has to wait for them.
    """

    def __init__(self, array: DeviceArray, device_type: int = CUDA) -> None:
        super().__init__(array, array.shape, array.dtype)
        self._device_type = device_type

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device_type, 0

    def __dlpack__(self, *, stream: Any = None, **newer: Any) -> Any:
        """A capsule; `stream` and what newer versions of the protocol ask for change nothing about it."""
        sides = ctypes.c_int64 * max(1, len(self.shape))
        shape = sides(*self.shape)
        managed = _Managed(deleter=ctypes.cast(_give_back, ctypes.c_void_p).value)
        managed.tensor = _Tensor(
            data=self.address,
            device_type=self._device_type,
            ndim=len(self.shape),
            code=_CODES[self.dtype.kind],
            bits=8 * self.dtype.itemsize,
            lanes=1,
            shape=ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64)),
        )
        address = ctypes.addressof(managed)
        _lent[address] = (managed, shape, self)
        new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return new(("PyCapsule_New", ctypes.pythonapi))(address, _NAME, ctypes.cast(_drop_capsule, ctypes.c_void_p))


def interface_of(source: Any, stream_handle: int) -> dict[str, Any]:
    """An array of another library on the device as a `__cuda_array_interface__` would tell it, by its DLPack.

    Args:
        source: has `__dlpack__`.
        stream_handle: the stream that will read it, for which the other library makes it ready.

    Returns:
        also "owner", which has to be kept as long as the memory is used.

    Raises:
        ValueError: numbers of a kind that NumPy does not have.
    """
    capsule = source.__dlpack__(stream=stream_handle or None)
    pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    address = pointer(("PyCapsule_GetPointer", ctypes.pythonapi))(capsule, _NAME)
    tensor = _Managed.from_address(address).tensor
    if tensor.code not in _KINDS or tensor.lanes != 1 or tensor.bits % 8:
        raise ValueError(f"expected plain numbers, got DLPack's type {tensor.code} of {tensor.bits} bits")
    dtype = np.dtype(f"{_KINDS[tensor.code]}{tensor.bits // 8}")
    strides = None
    if tensor.strides:
        strides = tuple(tensor.strides[axis] * dtype.itemsize for axis in range(tensor.ndim))
    return {
        "shape": tuple(tensor.shape[axis] for axis in range(tensor.ndim)),
        "typestr": dtype.str,
        "data": ((tensor.data or 0) + tensor.byte_offset, True),
        "strides": strides,
        "owner": (source, capsule),
    }

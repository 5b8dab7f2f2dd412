"""Arrays on a device from and to other libraries by DLPack. The device is host memory, which NumPy and PyTorch read."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
from host_device import HostDriver

from segzero_rt.device import Device
from segzero_rt.resident import dlpack
from segzero_rt.resident.arrays import Staging
from segzero_rt.resident.dlpack import CPU, CUDA, SharedArray, interface_of
from segzero_rt.resident.frames import as_frame

ARRAYS = [
    ("masks", np.arange(24, dtype=np.uint8).reshape(2, 3, 4)),
    ("scores", np.arange(5, dtype=np.float32)),
    ("boxes", np.arange(8, dtype=np.int32).reshape(2, 4)),
    ("areas", np.arange(3, dtype=np.int64)),
    ("nothing", np.zeros((0, 3, 4), np.uint8)),
]


@pytest.fixture
def device() -> Device:
    return Device(HostDriver())


@pytest.mark.parametrize(("name", "values"), ARRAYS, ids=[name for name, _ in ARRAYS])
def test_others_read_the_same_memory(name: str, values: np.ndarray, device: Device) -> None:
    shared = SharedArray(device.to_device(values), CPU)
    lent = len(dlpack._lent)
    taken = np.from_dlpack(shared)
    np.testing.assert_array_equal(taken, values)
    assert (taken.dtype, taken.shape) == (values.dtype, values.shape)
    assert not values.size or taken.ctypes.data == shared.address
    assert len(dlpack._lent) == lent + 1
    del taken
    gc.collect()
    assert len(dlpack._lent) == lent, "given back with the consumer's array"


def test_memory_lives_as_long_as_a_consumer(device: Device) -> None:
    values = np.arange(4096, dtype=np.uint8)
    taken = np.from_dlpack(SharedArray(device.to_device(values), CPU))
    gc.collect()
    device.to_device(np.zeros(4096, np.uint8))  # would get the memory if it had been given back
    np.testing.assert_array_equal(taken, values)


def test_a_capsule_that_nobody_takes_is_given_back(device: Device) -> None:
    lent = len(dlpack._lent)
    capsule = SharedArray(device.to_device(np.zeros(3, np.uint8)), CPU).__dlpack__()
    assert len(dlpack._lent) == lent + 1
    del capsule
    gc.collect()
    assert len(dlpack._lent) == lent


def test_pytorch_takes_masks(device: Device) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed; it comes with segzero-rt[export]")
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    shared = SharedArray(device.to_device(values), CPU)
    taken = torch.from_dlpack(shared)
    assert taken.data_ptr() == shared.address and torch.equal(taken, torch.from_numpy(values))
    assert SharedArray(shared).__dlpack_device__() == (CUDA, 0)
    assert shared.__cuda_array_interface__["data"][0] == shared.address


class OnCuda:
    """A host array that says it is on a CUDA device."""

    def __init__(self, array: Any) -> None:
        self._array = array
        self.streams: list[Any] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, 0

    def __dlpack__(self, *, stream: Any = None) -> Any:
        self.streams.append(stream)
        return self._array.__dlpack__()


def test_arrays_of_others_are_described_as_they_are() -> None:
    wide = np.zeros((4, 10, 3), np.uint8)
    for array in (wide, wide[:, 2:7], wide[1:].astype(np.float32), np.zeros((2, 2), np.int64)):
        source = OnCuda(array)
        found = interface_of(source, 94)
        assert found["shape"] == array.shape and np.dtype(found["typestr"]) == array.dtype
        assert found["data"][0] == array.ctypes.data
        assert found["strides"] is None or found["strides"] == array.strides
        assert source.streams == [94]
    with pytest.raises(ValueError, match="expected plain numbers"):
        interface_of(OnCuda(np.zeros(3, np.complex64)), 0)


def test_frames_come_by_dlpack(device: Device) -> None:
    staging, wide = Staging(device), np.random.default_rng(0).integers(0, 256, (5, 9, 3), dtype=np.uint8)
    frame = as_frame(OnCuda(wide[:, :7]), staging)
    assert (frame.size_hw, frame.pitches_bytes) == ((5, 7), (27,))
    assert frame.planes[0].address == wide.ctypes.data, "not copied"
    torch = pytest.importorskip("torch", reason="torch is not installed; it comes with segzero-rt[export]")
    from_host = as_frame(torch.from_numpy(wide), staging)
    assert from_host.size_hw == (5, 9)
    (copied,) = device.to_host(from_host.planes[0])
    np.testing.assert_array_equal(copied, wide.reshape(-1))

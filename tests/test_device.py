"""What a `Device` does around its driver: memory, copies, host waits, arguments, launches. On the host and on CUDA."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from host_device import FRESH, HostDriver

from segzero_rt.device import Device, DeviceArray, DeviceBuffer, Kernel
from segzero_rt.device_memory import borrow, pack_arguments, size_class


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Device:
    return Device(HostDriver()) if request.param == "host" else Device.open()


@pytest.fixture
def on_host() -> Device:
    return Device(HostDriver())


ARRAYS = [
    ("nothing", np.zeros((0, 3), np.float32)),
    ("one byte", np.array([7], np.uint8)),
    ("odd", np.arange(77, dtype=np.int16).reshape(7, 11)),
    ("large", np.arange(100_003, dtype=np.float64)),
    ("not contiguous", np.arange(12, dtype=np.int64).reshape(3, 4)[:, ::2]),
]


@pytest.mark.parametrize(("name", "array"), ARRAYS, ids=[name for name, _ in ARRAYS])
def test_arrays_come_back_as_they_went(name: str, array: np.ndarray, device: Device) -> None:
    copy = device.to_device(array)
    (back,) = device.to_host(copy)
    np.testing.assert_array_equal(back, array)
    assert (back.dtype, copy.shape, len(copy)) == (array.dtype, array.shape, len(array))


def test_several_arrays_come_back_with_one_wait(device: Device) -> None:
    arrays = [np.arange(5, dtype=np.int8), np.arange(9, dtype=np.float64), np.full((2, 3), 4, np.uint16)]
    copies = [device.to_device(array) for array in arrays]
    before = device.num_host_waits
    for back, array in zip(device.to_host(*copies), arrays, strict=True):
        np.testing.assert_array_equal(back, array)
    assert device.num_host_waits - before == 1


def test_waits_are_counted(device: Device) -> None:
    memory, plain, locked = device.empty((8,), np.int32), np.arange(8, dtype=np.int32), device.pinned((8,), np.int32)
    locked[:] = plain
    marks: list[Any] = []
    steps = [
        ("a copy from page-locked memory", lambda: device.upload(locked, memory), 0),
        ("a copy to page-locked memory", lambda: device.download(memory, locked[:4]), 0),
        ("filling", lambda: device.fill(memory, 1), 0),
        ("a copy on the device", lambda: device.copy(memory, device.empty((8,), np.int32)), 0),
        ("two marks", lambda: marks.extend([device.record(), device.record()]), 0),
        ("the stream waits for a mark", lambda: device.wait_for(marks[0]), 0),
        ("time between marks", lambda: device.elapsed_ms(*marks), 1),
        ("waiting", device.synchronize, 1),
        ("a copy from other memory", lambda: device.upload(plain, memory), 1),
        ("a copy to other memory", lambda: device.download(memory, plain), 1),
        ("a copy of nothing", lambda: device.upload(plain[:0], memory), 0),
    ]
    for name, step, waits in steps:
        before = device.num_host_waits
        step()
        assert device.num_host_waits - before == waits, name


def test_filling_and_copying_on_the_device(device: Device) -> None:
    array = device.to_device(np.arange(6, dtype=np.uint8))
    other = device.empty((8,), np.uint8)
    device.fill(other, 9)
    device.copy(array, other)
    device.copy(array.view((2,), offset_bytes=4), other.view((2,), offset_bytes=6))
    (back,) = device.to_host(other)
    assert back.tolist() == [0, 1, 2, 3, 4, 5, 4, 5]


def test_memory_is_taken_again(device: Device) -> None:
    for _ in range(3):
        kept = [device.allocate(1000), device.allocate(900)]
        assert kept[0].address != kept[1].address
        del kept
        device.allocate(5000)
    assert device.num_allocations == 3, "two of one class, one of another"


@pytest.mark.parametrize("num_bytes", [1, 512, 513, 640, 641, 1024, 1025, 5_000_000, (1 << 33) + 1])
def test_size_classes_lose_a_quarter_at_most(num_bytes: int) -> None:
    size = size_class(num_bytes)
    assert size >= num_bytes and size % 64 == 0 and size_class(size) == size
    assert size <= max(512, num_bytes * 5 / 4)


def test_fresh_memory_of_the_host_is_not_zero(on_host: Device) -> None:
    assert on_host.to_host(on_host.empty((4,), np.uint8))[0].tolist() == [FRESH] * 4


def test_what_does_not_fit_is_refused(device: Device) -> None:
    memory = device.empty((4,), np.int32)
    for name, step in (
        ("an array that is too large", lambda: device.upload(np.zeros(5, np.int32), memory)),
        ("one that is not contiguous", lambda: device.upload(np.zeros(8, np.int32)[::2], memory)),
        ("too little room on the host's side is fine, too much is not", lambda: device.download(memory, np.zeros(3))),
        ("a copy into less", lambda: device.copy(memory, device.empty((3,), np.int32))),
        ("a view beyond the end", lambda: memory.view((4,), offset_bytes=4)),
        ("a view before the beginning", lambda: memory.view((1,), offset_bytes=-4)),
        ("a view between items", lambda: memory.view((1,), offset_bytes=2)),
        ("another shape", lambda: memory.expect("x", (5,), np.int32)),
        ("another dtype", lambda: memory.expect("x", (4,), np.float32)),
    ):
        with pytest.raises(ValueError, match="expected"):
            step()
            pytest.fail(name)
    assert memory.expect("x", (4,), np.int32) is memory


class Foreign:
    """An array as another library shows it."""

    def __init__(self, **interface: Any) -> None:
        self.__cuda_array_interface__ = {"typestr": "<f4", "data": (4096, False), "version": 3, **interface}


def test_arrays_of_other_libraries_are_borrowed() -> None:
    for name, source, shape in (
        ("no strides", Foreign(shape=(2, 3), strides=None), (2, 3)),
        ("packed strides", Foreign(shape=(2, 3), strides=(12, 4)), (2, 3)),
        ("strides left out", Foreign(shape=(5,)), (5,)),
        ("nothing, whatever its strides", Foreign(shape=(0, 3), strides=(99, 9)), (0, 3)),
        ("a number", Foreign(shape=()), ()),
    ):
        array = borrow(source)
        assert (array.shape, array.dtype, array.address) == (shape, np.float32, 4096), name
        assert array.owner.source is source, "kept alive"
        assert array.__cuda_array_interface__["shape"] == shape
    for wrong in (Foreign(shape=(2, 3), strides=(24, 8)), Foreign(shape=(2, 3), strides=(4, 8)), np.zeros(3)):
        with pytest.raises(ValueError, match="on the device"):
            borrow(wrong)


class _Mixed(ctypes.Structure):
    _fields_ = (("small", ctypes.c_uint8), ("wide", ctypes.c_double))


def test_arguments_are_packed_as_a_structure_of_them_would_be(on_host: Device) -> None:
    class Whole(ctypes.Structure):
        _fields_ = (
            ("a", ctypes.c_int32),
            ("b", ctypes.c_void_p),
            ("c", ctypes.c_uint8),
            ("d", _Mixed),
            ("e", ctypes.c_float),
            ("f", ctypes.c_void_p),
            ("g", ctypes.c_void_p),
        )

    buffer, array = on_host.allocate(8), on_host.empty((2, 2), np.int64).view((2,), offset_bytes=16)
    assert isinstance(buffer, DeviceBuffer) and isinstance(array, DeviceArray)
    mixed = _Mixed(3, 0.5)
    whole = Whole(-7, buffer.address, 9, mixed, 1.5, None, array.address)
    packed = pack_arguments([ctypes.c_int32(-7), buffer, ctypes.c_uint8(9), mixed, ctypes.c_float(1.5), None, array])
    assert len(packed) == ctypes.sizeof(Whole)
    read = Whole.from_buffer_copy(packed)
    for field, _ in Whole._fields_:
        expected, found = getattr(whole, field), getattr(read, field)
        assert (found.small, found.wide) == (3, 0.5) if field == "d" else found == expected, field
    assert pack_arguments([]) == b""


@pytest.mark.parametrize("argument", [7, 1.5, "x", np.int32(3), np.zeros(2)], ids=lambda value: type(value).__name__)
def test_numbers_of_unknown_width_are_no_arguments(argument: Any) -> None:
    with pytest.raises(TypeError, match="argument 1"):
        pack_arguments([ctypes.c_int32(1), argument])


GRIDS = [
    ("no threads", (1,), (0,)),
    ("too many threads", (1,), (1025,)),
    ("too many threads together", (1,), (32, 33)),
    ("a negative number of blocks", (-1,), (32,)),
    ("too many blocks along y", (1, 65536), (32,)),
    ("too many blocks along z", (1, 1, 65536), (32,)),
    ("too many blocks", (1 << 31,), (32,)),
]


@pytest.mark.parametrize(("name", "grid", "block"), GRIDS, ids=[name for name, *_ in GRIDS])
def test_launches_beyond_a_devices_limits_are_refused(name: str, grid: Any, block: Any, on_host: Device) -> None:
    with pytest.raises(ValueError, match="expected"):
        on_host.launch(Kernel("nothing", None), grid, block)


def test_a_grid_without_blocks_is_no_launch(on_host: Device) -> None:
    on_host.launch(Kernel("nothing", None), (0, 5), (32,))
    assert on_host.driver.launches == []


def test_rows_go_to_rows_that_lie_apart(device: Device) -> None:
    target = device.to_device(np.zeros((3, 10), np.uint8))
    rows = device.to_device(np.arange(1, 7, dtype=np.uint8).reshape(3, 2))
    device.copy_rows(rows, target, row_bytes=2, rows=3, pitch_bytes=10, offset_bytes=4)
    (found,) = device.to_host(target)
    assert found[:, 4:6].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert not found[:, :4].any() and not found[:, 6:].any()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("a row behind the end", {"row_bytes": 2, "rows": 3, "pitch_bytes": 10, "offset_bytes": 9}),
        ("more than there is", {"row_bytes": 3, "rows": 3, "pitch_bytes": 10}),
        ("rows into each other", {"row_bytes": 2, "rows": 3, "pitch_bytes": 1}),
        ("before the beginning", {"row_bytes": 2, "rows": 3, "pitch_bytes": 10, "offset_bytes": -1}),
    ],
)
def test_rows_that_do_not_fit_are_refused(name: str, arguments: dict[str, int], device: Device) -> None:
    target, rows = device.empty((3, 10), np.uint8), device.empty((3, 2), np.uint8)
    with pytest.raises(ValueError, match="expected 3 rows"):
        device.copy_rows(rows, target, **arguments)


def test_another_stream_sees_the_same_memory_and_its_marks(device: Device) -> None:
    other = device.fork()
    array = device.to_device(np.arange(5))
    mark = device.record()
    other.wait_for(mark)
    np.testing.assert_array_equal(other.to_host(array)[0], np.arange(5))
    assert device.reached(mark), "the other stream has waited for it"


def test_work_of_others_is_called(device: Device) -> None:
    called: list[int] = []
    device.call(lambda: called.append(1))
    device.synchronize()
    assert called == [1]

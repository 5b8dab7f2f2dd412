"""Rows of device arrays, and small arrays on their way up while the stream is behind."""

from __future__ import annotations

import numpy as np
import pytest
from host_stream import host_stream

from segzero_rt.resident.arrays import Staging, rows


def test_rows_are_parts_of_the_same_memory() -> None:
    device, _ = host_stream()
    array = device.to_device(np.arange(24, dtype=np.int32).reshape(4, 3, 2))
    part = rows(array, 1, 3)
    assert (part.shape, part.address - array.address) == ((2, 3, 2), 24)
    np.testing.assert_array_equal(device.to_host(part)[0], np.arange(6, 18).reshape(2, 3, 2))
    assert rows(array, 4, 4).shape == (0, 3, 2)
    for begin, end in ((-1, 2), (0, 5), (3, 2)):
        with pytest.raises(ValueError, match="expected rows within 4"):
            rows(array, begin, end)


def test_arrays_may_change_while_the_stream_is_behind() -> None:
    device, driver = host_stream()
    staging, waits = Staging(device), device.num_host_waits
    values = [np.full(size, index, np.uint8) for index, size in enumerate((1, 63, 64, 65, 30_000, 200_000, 7, 70_000))]
    with driver.held():
        sent = [staging.to_device(each) for each in values]
        for each in values:
            each[:] = 99
    assert device.num_host_waits == waits, "page-locked all of it"
    for index, array in enumerate(sent):
        assert (device.to_host(array)[0] == index).all(), f"array {index}"


def test_memory_serves_again_when_its_copies_are_done() -> None:
    device, _ = host_stream()
    staging = Staging(device)
    for index in range(50):
        sent = staging.to_device(np.full(20_000, index, np.int16))
        assert (device.to_host(sent)[0] == index).all()
    assert device.driver.num_pinned <= 4, "the first blocks, and what `to_host` reads through"


def test_what_is_held_stays_until_it_is_released() -> None:
    device, driver = host_stream()
    staging = Staging(device)
    first, second = device.empty((4,), np.int32), device.empty((4,), np.int32)
    with driver.held():
        for target, value in ((first, 1), (second, 2)):
            device.upload(staging.hold(np.full(4, value, np.int32)), target)
        staging.release()
        staging.to_device(np.zeros(4, np.int32))
    found = device.to_host(first, second)
    assert [array.tolist() for array in found] == [[1] * 4, [2] * 4]


def test_what_is_held_outlives_copies_that_end_meanwhile() -> None:
    device, driver = host_stream()
    staging = Staging(device)
    with driver.held():
        staging.to_device(np.zeros(100, np.uint8))
        early = staging.hold(np.full(100, 1, np.uint8))
    device.synchronize()
    late = staging.hold(np.full(1000, 2, np.uint8))
    assert (early == 1).all() and (late == 2).all()

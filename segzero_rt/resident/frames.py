"""Frames into a device's memory: from the host by a copy, from another library on the device without one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from segzero_rt.device import DeviceArray
from segzero_rt.errors import ImageError
from segzero_rt.image import as_image, check_size
from segzero_rt.kernels.preprocess_device import DeviceFrame
from segzero_rt.resident.arrays import Staging
from segzero_rt.resident.dlpack import CUDA, interface_of

_INTERFACE = "__cuda_array_interface__"


def as_frame(image: Any, staging: Staging) -> DeviceFrame:
    """A picture for the resident pipeline.

    Args:
        image: what `as_image` takes; or an array of another library on the same device, uint8 [H, W, 3] RGB by its
            `__cuda_array_interface__` or DLPack, whose rows may lie any distance apart. That is not copied, and has to
            stay as it is until the question is answered. By DLPack the other library makes it ready for the stream; by
            the interface it has to be ready.

    Raises:
        ImageError: another layout, or a picture that cannot be read.
    """
    interface = getattr(image, _INTERFACE, None)
    if interface is not None:
        return _borrowed(image, interface)
    if hasattr(image, "__dlpack_device__") and not isinstance(image, np.ndarray):
        if image.__dlpack_device__()[0] == CUDA:
            lent = interface_of(image, staging.device.stream_handle)
            return _borrowed(lent["owner"], lent)
        image = np.from_dlpack(image)
    pixels = as_image(image)
    height, width = pixels.shape[:2]
    plane = staging.to_device(np.ascontiguousarray(pixels).reshape(-1))
    return DeviceFrame(pixel_format="rgb", size_hw=(height, width), planes=(plane,), pitches_bytes=(3 * width,))


class _Borrowed:
    """Memory of another library, which is kept alive."""

    def __init__(self, source: object, address: int, num_bytes: int) -> None:
        self.source, self.address, self.num_bytes = source, address, num_bytes


def _borrowed(source: object, interface: dict[str, Any]) -> DeviceFrame:
    shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
    if dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise ImageError(f"expected a picture on the device as uint8 [H, W, 3], got {dtype} {list(shape)}")
    height, width = shape[:2]
    check_size("the picture", (width, height))
    strides = interface.get("strides") or (3 * width, 3, 1)
    if tuple(strides[1:]) != (3, 1) or strides[0] < 3 * width:
        raise ImageError(f"expected a picture on the device whose rows are contiguous, got strides {tuple(strides)}")
    num_bytes = (height - 1) * strides[0] + math.prod(shape[1:])
    memory = _Borrowed(source, int(interface["data"][0]), num_bytes)
    plane = DeviceArray(memory, (num_bytes,), np.uint8)
    return DeviceFrame(pixel_format="rgb", size_hw=(height, width), planes=(plane,), pitches_bytes=(int(strides[0]),))

"""preprocess: a frame as it comes from a camera to what a model takes: resized, normalised, laid out.

**Contract.** For each frame, bit for bit in every build:

* *Colours*: red, green, blue. BGR is swapped. NV12 (a plane of luma, a plane of U and V at half the resolution, of odd
  sizes the larger half) becomes colours by `YUV_RULES`, in 20 bits of fixed point, each pixel with the chroma that its
  pair shares.
* *Resizing*: Pillow's two passes, see `resampling.resize`. That is: weights of the filter around a pixel's centre,
  widened when shrinking, in 22 bits of fixed point; sums along rows, rounded to eight bits, then down columns.
* *Values*: `(level * float32(1 / 255) - mean) / deviation`, each step in float32.
* *Layout*: [3, height, width], or with a patch side [patches, 3 * side ** 2] with the patches of a token consecutive,
  as `Qwen2VLImageProcessor` has them; `order` lists the patches in another order.

Rows may lie any number of bytes apart, backwards too: nothing is copied for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from segzero_rt.errors import ImageError
from segzero_rt.image import check_image, check_size
from segzero_rt.kernels.backend import Kernels, resolve_kernels
from segzero_rt.resampling import RESAMPLERS, resize

PixelFormat: TypeAlias = Literal["rgb", "bgr", "nv12"]
PIXEL_FORMATS: tuple[PixelFormat, ...] = ("rgb", "bgr", "nv12")
YuvColours: TypeAlias = Literal["bt601", "bt601_full", "bt709"]
_YUV_BITS = 20


def _yuv_rule(red: float, blue: float, *, full: bool) -> tuple[int, int, int, int, int, int]:
    """Black level and, in fixed point, what luma, V to red, V and U to green, U to blue count; from a standard's shares
    of red and blue in luma."""
    green = 1 - red - blue
    luma, chroma = (1.0, 1.0) if full else (255 / 219, 255 / 224)
    shares = (
        luma,
        chroma * 2 * (1 - red),
        -chroma * 2 * (1 - red) * red / green,
        -chroma * 2 * (1 - blue) * blue / green,
        chroma * 2 * (1 - blue),
    )
    scaled = [round(share * (1 << _YUV_BITS)) for share in shares]
    return (0 if full else 16, *scaled)  # type: ignore[return-value]


YUV_RULES: dict[YuvColours, tuple[int, int, int, int, int, int]] = {
    # OpenCV's numbers (imgproc, color_yuv: ITUR_BT_601_*), which come of the standard's rounded to three digits.
    "bt601": (16, 1220542, 1673527, -852492, -409993, 2116026),
    "bt601_full": _yuv_rule(0.299, 0.114, full=True),
    "bt709": _yuv_rule(0.2126, 0.0722, full=False),
}
"""Conversions by name: cameras of low resolution and OpenCV, JPEG, cameras of high definition."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Frame:
    """A picture in memory, not copied. Use `rgb`, `bgr` or `nv12`."""

    pixel_format: PixelFormat
    planes: tuple[NDArray[np.uint8], ...]
    """uint8 [H, W, 3]; of NV12 uint8 [H, W] and [(H + 1) // 2, (W + 1) // 2, 2]."""
    colours: YuvColours = "bt601"
    """Of NV12."""

    def __post_init__(self) -> None:
        if self.pixel_format not in PIXEL_FORMATS or self.colours not in YUV_RULES:
            raise ImageError(
                f"expected a format of {', '.join(PIXEL_FORMATS)} and colours of {', '.join(YUV_RULES)}, got "
                f"{self.pixel_format!r} and {self.colours!r}"
            )
        if self.pixel_format == "nv12":
            _check_nv12(self.planes)
        elif len(self.planes) != 1:
            raise ImageError(f"expected one plane of {self.pixel_format} pixels, got {len(self.planes)}")
        else:
            check_image(self.planes[0])

    @classmethod
    def rgb(cls, pixels: NDArray[np.uint8]) -> Frame:
        """uint8 [H, W, 3], red first.

        Raises:
            ImageError: another layout, or no pixels.
        """
        return cls(pixel_format="rgb", planes=(pixels,))

    @classmethod
    def bgr(cls, pixels: NDArray[np.uint8]) -> Frame:
        """uint8 [H, W, 3], blue first, as OpenCV reads pictures.

        Raises:
            ImageError: another layout, or no pixels.
        """
        return cls(pixel_format="bgr", planes=(pixels,))

    @classmethod
    def nv12(cls, luma: NDArray[np.uint8], chroma: NDArray[np.uint8], *, colours: YuvColours = "bt601") -> Frame:
        """uint8 [H, W] and [(H + 1) // 2, (W + 1) // 2, 2], U first.

        Raises:
            ImageError: planes that do not fit each other, no pixels, or unknown colours.
        """
        return cls(pixel_format="nv12", planes=(luma, chroma), colours=colours)

    @property
    def size_hw(self) -> tuple[int, int]:
        return self.planes[0].shape[0], self.planes[0].shape[1]

    def to_rgb(self) -> NDArray[np.uint8]:
        """The frame's colours, uint8 [H, W, 3]: the array itself where it has them."""
        if self.pixel_format == "rgb":
            return self.planes[0]
        if self.pixel_format == "bgr":
            return self.planes[0][:, :, ::-1]
        return _rgb_of_nv12(self.planes[0], self.planes[1], YUV_RULES[self.colours])


@dataclass(frozen=True, kw_only=True, slots=True)
class InputTensor:
    """What a model takes for a picture.

    Raises:
        ValueError: a size that is not positive or no multiple of a token's side, an unknown resampler, or a deviation
            that is not positive.
    """

    size_hw: tuple[int, int]
    """Pixels."""
    image_mean: tuple[float, float, float]
    """Per channel, of values in 0..1."""
    image_std: tuple[float, float, float]
    resampler: str = "pillow_bilinear"
    patch_size: int = 0
    """Pixels of a patch's side; 0 leaves the picture whole."""
    merge_size: int = 1
    """Patches of a token's side."""

    def __post_init__(self) -> None:
        side = max(1, self.patch_size * self.merge_size)
        if self.patch_size < 0 or self.merge_size < 1 or min(self.size_hw) < 1 or any(n % side for n in self.size_hw):
            raise ValueError(
                f"expected a size in multiples of {side} pixels, got {self.size_hw} for patches of {self.patch_size} "
                f"and tokens of {self.merge_size}"
            )
        if self.resampler not in RESAMPLERS:
            raise ValueError(f"expected a resampler of {', '.join(RESAMPLERS)}, got {self.resampler!r}")
        if min(self.image_std) <= 0:
            raise ValueError(f"expected positive image_std, got {self.image_std}")

    @property
    def num_patches(self) -> int:
        """0 for a whole picture."""
        return self.size_hw[0] * self.size_hw[1] // self.patch_size**2 if self.patch_size else 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        if self.patch_size:
            return self.num_patches, 3 * self.patch_size**2
        return 3, *self.size_hw


def preprocess(
    frame: Frame, tensor: InputTensor, *, order: NDArray[np.integer] | None = None, kernels: Kernels | None = None
) -> NDArray[np.float32]:
    """Makes a tensor by the contract above.

    Args:
        frame: of any size.
        tensor: what the model takes.
        order: int [patches], which patch stands at each place; by default they stand token by token.
        kernels: the build to use; by default what `resolve_kernels` gives.

    Returns:
        float32 in `tensor.shape`.

    Raises:
        ValueError: an order that does not name each patch once.
        MemoryError: a frame so long that its weights find no room.
    """
    places = None if order is None else places_of(order, tensor.num_patches)
    chosen = kernels or resolve_kernels()
    if chosen.device is not None:
        from segzero_rt.kernels.preprocess_device import preprocess_with_device

        return preprocess_with_device(chosen.device, frame, tensor, order)
    if chosen.library is not None:
        from segzero_rt.kernels.preprocess_host import preprocess_on_host

        return preprocess_on_host(chosen.library, frame, tensor, places)
    values = _reference(frame, tensor)
    return values if order is None else values[order]


def _reference(frame: Frame, tensor: InputTensor) -> NDArray[np.float32]:
    pixels = resize(np.ascontiguousarray(frame.to_rgb()), tensor.size_hw, tensor.resampler)
    mean, std = np.asarray(tensor.image_mean, np.float32), np.asarray(tensor.image_std, np.float32)
    if not tensor.patch_size:
        planes = pixels.transpose(2, 0, 1) * np.float32(1 / 255)
        return np.asarray((planes - mean[:, None, None]) / std[:, None, None], np.float32)
    patch, merge = tensor.patch_size, tensor.merge_size
    rows, columns = (side // (patch * merge) for side in tensor.size_hw)
    blocks = pixels.reshape(rows, merge, patch, columns, merge, patch, 3)
    patches = blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3, patch * patch)  # uint8: a quarter of the moving
    values = (patches * np.float32(1 / 255) - mean[:, None]) / std[:, None]
    return np.asarray(values, np.float32).reshape(tensor.shape)


def places_of(order: NDArray[np.integer], num_patches: int) -> NDArray[np.int32]:
    """Where each patch goes: the inverse of `order`.

    Raises:
        ValueError: an order that does not name each patch once.
    """
    given = np.asarray(order)
    places = np.full(num_patches, -1, np.int32)
    if given.shape == places.shape and given.size and given.min() >= 0 and given.max() < num_patches:
        places[given] = np.arange(num_patches, dtype=np.int32)
    if given.shape != places.shape or (places < 0).any():
        raise ValueError(f"expected an order that names each of {num_patches} patches once, got shape {given.shape}")
    return places


def _check_nv12(planes: tuple[NDArray[np.uint8], ...]) -> None:
    layouts = [f"{plane.dtype} {list(plane.shape)}" for plane in planes]
    if len(planes) == 2 and planes[0].ndim == 2:
        height, width = planes[0].shape
        check_size("the picture", (width, height))
        wanted = [f"uint8 {[height, width]}", f"uint8 {[(height + 1) // 2, (width + 1) // 2, 2]}"]
        if layouts == wanted:
            return
        raise ImageError(f"expected planes of {' and '.join(wanted)}, got {' and '.join(layouts)}")
    raise ImageError(f"expected a plane of luma and one of chroma, got {' and '.join(layouts) or 'none'}")


def _rgb_of_nv12(
    luma: NDArray[np.uint8], chroma: NDArray[np.uint8], rule: tuple[int, int, int, int, int, int]
) -> NDArray[np.uint8]:
    black, share, red_of_v, green_of_v, green_of_u, blue_of_u = rule
    height, width = luma.shape
    each = chroma.repeat(2, axis=0)[:height].repeat(2, axis=1)[:, :width].astype(np.int32) - 128
    u, v = each[:, :, 0], each[:, :, 1]
    base = np.maximum(luma.astype(np.int32) - black, 0) * share + (1 << (_YUV_BITS - 1))
    sums = np.stack([base + red_of_v * v, base + green_of_v * v + green_of_u * u, base + blue_of_u * u], axis=2)
    return np.asarray((sums >> _YUV_BITS).clip(0, 255), np.uint8)

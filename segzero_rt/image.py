"""Pictures in: every file becomes uint8 RGB [H, W, 3], turned upright, or an `ImageError` that says why not.

What happens to the layouts that are not plain RGB:

* EXIF orientation is applied, so that pixels are where a viewer shows them;
* transparency is composited on white, as a viewer shows it; the colour under fully transparent pixels means nothing;
* 16-bit grey is scaled by 255 / 65535 and rounded; grey is repeated, palettes are looked up, CMYK is converted;
* of an animation or a multi-page file, the first frame counts;
* floating-point and 32-bit integer pictures are refused: their range is not known.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from segzero_rt.errors import ImageError

if TYPE_CHECKING:  # Pillow is imported when a file is read: a caller with arrays never pays for it
    from PIL import Image

ImageRgb: TypeAlias = NDArray[np.uint8]
"""uint8 [H, W, 3], RGB, 0..255."""
ImageLike: TypeAlias = "ImageRgb | str | os.PathLike[str] | bytes"

MAX_PIXELS = 100_000_000
"""Larger pictures are refused by their header, before any memory is taken for them."""
MAX_FILE_BYTES = 512 << 20

# Formats whose decoders need no outside program; EPS, for one, would start Ghostscript.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
# What Pillow's decoders were seen to raise on damaged files. Each means the same here: this file is not a picture.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error)
_ALPHA_MODES = ("RGBA", "LA", "PA", "La", "RGBa")


def load_image(source: str | os.PathLike[str] | bytes, *, upright: bool = True) -> ImageRgb:
    """Read a picture from a path or from the bytes of a file.

    Args:
        source: path, or the bytes of a file.
        upright: False leaves the pixels as they are stored, whatever the EXIF tag says: what annotations mean.

    Returns:
        uint8 [H, W, 3], RGB.

    Raises:
        ImageError: missing, a folder, not a picture, truncated or damaged, without pixels, of more than `MAX_PIXELS`,
            or of a layout that has no defined range.
    """
    # Naming the two plugins that Pillow does not load by itself spares loading all forty.
    from PIL import Image, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin  # noqa: F401

    name = "the picture" if isinstance(source, bytes) else os.fspath(source)
    data = source if isinstance(source, bytes) else _read_file(Path(source))
    try:
        with warnings.catch_warnings():
            # Pillow's bomb warning starts below this module's own limit; damaged metadata does not matter to pixels.
            warnings.simplefilter("ignore")
            picture = Image.open(io.BytesIO(data), formats=_FORMATS)
            check_size(name, picture.size)
            picture.load()
            return _to_rgb(name, picture, upright=upright)
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: expected at most {MAX_PIXELS // 10**6} megapixels, got far more") from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name}: expected a picture (PNG, JPEG, WebP, BMP, TIFF, GIF, PPM), got {_kind(data)}"
        ) from error
    except _DECODE_ERRORS as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise ImageError(f"{name}: expected a whole picture, got one that cannot be decoded ({reason})") from error


def check_image(image_rgb: object) -> ImageRgb:
    """Return `image_rgb` itself if it is uint8 [H, W, 3] with at least one and at most `MAX_PIXELS` pixels.

    Raises:
        ImageError: anything else; arrays of other layouts are refused rather than guessed at.
    """
    if not isinstance(image_rgb, np.ndarray):
        raise ImageError(f"expected a picture as a numpy array or a path, got {type(image_rgb).__name__}")
    shape = image_rgb.shape
    if image_rgb.dtype != np.uint8 or len(shape) != 3 or shape[2] != 3:
        raise ImageError(
            f"expected a picture as uint8 [H, W, 3] in RGB order, got {image_rgb.dtype} {list(shape)}; convert it first"
        )
    check_size("the picture", (shape[1], shape[0]))
    return image_rgb


def as_image(image: ImageLike) -> ImageRgb:
    """An array as it is, a path or bytes through `load_image`."""
    return load_image(image) if isinstance(image, (str, bytes, os.PathLike)) else check_image(image)


def _read_file(path: Path) -> bytes:
    try:
        if "\0" in str(path):
            raise ValueError("a NUL in the path")
        if path.is_dir():
            raise ImageError(f"{path}: expected a picture, got a folder")
        if not path.exists():
            raise ImageError(f"{path}: expected a picture, got nothing there; check the path")
        if not path.is_file():  # a device or a pipe may never end
            raise ImageError(f"{path}: expected a plain file")
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise ImageError(f"{path}: expected at most {MAX_FILE_BYTES >> 20} MiB, got {size >> 20} MiB")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise ImageError(f"{str(path)[:200]!r}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def check_size(name: str, size_wh: tuple[int, int]) -> None:
    """Raises ImageError for a picture without pixels or with more than `MAX_PIXELS`."""
    width, height = size_wh
    if width < 1 or height < 1:
        raise ImageError(f"{name}: expected at least one pixel, got {width}x{height}")
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name}: expected at most {MAX_PIXELS // 10**6} megapixels, got {width}x{height}; shrink it first"
        )


def _to_rgb(name: str, picture: Image.Image, *, upright: bool) -> ImageRgb:
    from PIL import Image, ImageOps

    if upright:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("F", "I") and not _holds_16_bits(picture):
        raise ImageError(f"{name}: expected 8 or 16 bits a channel, got {picture.mode} (32 bits); convert it first")
    if picture.mode.startswith("I"):
        grey = np.asarray(picture).astype(np.float64) * (255.0 / 65535.0)
        return np.repeat(np.rint(grey).astype(np.uint8)[:, :, None], 3, axis=2)
    if picture.mode in _ALPHA_MODES or "transparency" in picture.info:
        with_alpha = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), with_alpha)
    return np.array(picture.convert("RGB"), dtype=np.uint8)


def _holds_16_bits(picture: Image.Image) -> bool:
    """Pillow before 11 read 16-bit grey PNG and PGM files into 32-bit integers."""
    if picture.mode != "I" or picture.format not in ("PNG", "PPM"):
        return False
    values = np.asarray(picture)
    return bool(values.min() >= 0 and values.max() <= 65535)


def _kind(data: bytes) -> str:
    if not data:
        return "an empty file"
    return "text" if data[:512].isascii() and b"\0" not in data[:512] else "something else"

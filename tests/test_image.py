"""Pictures in: every layout ends up as upright RGB, and what is no picture is one clear error."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segzero_rt.errors import ImageError
from segzero_rt.image import MAX_PIXELS, as_image, check_image, load_image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
# Two rows, three columns, all different: any turn or flip shows.
UPRIGHT = np.array([[RED, GREEN, BLUE], [WHITE, (0, 0, 0), (255, 255, 0)]], np.uint8)


def encode(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def png(width: int, height: int, body: bytes = b"", depth: int = 8, colour: int = 2) -> bytes:
    """A PNG with any header, whether or not its pixels are there."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def refused(source: bytes | str | Path) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(source)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP"])
def test_lossless_formats_give_the_same_pixels(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    image = load_image(encode(Image.fromarray(UPRIGHT), kind, **options))
    assert image.dtype == np.uint8 and image.flags.c_contiguous and image.flags.writeable
    np.testing.assert_array_equal(image, UPRIGHT)


def test_a_path_and_its_bytes_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "päth with spaces.dat"  # the contents decide, not the suffix
    path.write_bytes(encode(Image.fromarray(UPRIGHT)))
    for source in (path, os.fspath(path), path.read_bytes()):
        np.testing.assert_array_equal(load_image(source), UPRIGHT)


ORIENTATIONS = {  # what the camera stored, so that a viewer that obeys the tag shows UPRIGHT
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.transpose(1, 0, 2),
    6: np.rot90(UPRIGHT, 1),
    7: UPRIGHT[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(UPRIGHT, -1),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    stored = Image.fromarray(np.ascontiguousarray(ORIENTATIONS[orientation]).repeat(16, 0).repeat(16, 1))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    image = load_image(encode(stored, kind, exif=exif, **options))
    assert image.shape == (32, 48, 3)
    middle = image[8::16, 8::16].astype(int)  # away from JPEG's edges
    assert np.abs(middle - UPRIGHT).max() <= (4 if kind == "JPEG" else 0)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_exif_orientation_that_means_nothing_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(load_image(encode(Image.fromarray(UPRIGHT), exif=exif)), UPRIGHT)


def test_grey_is_repeated() -> None:
    grey = np.array([[0, 100, 255]], np.uint8)
    np.testing.assert_array_equal(load_image(encode(Image.fromarray(grey))), np.repeat(grey[:, :, None], 3, 2))


def test_one_bit_becomes_black_and_white() -> None:
    image = load_image(encode(Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")))
    np.testing.assert_array_equal(image, [[[0, 0, 0], [255, 255, 255]]])


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_and_rounded(kind: str) -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    image = load_image(encode(Image.fromarray(values), kind))
    np.testing.assert_array_equal(image[0, :, 0], [0, 0, 1, 1, 128, 255])
    assert (image == image[:, :, :1]).all()


def test_sixteen_bit_colour_is_taken_to_eight() -> None:
    row = b"\0" + struct.pack(">6H", 65535, 0, 0, 0, 32768, 257)
    image = load_image(png(2, 1, row, depth=16))
    assert np.abs(image.astype(int) - [[RED, (0, 128, 1)]]).max() <= 1


def test_transparency_shows_white() -> None:
    pixels = np.array([[(255, 0, 0, 255), (9, 9, 9, 0), (0, 0, 0, 128)]], np.uint8)
    np.testing.assert_array_equal(load_image(encode(Image.fromarray(pixels))), [[RED, WHITE, (127, 127, 127)]])
    grey_alpha = np.array([[(0, 255), (0, 0)]], np.uint8)
    np.testing.assert_array_equal(load_image(encode(Image.fromarray(grey_alpha, "LA"))), [[(0, 0, 0), WHITE]])


def test_a_palette_is_looked_up_with_its_transparent_entry() -> None:
    picture = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    picture.putpalette([*RED, *GREEN, *BLUE])
    np.testing.assert_array_equal(load_image(encode(picture)), [[RED, GREEN, BLUE]])
    np.testing.assert_array_equal(load_image(encode(picture, transparency=1)), [[RED, WHITE, BLUE]])


def test_cmyk_is_converted() -> None:
    picture = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    image = load_image(encode(picture, "JPEG", quality=100))
    assert image.shape == (8, 8, 3)
    assert np.abs(image.astype(int) - RED).max() <= 4


def test_of_an_animation_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    image = load_image(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert (image == RED).all()


def test_one_pixel_is_a_picture() -> None:
    assert load_image(encode(Image.new("RGB", (1, 1), RED))).tolist() == [[list(RED)]]


@pytest.mark.parametrize("size_wh", [(1, 5000), (5000, 1)], ids=["tall", "wide"])
def test_strips_are_pictures(size_wh: tuple[int, int]) -> None:
    assert load_image(encode(Image.new("RGB", size_wh))).shape == (size_wh[1], size_wh[0], 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP"])
def test_truncated_files_are_refused_or_never_crash(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (24, 31, 3), np.uint8)
    whole = encode(Image.fromarray(noise), kind)
    assert load_image(whole).shape == noise.shape
    assert "expected a whole picture" in refused(whole[: len(whole) // 2])
    for end in range(0, len(whole) - 1, 13):
        try:  # only bytes after the last pixel may be missing
            assert load_image(whole[:end]).shape == noise.shape
        except ImageError:
            assert end < len(whole)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP", "PPM"])
def test_flipped_bytes_give_a_picture_or_an_image_error(kind: str) -> None:
    generator = np.random.default_rng(1)
    whole = encode(Image.fromarray(generator.integers(0, 256, (9, 11, 3), np.uint8)), kind)
    for _ in range(400):
        damaged = bytearray(whole)
        for position in generator.integers(0, len(whole), 3):
            damaged[position] = int(generator.integers(0, 256))
        try:
            image = load_image(bytes(damaged))
        except ImageError as error:
            assert "\n" not in str(error)
        else:
            assert image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8


@pytest.mark.parametrize(
    ("size_wh", "expected"),
    [
        ((20_000, 20_000), "megapixels"),
        ((2**31 - 1, 2**31 - 1), "megapixels"),
        ((10_001, 10_000), "100 megapixels, got 10001x10000"),
    ],
)
def test_a_huge_header_is_refused_before_its_pixels_are_read(size_wh: tuple[int, int], expected: str) -> None:
    assert size_wh[0] * size_wh[1] > MAX_PIXELS
    assert expected in refused(png(*size_wh))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty file"),
        (b"hello, I am a text\n" * 20, "text"),
        (b"\0" * 1000, "something else"),
        (b"\x89PNG\r\n\x1a\n", "expected"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "text"),
        (png(0, 5), "expected"),
        (png(5, 5), "expected a whole picture"),
        (b"GIF89a", "expected"),
        (b"\xff\xd8\xff\xe0", "expected"),
    ],
    ids=["empty", "text", "zeros", "png magic", "eps", "no width", "no pixels", "gif magic", "jpeg magic"],
)
def test_what_is_no_picture(data: bytes, expected: str) -> None:
    assert expected in refused(data)


def test_floating_point_pictures_are_refused() -> None:
    assert "32 bits" in refused(encode(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"))
    assert "32 bits" in refused(encode(Image.fromarray(np.full((2, 2), 70_000, np.int32)), "TIFF"))


def test_paths_that_hold_no_picture(tmp_path: Path) -> None:
    assert "folder" in refused(tmp_path)
    assert "nothing there" in refused(tmp_path / "gone.png")
    assert "nothing there" in refused(tmp_path / "gone" / "too.png")
    assert "plain file" in refused("/dev/zero")
    assert "cannot be read" in refused("with\0nul.png")
    assert "cannot be read" in refused("x" * 5000)
    os.mkfifo(tmp_path / "pipe")
    assert "plain file" in refused(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (np.zeros((4, 4), np.uint8), "[4, 4]"),
        (np.zeros((4, 4, 4), np.uint8), "[4, 4, 4]"),
        (np.zeros((3, 4, 4), np.uint8), "[3, 4, 4]"),
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.zeros((0, 4, 3), np.uint8), "one pixel"),
        (np.zeros((4, 0, 3), np.uint8), "one pixel"),
        (np.broadcast_to(np.uint8(0), (20_000, 20_000, 3)), "megapixels"),
        ([[1, 2, 3]], "list"),
        (None, "NoneType"),
    ],
    ids=["grey", "rgba", "planar", "float", "no rows", "no columns", "huge", "list", "none"],
)
def test_arrays_of_other_layouts_are_refused(image: object, expected: str) -> None:
    with pytest.raises(ImageError) as caught:
        check_image(image)
    assert expected in str(caught.value)


def test_an_array_passes_as_it_is() -> None:
    assert check_image(UPRIGHT) is UPRIGHT
    assert as_image(UPRIGHT) is UPRIGHT
    np.testing.assert_array_equal(as_image(encode(Image.fromarray(UPRIGHT))), UPRIGHT)

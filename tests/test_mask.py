"""Masks: COCO run lengths byte by byte, boxes, IoU. Ugly sizes throughout."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from kernel_builds import BUILDS, forced_kernels

from segzero_rt.mask import (
    MAX_RLE_PIXELS,
    decode_rle,
    encode_rle,
    mask_iou,
    masks_from_logits,
    tight_boxes,
)
from segzero_rt.upsampling import upsample_logits


@pytest.fixture(params=BUILDS, autouse=True)
def build(request: pytest.FixtureRequest) -> Iterator[str]:
    """Everything here holds for every build of the kernels."""
    with forced_kernels(request.param):
        yield str(request.param)


def picture(text: str) -> np.ndarray:
    """Rows of `.` and `#`, for masks that can be read."""
    return np.array([[character == "#" for character in row.split()[0]] for row in text.strip().splitlines()])


# Worked out by hand from the format: runs down the columns, zeros first; five bits a character, 48 added; bit 32 says
# that the number goes on; from the fourth run on the difference to the run two before.
BY_HAND = [
    ("all zeros", picture("..\n.."), "4"),
    ("all ones", picture("##\n##"), "04"),
    ("one pixel, off", picture("."), "1"),
    ("one pixel, on", picture("#"), "01"),
    ("first column", picture("#..\n#.."), "024"),
    ("a difference below zero: runs 0 1 2 2 1 are 0 1 2 1 -1", picture("#.#\n.#."), "0121O"),
    ("runs 1 2 3: three plain numbers", picture("...\n#..\n#.."), "126"),
    ("15 fits one character, 16 needs two", np.zeros((1, 16), bool), "`0"),
]


@pytest.mark.parametrize(("name", "mask", "counts"), BY_HAND, ids=[name for name, _, _ in BY_HAND])
def test_run_lengths_by_hand(name: str, mask: np.ndarray, counts: str) -> None:
    encoded = encode_rle(mask)
    assert encoded == {"size": list(mask.shape), "counts": counts}
    np.testing.assert_array_equal(decode_rle(encoded), mask)


SIZES = [(0, 0), (0, 5), (5, 0), (1, 1), (1, 7), (7, 1), (3, 5), (16, 16), (33, 31), (480, 641)]


@pytest.mark.parametrize("size_hw", SIZES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.03, 0.5, 0.97, 1.0])
def test_run_lengths_come_back(size_hw: tuple[int, int], density: float) -> None:
    mask = np.random.default_rng(3).random(size_hw) < density
    encoded = encode_rle(mask)
    assert encoded["size"] == list(size_hw)
    np.testing.assert_array_equal(decode_rle(encoded), mask)
    np.testing.assert_array_equal(decode_rle({**encoded, "counts": encoded["counts"].encode()}), mask)


@pytest.mark.parametrize("size_hw", [size for size in SIZES if min(size)], ids=str)
def test_run_lengths_are_those_of_the_coco_api(size_hw: tuple[int, int]) -> None:
    coco = pytest.importorskip(
        "pycocotools.mask", reason="pycocotools is not installed; it comes with segzero-rt[eval]"
    )
    rng = np.random.default_rng(5)
    for density in (0.0, 0.01, 0.3, 0.5, 0.99, 1.0):
        mask = rng.random(size_hw) < density
        theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert encode_rle(mask)["counts"] == theirs["counts"].decode()
        np.testing.assert_array_equal(decode_rle({"size": list(size_hw), "counts": theirs["counts"]}), mask)


def test_long_runs_are_those_of_the_coco_api() -> None:
    coco = pytest.importorskip(
        "pycocotools.mask", reason="pycocotools is not installed; it comes with segzero-rt[eval]"
    )
    mask = np.zeros((2161, 3840), bool)
    mask[40:2000, 5:3838] = True
    assert encode_rle(mask)["counts"] == coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()


HOSTILE = [
    ("no size", {"counts": "4"}),
    ("size a number", {"size": 4, "counts": "4"}),
    ("size of three", {"size": [2, 2, 1], "counts": "4"}),
    ("size of floats", {"size": [2.0, 2.0], "counts": "4"}),
    ("size of truth values", {"size": [True, True], "counts": "1"}),
    ("size below zero", {"size": [-2, -2], "counts": "4"}),
    ("size beyond memory", {"size": [MAX_RLE_PIXELS, 2], "counts": "4"}),
    ("no counts", {"size": [2, 2]}),
    ("counts as a list", {"size": [2, 2], "counts": [4]}),
    ("empty counts", {"size": [2, 2], "counts": ""}),
    ("too few", {"size": [2, 2], "counts": "3"}),
    ("too many", {"size": [2, 2], "counts": "5"}),
    ("a run below zero", {"size": [2, 2], "counts": "5O"}),
    ("cut off inside a number", {"size": [4, 4], "counts": "P"}),
    ("a number without end", {"size": [4, 4], "counts": "P" * 40 + "0"}),
    ("a character below", {"size": [2, 2], "counts": "/"}),
    ("a character above", {"size": [2, 2], "counts": "p"}),
    ("not ASCII", {"size": [2, 2], "counts": "4é"}),
    ("a NUL byte", {"size": [2, 2], "counts": "4\0"}),
]


@pytest.mark.parametrize(("name", "rle"), HOSTILE, ids=[name for name, _ in HOSTILE])
def test_what_is_no_mask_is_refused(name: str, rle: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        decode_rle(rle)


@pytest.mark.parametrize("array", [np.zeros((2, 2), np.uint8), np.zeros(4, bool), np.zeros((1, 2, 2), bool)])
def test_only_masks_are_encoded(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="bool"):
        encode_rle(array)


def test_masks_are_upsampled_logits_above_zero() -> None:
    logits = np.random.default_rng(2).normal(0, 1, (3, 16, 16)).astype(np.float32)
    np.testing.assert_array_equal(masks_from_logits(logits, (33, 47)), upsample_logits(logits, (33, 47)) > 0)
    assert masks_from_logits(np.zeros((1, 4, 4), np.float32), (5, 5)).sum() == 0, "0 itself is not above the threshold"


def test_no_masks_have_their_shapes() -> None:
    assert masks_from_logits(np.zeros((0, 8, 8), np.float32), (5, 6)).shape == (0, 5, 6)
    assert tight_boxes(np.zeros((0, 5, 6), bool)).shape == (0, 4)


BOXES = [
    ("nothing", picture("...\n..."), (0, 0, 0, 0)),
    ("all", picture("###\n###"), (0, 0, 3, 2)),
    ("one pixel in a corner", picture("...\n..#"), (2, 1, 3, 2)),
    ("two far apart", picture("#..\n...\n..#"), (0, 0, 3, 3)),
]


@pytest.mark.parametrize(("name", "mask", "box_xyxy"), BOXES, ids=[name for name, _, _ in BOXES])
def test_tight_boxes(name: str, mask: np.ndarray, box_xyxy: tuple[int, ...]) -> None:
    np.testing.assert_array_equal(tight_boxes(mask[None]), [box_xyxy])


IOUS = [
    ("equal", picture("##.\n..."), picture("##.\n..."), 1.0),
    ("apart", picture("#..\n..."), picture("..#\n..."), 0.0),
    ("one of three", picture("##.\n..."), picture(".##\n..."), 1 / 3),
    ("both empty", picture("...\n..."), picture("...\n..."), 1.0),
    ("one empty", picture("...\n..."), picture("#..\n..."), 0.0),
]


@pytest.mark.parametrize(("name", "one", "other", "iou"), IOUS, ids=[name for name, *_ in IOUS])
def test_mask_iou(name: str, one: np.ndarray, other: np.ndarray, iou: float) -> None:
    assert mask_iou(one, other) == mask_iou(other, one) == pytest.approx(iou)


def test_masks_of_two_sizes_have_no_iou() -> None:
    with pytest.raises(ValueError, match="one size"):
        mask_iou(np.zeros((2, 3), bool), np.zeros((3, 2), bool))

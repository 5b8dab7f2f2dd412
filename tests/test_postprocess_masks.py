"""postprocess_masks: rules by hand on every build, builds against each other bit for bit, SAM 2 and COCO as oracles."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from kernel_builds import BUILDS, COMPILED_BUILDS, DEVICE_BUILDS, NEEDS_COMPILER, kernel_build

from segzero_rt.kernels.backend import Kernels, resolve_kernels
from segzero_rt.kernels.postprocess_masks import CLEAN_ORDERS, ProcessedMasks, postprocess_masks, small_components
from segzero_rt.kernels.postprocess_masks_device import DeviceMaskMaker
from segzero_rt.mask import decode_rle


@pytest.fixture(params=BUILDS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return kernel_build(request.param)


def logits_of(text: str) -> np.ndarray:
    """Rows of `.` (-1) and `#` (+1): float32 [1, h, w]."""
    rows = text.split()
    return np.array([[[1.0 if character == "#" else -1.0 for character in row] for row in rows]], np.float32)


def rows_of(mask: np.ndarray) -> str:
    return " ".join("".join("#" if pixel else "." for pixel in row) for row in mask)


# Area limits of 2 in both rules. Logits and source have the same size, so that the mask is the logits' signs.
CLEANED = [
    ("a hole of one", "### #.# ###", "### ### ###"),
    ("a hole of two", "#### #..# ####", "#### #### ####"),
    ("a hole of three stays", "##### #...# #####", "##### #...# #####"),
    ("corners join a hole: three in all", "##### #.### ##.## ###.# #####", "##### #.### ##.## ###.# #####"),
    ("a hole at the edge is one too", ".### #### ####", "#### #### ####"),
    ("a sprinkle of two", "##... ..... ..###", "..... ..... ..###"),
    ("corners join a sprinkle", "#.... .#... ..#..", "#.... .#... ..#.."),
    ("both at once: neither sees what the other did", "##### #...# #.#.# #...# #####", "##### #...# #...# #...# #####"),
    ("one pixel", "#", "."),
    ("one pixel of nothing", ".", "#"),
    ("two rows that end together and meet by a corner", "#. .#", ".# #."),
]


@pytest.mark.parametrize("order", CLEAN_ORDERS)
@pytest.mark.parametrize(("name", "before", "after"), CLEANED, ids=[name for name, _, _ in CLEANED])
def test_holes_and_sprinkles(name: str, before: str, after: str, order: Any, kernels: Kernels) -> None:
    logits = logits_of(before)
    read = postprocess_masks(
        logits, logits.shape[1:], max_hole_area=2, max_sprinkle_area=2, order=order, kernels=kernels
    )
    assert rows_of(read.masks[0]) == after
    untouched = postprocess_masks(logits, logits.shape[1:], order=order, kernels=kernels)
    assert rows_of(untouched.masks[0]) == before.strip()


def test_the_orders_differ_where_they_should(kernels: Kernels) -> None:
    logits = logits_of("##### ##.## ##### #####")
    arguments: dict[str, Any] = {"max_hole_area": 1, "kernels": kernels}
    early = postprocess_masks(logits, (40, 50), order="before_upsampling", **arguments)
    late = postprocess_masks(logits, (40, 50), order="after_upsampling", **arguments)
    assert early.masks.all(), "one logit is one pixel before upsampling"
    assert not late.masks.all(), "and many after it"
    assert postprocess_masks(logits, (40, 50), order="after_upsampling", max_hole_area=200, kernels=kernels).masks.all()


def test_a_result_by_hand(kernels: Kernels) -> None:
    logits = np.stack([logits_of("...# ..##")[0], np.full((2, 4), -1, np.float32), np.full((2, 4), 0.02, np.float32)])
    read = postprocess_masks(logits, (2, 4), kernels=kernels)
    assert read.boxes_xyxy.tolist() == [[2, 0, 4, 2], [0, 0, 0, 0], [0, 0, 4, 2]]
    assert read.areas.tolist() == [3, 0, 8]
    assert read.stability.tolist() == [1.0, 1.0, 0.0]
    assert read.rle_counts == ("53", "8", "08")
    for rle, mask in zip(read.rles, read.masks, strict=True):
        np.testing.assert_array_equal(decode_rle(rle), mask)


@pytest.mark.parametrize(
    ("name", "logits", "change", "message"),
    [
        ("double precision", np.zeros((1, 2, 2)), {}, "float32"),
        ("one picture without its axis", np.zeros((2, 2), np.float32), {}, r"\[N, h, w\]"),
        ("no logits", np.zeros((1, 0, 2), np.float32), {}, r"\[N, h, w\]"),
        ("a size below zero", np.zeros((1, 2, 2), np.float32), {"size_hw": (-1, 4)}, "negative"),
        ("an area below zero", np.zeros((1, 2, 2), np.float32), {"max_hole_area": -1}, "negative"),
        ("an order that is none", np.zeros((1, 2, 2), np.float32), {"order": "later"}, "before_upsampling"),
    ],
)
def test_what_the_caller_must_mend(
    name: str, logits: np.ndarray, change: dict[str, Any], message: str, kernels: Kernels
) -> None:
    with pytest.raises(ValueError, match=message):
        postprocess_masks(logits, **{"size_hw": (4, 4), **change}, kernels=kernels)


def test_no_masks_have_their_shapes(kernels: Kernels) -> None:
    read = postprocess_masks(np.zeros((0, 4, 4), np.float32), (5, 6), kernels=kernels)
    assert (read.masks.shape, read.boxes_xyxy.shape, read.areas.shape) == ((0, 5, 6), (0, 4), (0,))
    assert (read.stability.shape, read.rle_counts) == ((0,), ())
    assert postprocess_masks(np.ones((1, 4, 4), np.float32), (5, 6), run_lengths=False, kernels=kernels).rles == []


# --- builds against each other

SIZES = [
    ((1, 1), (1, 1)),
    ((1, 1), (5, 9)),
    ((7, 5), (7, 5)),
    ((33, 31), (17, 3)),  # shrinking: logits are stepped over
    ((16, 9), (77, 130)),
    ((5, 300), (77, 10)),
    ((64, 64), (479, 641)),
    ((9, 9), (31, 0)),
    ((8, 8), (0, 4)),
]
KINDS = ("smooth", "noise", "whole numbers", "huge", "infinite", "not a number", "nearly zero")
RULES: list[dict[str, Any]] = [
    {},
    {"max_hole_area": 8, "max_sprinkle_area": 5},
    {"max_sprinkle_area": 40, "order": "after_upsampling", "max_hole_area": 25},
    {"threshold": 0.5, "max_hole_area": 3, "stability_delta": 1.0},
    {"threshold": -2.0, "max_sprinkle_area": 3, "run_lengths": False},
]


def _logits(kind: str, size_hw: tuple[int, int], count: int = 3) -> np.ndarray:
    rng = np.random.default_rng(size_hw[0] * 1000 + size_hw[1])
    logits = rng.normal(0, 2, (count, *size_hw)).astype(np.float32)
    if kind == "smooth":
        logits = np.stack([12 * cv2.GaussianBlur(picture, (0, 0), 3) for picture in logits])
    elif kind == "whole numbers":
        logits = np.round(logits)
    elif kind == "huge":
        logits *= np.float32(1e37)
    elif kind == "nearly zero":
        logits *= np.float32(1e-42)
    elif kind != "noise":
        logits[rng.random(logits.shape) < 0.1] = np.nan if kind == "not a number" else np.inf
        logits[rng.random(logits.shape) < 0.1] = np.nan if kind == "not a number" else -np.inf
    return logits.astype(np.float32)


def _assert_equal(one: ProcessedMasks, other: ProcessedMasks) -> None:
    for field in ("masks", "boxes_xyxy", "areas", "stability"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field), err_msg=field)
        assert getattr(one, field).dtype == getattr(other, field).dtype
    assert one.rle_counts == other.rle_counts


@pytest.mark.parametrize("build", COMPILED_BUILDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("coarse_hw", "size_hw"), SIZES, ids=str)
def test_the_builds_agree_to_the_bit(
    coarse_hw: tuple[int, int], size_hw: tuple[int, int], kind: str, build: str
) -> None:
    logits = _logits(kind, coarse_hw)
    for rules in RULES:
        builds = (kernel_build(build), resolve_kernels("reference"))
        _assert_equal(*(postprocess_masks(logits, size_hw, **rules, kernels=one) for one in builds))


@pytest.mark.parametrize("build", COMPILED_BUILDS)
def test_the_builds_agree_on_many_small_pictures(build: str) -> None:
    rng = np.random.default_rng(11)
    for _ in range(300):
        coarse_hw, size_hw = rng.integers(1, 12, 2), rng.integers(0, 30, 2)
        logits = np.round(rng.normal(0, 1.2, (2, *coarse_hw))).astype(np.float32)
        rules: dict[str, Any] = {
            "max_hole_area": int(rng.integers(0, 6)),
            "max_sprinkle_area": int(rng.integers(0, 6)),
            "order": CLEAN_ORDERS[rng.integers(2)],
        }
        size = (int(size_hw[0]), int(size_hw[1]))
        builds = (kernel_build(build), resolve_kernels("reference"))
        _assert_equal(*(postprocess_masks(logits, size, **rules, kernels=one) for one in builds))


@NEEDS_COMPILER
def test_logits_need_not_be_contiguous() -> None:
    logits = _logits("smooth", (24, 40))[:, ::2, ::-1]
    host = resolve_kernels("host")
    _assert_equal(
        postprocess_masks(logits, (30, 50), kernels=host),
        postprocess_masks(np.ascontiguousarray(logits), (30, 50), kernels=host),
    )


@pytest.mark.parametrize("build", DEVICE_BUILDS)
@pytest.mark.parametrize("order", CLEAN_ORDERS)
def test_logits_on_the_device_become_masks_there_without_a_wait(order: Any, build: str) -> None:
    kernels = kernel_build(build).device
    assert kernels is not None
    device = kernels.device
    rules: dict[str, Any] = {"max_hole_area": 9, "max_sprinkle_area": 6, "order": order}
    maker = DeviceMaskMaker(kernels, (2, 24, 40), (135, 101), **rules, max_runs=5000, max_characters=9000)
    few = DeviceMaskMaker(kernels, (2, 24, 40), (135, 101), **rules, max_runs=3)
    short = DeviceMaskMaker(kernels, (2, 24, 40), (135, 101), **rules, max_characters=5)
    for kind in ("smooth", "noise"):
        logits = _logits(kind, (24, 40), 2)
        resident = device.to_device(logits)
        maker.enqueue(resident)  # compiles and loads
        waits, allocations = device.num_host_waits, device.num_allocations
        for one in (maker, few, short):
            one.enqueue(resident)
        assert (device.num_host_waits, device.num_allocations) == (waits, allocations), "nothing was waited for"
        want = postprocess_masks(logits, (135, 101), **rules, kernels=resolve_kernels("reference"))
        masks, boxes, areas, stability = device.to_host(maker.masks, maker.boxes_xyxy, maker.areas, maker.stability)
        text, lengths = device.to_host(maker.rle_text, maker.rle_lengths)
        counts = tuple(text[index, :length].tobytes().decode() for index, length in enumerate(lengths.tolist()))
        _assert_equal(
            ProcessedMasks(
                masks=masks.view(bool), boxes_xyxy=boxes, areas=areas, stability=stability, rle_counts=counts
            ),
            want,
        )
        assert device.to_host(few.rle_lengths)[0].tolist() == [-1, -1] == device.to_host(short.rle_lengths)[0].tolist()
    with pytest.raises(ValueError, match="logits"):
        maker.enqueue(device.empty((2, 24, 41), np.float32))
    with pytest.raises(ValueError, match="pixels"):
        DeviceMaskMaker(kernels, (1, 1, 1), (1 << 16, 1 << 15))


@pytest.mark.parametrize("build", DEVICE_BUILDS)
def test_run_lengths_without_room_on_the_device_come_from_the_host(build: str) -> None:
    logits = np.where(np.indices((400, 400)).sum(axis=0) % 2, 1, -1).astype(np.float32)[None]
    read, want = (postprocess_masks(logits, (400, 400), kernels=kernel_build(one)) for one in (build, "reference"))
    _assert_equal(read, want)
    assert len(want.rle_counts[0]) > 1 << 16


# --- oracles


def test_run_lengths_are_those_of_the_coco_api(kernels: Kernels) -> None:
    coco = pytest.importorskip(
        "pycocotools.mask", reason="pycocotools is not installed; it comes with segzero-rt[eval]"
    )
    for kind in ("smooth", "noise"):
        read = postprocess_masks(_logits(kind, (32, 48)), (301, 477), kernels=kernels)
        for rle, mask, box, area in zip(read.rles, read.masks, read.boxes_xyxy, read.areas, strict=True):
            theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
            assert rle["counts"] == theirs["counts"].decode()
            x, y, width, height = coco.toBbox(theirs)
            assert box.tolist() == [x, y, x + width, y + height] and area == coco.area(theirs)


def test_cleaning_and_upsampling_are_sam2s(kernels: Kernels) -> None:
    """`SAM2Transforms.postprocess_masks`, written down again with SciPy's labels and PyTorch's interpolation."""
    torch = pytest.importorskip("torch", reason="torch is not installed; it comes with segzero-rt[export]")
    measure = pytest.importorskip("scipy.ndimage", reason="scipy is not installed; it comes with segzero-rt[train]")
    logits = _logits("smooth", (64, 64), 2) + _logits("noise", (64, 64), 2) * np.float32(0.6)

    def small(pixels: np.ndarray, area: int) -> np.ndarray:
        labels, _ = measure.label(pixels, np.ones((3, 3)))
        return (labels > 0) & (np.bincount(labels.ravel())[labels] <= area)

    theirs = []
    for picture in logits:
        filled = np.where(small(picture <= 0, 12), np.float32(10), picture)
        cleaned = np.where(small(picture > 0, 7), np.float32(-10), filled).astype(np.float32)
        wide = torch.nn.functional.interpolate(torch.from_numpy(cleaned)[None, None], size=(479, 641), mode="bilinear")
        theirs.append(wide[0, 0].numpy() > 0)
    read = postprocess_masks(logits, (479, 641), max_hole_area=12, max_sprinkle_area=7, kernels=kernels)
    assert np.count_nonzero(read.masks != np.stack(theirs)) <= 2, "another way of PyTorch's may round a pixel otherwise"


def test_small_components_against_scipy() -> None:
    measure = pytest.importorskip("scipy.ndimage", reason="scipy is not installed; it comes with segzero-rt[train]")
    pixels = np.random.default_rng(2).random((41, 57)) < 0.4
    labels, _ = measure.label(pixels, np.ones((3, 3)))
    for area in (0, 1, 5, 10_000):
        expected = (labels > 0) & (np.bincount(labels.ravel())[labels] <= area)
        np.testing.assert_array_equal(small_components(pixels, area), expected)

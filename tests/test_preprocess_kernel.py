"""preprocess: rules by hand on every build, builds against each other bit for bit, Pillow and OpenCV as oracles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pytest
from kernel_builds import BUILDS, COMPILED_BUILDS, DEVICE_BUILDS, kernel_build
from PIL import Image

from segzero_rt.errors import ImageError
from segzero_rt.kernels.backend import Kernels, resolve_kernels
from segzero_rt.kernels.preprocess import YUV_RULES, Frame, InputTensor, preprocess
from segzero_rt.kernels.preprocess_device import DeviceFrame, DevicePreprocessor
from segzero_rt.resampling import RESAMPLERS

PLAIN: dict[str, Any] = {"image_mean": (0.0, 0.0, 0.0), "image_std": (1.0, 1.0, 1.0)}
CLIP: dict[str, Any] = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}


@dataclass
class Plane:
    """Memory of a device, as far as a frame looks at it."""

    num_bytes: int
    address: int = 4096


@pytest.fixture(params=BUILDS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return kernel_build(request.param)


def pixels(size_hw: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size_hw, 3), dtype=np.uint8)


def chroma_of(size_hw: tuple[int, int], seed: int = 1) -> np.ndarray:
    shape = ((size_hw[0] + 1) // 2, (size_hw[1] + 1) // 2, 2)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def levels(values: np.ndarray) -> np.ndarray:
    """Grey levels of a tensor made with `PLAIN`, whole numbers again."""
    return np.rint(values * 255).astype(np.int32)


def test_a_picture_by_hand(kernels: Kernels) -> None:
    picture = np.array([[[0, 10, 255], [100, 20, 255]]], np.uint8)
    tensor = InputTensor(size_hw=(1, 4), image_mean=(0.0, 0.5, 1.0), image_std=(1.0, 0.5, 2.0))
    values = preprocess(Frame.rgb(picture), tensor, kernels=kernels)
    # Bilinear between pixel centres: a quarter of the way from either end, the ends as they are.
    np.testing.assert_array_equal(levels(values[0]), [[0, 25, 75, 100]])
    np.testing.assert_array_equal(levels(values[1] * 0.5 + 0.5), [[10, 13, 18, 20]])
    np.testing.assert_array_equal(values[2], np.zeros((1, 4)))
    swapped = preprocess(Frame.bgr(picture), tensor, kernels=kernels)
    np.testing.assert_array_equal(levels(swapped[0]), np.full((1, 4), 255))


def test_patches_by_hand(kernels: Kernels) -> None:
    """Each pixel's red is its row, green its column: patches of two, tokens of two by two patches."""
    picture = np.stack(np.broadcast_arrays(np.arange(8)[:, None], np.arange(8), 0), axis=2).astype(np.uint8)
    tensor = InputTensor(size_hw=(8, 8), patch_size=2, merge_size=2, **PLAIN)
    patches = levels(preprocess(Frame.rgb(picture), tensor, kernels=kernels)).reshape(16, 3, 2, 2)
    corners = [(int(patch[0, 0, 0]), int(patch[1, 0, 0])) for patch in patches]
    assert corners[:6] == [(0, 0), (0, 2), (2, 0), (2, 2), (0, 4), (0, 6)]
    assert patches[3].tolist() == [[[2, 2], [3, 3]], [[2, 3], [2, 3]], [[0, 0], [0, 0]]]
    order = np.array([5, *range(5), *range(6, 16)])
    moved = levels(preprocess(Frame.rgb(picture), tensor, order=order, kernels=kernels)).reshape(16, 3, 2, 2)
    np.testing.assert_array_equal(moved, patches[order])


SIZES = [(1, 1), (1, 7), (9, 1), (5, 3), (37, 41), (29, 501), (120, 160), (280, 364)]
TENSORS = [
    InputTensor(size_hw=(56, 84), patch_size=14, merge_size=2, **CLIP),
    InputTensor(size_hw=(64, 32), patch_size=16, merge_size=2, resampler="pillow_bicubic", **CLIP),
    InputTensor(size_hw=(18, 27), patch_size=9, **CLIP),
    InputTensor(size_hw=(33, 17), **CLIP),
    InputTensor(size_hw=(1, 1), resampler="pillow_bicubic", **CLIP),
    InputTensor(size_hw=(280, 364), resampler="pillow_bicubic", **PLAIN),
]


def frames(size_hw: tuple[int, int]) -> dict[str, Frame]:
    picture, chroma = pixels(size_hw), chroma_of(size_hw)
    wide = np.zeros((size_hw[0], size_hw[1] + 5, 3), np.uint8)
    wide[:, :-5] = picture
    return {
        "rgb": Frame.rgb(picture),
        "bgr": Frame.bgr(picture),
        "rows apart": Frame.rgb(wide[:, :-5]),
        "upside down": Frame.bgr(picture[::-1]),
        "mirrored, which has to be copied": Frame.rgb(picture[:, ::-1]),
        "one row again and again": Frame.rgb(np.broadcast_to(picture[:1], picture.shape)),
        "nv12": Frame.nv12(picture[:, :, 0], chroma),
        "nv12, rows apart": Frame.nv12(wide[:, :-5, 1], chroma[::-1], colours="bt709"),
    }


@pytest.mark.parametrize("build", COMPILED_BUILDS)
@pytest.mark.parametrize("tensor", TENSORS, ids=lambda tensor: f"{tensor.size_hw} {tensor.patch_size}")
@pytest.mark.parametrize("size_hw", SIZES, ids=str)
def test_the_builds_agree_to_the_bit(size_hw: tuple[int, int], tensor: InputTensor, build: str) -> None:
    for name, frame in frames(size_hw).items():
        found, reference = (preprocess(frame, tensor, kernels=kernel_build(one)) for one in (build, "reference"))
        np.testing.assert_array_equal(found, reference, err_msg=name)
        assert (found.dtype, found.shape) == (reference.dtype, tensor.shape) == (np.float32, reference.shape)


@pytest.mark.parametrize("build", DEVICE_BUILDS)
def test_frames_on_the_device_become_tensors_there_without_a_wait(build: str) -> None:
    kernels = kernel_build(build).device
    assert kernels is not None
    device = kernels.device
    tensor = InputTensor(size_hw=(56, 84), patch_size=14, merge_size=2, **CLIP)
    order = np.random.default_rng(0).permutation(24)
    preprocessor = DevicePreprocessor(kernels, tensor, order=order)
    out = device.empty(tensor.shape, np.float32)
    for size_hw in ((37, 41), (120, 160), (37, 41)):
        for name in ("rgb", "bgr", "nv12"):
            frame = frames(size_hw)[name]
            pitches = tuple(plane[0].nbytes + 24 for plane in frame.planes)
            planes = tuple(
                device.to_device(np.pad(plane.reshape(len(plane), -1), ((0, 0), (0, 24)), constant_values=99))
                for plane in frame.planes
            )
            resident = DeviceFrame(
                pixel_format=frame.pixel_format, size_hw=size_hw, planes=planes, pitches_bytes=pitches
            )
            preprocessor.enqueue(resident, out)  # compiles and loads, and makes the weights of a size
            waits, allocations = device.num_host_waits, device.num_allocations
            preprocessor.enqueue(resident, out)
            assert (device.num_host_waits, device.num_allocations) == (waits, allocations), "nothing was waited for"
            want = preprocess(frame, tensor, order=order, kernels=resolve_kernels("reference"))
            np.testing.assert_array_equal(device.to_host(out)[0], want, err_msg=f"{name} {size_hw}")
    with pytest.raises(ValueError, match="out"):
        preprocessor.enqueue(resident, device.empty((24, 588), np.float16))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("an unknown format", {"pixel_format": "yuyv"}),
        ("no rows", {"size_hw": (0, 4)}),
        ("two planes of one", {"planes": (Plane(99), Plane(99)), "pitches_bytes": (12, 12)}),
        ("pitches of another number", {"pitches_bytes": (12, 12)}),
        ("rows that overlap", {"pitches_bytes": (11,)}),
        ("a byte too little", {"planes": (Plane(2 * 13 + 11),), "pitches_bytes": (13,)}),
        ("chroma too short", {"pixel_format": "nv12", "planes": (Plane(12), Plane(7)), "pitches_bytes": (4, 4)}),
    ],
)
def test_frames_on_the_device_that_are_none(name: str, change: dict[str, Any]) -> None:
    good: dict[str, Any] = {
        "pixel_format": "rgb",
        "size_hw": (3, 4),
        "planes": (Plane(2 * 13 + 12),),
        "pitches_bytes": (13,),
    }
    assert DeviceFrame(**good).size_hw == (3, 4)
    with pytest.raises(ValueError, match="expected"):
        DeviceFrame(**{**good, **change})


# Pillow 13 begins with the pass that leaves less: these shapes are such that it begins with rows, as all others do.
@pytest.mark.parametrize("resampler", RESAMPLERS)
@pytest.mark.parametrize(
    ("from_hw", "to_hw"),
    [((77, 123), (280, 28)), ((77, 123), (300, 9)), ((20, 130), (123, 77)), ((2, 2), (28, 28)), ((90, 90), (31, 31))],
    ids=str,
)
def test_levels_are_those_of_pillow(
    from_hw: tuple[int, int], to_hw: tuple[int, int], resampler: str, kernels: Kernels
) -> None:
    picture = pixels(from_hw, 5)
    kind = Image.Resampling.BILINEAR if resampler == "pillow_bilinear" else Image.Resampling.BICUBIC
    want = np.asarray(Image.fromarray(picture).resize(to_hw[::-1], kind))
    got = preprocess(Frame.rgb(picture), InputTensor(size_hw=to_hw, resampler=resampler, **PLAIN), kernels=kernels)
    np.testing.assert_array_equal(levels(got).transpose(1, 2, 0), want)


def test_rows_come_first_whatever_pillow_does(kernels: Kernels) -> None:
    """Means of two pixels each, halves rounded up; then a portrait, which Pillow 13 begins with columns."""
    picture = np.zeros((2, 2, 3), np.uint8)
    picture[0, 1], picture[1] = (1, 3, 200), (0, 0, 101)
    got = preprocess(Frame.rgb(picture), InputTensor(size_hw=(1, 1), **PLAIN), kernels=kernels)
    across = (picture.astype(int).sum(axis=1) + 1) // 2
    np.testing.assert_array_equal(levels(got).ravel(), (across.sum(axis=0) + 1) // 2)
    portrait = pixels((200, 100), 3)
    tensor = InputTensor(size_hw=(28, 101), **PLAIN)
    narrowed = Image.fromarray(portrait).resize((101, 200), Image.Resampling.BILINEAR)
    want = np.asarray(narrowed.resize((101, 28), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(levels(preprocess(Frame.rgb(portrait), tensor, kernels=kernels))[0], want[:, :, 0])


@pytest.mark.parametrize("size_hw", [(2, 2), (48, 64), (6, 130)], ids=str)
def test_nv12_has_the_colours_of_opencv(size_hw: tuple[int, int], kernels: Kernels) -> None:
    luma, chroma = pixels(size_hw)[:, :, 0], chroma_of(size_hw)
    stacked = np.concatenate([luma, chroma.reshape(size_hw[0] // 2, size_hw[1])])
    want = cv2.cvtColor(stacked, cv2.COLOR_YUV2RGB_NV12)
    got = preprocess(Frame.nv12(luma, chroma), InputTensor(size_hw=size_hw, **PLAIN), kernels=kernels)
    np.testing.assert_array_equal(levels(got).transpose(1, 2, 0), want)


# Luma, U and V of saturated colours by the standards' own formulas, rounded to eight bits.
COLOURS = [
    ("bt601", (16, 128, 128), (0, 0, 0)),
    ("bt601", (235, 128, 128), (255, 255, 255)),
    ("bt601", (81, 90, 240), (255, 0, 0)),
    ("bt709", (63, 102, 240), (255, 0, 0)),
    ("bt709", (173, 42, 26), (0, 255, 0)),
    ("bt709", (32, 240, 118), (0, 0, 255)),
    ("bt601_full", (76, 85, 255), (255, 0, 0)),
    ("bt601_full", (150, 44, 21), (0, 255, 0)),
    ("bt601_full", (255, 128, 128), (255, 255, 255)),
]


@pytest.mark.parametrize(("rule", "yuv", "rgb"), COLOURS, ids=str)
def test_known_colours(rule: Any, yuv: tuple[int, ...], rgb: tuple[int, ...], kernels: Kernels) -> None:
    frame = Frame.nv12(np.full((3, 5), yuv[0], np.uint8), np.full((2, 3, 2), yuv[1:], np.uint8), colours=rule)
    got = levels(preprocess(frame, InputTensor(size_hw=(1, 1), **PLAIN), kernels=kernels)).ravel()
    assert np.abs(got - rgb).max() <= 2, "what eight bits of luma and chroma leave open"
    assert set(YUV_RULES) == {known for known, _, _ in COLOURS}


GREY, HALVES = np.zeros((4, 6), np.uint8), np.zeros((2, 3, 2), np.uint8)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("a plane of grey", lambda: Frame.rgb(GREY), "uint8"),
        ("four channels", lambda: Frame.bgr(np.zeros((2, 2, 4), np.uint8)), "uint8"),
        ("no rows", lambda: Frame.rgb(np.zeros((0, 2, 3), np.uint8)), "at least one pixel"),
        ("chroma in full size", lambda: Frame.nv12(GREY, np.zeros((4, 6, 2), np.uint8)), r"\[2, 3, 2\]"),
        ("chroma rounded down", lambda: Frame.nv12(np.zeros((5, 7), np.uint8), HALVES), r"\[3, 4, 2\]"),
        ("chroma in 16 bits", lambda: Frame.nv12(GREY, HALVES.astype(np.uint16)), "uint16"),
        ("no luma", lambda: Frame.nv12(np.zeros((0, 6), np.uint8), HALVES), "at least one pixel"),
        ("one plane of two", lambda: Frame(pixel_format="nv12", planes=(GREY,)), "a plane of luma"),
        ("two planes of one", lambda: Frame(pixel_format="rgb", planes=(GREY, GREY)), "one plane"),
        ("an unknown format", lambda: Frame(pixel_format="yuyv", planes=(GREY,)), "yuyv"),  # type: ignore[arg-type]
        ("unknown colours", lambda: Frame.nv12(GREY, HALVES, colours="bt2020"), "bt601_full"),  # type: ignore[arg-type]
    ],
)
def test_frames_that_are_none(name: str, make: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        make()


@pytest.mark.parametrize(
    "change",
    [
        {"size_hw": (0, 4)},
        {"size_hw": (28, 30), "patch_size": 14},
        {"patch_size": -1},
        {"merge_size": 0},
        {"resampler": "nearest"},
        {"image_std": (1.0, 0.0, 1.0)},
    ],
    ids=str,
)
def test_tensors_that_are_none(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        InputTensor(**{"size_hw": (28, 28), **CLIP, **change})


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 1, 2, 2], [0, 1, 2, 4], [0, 1, 2, -1], [[0, 1], [2, 3]]], ids=str)
def test_an_order_names_each_patch_once(order: list[Any], kernels: Kernels) -> None:
    tensor = InputTensor(size_hw=(28, 28), patch_size=14, **CLIP)
    with pytest.raises(ValueError, match="each of 4 patches once"):
        preprocess(Frame.rgb(pixels((4, 4))), tensor, order=np.array(order), kernels=kernels)

"""Pictures become the same patches as in transformers, whose processor the policies were trained with."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from segzero_rt.errors import ImageError
from segzero_rt.preprocess import Preprocessor

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def preprocessor(size_hw: tuple[int, int], resampler: str = "pillow_bilinear") -> Preprocessor:
    return Preprocessor(
        input_size_hw=size_hw, patch_size=14, merge_size=2, image_mean=MEAN, image_std=STD, resampler=resampler
    )


def picture(size_hw: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size_hw, 3), dtype=np.uint8)


def one_frame(patches: np.ndarray) -> np.ndarray:
    """The processor's [patches, 3 * 2 * 14 * 14] without the second, equal frame."""
    frames = patches.reshape(len(patches), 3, 2, 14 * 14)
    np.testing.assert_array_equal(frames[:, :, 0], frames[:, :, 1])
    return frames[:, :, 0].reshape(len(patches), -1)


@pytest.mark.parametrize("size_hw", [(28, 28), (280, 280), (84, 140), (28, 252)])
def test_patches_equal_transformers_without_resizing(size_hw: tuple[int, int]) -> None:
    transformers = pytest.importorskip("transformers", reason="compares with transformers' processor")
    image = picture(size_hw)
    processor = transformers.Qwen2VLImageProcessorPil(do_resize=False)
    want = processor(images=[Image.fromarray(image)], return_tensors="np")
    got = preprocessor(size_hw).patches(image)
    np.testing.assert_allclose(got, one_frame(want["pixel_values"]), atol=1e-5)
    rows, columns = preprocessor(size_hw).grid_hw
    assert want["image_grid_thw"].tolist() == [[1, 2 * rows, 2 * columns]]


@pytest.mark.parametrize("resampler", ["pillow_bilinear", "pillow_bicubic"])
@pytest.mark.parametrize(
    ("source_hw", "policy_hw"),
    [
        pytest.param((480, 640), (280, 364), id="shrink"),
        pytest.param((100, 131), (280, 364), id="grow"),
        pytest.param((280, 364), (280, 364), id="same"),
        pytest.param((29, 1001), (28, 980), id="long"),
    ],
)
def test_resizing_equals_transformers(source_hw: tuple[int, int], policy_hw: tuple[int, int], resampler: str) -> None:
    transformers = pytest.importorskip("transformers", reason="compares with transformers' processor")
    image = picture(source_hw, 3)
    pixels = policy_hw[0] * policy_hw[1]
    processor = transformers.Qwen2VLImageProcessorPil(
        size={"shortest_edge": pixels, "longest_edge": pixels},
        resample=Image.Resampling.BILINEAR if resampler == "pillow_bilinear" else Image.Resampling.BICUBIC,
    )
    want = processor(images=[Image.fromarray(image)], return_tensors="np")
    grid = want["image_grid_thw"][0, 1:] * 14
    got = preprocessor((int(grid[0]), int(grid[1])), resampler).patches(image)
    level = 1 / 255 / np.repeat(np.array(STD, dtype=np.float32), 196)  # one grey level, normalised
    assert (np.abs(got - one_frame(want["pixel_values"])) <= level * 1.01).all()


def test_a_picture_of_one_pixel_fills_the_input() -> None:
    patches = preprocessor((56, 28)).patches(np.array([[[255, 0, 128]]], dtype=np.uint8))
    assert patches.shape == (8, 588)
    colours = patches.reshape(8, 3, 196)
    assert np.ptp(colours, axis=(0, 2)).max() == 0
    np.testing.assert_allclose(colours[0, :, 0], (np.array([255, 0, 128]) / 255 - MEAN) / STD, atol=1e-5)


def test_the_first_patches_are_one_token() -> None:
    image = np.zeros((56, 56, 3), dtype=np.uint8)
    image[:28, :28] = 255
    bright = preprocessor((56, 56)).patches(image)[:, 0] > 0
    assert bright.tolist() == [True] * 4 + [False] * 12


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(np.zeros((4, 4), np.uint8), id="grey"),
        pytest.param(np.zeros((4, 4, 4), np.uint8), id="rgba"),
        pytest.param(np.zeros((4, 4, 3), np.uint16), id="16-bit"),
        pytest.param(np.zeros((4, 4, 3), np.float32), id="float"),
        pytest.param(np.zeros((0, 4, 3), np.uint8), id="empty"),
        pytest.param("picture.png", id="path"),
        pytest.param(None, id="none"),
    ],
)
def test_other_arrays_are_refused(image: object) -> None:
    with pytest.raises(ImageError, match=r"expected a picture as|at least one pixel"):
        preprocessor((28, 28)).patches(image)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"input_size_hw": (30, 28)},
        {"input_size_hw": (0, 28)},
        {"resampler": "opencv_linear"},
        {"image_std": (0.1, 0.0, 0.1)},
    ],
)
def test_settings_that_cannot_work_are_refused(change: dict[str, object]) -> None:
    settings = {"input_size_hw": (28, 28), "patch_size": 14, "merge_size": 2, "image_mean": MEAN, "image_std": STD}
    with pytest.raises(ValueError, match="expected"):
        Preprocessor(**{**settings, **change})  # type: ignore[arg-type]


def test_pictures_that_are_views_of_others_work() -> None:
    view = picture((60, 60))[::2, ::-1]
    assert not view.flags.c_contiguous
    np.testing.assert_array_equal(preprocessor((28, 28)).patches(view), preprocessor((28, 28)).patches(view.copy()))

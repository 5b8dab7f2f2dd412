"""Repeated pictures are worked on once, and come out as transformers' own processor gives each of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image
from policy_checkpoints import random_picture
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from training.distinct_pictures import DistinctPictureProcessor, number_distinct

A, B, C = (Image.fromarray(random_picture(seed, size)) for seed, size in ((0, (56, 84)), (1, (84, 56)), (2, (56, 84))))


def twin(picture: Image.Image) -> Image.Image:
    """The same pixels in another object, as a data set decodes them anew."""
    return Image.fromarray(np.asarray(picture).copy())


@pytest.mark.parametrize(
    ("images", "worked_on"),
    [
        pytest.param([A], 1, id="one"),
        pytest.param([A, A, twin(A)], 1, id="one three times"),
        pytest.param([B, A, twin(B), C, A], 3, id="mixed"),
        pytest.param([[A], [B], [twin(A)]], 2, id="a list for each prompt"),
        pytest.param([[A, B], [], [B]], 2, id="several, and none, in a prompt"),
        pytest.param([A.convert("L"), A.convert("RGB")], 2, id="grey and coloured"),
    ],
)
@pytest.mark.parametrize("return_tensors", ["pt", "np", None])
def test_repeated_pictures_are_worked_on_once(
    images: list[Any], worked_on: int, return_tensors: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    plain = Qwen2VLImageProcessorPil.preprocess

    def counted(self: Any, pictures: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(len(pictures))
        return plain(self, pictures, *arguments, **options)

    flat = [picture for entry in images for picture in (entry if isinstance(entry, list) else [entry])]
    expected = Qwen2VLImageProcessorPil(do_resize=False)(flat, return_tensors=return_tensors)
    monkeypatch.setattr(Qwen2VLImageProcessorPil, "preprocess", counted)
    found = DistinctPictureProcessor(do_resize=False)(images, return_tensors=return_tensors)
    assert seen == [worked_on]
    for name in ("pixel_values", "image_grid_thw"):
        assert type(found[name]) is type(expected[name]) and found[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(expected[name]))


def test_arrays_are_left_to_transformers() -> None:
    arrays = [np.asarray(A), np.asarray(B)]
    found = DistinctPictureProcessor(do_resize=False)(arrays, return_tensors="np")
    expected = Qwen2VLImageProcessorPil(do_resize=False)(arrays, return_tensors="np")
    np.testing.assert_array_equal(found["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize(
    ("keys", "numbers"),
    [
        pytest.param([], [], id="none"),
        pytest.param(["b", "a", "b", "c", "a"], [0, 1, 0, 2, 1], id="in order of appearance"),
    ],
)
def test_distinct_keys_are_numbered(keys: list[str], numbers: list[int]) -> None:
    assert number_distinct(keys) == numbers

"""transformers' image processor, which here works on each picture once however often it is given.

TRL hands it a picture twice for every sample, and the work on one takes as long as a small policy's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import BatchFeature
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

PictureKey = tuple[str, tuple[int, int], bytes]
"""Mode, size and pixels."""


class DistinctPictureProcessor(Qwen2VLImageProcessorPil):
    """The same patches and grids as its parent's, in the order of the pictures."""

    def __call__(  # type: ignore[override]  # the parent spells every option out
        self, images: Any, *arguments: Any, **options: Any
    ) -> BatchFeature:
        pictures = flat_pictures(images)
        if pictures is None:
            return super().__call__(images, *arguments, **options)
        return_tensors = options.pop("return_tensors", None)
        number_of = number_distinct([picture_key(picture) for picture in pictures])
        first = [number_of.index(number) for number in range(max(number_of) + 1)]
        once = super().__call__([pictures[place] for place in first], *arguments, **options)
        grids = once["image_grid_thw"]
        patches = np.split(once["pixel_values"], np.cumsum(grids.prod(1))[:-1])
        repeated = {
            "pixel_values": np.concatenate([patches[number] for number in number_of]),
            "image_grid_thw": grids[number_of],
        }
        return BatchFeature(data=repeated, tensor_type=return_tensors)


def flat_pictures(images: Any) -> list[Image.Image] | None:
    """The pictures of a list, or of a list of lists; None where something is not Pillow's."""
    if not isinstance(images, Sequence) or not images:
        return None
    flat = [picture for entry in images for picture in (entry if isinstance(entry, (list, tuple)) else [entry])]
    return flat if flat and all(isinstance(picture, Image.Image) for picture in flat) else None


def picture_key(picture: Image.Image) -> PictureKey:
    """Equal for pictures with the same pixels."""
    return picture.mode, picture.size, picture.tobytes()


def number_distinct(keys: Sequence[Any]) -> list[int]:
    """For each key the number of its first equal, counting distinct ones from 0 in order."""
    numbers: dict[Any, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]

"""Questions on pictures to measure with: drawn on the spot, from a folder, or from a dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from segzero_rt.errors import DatasetError

if TYPE_CHECKING:  # `--help` must not import numpy
    from segzero_rt.image import ImageRgb

_QUESTIONS = (
    "the red mug",
    "the largest object",
    "something to cut paper with",
    "the object left of the bottle",
    "everything that can be eaten",
    "the blue thing nearest to the plate",
    "something to drink from",
    "the elephant",
)
_PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
_DRAWN_SIZE_HW = (480, 640)


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One question on one picture; the picture is read when it is its turn, outside the timing."""

    question: str
    load_image: Callable[[], ImageRgb]


def make_tasks(images: str | None, count: int) -> Iterator[Task]:
    """`count` tasks; where there are fewer pictures or questions than that, they come round again.

    Args:
        images: a folder of pictures, a dataset folder, or None for drawn pictures, of which no two are alike.

    Raises:
        DatasetError: the folder holds neither.
    """
    from segzero_rt.dataset import ANNOTATIONS_NAME, read_dataset
    from segzero_rt.image import load_image

    if images is None:
        for index in range(count):
            yield Task(question=_QUESTIONS[index % len(_QUESTIONS)], load_image=partial(draw_picture, index))
        return
    folder = Path(images)
    if (folder / ANNOTATIONS_NAME).is_file():
        samples = read_dataset(folder, limit=count)
        for index in range(count):
            sample = samples[index % len(samples)]
            yield Task(question=sample.text, load_image=partial(load_image, sample.image_path))
        return
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in _PICTURE_SUFFIXES and path.is_file())
    if not paths:
        raise DatasetError(f"expected a folder with pictures or {ANNOTATIONS_NAME}, found none in {folder}")
    for index in range(count):
        path = paths[index % len(paths)]
        yield Task(question=_QUESTIONS[index % len(_QUESTIONS)], load_image=partial(load_image, path))


def draw_picture(seed: int) -> ImageRgb:
    """A table with a few coloured things on it: the same on every machine, another for each seed."""
    import cv2
    import numpy as np

    height, width = _DRAWN_SIZE_HW
    rng = np.random.default_rng(seed)
    picture = np.empty((height, width, 3), np.uint8)
    picture[:] = rng.integers(120, 220, 3)
    for _ in range(int(rng.integers(4, 9))):
        center = (int(rng.integers(60, width - 60)), int(rng.integers(60, height - 60)))
        axes = (int(rng.integers(20, 60)), int(rng.integers(20, 60)))
        color = rng.integers(0, 256, 3).tolist()
        angle = float(rng.uniform(0, 180))
        cv2.ellipse(picture, (center[0] + 6, center[1] + 8), axes, angle, 0, 360, (60, 60, 60), cv2.FILLED, cv2.LINE_AA)
        cv2.ellipse(picture, center, axes, angle, 0, 360, color, cv2.FILLED, cv2.LINE_AA)
    noise = rng.integers(-8, 9, picture.shape)
    return np.asarray(np.clip(picture + noise, 0, 255), np.uint8)

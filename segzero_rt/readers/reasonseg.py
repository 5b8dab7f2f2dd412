"""ReasonSeg as LISA's authors publish it: a folder of `NAME.jpg` with `NAME.json` beside each.

A JSON file holds `text` (several wordings of the question, or one), `is_sentence`, and `shapes`: polygons, each with
`points` and a `label`. `target` is the object, `ignore` is left out of any score, `flag` means nothing. Where polygons
overlap the smaller one counts, and a polygon's outline is part of it.

A picture becomes one question per wording, or of its first wording alone; all its targets together are one object, as
the benchmark scores it. What is to be ignored is kept as the question's `ignore_rle`.

Source: `dvlab-research/LISA`, README and data set description; LISA issue #157 on test pictures without a target.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from segzero_rt.errors import DatasetError
from segzero_rt.mask import encode_rle
from segzero_rt.readers.source import (
    Load,
    SourcePicture,
    SourceQuestion,
    picture_path,
    read_json_file,
    required,
    stored_size_hw,
)

TARGET, IGNORE, FLAG = "target", "ignore", "flag"
IS_SENTENCE, IGNORE_RLE = "is_sentence", "ignore_rle"
"""Extra fields of a question: whether it is a sentence or a phrase, and the pixels to be ignored."""
_NOTHING, _TARGET_LEVEL, _IGNORE_LEVEL = 0, 1, 255
_SUFFIXES = (".jpg", ".jpeg", ".png")


class ReasonSegReader:
    """A folder of pictures with JSON files of polygons.

    Args:
        folder: of `NAME.jpg` and `NAME.json`.
        all_sentences: a question per wording instead of the first one alone.
        without_target: take a picture without a visible target as a question about nothing, as LISA scores it, instead
            of refusing it.
    """

    def __init__(self, folder: Path, *, all_sentences: bool = True, without_target: bool = False) -> None:
        self.folder = folder
        self.all_sentences, self.without_target = all_sentences, without_target
        self.files = sorted(folder.glob("*.json"))
        if not self.files:
            raise DatasetError(f"{folder}: expected a folder of NAME.jpg and NAME.json, found no JSON file")

    def __len__(self) -> int:
        return len(self.files)

    def pictures(self) -> Iterator[tuple[str, Load]]:
        for file in self.files:
            yield file.stem, functools.partial(self._picture, file)

    def _picture(self, file: Path) -> SourcePicture:
        picture = _picture(self.folder, file)
        if not picture.questions[0].masks and not self.without_target:
            raise DatasetError(f"{file}: expected a `{TARGET}` polygon with visible pixels, found none; leave it out")
        return picture if self.all_sentences else replace(picture, questions=picture.questions[:1])


def _picture(folder: Path, file: Path) -> SourcePicture:
    entry, source = read_json_file(file), str(file)
    texts = required(entry, "text", source, list, str)
    texts = [texts] if isinstance(texts, str) else texts
    if not texts or not all(isinstance(text, str) for text in texts):
        raise DatasetError(f"{source}: expected `text` as one or more questions, got {texts!r:.80}")
    names = [f"{file.stem}{suffix}" for suffix in _SUFFIXES if (folder / f"{file.stem}{suffix}").is_file()]
    image = picture_path(folder, names[0] if names else f"{file.stem}{_SUFFIXES[0]}", source)
    levels = _levels(required(entry, "shapes", source, list), stored_size_hw(image, source), source)
    target, ignored = levels == _TARGET_LEVEL, levels == _IGNORE_LEVEL
    extra: dict[str, object] = {IS_SENTENCE: bool(required(entry, IS_SENTENCE, source, bool, int))}
    if ignored.any():
        extra[IGNORE_RLE] = encode_rle(ignored)
    questions = tuple(
        SourceQuestion(row_id=f"{file.stem}-{number}", text=text, masks=(target,) if target.any() else (), extra=extra)
        for number, text in enumerate(texts)
    )
    return SourcePicture(source=source, image=image, questions=questions)


def _levels(shapes: list[object], size_hw: tuple[int, int], source: str) -> NDArray[np.uint8]:
    """uint8 [H, W]: 1 target, 255 to be ignored; the largest polygon is drawn first."""
    drawn = []
    for index, shape in enumerate(shapes):
        where = f"{source}: shapes[{index}]"
        label = required(shape, "label", where, str).lower()
        if label == FLAG:
            continue
        polygon = _polygon(required(shape, "points", where, list), size_hw, where)
        area = int(np.count_nonzero(_draw(np.zeros(size_hw, np.uint8), polygon, 1)))
        drawn.append((area, _IGNORE_LEVEL if IGNORE in label else _TARGET_LEVEL, polygon))
    levels = np.full(size_hw, _NOTHING, np.uint8)
    for _, level, polygon in sorted(drawn, key=lambda one: -one[0]):
        _draw(levels, polygon, level)
    return levels


def _polygon(points: list[object], size_hw: tuple[int, int], source: str) -> NDArray[np.int32]:
    """int32 [N, 2]. A point may lie one pixel outside: annotation tools let the mouse go that far."""
    pairs = [
        pair
        for pair in points
        if isinstance(pair, list) and len(pair) == 2 and all(type(value) in (int, float) for value in pair)
    ]
    if not points or len(pairs) != len(points):
        raise DatasetError(f"{source}: expected `points` as pairs of numbers, got {points!r:.80}")
    polygon = np.array(pairs, np.float64)
    height, width = size_hw
    if not ((polygon >= -1) & (polygon <= (width + 1, height + 1))).all():  # NaN fails, too
        raise DatasetError(f"{source}: expected points inside {width} x {height} pixels, got {points!r:.80}")
    return polygon.astype(np.int32)


def _draw(levels: NDArray[np.uint8], polygon: NDArray[np.int32], level: int) -> NDArray[np.uint8]:
    cv2.polylines(levels, [polygon], isClosed=True, color=level, thickness=1)
    cv2.fillPoly(levels, [polygon], color=level)
    return levels

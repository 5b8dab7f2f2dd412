"""From a published data set to a folder of training rows, picture by picture.

Masks become boxes (their extent) and two points (`mask_points`), scaled to the picture that the policy will see. A
question can be made to pass the segmenter first: what that draws for box and first point must reach an IoU with the
true masks, as in Seg-Zero's data (SAM 2.1 large, single mask, 0.6). What it cannot draw teaches the policy nothing.

The folder grows beside its final name and gets it when it is whole. A run that was stopped goes on with the next
picture. Pictures are stored as they came, under the hash of their bytes; one that an EXIF tag would turn is stored anew
without the tag, since annotations mean the pixels as they are.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segzero_rt.answer import Prompt
from segzero_rt.bundle import Bundle
from segzero_rt.commands.progress import Progress
from segzero_rt.errors import DatasetError, ImageError
from segzero_rt.image import load_image
from segzero_rt.mask import encode_rle, mask_iou
from segzero_rt.readers.source import Mask, Reader, SourcePicture, SourceQuestion
from segzero_rt.segmenter import ImageEmbedding, ImageEncoder, MaskDecoder

from .mask_points import box_and_points
from .prepare_journal import Journal, Prepared, check_settings
from .rows import IMAGES_NAME, RowObject, TrainingRow, check_new_folder, finish_folder

_JOURNAL_NAME, _SETTINGS_NAME, _CONTENT_NAME = "done.jsonl", "settings.json", "rows"
_EXIF_ORIENTATION, _UPRIGHT = 0x0112, 1
_SUFFIXES = {
    "JPEG": ".jpg",
    "PNG": ".png",
    "WEBP": ".webp",
    "BMP": ".bmp",
    "TIFF": ".tif",
    "GIF": ".gif",
    "PPM": ".ppm",
}
_TOO_SMALL, _NOT_DRAWN = "an object below {} px", "the segmenter below IoU {}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Preparation:
    """How rows are made.

    Raises:
        DatasetError: a value out of its range.
    """

    input_size_hw: tuple[int, int] = (840, 840)
    """The picture that the policy will see."""
    min_side_px: float = 2.0
    """Objects whose box is narrower or lower than this in the policy's picture take their question with them."""
    min_iou: float = 0.0
    """The segmenter must reach this with every object of a question; 0: it is not asked."""
    leave_out: frozenset[str] = frozenset()
    """Keys of pictures that are not looked at."""
    limit: int | None = None
    """Only so many pictures, the first ones."""

    def __post_init__(self) -> None:
        if min(self.input_size_hw) < 1 or self.min_side_px < 0 or not 0 <= self.min_iou < 1:
            raise DatasetError(
                f"expected a positive size, a side from 0 and an IoU from 0 to below 1, got {self.input_size_hw}, "
                f"{self.min_side_px} and {self.min_iou}"
            )


class Segmenter:
    """A bundle's segmenter on boxes and first points, one mask each."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        self._encoder = ImageEncoder.load(bundle, threads=threads)
        self._decoder = MaskDecoder.load(bundle, threads=threads)

    def look(self, image_rgb: NDArray[np.uint8]) -> ImageEmbedding:
        """Features of a picture, uint8 [H, W, 3], for any number of questions."""
        return self._encoder(image_rgb)

    def ious(self, embedding: ImageEmbedding, masks: Sequence[Mask]) -> list[float]:
        """IoU with each true mask, bool [H, W], of what the segmenter draws for its box and first point."""
        prompts = []
        for mask in masks:
            (left, top, right, bottom), ((x, y), _) = box_and_points(mask)
            prompts.append(Prompt(box_xyxy=(left, top, right, bottom), points_xy=((x, y),)))
        drawn = self._decoder(embedding, prompts, multimask=False).masks
        return [mask_iou(one, true) for one, true in zip(drawn, masks, strict=True)]


def prepare(
    reader: Reader,
    folder: Path,
    preparation: Preparation,
    *,
    source: Mapping[str, Any],
    segmenter: Segmenter | None = None,
) -> Prepared:
    """Makes `folder`, which must not exist yet.

    Args:
        reader: the data set.
        folder: gets `images/` and `rows.jsonl`.
        preparation: how.
        source: what tells one call from another (paths, options of the reader); a run that was stopped goes on only
            where this and `preparation` are the same.
        segmenter: needed where `preparation.min_iou` is above 0.

    Raises:
        DatasetError: the folder exists, something in the data set is wrong, a picture to be left out is not there, a
            stopped run was another one, or nothing is left.
    """
    if (preparation.min_iou > 0) != (segmenter is not None):
        raise ValueError(f"min_iou {preparation.min_iou} and the segmenter go together, got {segmenter}")
    check_new_folder(folder)
    partial = folder.parent / f".{folder.name}.partial"
    content = partial / _CONTENT_NAME
    (content / IMAGES_NAME).mkdir(parents=True, exist_ok=True)
    check_settings(partial / _SETTINGS_NAME, {**source, **_settings(preparation)}, partial)
    journal = Journal(partial / _JOURNAL_NAME)
    wanted = len(reader) if preparation.limit is None else min(len(reader), preparation.limit)
    keys: list[str] = []
    with Progress(wanted, "pictures") as progress:
        for key, load in itertools.islice(reader.pictures(), preparation.limit):
            keys.append(key)
            if key not in journal.done and key not in preparation.leave_out:
                journal.add(key, *_rows_of(load(), content / IMAGES_NAME, preparation, segmenter))
            progress.step()
    if unknown := preparation.leave_out - set(keys):
        raise DatasetError(f"expected pictures of the data set to leave out, it has no {', '.join(sorted(unknown))}")
    prepared, lines = journal.result([key for key in keys if key not in preparation.leave_out])
    try:
        finish_folder(content, folder, lines)
    except DatasetError as error:
        raise DatasetError(f"{error}; left out: {dict(prepared.left_out)}") from error
    shutil.rmtree(partial)
    return prepared


def _rows_of(
    picture: SourcePicture, images: Path, preparation: Preparation, segmenter: Segmenter | None
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The rows of one picture, which is stored if there is any, and what was left out of it."""
    left_out = Counter[str](picture.left_out)
    image_rgb, data, suffix = _stored_picture(picture)
    look = functools.cache(lambda: segmenter.look(image_rgb) if segmenter else None)
    name = hashlib.sha256(data).hexdigest()[:24] + suffix
    rows = []
    for question in picture.questions:
        if segmenter and question.objects:
            raise DatasetError(f"{picture.source}: expected masks to compare the segmenter's with, got boxes alone")
        objects = _objects_of(question, image_rgb.shape[:2], preparation, picture.source)
        if objects is None:
            left_out[_TOO_SMALL.format(f"{preparation.min_side_px:g}")] += 1
        elif segmenter and question.masks and min(segmenter.ious(look(), question.masks)) < preparation.min_iou:
            left_out[_NOT_DRAWN.format(preparation.min_iou)] += 1
        else:
            rows.append(_row(question, objects, images / name, preparation, picture.source))
    if rows and not (images / name).exists():
        temporary = images / f"{name}.part"
        temporary.write_bytes(data)
        temporary.replace(images / name)
    return rows, left_out


def _row(
    question: SourceQuestion, objects: tuple[RowObject, ...], image: Path, preparation: Preparation, source: str
) -> dict[str, Any]:
    try:
        row = TrainingRow(
            row_id=question.row_id,
            question=question.text,
            image=image,
            input_size_hw=preparation.input_size_hw,
            objects=objects,
            kind=question.kind,
            extra=question.extra,
        )
        return row.to_json(f"{IMAGES_NAME}/{image.name}")
    except DatasetError as error:
        raise DatasetError(f"{source}: {error}") from error


def _objects_of(
    question: SourceQuestion, size_hw: tuple[int, ...], preparation: Preparation, source: str
) -> tuple[RowObject, ...] | None:
    """The question's objects in pixels of the policy's picture; None if one is too small there."""
    height, width = size_hw
    scale_xy = preparation.input_size_hw[1] / width, preparation.input_size_hw[0] / height
    given = list(question.objects)
    for one in given:
        try:
            one.check_inside((height, width))
        except DatasetError as error:
            raise DatasetError(f"{source}: {error}") from error
    for mask in question.masks:
        if mask.shape != (height, width):
            raise DatasetError(f"{source}: expected masks of the picture's size {(height, width)}, got {mask.shape}")
        if not mask.any():  # a polygon thinner than a pixel
            return None
        box, points = box_and_points(mask)
        centres = tuple((x + 0.5, y + 0.5) for x, y in points)
        given.append(RowObject(box_xyxy=box, points_xy=centres, mask_rle=encode_rle(mask)))
    scaled = tuple(_scaled(one, scale_xy) for one in given)
    sides = [side for one in scaled for side in (one[0][2] - one[0][0], one[0][3] - one[0][1])]
    if sides and min(sides) < preparation.min_side_px:
        return None
    return tuple(
        RowObject(box_xyxy=box, points_xy=points, mask_rle=one.mask_rle)
        for one, (box, points) in zip(given, scaled, strict=True)
    )


def _scaled(
    one: RowObject, scale_xy: tuple[float, float]
) -> tuple[tuple[float, float, float, float], tuple[tuple[float, float], ...]]:
    """Box and points in pixels of the policy's picture, to a hundredth of one."""
    sx, sy = scale_xy
    left, top, right, bottom = one.box_xyxy
    box = round(left * sx, 2), round(top * sy, 2), round(right * sx, 2), round(bottom * sy, 2)
    return box, tuple((round(x * sx, 2), round(y * sy, 2)) for x, y in one.points_xy)


def _stored_picture(picture: SourcePicture) -> tuple[NDArray[np.uint8], bytes, str]:
    """Pixels, the bytes to store, and their suffix."""
    try:
        data = picture.image if isinstance(picture.image, bytes) else picture.image.read_bytes()
        image_rgb = load_image(data)
        with Image.open(io.BytesIO(data)) as opened:
            suffix = _SUFFIXES.get(opened.format or "", ".img")
            if opened.getexif().get(_EXIF_ORIENTATION, _UPRIGHT) == _UPRIGHT:
                return image_rgb, data, suffix
            image_rgb = np.asarray(opened.convert("RGB"), np.uint8)
    except (OSError, ValueError, SyntaxError, ImageError) as error:
        raise DatasetError(f"{picture.source}: picture cannot be read: {error}; replace it or leave it out") from error
    stored = io.BytesIO()
    Image.fromarray(image_rgb).save(stored, "PNG")
    return image_rgb, stored.getvalue(), _SUFFIXES["PNG"]


def _settings(preparation: Preparation) -> dict[str, Any]:
    return {
        "input_size_hw": list(preparation.input_size_hw),
        "min_side_px": preparation.min_side_px,
        "min_iou": preparation.min_iou,
    }

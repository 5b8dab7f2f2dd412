"""Pictures of the worst answers, drawn from records: what was predicted and what is true, side by side."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segzero_rt.answer import Answer, AnswerStatus, Prompt
from segzero_rt.dataset import Sample
from segzero_rt.errors import DatasetError
from segzero_rt.evaluation import Record
from segzero_rt.evaluation_run import PictureRecords
from segzero_rt.evaluation_sets import EvaluationSet
from segzero_rt.mask import decode_rle
from segzero_rt.overlay import draw_overlay
from segzero_rt.segmentation import Segmentation

_PICTURE_SIDE_PX = 480


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """One answer as pictures."""

    record: Record
    answer_jpeg: bytes | None
    """None where the data set gives no picture."""
    truth_jpeg: bytes | None


def draw_worst(dataset: EvaluationSet, by_picture: Sequence[PictureRecords], *, size: int = 24) -> list[Drawing]:
    """The `size` worst answers, worst first, of equals the first. Only their pictures are read again.

    Args:
        dataset: what was evaluated.
        by_picture: its records, in its order.
        size: how many.
    """
    ranked = sorted(
        (record.iou, number, position)
        for number, (_, records) in enumerate(by_picture)
        for position, record in enumerate(records)
    )[:size]
    wanted: dict[int, list[int]] = {}
    for _, number, position in ranked:
        wanted.setdefault(number, []).append(position)
    drawings: dict[tuple[int, int], Drawing] = {}
    pictures = dataset.pictures()
    for number, (_, records) in enumerate(by_picture):
        _, load = next(pictures)
        if number not in wanted:
            continue
        try:
            samples = load()
            image_rgb = samples[0].image_rgb
        except DatasetError:  # its record says so
            samples = []
        for position in wanted[number]:
            record = records[position]
            drawn = [_jpeg(draw_overlay(image_rgb, one, caption=False)) for one in _both(samples, position, record)]
            answer, truth = drawn or (None, None)
            drawings[number, position] = Drawing(record=record, answer_jpeg=answer, truth_jpeg=truth)
    return [drawings[number, position] for _, number, position in ranked]


def _both(samples: Sequence[Sample], position: int, record: Record) -> Iterator[Segmentation]:
    if samples:
        yield _predicted(record, samples[position].size_hw)
        yield _truth(samples[position])


def _predicted(record: Record, size_hw: tuple[int, int]) -> Segmentation:
    if not record.boxes_xyxy:
        none_found = record.status == AnswerStatus.NONE_FOUND.value
        status = AnswerStatus.NONE_FOUND if none_found else AnswerStatus.MALFORMED
        return Segmentation.empty(Answer(status=status), size_hw)
    prompts = tuple(
        Prompt(box_xyxy=(left, top, right, bottom), points_xy=tuple((x, y) for x, y in points))
        for (left, top, right, bottom), points in zip(record.boxes_xyxy, record.points_xy, strict=True)
    )
    masks = [decode_rle(rle) for rle in record.masks_rle or ()] or [np.zeros(size_hw, np.bool_)] * len(prompts)
    return Segmentation(
        masks=np.stack(masks),
        scores=np.ones(len(prompts), np.float32),
        boxes_xyxy=np.array(record.boxes_xyxy, np.float32),
        answer=Answer(status=AnswerStatus.OK, prompts=prompts),
    )


def _truth(sample: Sample) -> Segmentation:
    prompts = tuple(Prompt(box_xyxy=one.box_xyxy) for one in sample.objects)
    return Segmentation(
        masks=sample.masks,
        scores=np.ones(len(prompts), np.float32),
        boxes_xyxy=sample.boxes_xyxy,
        answer=Answer(status=AnswerStatus.OK if prompts else AnswerStatus.NONE_FOUND, prompts=prompts),
    )


def _jpeg(image_rgb: NDArray[np.uint8]) -> bytes:
    picture = Image.fromarray(image_rgb)
    picture.thumbnail((_PICTURE_SIDE_PX, _PICTURE_SIDE_PX))
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=85)
    return encoded.getvalue()

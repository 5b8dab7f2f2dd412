"""The rewards of reinforcement, each term a function in TRL's signature: `reward(prompts, completions, **columns)`.

`seg_zero_rewards()` and `vision_reasoner_rewards()` are the papers' rewards, plain sums with equal weights. TRL logs
each term under its name and adds them up; `score` gives the same breakdown for one completion. What goes beyond the
papers stands in `reward_extras`, is asked for by name, and is off in these presets.

Seg-Zero, at most 5
    think_format: the text is `<think>…</think>`, white space, `<answer>…</answer>`
    answer_format: the first `{…}` in the text has a box of 4 and two points of 2 (`strict`: under the exact keys)
    box_iou: above 0.5
    box_l1: mean difference of the coordinates below 10 px
    points: both in the predicted box, mean distance to the true ones below 100 px in the better pairing
VisionReasoner, at most 7
    think_format: as above
    answer_format: per item 1 for a box of 4 and 1 for a point of 2, mean over the items (at most 2)
    accuracy: per pair of objects 1 each for box IoU above 0.5, box difference below 10 px, point below 30 px away and
        in its own box; the best one-to-one matching over the larger number of objects (at most 3)
    non_repeat: fewer than two repeated sentences in the whole text

Pixels are those of an 840 x 840 input and scale with others. A completion of any text is scored; a row or a call that
is wrong raises.

Departures from the papers' code: those of `reward_readings`, and
1. rows without objects score 0 in every term of accuracy instead of stopping in an exception that is swallowed;
2. true coordinates need not be whole numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from segzero_rt.answer_format import SEG_ZERO, VISION_REASONER
from segzero_rt.answer_parser import MAX_OBJECTS, ParseMode
from segzero_rt.errors import DatasetError

from .reward_geometry import (
    BOX_L1_PX,
    MIN_BOX_IOU,
    NUM_CRITERIA,
    TWO_POINTS_PX,
    Floats,
    box_l1,
    is_in_box,
    matched_score,
    pair_scores,
    pixel_scale,
    seg_zero_box_iou,
    two_points_distance,
)
from .reward_readings import SegZeroReading, completion_text, has_think_format, read_seg_zero, read_vision_reasoner
from .rows import IMAGE, IMAGE_PATH, INPUT_SIZE_HW, OBJECTS, ROW_ID, RowObject, TrainingRow

REQUIRED_COLUMNS = (OBJECTS, INPUT_SIZE_HW, ROW_ID)
"""Columns that every reward reads; `mask_iou` reads the picture, too, from `image_path` or else from `image`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One completion and the truth that it is held to."""

    text: str
    objects: tuple[RowObject, ...]
    input_size_hw: tuple[int, int]
    row_id: str = ""
    image: object = None
    """The stored picture as the data set's columns give it: a path, a Pillow picture or an array. Most rewards do not
    look."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reward:
    """One named term, callable as TRL calls a reward function; it can be pickled if its rule can."""

    name: str
    """What TRL logs it under."""
    rule: Callable[[Case], float]
    maximum: float
    """The most that it gives. The least is 0, or minus this for a penalty (then `maximum` is 0)."""

    @property
    def __name__(self) -> str:  # TRL names a reward function by this
        return self.name

    def __call__(self, prompts: Sequence[object], completions: Sequence[object], **columns: object) -> list[float]:
        """Scores a batch.

        Args:
            prompts: as TRL gives them; not looked at.
            completions: text, or the messages of one chat turn, each.
            columns: the data set's columns of `REQUIRED_COLUMNS`, one entry per completion; others are not looked at.

        Raises:
            ValueError: a column is absent or has another length.
            DatasetError: a row is not one of `training.rows`.
        """
        return [float(self.rule(case)) for case in cases_of(completions, columns)]


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardBreakdown:
    """What one completion got, term by term."""

    terms: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.terms.values())


def score(case: Case, rewards: Iterable[Reward]) -> RewardBreakdown:
    """The terms of one completion, in order."""
    return RewardBreakdown(terms={reward.name: float(reward.rule(case)) for reward in rewards})


def cases_of(completions: Sequence[object], columns: Mapping[str, object]) -> list[Case]:
    """A batch as TRL hands it over, as cases.

    Raises:
        ValueError: a column of `REQUIRED_COLUMNS` is absent or has another length.
        DatasetError: an entry of `objects` is not one of `RowObject.to_json`.
    """
    check_columns(columns)
    picture = IMAGE_PATH if IMAGE_PATH in columns else IMAGE
    columns = {picture: [None] * len(completions), **columns}
    for name in (*REQUIRED_COLUMNS, picture):
        column = columns[name]
        if not isinstance(column, Sequence) or len(column) != len(completions):
            raise ValueError(f"expected column `{name}` with {len(completions)} entries, got {column!r:.80}")
    rows = zip(*(cast("Sequence[Any]", columns[name]) for name in (*REQUIRED_COLUMNS, picture)), strict=True)
    return [
        Case(
            text=completion_text(completion),
            objects=_objects(objects, str(row_id)),
            input_size_hw=(int(size_hw[0]), int(size_hw[1])),
            row_id=str(row_id),
            image=image,
        )
        for completion, (objects, size_hw, row_id, image) in zip(completions, rows, strict=True)
    ]


def check_columns(names: Iterable[str]) -> None:
    """Raises `ValueError` unless the columns that rewards read are there; for trainers to call before they begin."""
    present = set(names)
    if missing := [name for name in REQUIRED_COLUMNS if name not in present]:
        raise ValueError(f"expected the columns {', '.join(missing)} for the rewards, the data set has none of them")


def seg_zero_rewards(*, strict: bool = True, mode: ParseMode = "seg_zero") -> tuple[Reward, ...]:
    """Seg-Zero's five terms, at most 5 together; `strict` is what its configuration files use.

    Rows have one object with two points (or, beyond the paper, no object: see `check_seg_zero_row`).
    """
    read = functools.partial(_seg_zero_reading, strict=strict, mode=mode)
    return (
        Reward(name="think_format", rule=think_format, maximum=1),
        Reward(name="answer_format", rule=functools.partial(_seg_zero_format, read=read), maximum=1),
        Reward(name="box_iou", rule=functools.partial(_seg_zero_iou, read=read), maximum=1),
        Reward(name="box_l1", rule=functools.partial(_seg_zero_l1, read=read), maximum=1),
        Reward(name="points", rule=functools.partial(_seg_zero_points, read=read), maximum=1),
    )


def vision_reasoner_rewards(*, mode: ParseMode = "vision_reasoner") -> tuple[Reward, ...]:
    """VisionReasoner's four terms, at most 7 together. Every object of a row has a point."""
    return (
        Reward(name="think_format", rule=think_format, maximum=1),
        Reward(name="answer_format", rule=functools.partial(_list_format, mode=mode), maximum=2),
        Reward(name="accuracy", rule=functools.partial(list_accuracy, mode=mode), maximum=NUM_CRITERIA),
        Reward(name="non_repeat", rule=non_repeat, maximum=1),
    )


def check_seg_zero_row(row: TrainingRow) -> None:
    """Raises `DatasetError` unless the row can be trained on in Seg-Zero's format: at most one object, two points."""
    _seg_zero_truth(row.row_id, row.objects)


def check_vision_reasoner_row(row: TrainingRow) -> None:
    """Raises `DatasetError` unless the row can be trained on in VisionReasoner's format: a point in every object."""
    _list_truth(row.row_id, row.objects)


def think_format(case: Case) -> float:
    """1 for a text of the right outline, else 0. An empty think block will do; see `reward_extras.empty_thinking`."""
    return float(has_think_format(case.text))


def non_repeat(case: Case) -> float:
    """0 for a text in which two or more sentences are repetitions, else 1. A full stop ends a sentence."""
    sentences = [sentence for part in case.text.split(".") if (sentence := part.strip())]
    return float(len(sentences) - len(set(sentences)) < 2)


PairRule = Callable[..., Floats]
"""`reward_geometry.pair_scores` or one of its signature."""


def list_accuracy(case: Case, *, mode: ParseMode, of_pairs: PairRule = pair_scores) -> float:
    """0 … 3: the matched criteria over the larger number of objects; 0 where either side has none."""
    truth = _list_truth(case.row_id, case.objects)[:MAX_OBJECTS]
    reading = read_vision_reasoner(case.text, mode=mode, input_size_hw=case.input_size_hw)
    if not truth or not len(reading.boxes):
        return 0.0
    true_boxes = np.array([one.box_xyxy for one in truth], np.float64)
    true_points = np.array([one.points_xy[0] for one in truth], np.float64)
    scale = pixel_scale(case.input_size_hw)
    return matched_score(of_pairs(reading.boxes, reading.points, true_boxes, true_points, scale=scale))


def _list_format(case: Case, *, mode: ParseMode) -> float:
    return read_vision_reasoner(case.text, mode=mode, input_size_hw=case.input_size_hw).format_score


_SegZeroRead = Callable[[Case], SegZeroReading]


def _seg_zero_reading(case: Case, *, strict: bool, mode: ParseMode) -> SegZeroReading:
    return read_seg_zero(case.text, strict=strict, mode=mode, input_size_hw=case.input_size_hw)


def _seg_zero_format(case: Case, *, read: _SegZeroRead) -> float:
    return float(read(case).well_formed)


def _seg_zero_iou(case: Case, *, read: _SegZeroRead) -> float:
    truth, box = _seg_zero_truth(case.row_id, case.objects), read(case).box
    return float(truth is not None and box is not None and seg_zero_box_iou(box, truth.box_xyxy) > MIN_BOX_IOU)


def _seg_zero_l1(case: Case, *, read: _SegZeroRead) -> float:
    truth, box = _seg_zero_truth(case.row_id, case.objects), read(case).box
    limit_px = BOX_L1_PX * pixel_scale(case.input_size_hw)
    return float(truth is not None and box is not None and box_l1(box, truth.box_xyxy) < limit_px)


def _seg_zero_points(case: Case, *, read: _SegZeroRead) -> float:
    truth, reading = _seg_zero_truth(case.row_id, case.objects), read(case)
    box, points = reading.box, reading.points
    if truth is None or box is None or points is None or not all(is_in_box(point, box) for point in points):
        return 0.0
    limit_px = TWO_POINTS_PX * pixel_scale(case.input_size_hw)
    return float(two_points_distance(points, (truth.points_xy[0], truth.points_xy[1])) < limit_px)


def _seg_zero_truth(row_id: str, objects: tuple[RowObject, ...]) -> RowObject | None:
    if not objects:
        return None
    if len(objects) > 1 or len(objects[0].points_xy) < SEG_ZERO.max_points:
        raise DatasetError(
            f"row {row_id!r:.60}: expected one object with {SEG_ZERO.max_points} points for {SEG_ZERO.name}, got "
            f"{len(objects)} with {[len(one.points_xy) for one in objects]}; use {VISION_REASONER.name} for several"
        )
    return objects[0]


def _list_truth(row_id: str, objects: tuple[RowObject, ...]) -> tuple[RowObject, ...]:
    for index, one in enumerate(objects):
        if not one.points_xy:
            raise DatasetError(
                f"row {row_id!r:.60}: objects[{index}]: expected a point for {VISION_REASONER.name}, got none"
            )
    return objects


def _objects(entries: object, row_id: str) -> tuple[RowObject, ...]:
    if not isinstance(entries, Sequence):
        raise DatasetError(f"row {row_id!r:.60}: expected `{OBJECTS}` as a list, got {entries!r:.80}")
    return tuple(entry if isinstance(entry, RowObject) else RowObject.from_json(entry) for entry in entries)

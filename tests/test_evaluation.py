"""Metrics against values worked out by hand; the 4x4 pictures below are the expectation."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from segzero_rt.answer import Answer, AnswerStatus, Prompt
from segzero_rt.dataset import LabeledObject, Sample
from segzero_rt.errors import DatasetError, QuestionError
from segzero_rt.evaluation import (
    FAILED,
    Record,
    box_ious,
    evaluate,
    giou_interval,
    giou_loss,
    mask_overlap,
    mean_box_iou,
    percentiles,
    score_sample,
    summarize,
)
from segzero_rt.segmentation import Segmentation


def picture(*rows: str) -> NDArray[np.bool_]:
    return np.array([[sign == "#" for sign in row] for row in rows])


SQUARE = picture("##..", "##..", "....", "....")
SHIFTED = picture(".##.", ".##.", "....", "....")  # overlap 2 of 6
LOWER = picture("....", "....", "..##", "..##")
PIXEL = picture("....", ".#..", "....", "....")
EMPTY = picture("....", "....", "....", "....")
FULL = ~EMPTY


def sample(*masks: NDArray[np.bool_], kind: str = "name", path: str = "images/0.png", text: str = "the mug") -> Sample:
    objects = tuple(LabeledObject.from_mask("mug", mask) for mask in masks)
    return Sample(image_path=Path(path), text=text, kind=kind, size_hw=(4, 4), objects=objects, source="a.jsonl:1")


def result(*masks: NDArray[np.bool_], status: AnswerStatus | None = None) -> Segmentation:
    status = status or (AnswerStatus.OK if masks else AnswerStatus.NONE_FOUND)
    if not masks:
        return Segmentation.empty(Answer(status=status), (4, 4))
    boxes = [LabeledObject.from_mask("", mask if mask.any() else FULL).box_xyxy for mask in masks]
    return Segmentation(
        masks=np.stack(masks),
        scores=np.ones(len(masks), np.float32),
        boxes_xyxy=np.array(boxes, np.float32),
        answer=Answer(status=status, prompts=tuple(Prompt(box_xyxy=box) for box in boxes)),
    )


CASES = [
    ("exact", sample(SQUARE), result(SQUARE), 1.0, 4, 4, 1.0),
    ("shifted by one", sample(SQUARE), result(SHIFTED), 2 / 6, 2, 6, 2 / 6),
    ("apart", sample(SQUARE), result(LOWER), 0.0, 0, 8, 0.0),
    ("single pixel, exact", sample(PIXEL), result(PIXEL), 1.0, 1, 1, 1.0),
    ("single pixel, all marked", sample(PIXEL), result(FULL), 1 / 16, 1, 16, 1 / 16),
    ("two found as one mask", sample(SQUARE, LOWER), result(SQUARE | LOWER), 1.0, 8, 8, 4 / 16 / 2),
    ("one of two found", sample(SQUARE, LOWER), result(SQUARE), 0.5, 4, 8, 0.5),
    ("found twice", sample(SQUARE), result(SQUARE, SQUARE), 1.0, 4, 4, 0.5),
    ("order does not matter", sample(SQUARE, LOWER), result(LOWER, SQUARE), 1.0, 8, 8, 1.0),
    ("overlapping predictions", sample(SQUARE), result(SQUARE, SHIFTED), 4 / 6, 4, 6, 0.5),
    ("said none, was there", sample(SQUARE), result(), 0.0, 0, 4, 0.0),
    ("none, said none", sample(), result(), 1.0, 0, 0, None),
    ("none, found something", sample(), result(SQUARE), 0.0, 0, 4, 0.0),
    ("none, box with an empty mask", sample(), result(EMPTY), 0.0, 0, 0, 0.0),
    ("none, malformed", sample(), result(status=AnswerStatus.MALFORMED), 1.0, 0, 0, None),
    ("none, failed", sample(), None, 0.0, 0, 0, None),
    ("failed", sample(SQUARE), None, 0.0, 0, 4, 0.0),
]


@pytest.mark.parametrize(
    ("asked", "given", "iou", "intersection", "union", "box_iou"),
    [case[1:] for case in CASES],
    ids=[case[0] for case in CASES],
)
def test_scores_one_sample(
    asked: Sample, given: Segmentation | None, iou: float, intersection: int, union: int, box_iou: float | None
) -> None:
    record = score_sample(asked, given, latency_ms=1.0)
    assert (record.iou, record.intersection, record.union) == (pytest.approx(iou), intersection, union)
    assert record.box_iou == (None if box_iou is None else pytest.approx(box_iou))


def test_summary_by_hand() -> None:
    rows = [
        (sample(SQUARE, kind="name"), result(SQUARE)),  # iou 1, 4/4
        (sample(SQUARE, kind="name"), result(SHIFTED)),  # iou 1/3, 2/6
        (sample(SQUARE, kind="relation"), result()),  # iou 0, 0/4, false none
        (sample(SQUARE, kind="relation"), result(status=AnswerStatus.TRUNCATED)),  # iou 0, 0/4, not parsed
        (sample(kind="none"), result()),  # iou 1
        (sample(kind="none"), result(SQUARE)),  # iou 0, 0/4
        (sample(kind="none"), None),  # failed: 0
    ]
    records = [score_sample(asked, given, latency_ms=float(ms)) for ms, (asked, given) in enumerate(rows)]
    summary = summarize(records)
    assert summary["giou"] == pytest.approx((1 + 1 / 3 + 0 + 0 + 1 + 0 + 0) / 7)
    assert summary["ciou"] == pytest.approx((4 + 2) / (4 + 6 + 4 + 4 + 4))
    assert summary["box_iou"] == pytest.approx((1 + 1 / 3 + 0 + 0) / 4)
    assert (summary["num_samples"], summary["num_failed"]) == (7, 1)
    assert summary["parse_rate"] == pytest.approx(5 / 7)
    assert summary["none_accuracy"] == pytest.approx(1 / 3)
    assert summary["false_none_rate"] == pytest.approx(1 / 4)
    assert summary["statuses"] == {FAILED: 1, "none_found": 2, "ok": 3, "truncated": 1}
    assert summary["by_kind"]["name"]["giou"] == pytest.approx(2 / 3)
    assert summary["by_kind"]["none"] == {"giou": pytest.approx(1 / 3), "num_samples": 3, "ciou": 0.0, "box_iou": None}
    assert summary["latency_ms"]["p50"] == 3.0
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_rates_without_samples_are_none() -> None:
    only_none = summarize([score_sample(sample(kind="none"), result(), latency_ms=1)])
    assert (only_none["giou"], only_none["ciou"], only_none["false_none_rate"]) == (1.0, None, None)
    only_objects = summarize([score_sample(sample(SQUARE), result(SQUARE), latency_ms=1)])
    assert only_objects["none_accuracy"] is None
    with pytest.raises(ValueError, match="at least one"):
        summarize([])


def test_masks_of_another_size_or_type_are_a_bug() -> None:
    with pytest.raises(ValueError, match="one size"):
        mask_overlap(SQUARE, SQUARE[:3])
    with pytest.raises(ValueError, match="bool"):
        mask_overlap(SQUARE.astype(np.uint8), SQUARE)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([0, 0, 2, 2], [0, 0, 2, 2], 1.0),
        ([0, 0, 2, 2], [1, 1, 3, 3], 1 / 7),
        ([0, 0, 2, 2], [2, 0, 4, 2], 0.0),
        ([0, 0, 4, 4], [1, 1, 2, 2], 1 / 16),
        ([1, 1, 1, 1], [1, 1, 1, 1], 0.0),
    ],
    ids=["same", "corner", "touching", "inside", "no area"],
)
def test_box_iou(a: list[float], b: list[float], expected: float) -> None:
    boxes = np.array([a], np.float32), np.array([b], np.float32)
    assert box_ious(*boxes)[0, 0] == pytest.approx(expected)
    assert mean_box_iou(*boxes) == pytest.approx(expected)


def test_boxes_match_best_pair_first() -> None:
    truth = np.array([[0, 0, 10, 10], [20, 0, 30, 10]], np.float32)
    predicted = np.array([[0, 0, 10, 9], [0, 0, 10, 10], [50, 50, 60, 60]], np.float32)
    assert mean_box_iou(predicted, truth) == pytest.approx(1 / 3)
    assert mean_box_iou(predicted[:0], truth[:0]) is None


def test_interval_holds_the_mean_and_narrows_with_pictures() -> None:
    rng = np.random.default_rng(3)

    def interval(num_pictures: int, per_picture: int) -> tuple[float, float]:
        records = []
        for index in range(num_pictures):
            iou = float(rng.random())
            for _ in range(per_picture):
                asked = sample(SQUARE, path=f"images/{index}.png")
                record = score_sample(asked, result(SQUARE), latency_ms=1)
                values = {name: getattr(record, name) for name in Record.__slots__}
                records.append(Record(**{**values, "iou": iou}))
        low, high = giou_interval(records)
        assert low < sum(record.iou for record in records) / len(records) < high
        assert (low, high) == giou_interval(records)
        return low, high

    few, many, repeated = interval(20, 1), interval(500, 1), interval(20, 25)
    assert many[1] - many[0] < (few[1] - few[0]) / 3
    # 25 copies of a question say nothing new: the interval follows the pictures.
    assert repeated[1] - repeated[0] > (few[1] - few[0]) / 2


def test_percentiles() -> None:
    assert percentiles([1.0]) == {"p50": 1.0, "p90": 1.0, "p99": 1.0}
    assert percentiles(list(range(101))) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}


def test_evaluate_never_skips(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "0.png")
    asked = [sample(SQUARE, path=str(tmp_path / "0.png"), text=text) for text in ("good", "bad", "good")]

    def predict(one: Sample, image_rgb: NDArray[np.uint8]) -> Segmentation:
        assert image_rgb.shape == (4, 4, 3)
        if one.text == "bad":
            raise QuestionError("too long")
        return result(SQUARE)

    records = [record for record, _ in evaluate(asked, predict)]
    assert [record.iou for record in records] == [1.0, 0.0, 1.0]
    assert records[1].status == FAILED and records[1].error == "QuestionError: too long"
    assert all(record.latency_ms > 0 for record in records)


@pytest.mark.parametrize("stage", ["predict", "picture"])
def test_evaluate_stops_at_a_bug_or_a_broken_picture(tmp_path: Path, stage: str) -> None:
    path = tmp_path / "0.png"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)
    if stage == "picture":
        path.write_bytes(b"")

    def predict(one: Sample, image_rgb: NDArray[np.uint8]) -> Segmentation:
        raise ZeroDivisionError

    expected: Callable[..., Exception] = ZeroDivisionError if stage == "predict" else DatasetError
    with pytest.raises(expected):  # type: ignore[arg-type]
        list(evaluate([sample(SQUARE, path=str(path))], predict))


def records_of(ious: list[float], pictures: list[str] | None = None) -> list[Record]:
    """Records with these IoUs, each on its own picture unless told."""
    names = pictures or [f"{index}.png" for index in range(len(ious))]
    template = score_sample(sample(SQUARE), result(SQUARE), latency_ms=1)
    return [
        replace(template, iou=iou, image=name, source=f"a.jsonl:{index}")
        for index, (iou, name) in enumerate(zip(ious, names, strict=True))
    ]


@pytest.mark.parametrize(
    ("ours", "theirs", "loss"),
    [
        ([1.0, 0.5, 0.0], [1.0, 0.5, 0.0], 0.0),
        ([0.0, 0.0], [1.0, 1.0], 1.0),
        ([1.0, 0.5], [0.5, 0.5], -0.25),
        ([0.2, 0.9, 0.4], [0.3, 0.7, 0.4], -0.1 / 3),
    ],
    ids=["equal", "all lost", "gained", "mixed"],
)
def test_the_loss_is_paired(ours: list[float], theirs: list[float], loss: float) -> None:
    found, (low, high) = giou_loss(records_of(ours), records_of(theirs))
    assert found == pytest.approx(loss)
    assert low <= found <= high


def test_a_paired_interval_is_narrow_where_both_fail_together_and_wide_where_pictures_are_few() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(400).tolist()
    found, (low, high) = giou_loss(records_of(hard), records_of([value + 0.01 for value in hard]))
    assert (found, low, high) == (pytest.approx(0.01), pytest.approx(0.01), pytest.approx(0.01))
    noisy = rng.random(400).tolist()
    names = [f"{index // 100}.png" for index in range(400)]
    shifted = [value + 0.1 * (index // 100) for index, value in enumerate(noisy)]
    _, few = giou_loss(records_of(noisy, names), records_of(shifted, names))
    _, many = giou_loss(records_of(noisy), records_of(shifted))
    assert few[1] - few[0] > 4 * (many[1] - many[0])


@pytest.mark.parametrize(
    ("ours", "theirs"), [([], []), ([1.0], [1.0, 0.0]), ([1.0], [])], ids=["none", "more", "no reference"]
)
def test_a_loss_needs_the_same_questions(ours: list[float], theirs: list[float]) -> None:
    with pytest.raises(ValueError, match="same questions"):
        giou_loss(records_of(ours), records_of(theirs))

"""Scores of a policy and segmenter on a dataset: gIoU, cIoU, format validity, latency. No sample is ever skipped.

* gIoU is the mean over samples of IoU(union of predicted masks, union of true masks). A sample without objects scores 1
  when the prediction is empty, else 0. (Seg-Zero, arXiv:2503.06520; the rule for "none" is gRefCOCO's.)
* cIoU is the sum of intersections over the sum of unions, so large objects weigh more.
* Box accuracy matches boxes one to one, best pair first; the share of pairs above IoU 0.5 in the longer list. With one
  true and one predicted box that is the usual "accuracy at 0.5"; misses and extras count against it.
* Point accuracy is the share of the reply's points that lie on a true object, 0 where there is no point at all.
* Pixels that a data set says to ignore are taken out of both masks, as LISA (arXiv:2308.00692) scores ReasonSeg.
* What fails (a question that the policy cannot take, say) counts as IoU 0 and is listed with its message.

Everything here is arithmetic on values; no model is needed to test it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segzero_rt.answer import AnswerStatus
from segzero_rt.dataset import Sample
from segzero_rt.errors import SegZeroError
from segzero_rt.evaluation_bootstrap import NUM_DRAWS, mean_interval, ratio_interval
from segzero_rt.mask import encode_rle
from segzero_rt.segmentation import Segmentation

Predict = Callable[[Sample, NDArray[np.uint8]], Segmentation]
"""A sample and its picture, already decoded, to a result. Only `sample.text` is fair to use, but for oracles."""

_PARSED = frozenset({AnswerStatus.OK.value, AnswerStatus.NONE_FOUND.value})
FAILED = "failed"
"""Status of a record whose prediction raised a `SegZeroError`."""
BROKEN_KIND = "broken"
"""Kind of the one record of a picture that its data set does not give, where that is counted instead of refused."""
BOX_IOU_THRESHOLD = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What came of one sample. Areas are in pixels of its picture."""

    source: str
    """`file:line` of the sample."""
    image: str
    text: str
    kind: str
    iou: float
    intersection: int
    union: int
    box_iou: float | None
    """Mean IoU of boxes, see `mean_box_iou`; None when neither side has a box."""
    box_accuracy: float | None = None
    """Share of boxes above IoU 0.5; None when neither side has a box."""
    point_accuracy: float | None = None
    """Share of the reply's points on a true object; None where nothing is true, or a reply has boxes and no points."""
    num_objects: int
    num_predicted: int
    status: str
    """An `AnswerStatus` value, or `failed`."""
    latency_ms: float
    """Of the prediction alone, the decoded picture in memory."""
    thinking: str = ""
    boxes_xyxy: list[list[float]] = field(default_factory=list)
    error: str | None = None
    sample_id: str = ""
    """What the data set calls the question; not every set keeps them unique, `source` is."""
    points_xy: list[list[list[float]]] = field(default_factory=list)
    """Points of each box, in pixels of the picture."""
    masks_rle: list[dict[str, Any]] | None = None
    """COCO RLE of each predicted mask, where they were asked for."""
    thinking_tokens: int | None = None
    """Tokens of the thinking alone, without tags; None where nothing counts them."""
    reply_tokens: int | None = None
    """Tokens of the whole reply."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Record:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: fields are missing, or others came.
        """
        known = {one.name for one in fields(cls)}
        if entry.keys() != known:
            raise ValueError(f"expected a record of {sorted(known)}, got {sorted(entry)}")
        return cls(**entry)


def evaluate(
    samples: Iterable[Sample],
    predict: Predict,
    *,
    count_tokens: Callable[[str], int] | None = None,
    keep_masks: bool = False,
) -> Iterator[tuple[Record, Segmentation | None]]:
    """Predicts and scores one sample at a time, in order.

    Args:
        samples: those on one picture best stand together: the picture is then decoded once.
        predict: makes a result of a sample and its picture.
        count_tokens: how many tokens a text has, for `thinking_tokens`.
        keep_masks: whether records hold the predicted masks.

    Yields:
        The record and the result it was made from, which is None where the prediction raised a `SegZeroError`.

    Raises:
        DatasetError: a picture cannot be decoded. That is the dataset's fault and stops, before it looks like a score.
    """
    picture: tuple[Path, bytes | None] | None = None
    image_rgb = np.zeros((0, 0, 3), dtype=np.uint8)
    for sample in samples:
        if sample.picture != picture:
            picture, image_rgb = sample.picture, sample.image_rgb
        start = time.perf_counter()
        error: str | None = None
        result: Segmentation | None = None
        try:
            result = predict(sample, image_rgb)
        except SegZeroError as raised:
            error = f"{type(raised).__name__}: {raised}"
        latency_ms = (time.perf_counter() - start) * 1e3
        record = score_sample(
            sample, result, latency_ms=latency_ms, error=error, count_tokens=count_tokens, keep_masks=keep_masks
        )
        yield record, result


def score_sample(
    sample: Sample,
    result: Segmentation | None,
    *,
    latency_ms: float,
    error: str | None = None,
    count_tokens: Callable[[str], int] | None = None,
    keep_masks: bool = False,
) -> Record:
    """The record of one result; `result` None means that the prediction failed, which scores 0 whatever was true."""
    scored = ~sample.ignored
    truth = np.asarray(sample.masks.any(axis=0), np.bool_) & scored
    predicted = np.zeros_like(truth) if result is None else result.union & scored
    intersection, union = mask_overlap(predicted, truth)
    if result is None:
        iou = 0.0
    elif sample.objects:
        iou = intersection / union if union else 0.0
    else:
        iou = 0.0 if len(result) else 1.0
    boxes = np.zeros((0, 4), dtype=np.float32) if result is None else result.boxes_xyxy
    prompts = () if result is None else result.answer.prompts
    points = [[[float(x), float(y)] for x, y in prompt.points_xy] for prompt in prompts]
    thinking = "" if result is None else result.answer.thinking
    return Record(
        source=sample.source,
        image=f"{sample.image_path.parent.name}/{sample.image_path.name}",
        text=sample.text,
        kind=sample.kind,
        iou=iou,
        intersection=intersection,
        union=union,
        box_iou=mean_box_iou(boxes, sample.boxes_xyxy),
        box_accuracy=box_accuracy(boxes, sample.boxes_xyxy),
        point_accuracy=point_accuracy(points, truth) if sample.objects else None,
        num_objects=len(sample.objects),
        num_predicted=len(boxes),
        status=FAILED if result is None else result.answer.status.value,
        latency_ms=latency_ms,
        thinking=thinking,
        boxes_xyxy=[[float(value) for value in box] for box in boxes],
        error=error,
        sample_id=sample.sample_id,
        points_xy=points,
        masks_rle=[encode_rle(mask) for mask in result.masks] if keep_masks and result is not None else None,
        thinking_tokens=count_tokens(thinking) if count_tokens is not None and result is not None else None,
        reply_tokens=None if result is None else result.decode_counts.get("tokens"),
    )


def broken_record(source: str, image: str, error: str) -> Record:
    """A picture that its data set does not give, as a question that was missed.

    Its true area is not known, so it cannot weigh in cIoU; everything else counts 0.
    """
    return Record(
        source=source,
        image=image,
        text="",
        kind=BROKEN_KIND,
        iou=0.0,
        intersection=0,
        union=0,
        box_iou=0.0,
        box_accuracy=0.0,
        point_accuracy=0.0,
        num_objects=1,
        num_predicted=0,
        status=FAILED,
        latency_ms=0.0,
        error=error,
    )


def mask_overlap(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> tuple[int, int]:
    """Pixels in both and in either of two bool [H, W] masks.

    Raises:
        ValueError: the masks differ in size or are not bool.
    """
    if predicted.shape != truth.shape or predicted.dtype != np.bool_ or truth.dtype != np.bool_:
        raise ValueError(
            "expected two bool masks of one size, got "
            f"{predicted.dtype} {predicted.shape} and {truth.dtype} {truth.shape}"
        )
    return int(np.count_nonzero(predicted & truth)), int(np.count_nonzero(predicted | truth))


def box_ious(a_xyxy: NDArray[np.float32], b_xyxy: NDArray[np.float32]) -> NDArray[np.float64]:
    """float64 [N, M] of IoUs between boxes [N, 4] and [M, 4]; 0 where both have no area."""
    a, b = a_xyxy.astype(np.float64)[:, None], b_xyxy.astype(np.float64)[None]
    width = np.clip(np.minimum(a[..., 2], b[..., 2]) - np.maximum(a[..., 0], b[..., 0]), 0, None)
    height = np.clip(np.minimum(a[..., 3], b[..., 3]) - np.maximum(a[..., 1], b[..., 1]), 0, None)
    intersection = width * height
    area_a = (a[..., 2] - a[..., 0]) * (a[..., 3] - a[..., 1])
    area_b = (b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1])
    union = area_a + area_b - intersection
    return np.asarray(np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0))


def mean_box_iou(predicted_xyxy: NDArray[np.float32], truth_xyxy: NDArray[np.float32]) -> float | None:
    """Matches boxes one to one, best pair first, and averages over the longer list: misses and extras count 0."""
    if not len(predicted_xyxy) and not len(truth_xyxy):
        return None
    return sum(_matched_ious(predicted_xyxy, truth_xyxy)) / max(len(predicted_xyxy), len(truth_xyxy))


def box_accuracy(predicted_xyxy: NDArray[np.float32], truth_xyxy: NDArray[np.float32]) -> float | None:
    """The share of pairs, matched likewise, above IoU 0.5, in the longer list."""
    if not len(predicted_xyxy) and not len(truth_xyxy):
        return None
    right = sum(iou > BOX_IOU_THRESHOLD for iou in _matched_ious(predicted_xyxy, truth_xyxy))
    return right / max(len(predicted_xyxy), len(truth_xyxy))


def _matched_ious(predicted_xyxy: NDArray[np.float32], truth_xyxy: NDArray[np.float32]) -> list[float]:
    ious = box_ious(predicted_xyxy, truth_xyxy)
    matched = []
    for _ in range(min(ious.shape)):
        row, column = np.unravel_index(int(ious.argmax()), ious.shape)
        matched.append(max(0.0, float(ious[row, column])))
        ious[row, :] = ious[:, column] = -1.0
    return matched


def point_accuracy(points_xy: Sequence[Sequence[Sequence[float]]], truth: NDArray[np.bool_]) -> float | None:
    """The share of points (per predicted object, in pixels) on the bool [H, W] truth; a far edge belongs to its pixel.

    Nothing predicted is 0; predictions that come without points (boxes alone) are None.
    """
    if not points_xy:
        return 0.0
    height, width = truth.shape
    hits = [
        0 <= x <= width and 0 <= y <= height and bool(truth[min(int(y), height - 1), min(int(x), width - 1)])
        for of_one in points_xy
        for x, y in of_one
    ]
    return sum(hits) / len(hits) if hits else None


def summarize(records: Sequence[Record]) -> dict[str, Any]:
    """The document of `segzero eval`: plain JSON types; rates that have no sample are None.

    Raises:
        ValueError: there are no records.
    """
    if not records:
        raise ValueError("expected at least one record")
    without = [record for record in records if not record.num_objects]
    having = [record for record in records if record.num_objects]
    return {
        "giou": _mean(record.iou for record in records),
        "giou_interval_95": list(giou_interval(records)),
        "ciou": _ciou(records),
        "ciou_interval_95": _ciou_interval(records),
        "box_iou": _mean(record.box_iou for record in having if record.box_iou is not None),
        **_accuracy(having, "box_accuracy"),
        **_accuracy(having, "point_accuracy"),
        "num_samples": len(records),
        "num_pictures": len({record.image for record in records}),
        "num_failed": sum(record.status == FAILED for record in records),
        "parse_rate": _mean(record.status in _PARSED for record in records),
        "none_accuracy": _mean(record.status == AnswerStatus.NONE_FOUND.value for record in without),
        "false_none_rate": _mean(record.status == AnswerStatus.NONE_FOUND.value for record in having),
        "statuses": dict(sorted(Counter(record.status for record in records).items())),
        "by_kind": {
            kind: _summarize_kind([record for record in records if record.kind == kind])
            for kind in sorted({record.kind for record in records})
        },
        "thinking_tokens": _token_counts(record.thinking_tokens for record in records),
        "reply_tokens": _token_counts(record.reply_tokens for record in records),
        "latency_ms": percentiles([record.latency_ms for record in records]),
    }


def _accuracy(having: Sequence[Record], name: str) -> dict[str, Any]:
    known = [(record.image, value) for record in having if (value := getattr(record, name)) is not None]
    interval = list(mean_interval(*map(list, zip(*known, strict=True)))) if known else None
    return {name: _mean(value for _, value in known), f"{name}_interval_95": interval}


def _token_counts(counts: Iterable[int | None]) -> dict[str, float] | None:
    known = [float(count) for count in counts if count is not None]
    return {"mean": sum(known) / len(known), **percentiles(known)} if known else None


def _summarize_kind(records: Sequence[Record]) -> dict[str, Any]:
    return {
        "giou": _mean(record.iou for record in records),
        "num_samples": len(records),
        "ciou": _ciou(records),
        "box_iou": _mean(record.box_iou for record in records if record.num_objects and record.box_iou is not None),
    }


def giou_interval(records: Sequence[Record], *, num_draws: int = NUM_DRAWS, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of gIoU. Pictures are drawn, not questions: questions on one picture fail together."""
    images = [record.image for record in records]
    return mean_interval(images, [record.iou for record in records], num_draws=num_draws, seed=seed)


def _ciou_interval(records: Sequence[Record]) -> list[float] | None:
    unions = [float(record.union) for record in records]
    if not any(unions):
        return None
    intersections = [float(record.intersection) for record in records]
    return list(ratio_interval([record.image for record in records], intersections, unions))


def giou_loss(
    records: Sequence[Record], reference: Sequence[Record], *, num_draws: int = NUM_DRAWS, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """How much gIoU `records` lose against `reference`, with its 95 % interval from a paired bootstrap over pictures.

    Raises:
        ValueError: the two are not about the same questions in the same order, or there are none.
    """
    if not records or [_asked(one) for one in records] != [_asked(one) for one in reference]:
        raise ValueError(
            f"expected records of the same questions in the same order, got {len(records)} and {len(reference)}"
        )
    losses = [theirs.iou - ours.iou for ours, theirs in zip(records, reference, strict=True)]
    return sum(losses) / len(losses), mean_interval(
        [record.image for record in records], losses, num_draws=num_draws, seed=seed
    )


def _asked(record: Record) -> tuple[str, str]:
    return record.source, record.text


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99, linearly interpolated between values."""
    p50, p90, p99 = np.percentile(np.asarray(values, dtype=np.float64), [50, 90, 99])
    return {"p50": float(p50), "p90": float(p90), "p99": float(p99)}


def _ciou(records: Sequence[Record]) -> float | None:
    union = sum(record.union for record in records)
    return sum(record.intersection for record in records) / union if union else None


def _mean(values: Iterable[float]) -> float | None:
    numbers = [float(value) for value in values]
    return sum(numbers) / len(numbers) if numbers else None

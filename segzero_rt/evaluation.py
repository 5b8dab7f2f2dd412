"""Scores of a policy and segmenter on a dataset: gIoU, cIoU, format validity, latency. No sample is ever skipped.

* gIoU is the mean over samples of IoU(union of predicted masks, union of true masks). A sample without objects scores 1
  when the prediction is empty, else 0. (Seg-Zero, arXiv:2503.06520; the rule for "none" is gRefCOCO's.)
* cIoU is the sum of intersections over the sum of unions, so large objects weigh more.
* What fails (a question that the policy cannot take, say) counts as IoU 0 and is listed with its message.

Everything here is arithmetic on values; no model is needed to test it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segzero_rt.answer import AnswerStatus
from segzero_rt.dataset import Sample
from segzero_rt.errors import SegZeroError
from segzero_rt.segmentation import Segmentation

Predict = Callable[[Sample, NDArray[np.uint8]], Segmentation]
"""A sample and its picture, already decoded, to a result. Only `sample.text` is fair to use, but for oracles."""

_PARSED = frozenset({AnswerStatus.OK.value, AnswerStatus.NONE_FOUND.value})
FAILED = "failed"
"""Status of a record whose prediction raised a `SegZeroError`."""


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
    num_objects: int
    num_predicted: int
    status: str
    """An `AnswerStatus` value, or `failed`."""
    latency_ms: float
    """Of the prediction alone, the decoded picture in memory."""
    thinking: str = ""
    boxes_xyxy: list[list[float]] = field(default_factory=list)
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(samples: Iterable[Sample], predict: Predict) -> Iterator[tuple[Record, Segmentation | None]]:
    """Predicts and scores one sample at a time, in order.

    Yields:
        The record and the result it was made from, which is None where the prediction raised a `SegZeroError`.

    Raises:
        DatasetError: a picture cannot be decoded. That is the dataset's fault and stops, before it looks like a score.
    """
    image_path: Path | None = None
    image_rgb = np.zeros((0, 0, 3), dtype=np.uint8)
    for sample in samples:
        if sample.image_path != image_path:
            image_path, image_rgb = sample.image_path, sample.image_rgb
        start = time.perf_counter()
        error: str | None = None
        result: Segmentation | None = None
        try:
            result = predict(sample, image_rgb)
        except SegZeroError as raised:
            error = f"{type(raised).__name__}: {raised}"
        yield score_sample(sample, result, latency_ms=(time.perf_counter() - start) * 1e3, error=error), result


def score_sample(sample: Sample, result: Segmentation | None, *, latency_ms: float, error: str | None = None) -> Record:
    """The record of one result; `result` None means that the prediction failed, which scores 0 whatever was true."""
    truth = np.asarray(sample.masks.any(axis=0), np.bool_)
    predicted = np.zeros_like(truth) if result is None else result.union
    intersection, union = mask_overlap(predicted, truth)
    if result is None:
        iou = 0.0
    elif sample.objects:
        iou = intersection / union
    else:
        iou = 0.0 if len(result) else 1.0
    boxes = np.zeros((0, 4), dtype=np.float32) if result is None else result.boxes_xyxy
    return Record(
        source=sample.source,
        image=f"{sample.image_path.parent.name}/{sample.image_path.name}",
        text=sample.text,
        kind=sample.kind,
        iou=iou,
        intersection=intersection,
        union=union,
        box_iou=mean_box_iou(boxes, sample.boxes_xyxy),
        num_objects=len(sample.objects),
        num_predicted=len(boxes),
        status=FAILED if result is None else result.answer.status.value,
        latency_ms=latency_ms,
        thinking="" if result is None else result.answer.thinking,
        boxes_xyxy=[[float(value) for value in box] for box in boxes],
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
    ious = box_ious(predicted_xyxy, truth_xyxy)
    total = 0.0
    for _ in range(min(ious.shape)):
        row, column = np.unravel_index(int(ious.argmax()), ious.shape)
        total += max(0.0, float(ious[row, column]))
        ious[row, :] = ious[:, column] = -1.0
    return total / max(len(predicted_xyxy), len(truth_xyxy))


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
        "box_iou": _mean(record.box_iou for record in having if record.box_iou is not None),
        "num_samples": len(records),
        "num_failed": sum(record.status == FAILED for record in records),
        "parse_rate": _mean(record.status in _PARSED for record in records),
        "none_accuracy": _mean(record.status == AnswerStatus.NONE_FOUND.value for record in without),
        "false_none_rate": _mean(record.status == AnswerStatus.NONE_FOUND.value for record in having),
        "statuses": dict(sorted(Counter(record.status for record in records).items())),
        "by_kind": {
            kind: _summarize_kind([record for record in records if record.kind == kind])
            for kind in sorted({record.kind for record in records})
        },
        "latency_ms": percentiles([record.latency_ms for record in records]),
    }


def _summarize_kind(records: Sequence[Record]) -> dict[str, Any]:
    return {
        "giou": _mean(record.iou for record in records),
        "num_samples": len(records),
        "ciou": _ciou(records),
        "box_iou": _mean(record.box_iou for record in records if record.num_objects and record.box_iou is not None),
    }


def giou_interval(records: Sequence[Record], *, num_draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of gIoU. Pictures are drawn, not questions: questions on one picture fail together."""
    return _interval([record.image for record in records], [record.iou for record in records], num_draws, seed)


def giou_loss(
    records: Sequence[Record], reference: Sequence[Record], *, num_draws: int = 2000, seed: int = 0
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
    return sum(losses) / len(losses), _interval([record.image for record in records], losses, num_draws, seed)


def _asked(record: Record) -> tuple[str, str]:
    return record.source, record.text


def _interval(images: Sequence[str], values: Sequence[float], num_draws: int, seed: int) -> tuple[float, float]:
    """95 % interval of the mean of `values`, whole pictures drawn with replacement."""
    pictures = sorted(set(images))
    index = {picture: position for position, picture in enumerate(pictures)}
    where = np.array([index[image] for image in images])
    sums = np.bincount(where, weights=values)
    counts = np.bincount(where)
    rng = np.random.default_rng(seed)
    means = np.empty(num_draws)
    for draw in range(num_draws):
        drawn = rng.integers(0, len(pictures), len(pictures))
        means[draw] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


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

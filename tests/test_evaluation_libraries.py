"""The metrics beside pycocotools' and torchmetrics', on random masks and boxes, where they mean the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from segzero_rt.answer import Answer, AnswerStatus, Prompt
from segzero_rt.dataset import LabeledObject, Sample
from segzero_rt.evaluation import Record, box_ious, score_sample, summarize
from segzero_rt.mask import encode_rle
from segzero_rt.segmentation import Segmentation

NUM_SAMPLES = 60


def blob(rng: np.random.Generator, size_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """A rectangle with ragged content and at least one pixel."""
    height, width = size_hw
    top, left = int(rng.integers(0, height)), int(rng.integers(0, width))
    mask = np.zeros(size_hw, bool)
    area = mask[top : top + int(rng.integers(1, height + 1)), left : left + int(rng.integers(1, width + 1))]
    area[:] = rng.random(area.shape) < rng.random() + 0.1
    mask[top, left] = True
    return mask


def asked_and_answered(
    rng: np.random.Generator, number: int, *, ignoring: bool
) -> tuple[Sample, Segmentation, NDArray[np.bool_]]:
    """One question with one true object, 0 to 3 predicted ones, and pixels to be ignored beside the object."""
    size_hw = (int(rng.integers(3, 41)), int(rng.integers(3, 41)))
    truth = blob(rng, size_hw)
    ignored = (rng.random(size_hw) < 0.3) & ~truth if ignoring else np.zeros(size_hw, bool)
    masks = [blob(rng, size_hw) for _ in range(int(rng.integers(0, 4)))]
    boxes = [LabeledObject.from_mask("", mask).box_xyxy for mask in masks]
    sample = Sample(
        image_path=Path(f"{number}.png"),
        text="x",
        kind="object",
        size_hw=size_hw,
        objects=(LabeledObject.from_mask("", truth),),
        ignore_rle=encode_rle(ignored) if ignoring else None,
    )
    result = Segmentation(
        masks=np.stack(masks) if masks else np.zeros((0, *size_hw), bool),
        scores=np.ones(len(masks), np.float32),
        boxes_xyxy=np.array(boxes, np.float32).reshape(-1, 4),
        answer=Answer(
            status=AnswerStatus.OK if masks else AnswerStatus.NONE_FOUND,
            prompts=tuple(Prompt(box_xyxy=box) for box in boxes),
        ),
    )
    return sample, result, ignored


def scored(seed: int, *, ignoring: bool) -> list[tuple[Sample, Segmentation, NDArray[np.bool_], Record]]:
    rng = np.random.default_rng(seed)
    cases = [asked_and_answered(rng, number, ignoring=ignoring) for number in range(NUM_SAMPLES)]
    return [(*case, score_sample(case[0], case[1], latency_ms=1.0)) for case in cases]


def test_mask_iou_is_that_of_pycocotools() -> None:
    coco = pytest.importorskip("pycocotools.mask")
    for sample, result, _, record in scored(1, ignoring=False):
        runs = coco.encode(np.asfortranarray(result.union.astype(np.uint8)))
        truth = coco.encode(np.asfortranarray(sample.masks[0].astype(np.uint8)))
        assert record.iou == pytest.approx(float(coco.iou([runs], [truth], [0])[0, 0]), abs=1e-12)


def test_box_iou_is_that_of_pycocotools() -> None:
    coco = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(2)
    corners = rng.integers(0, 50, (40, 2)), rng.integers(1, 50, (40, 2))
    boxes = np.concatenate([corners[0], corners[0] + corners[1]], axis=1).astype(np.float32)
    as_xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).astype(np.float64)
    expected = coco.iou(as_xywh[:15], as_xywh[15:], [0] * 25)
    np.testing.assert_allclose(box_ious(boxes[:15], boxes[15:]), expected, atol=1e-12)


@pytest.mark.parametrize("ignoring", [False, True], ids=["all pixels", "ignored pixels"])
def test_giou_and_ciou_are_those_of_torchmetrics(ignoring: bool) -> None:
    """gIoU is the mean of its Jaccard index over pictures, cIoU the index of all pixels together; 255 is ignored."""
    torch = pytest.importorskip("torch")
    classification = pytest.importorskip("torchmetrics.classification")
    cases = scored(3, ignoring=ignoring)
    whole = classification.BinaryJaccardIndex(ignore_index=255)
    each = []
    for sample, result, ignored, record in cases:
        levels = torch.from_numpy(np.where(ignored, 255, sample.masks[0].astype(np.int64)))
        predicted = torch.from_numpy(result.union.astype(np.int64))
        one = classification.BinaryJaccardIndex(ignore_index=255)
        one.update(predicted, levels)
        whole.update(predicted, levels)
        each.append(float(one.compute()))
        assert record.iou == pytest.approx(each[-1], abs=1e-6)
    summary = summarize([case[-1] for case in cases])
    assert summary["giou"] == pytest.approx(np.mean(each), abs=1e-6)
    assert summary["ciou"] == pytest.approx(float(whole.compute()), abs=1e-6)


def test_rates_about_nothing_are_recall_and_specificity() -> None:
    """ "There is none" as a class: what is said against what is true."""
    torch = pytest.importorskip("torch")
    classification = pytest.importorskip("torchmetrics.classification")
    rng = np.random.default_rng(4)
    records, said, true = [], [], []
    for number in range(NUM_SAMPLES):
        sample, result, _ = asked_and_answered(rng, number, ignoring=False)
        if number % 3 == 0:
            sample = Sample(image_path=sample.image_path, text="x", kind="none", size_hw=sample.size_hw)
        records.append(score_sample(sample, result, latency_ms=1.0))
        said.append(int(not len(result)))
        true.append(int(not sample.objects))
    said_none, true_none = torch.tensor(said), torch.tensor(true)
    summary = summarize(records)
    recall = classification.BinaryRecall()(said_none, true_none)
    specificity = classification.BinarySpecificity()(said_none, true_none)
    assert summary["none_accuracy"] == pytest.approx(float(recall), abs=1e-6)
    assert summary["false_none_rate"] == pytest.approx(1 - float(specificity), abs=1e-6)

"""What a dataset gives away for nothing: answers that leave out the question, the picture, or both.

    python -m benchmarks.trivial_baselines TEST --train TRAIN [--bundle B]

| baseline | sees | answers with |
|---|---|---|
| `always_none` | nothing | nothing |
| `mean_box` | nothing | the mean box of the training set |
| `question_only` | question | a box or "none", by ridge regression on the question's words, fitted on `--train` |
| `picture_only` | picture | the most salient region: farthest from the picture's median colour |
| `largest_object` | picture, and the true masks | the object with the largest box, whatever was asked |
| `random_object` | picture, and the true masks | any object, whatever was asked |

The last two are oracles of segmentation: they show what finding objects without reading the question is worth. They
take the objects from `scene_objects` of each line, and masks from every question that asks for one of them; an object
that no question asks for gets its box as mask. With `--bundle`, the other boxes are also given to the segmenter
(`..._segmented`), which is the stronger answer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from segzero_rt.answer import Answer, AnswerStatus, Prompt
from segzero_rt.dataset import Sample, read_dataset
from segzero_rt.evaluation import Predict, box_ious, evaluate, summarize
from segzero_rt.mask import tight_boxes
from segzero_rt.segmentation import Segmentation

from .measuring import RESULTS, run_and_exit, write_result

Box = tuple[float, float, float, float]
_RIDGE = 1.0
_SAME_BOX_IOU = 0.9


def main() -> None:
    """Scores every baseline and writes one result file."""
    parser = argparse.ArgumentParser(description="gIoU of answers that ignore the question, the picture, or both")
    parser.add_argument("test", type=Path, help="dataset folder")
    parser.add_argument("--train", type=Path, required=True, help="dataset folder with other pictures")
    parser.add_argument("--bundle", help="also give the boxes to this bundle's segmenter; `embedded` for the default")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result file")
    arguments = parser.parse_args()
    test, train = read_dataset(arguments.test, limit=arguments.limit), read_dataset(arguments.train)
    predicts = make_baselines(train, test)
    if arguments.bundle:
        from segzero_rt.pipeline import SegZero

        pipeline = SegZero.load(None if arguments.bundle == "embedded" else arguments.bundle, backend="cpu")
        for name in ("mean_box", "question_only", "picture_only"):
            predicts[f"{name}_segmented"] = segmented(predicts[name], pipeline.segment)
    scores = {}
    for name, predict in predicts.items():
        scores[name] = summarize([record for record, _ in evaluate(test, predict)])
        del scores[name]["latency_ms"]
        print(f"{name:<24} gIoU {scores[name]['giou']:.4f}", file=sys.stderr)
    document = {"test": arguments.test.name, "train": arguments.train.name, "baselines": scores}
    path = write_result("trivial_baselines", document, arguments.out)
    print(json.dumps({"result": str(path), "giou": {name: score["giou"] for name, score in scores.items()}}))


def make_baselines(train: Sequence[Sample], test: Sequence[Sample]) -> dict[str, Predict]:
    """Every baseline by its name, ready for `evaluate`."""
    mean = mean_box(train)
    words = WordRegression.fit(train)
    scenes = collect_scenes(test)
    rng = np.random.default_rng(0)

    def largest(sample: Sample, _: NDArray[np.uint8]) -> Segmentation:
        return as_result(sample, max(scenes[sample.image_path], key=box_area, default=None))

    def any_object(sample: Sample, _: NDArray[np.uint8]) -> Segmentation:
        masks = scenes[sample.image_path]
        return as_result(sample, masks[int(rng.integers(len(masks)))] if masks else None)

    return {
        "always_none": lambda sample, _: as_result(sample, None),
        "mean_box": lambda sample, _: as_result(sample, box_mask(scale_box(mean, sample.size_hw), sample.size_hw)),
        "question_only": lambda sample, _: as_result(sample, words.mask(sample.text, sample.size_hw)),
        "picture_only": lambda sample, image_rgb: as_result(sample, salient_region(image_rgb)),
        "largest_object": largest,
        "random_object": any_object,
    }


def box_area(mask: NDArray[np.bool_]) -> float:
    """Pixels of the box around a mask: boxes of all objects are known, exact masks only of some."""
    left, top, right, bottom = tight_boxes(mask[None])[0]
    return float((right - left) * (bottom - top))


def segmented(predict: Predict, segment: Callable[[NDArray[np.uint8], list[Prompt]], Segmentation]) -> Predict:
    """The same boxes, their masks made by a segmenter."""

    def refined(sample: Sample, image_rgb: NDArray[np.uint8]) -> Segmentation:
        result = predict(sample, image_rgb)
        return segment(image_rgb, list(result.answer.prompts)) if len(result) else result

    return refined


def as_result(sample: Sample, mask: NDArray[np.bool_] | None) -> Segmentation:
    """One mask as a result; None or an empty mask is "there is none"."""
    if mask is None or not mask.any():
        return Segmentation.empty(Answer(status=AnswerStatus.NONE_FOUND), sample.size_hw)
    left, top, right, bottom = (float(value) for value in tight_boxes(mask[None])[0])
    box = (left, top, right, bottom)
    return Segmentation(
        masks=mask[None],
        scores=np.ones(1, np.float32),
        boxes_xyxy=np.array([box], np.float32),
        answer=Answer(status=AnswerStatus.OK, prompts=(Prompt(box_xyxy=box),)),
    )


def relative_box(sample: Sample) -> NDArray[np.float64] | None:
    """Box around all objects of a sample as shares of width and height, float64 [4]; None without objects."""
    if not sample.objects:
        return None
    boxes = sample.boxes_xyxy.astype(np.float64)
    height, width = sample.size_hw
    return np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)]) / [width, height, width, height]


def mean_box(train: Sequence[Sample]) -> NDArray[np.float64]:
    """Mean of the relative boxes of a dataset, float64 [4].

    Raises:
        ValueError: no sample has an object.
    """
    boxes = [box for sample in train if (box := relative_box(sample)) is not None]
    if not boxes:
        raise ValueError("expected a training set with objects, got none")
    return np.asarray(np.mean(boxes, axis=0))


def scale_box(relative: NDArray[np.float64], size_hw: tuple[int, int]) -> Box:
    """Shares of width and height to pixels inside the picture, at least one pixel large."""
    height, width = size_hw
    left = max(min(round(float(relative[0]) * width), width - 1), 0)
    top = max(min(round(float(relative[1]) * height), height - 1), 0)
    right = min(max(round(float(relative[2]) * width), left + 1), width)
    bottom = min(max(round(float(relative[3]) * height), top + 1), height)
    return float(left), float(top), float(right), float(bottom)


def box_mask(box: Box, size_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """bool [H, W], True inside the box."""
    mask = np.zeros(size_hw, dtype=bool)
    left, top, right, bottom = (round(value) for value in box)
    mask[top:bottom, left:right] = True
    return mask


class WordRegression:
    """Ridge regression from the words of a question to its box and to whether there is such an object."""

    def __init__(self, vocabulary: Mapping[str, int], weights: NDArray[np.float64]) -> None:
        self.vocabulary, self.weights = vocabulary, weights

    @classmethod
    def fit(cls, train: Sequence[Sample]) -> WordRegression:
        """Fits boxes on the samples that have objects, "none" on all."""
        found = sorted({word for sample in train for word in words_of(sample.text)})
        model = cls({word: index for index, word in enumerate(found)}, np.zeros((len(found) + 1, 5)))
        features = np.stack([model.features(sample.text) for sample in train])
        boxes = [relative_box(sample) for sample in train]
        having = np.array([box is not None for box in boxes])
        targets = np.stack([box for box in boxes if box is not None])
        model.weights[:, :4] = _ridge(features[having], targets)
        model.weights[:, 4:] = _ridge(features, having[:, None].astype(np.float64))
        return model

    def features(self, text: str) -> NDArray[np.float64]:
        """Which known words are there, and a constant: float64 [words + 1]."""
        row = np.zeros(len(self.vocabulary) + 1)
        row[-1] = 1
        for word in words_of(text):
            if word in self.vocabulary:
                row[self.vocabulary[word]] = 1
        return row

    def mask(self, text: str, size_hw: tuple[int, int]) -> NDArray[np.bool_] | None:
        """The box that these words suggest, as a mask; None where "none" is likelier."""
        *box, there = self.features(text) @ self.weights
        return box_mask(scale_box(np.array(box), size_hw), size_hw) if there >= 0.5 else None


def _ridge(features: NDArray[np.float64], targets: NDArray[np.float64]) -> NDArray[np.float64]:
    penalty = _RIDGE * np.eye(features.shape[1])
    penalty[-1, -1] = 0  # the constant is free
    # Least squares, since a constant word or two that go together always leave the matrix without an inverse.
    solution, *_ = np.linalg.lstsq(features.T @ features + penalty, features.T @ targets, rcond=None)
    return np.asarray(solution)


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return [word for part in text.lower().split() if (word := part.strip(".,;:?!\"'"))]


def salient_region(image_rgb: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """The largest connected region that differs from the picture's median colour, bool [H, W]; may be empty."""
    lab = cv2.cvtColor(image_rgb, cv2.COLOR_RGB2LAB).astype(np.float32)
    distance = np.linalg.norm(lab - np.median(lab.reshape(-1, 3), axis=0), axis=2)
    scaled = np.clip(distance / max(float(distance.max()), 1.0) * 255, 0, 255).astype(np.uint8)
    _, high = cv2.threshold(scaled, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    side = max(3, min(image_rgb.shape[:2]) // 60 | 1)
    opened = cv2.morphologyEx(high, cv2.MORPH_OPEN, np.ones((side, side), np.uint8))
    count, labels, stats, _ = cv2.connectedComponentsWithStats(opened)
    if count < 2:
        return np.zeros(image_rgb.shape[:2], dtype=bool)
    return np.asarray(labels == 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA])), dtype=np.bool_)


def collect_scenes(samples: Sequence[Sample]) -> dict[Path, list[NDArray[np.bool_]]]:
    """Masks of all known objects of each picture: those that are asked for, and the boxes of the others."""
    scenes: dict[Path, list[NDArray[np.bool_]]] = {}
    boxes: dict[Path, list[Box]] = {}
    for sample in samples:
        masks, known = scenes.setdefault(sample.image_path, []), boxes.setdefault(sample.image_path, [])
        for one in sample.objects:
            if not _is_known(one.box_xyxy, known):
                masks.append(one.mask)
                known.append(one.box_xyxy)
    for sample in samples:
        masks, known = scenes[sample.image_path], boxes[sample.image_path]
        for box in scene_boxes(sample):
            if not _is_known(box, known):
                masks.append(box_mask(box, sample.size_hw))
                known.append(box)
    return scenes


def scene_boxes(sample: Sample) -> list[Box]:
    """Boxes of the extra key `scene_objects`; none where it is absent."""
    objects: list[dict[str, Any]] = sample.extra.get("scene_objects", [])
    return [(float(b[0]), float(b[1]), float(b[2]), float(b[3])) for b in (one["box_xyxy"] for one in objects)]


def _is_known(box: Box, known: Sequence[Box]) -> bool:
    if not known:
        return False
    return bool((box_ious(np.array([box], np.float32), np.array(known, np.float32)) > _SAME_BOX_IOU).any())


if __name__ == "__main__":
    run_and_exit(main, "trivial_baselines")

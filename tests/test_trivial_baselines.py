"""The trivial baselines see only what they claim to see, and score what can be worked out by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import trivial_baselines
from benchmarks.trivial_baselines import WordRegression, box_mask, collect_scenes, mean_box, salient_region, scale_box
from segzero_rt.dataset import DatasetWriter, LabeledObject, read_dataset

SIZE_HW = (40, 60)
LEFT, RIGHT = (5, 10, 20, 30), (35, 5, 55, 35)


def area(box: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros(SIZE_HW, dtype=bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One picture: a small thing on the left, a large one on the right that only `scene_objects` knows fully."""
    picture = np.full((*SIZE_HW, 3), 200, np.uint8)
    picture[area(LEFT)] = (200, 20, 20)
    picture[area(RIGHT)] = (20, 20, 200)
    extra = {"scene_objects": [{"name": "red mug", "box_xyxy": LEFT}, {"name": "blue box", "box_xyxy": RIGHT}]}
    with DatasetWriter(tmp_path / "set") as writer:
        name = writer.add_image(picture)
        left = LabeledObject.from_mask("mug", area(LEFT))
        writer.add_question(name, "the mug on the left", kind="name", objects=[left], extra=extra)
        writer.add_question(name, "the red mug, left", kind="name", objects=[left], extra=extra)
        writer.add_question(name, "a zebra", kind="none", extra=extra)
        writer.add_question(name, "no zebra", kind="none", extra=extra)
    return tmp_path / "set"


def test_scores_by_hand(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", str(folder), "--train", str(folder), "--out", str(tmp_path / "results")])
    trivial_baselines.main()
    (path,) = (tmp_path / "results").iterdir()
    scores = {name: row["giou"] for name, row in json.loads(path.read_text())["baselines"].items()}
    assert scores["always_none"] == 0.5
    assert scores["mean_box"] == 0.5  # every training box is the left one; "none" questions get it, too
    assert scores["question_only"] == 1.0  # words tell all four apart, box and none alike
    assert scores["largest_object"] == 0.0  # the right one, whatever was asked
    assert scores["picture_only"] == 0.0
    assert str(tmp_path) not in path.read_text()


def test_scene_masks_are_true_where_known_and_boxes_elsewhere(folder: Path) -> None:
    samples = read_dataset(folder)
    (masks,) = collect_scenes(samples).values()
    assert [int(mask.sum()) for mask in masks] == [int(area(LEFT).sum()), int(area(RIGHT).sum())]


def test_salient_region_is_the_larger_thing(folder: Path) -> None:
    picture = read_dataset(folder)[0].image_rgb
    np.testing.assert_array_equal(salient_region(picture), area(RIGHT))
    assert not salient_region(np.full((5, 7, 3), 9, np.uint8)).any()
    assert salient_region(np.zeros((1, 1, 3), np.uint8)).shape == (1, 1)


def test_unknown_words_get_the_mean_answer(folder: Path) -> None:
    model = WordRegression.fit(read_dataset(folder))
    known = model.mask("mug left", SIZE_HW)
    assert known is not None
    np.testing.assert_array_equal(known, area(LEFT))
    assert model.features("")[:-1].sum() == 0 and model.features("MUG!").sum() == 2


@pytest.mark.parametrize(
    ("relative", "size_hw", "expected"),
    [
        ((0.25, 0.5, 0.75, 1.0), (8, 8), (2, 4, 6, 8)),
        ((0.5, 0.5, 0.5, 0.5), (8, 8), (4, 4, 5, 5)),
        ((-1.0, -1.0, 2.0, 2.0), (3, 5), (0, 0, 5, 3)),
        ((1.0, 1.0, 1.0, 1.0), (3, 5), (4, 2, 5, 3)),
        ((0.9, 0.9, 0.1, 0.1), (10, 10), (9, 9, 10, 10)),
        ((0.0, 0.0, 1.0, 1.0), (1, 1), (0, 0, 1, 1)),
    ],
    ids=["plain", "no area", "outside", "corner", "swapped", "single pixel"],
)
def test_boxes_stay_in_the_picture(
    relative: tuple[float, ...], size_hw: tuple[int, int], expected: tuple[int, ...]
) -> None:
    box = scale_box(np.array(relative), size_hw)
    assert box == expected
    assert box_mask(box, size_hw).any()


def test_mean_box_needs_objects(folder: Path) -> None:
    samples = read_dataset(folder)
    np.testing.assert_allclose(mean_box(samples), np.array(LEFT) / [60, 40, 60, 40])
    with pytest.raises(ValueError, match="with objects"):
        mean_box(samples[2:])

"""The segmenter's quality measurement: that it reads the real masks right, and leaves nothing out."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.segmenter_quality import (
    ASSETS,
    COCO,
    coco_case,
    davis_cases,
    grabcut,
    measure,
    prompts_for,
    scene_cases,
)
from segzero_rt.answer import Prompt

real = pytest.mark.skipif(not ASSETS.is_dir(), reason="the real pictures lie beside the repository, and do not here")


@real
def test_the_photo_has_its_six_objects() -> None:
    case = coco_case()
    assert case.names == ("coco remote 1", "coco remote 2", "coco couch 1", "coco bed 1", "coco cat 1", "coco cat 2")
    for mask, annotation in zip(
        case.masks, json.loads((ASSETS / COCO / "coco_annotations.txt").read_text()), strict=True
    ):
        assert mask.sum() == pytest.approx(annotation["area"], rel=0.03)


@real
def test_every_fifth_frame_is_measured() -> None:
    cases = list(davis_cases())
    assert [case.names[0][-2:] for case in cases] == ["00", "05", "10", "15", "20", "25", "30", "35"]
    for case in cases:
        assert case.masks.shape == (1, *case.image_rgb.shape[:2])
        assert 0.01 < case.masks.mean() < 0.3


@real
def test_boxes_themselves_are_measured_as_masks() -> None:
    """A segmenter that answers each box with the box: every object gets a figure, known beforehand for two of them."""

    def boxes(image_rgb: np.ndarray, prompts: list[Prompt]) -> np.ndarray:
        masks = np.zeros((len(prompts), *image_rgb.shape[:2]), bool)
        for mask, prompt in zip(masks, prompts, strict=True):
            left, top, right, bottom = (int(value) for value in prompt.box_xyxy)
            mask[top:bottom, left:right] = True
        return masks

    document = measure(boxes, scenes=0, with_grabcut=False)
    rows = {row["object"]: row["iou"] for row in document["real"]["objects"]}
    assert document["real"]["num_objects"] == len(rows) == 14
    assert rows["coco bed 1"] > 0.95
    assert rows["coco couch 1"] == pytest.approx(176_278 / (639 * 474), abs=0.03)
    assert document["real"]["mean_iou"] == pytest.approx(np.mean(list(rows.values())), abs=1e-3)


def test_scenes_come_with_the_truth() -> None:
    for case in scene_cases(2):
        assert len(case.names) == len(case.masks) >= 4
        for prompt, mask in zip(prompts_for(case.masks), case.masks, strict=True):
            left, top, right, bottom = (int(value) for value in prompt.box_xyxy)
            assert mask[top:bottom, left:right].sum() == mask.sum() > 0


def test_grabcut_finds_a_plain_disc_and_gives_up_nothing() -> None:
    rows, columns = np.mgrid[0:80, 0:100]
    disc = (rows - 40) ** 2 + (columns - 50) ** 2 < 20**2
    image_rgb = np.where(disc[..., None], np.uint8([200, 40, 40]), np.uint8([30, 60, 160])).astype(np.uint8)
    noisy = np.clip(image_rgb + np.random.default_rng(0).normal(0, 6, image_rgb.shape), 0, 255).astype(np.uint8)
    whole = Prompt(box_xyxy=(0, 0, 100, 80))
    masks = grabcut(noisy, [*prompts_for(disc[None]), whole])
    assert (masks[0] & disc).sum() / (masks[0] | disc).sum() > 0.95
    assert masks[1].all(), "a box around everything leaves no background to learn from: it is its own answer"

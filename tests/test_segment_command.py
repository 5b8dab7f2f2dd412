"""`segzero segment` beyond boxes: points alone, points off the object, a rough mask, the single reading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from segzero_rt.cli import main
from segzero_rt.mask import decode_rle

Segment = Callable[..., dict[str, Any]]
BOX = ("--box", "5,5,40,50")


@pytest.fixture
def picture(tmp_path: Path) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


@pytest.fixture
def rough(tmp_path: Path) -> str:
    mask = np.zeros((60, 80), np.uint8)
    mask[10:45, 8:38] = 255
    Image.fromarray(mask).save(tmp_path / "rough.png")
    return str(tmp_path / "rough.png")


@pytest.fixture
def segment(capsys: pytest.CaptureFixture[str], picture: str, tiny_bundle_path: Path) -> Segment:
    """Calls the command; its JSON document, or the error's with the exit status."""

    def call(*options: str) -> dict[str, Any]:
        capsys.readouterr()
        status = main(["segment", picture, *options, "--json", "--bundle", str(tiny_bundle_path)])
        document: dict[str, Any] = json.loads(capsys.readouterr().out or "{}")
        return document | {"exit": status}

    return call


PROMPTS = [
    ("a point", ("--point", "20,20")),
    ("two points, one off the object", ("--point", "20,20", "--outside", "70,5")),
    ("a point off the object", ("--outside", "70,5")),
    ("a box and both kinds of point", (*BOX, "--point", "20,20", "--outside", "70,5")),
    ("the single reading", (*BOX, "--single-mask")),
    ("a point, single", ("--point", "20,20", "--single-mask")),
]


@pytest.mark.parametrize(("name", "options"), PROMPTS, ids=[row[0] for row in PROMPTS])
def test_one_object_is_answered(segment: Segment, name: str, options: tuple[str, ...]) -> None:
    document = segment(*options)
    assert document["exit"] == 0 and document["status"] == "ok"
    (one,) = document["objects"]
    mask = decode_rle(one["mask_rle"])
    assert mask.shape == (60, 80)
    left, top, right, bottom = one["box_xyxy"]
    if "--box" in options:
        assert one["box_xyxy"] == [5, 5, 40, 50]
    elif mask.any():
        rows, columns = np.nonzero(mask)
        assert [left, top, right, bottom] == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    else:
        assert [left, top, right, bottom] == [0, 0, 80, 60]


def test_a_rough_mask_changes_the_answer(segment: Segment, rough: str) -> None:
    plain, with_mask, alone = segment(*BOX), segment(*BOX, "--mask", rough), segment("--mask", rough)
    assert [document["exit"] for document in (plain, with_mask, alone)] == [0, 0, 0]
    assert plain["objects"][0]["score"] != with_mask["objects"][0]["score"]
    assert with_mask["objects"][0]["score"] != alone["objects"][0]["score"]


REFUSED = [
    ("no prompt", (), "--box, --point, --outside or --mask"),
    ("a point off the picture", ("--outside", "80,5"), "80x60"),
    ("two boxes and a point off", (*BOX, *BOX, "--outside", "1,1"), "one box"),
    ("half a point", ("--outside", "1"), "x,y"),
    ("no such mask", ("--mask", "gone.png"), "nothing there"),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED, ids=[row[0] for row in REFUSED])
def test_bad_prompts_are_refused(segment: Segment, name: str, options: tuple[str, ...], message: str) -> None:
    document = segment(*options)
    assert document["exit"] == 2
    assert message in document["error"]["message"]


def test_masks_of_another_size_or_beside_two_boxes_are_refused(segment: Segment, rough: str, tmp_path: Path) -> None:
    assert "one box" in segment(*BOX, *BOX, "--mask", rough)["error"]["message"]
    Image.fromarray(np.zeros((60, 79), np.uint8)).save(tmp_path / "narrow.png")
    assert "80x60, as large as IMAGE, got 79x60" in segment("--mask", str(tmp_path / "narrow.png"))["error"]["message"]


def test_a_bundle_without_mask_prompts_says_so(
    capsys: pytest.CaptureFixture[str], picture: str, rough: str, bundle_path: Path, tiny_bundle_path: Path
) -> None:
    if bundle_path == tiny_bundle_path:
        pytest.skip("no embedded bundle in this checkout")
    assert main(["segment", picture, "--mask", rough, "--bundle", str(bundle_path)]) == 2
    assert "takes no masks in" in capsys.readouterr().err

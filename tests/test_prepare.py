"""`segzero train prepare`: every published layout to rows, a real photo, what is left out, runs that are stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from published_sets import (
    MASK_SCHEMA,
    TRAIN_SCHEMA,
    annotation,
    coco_tables,
    encoded,
    mask_row,
    picture,
    rectangle,
    ref,
    shape,
    train_row,
    write_coco,
    write_parquet,
    write_reasonseg,
    write_refs,
)

from segzero_rt.bundle import Bundle
from segzero_rt.cli import make_parser
from segzero_rt.errors import DatasetError
from segzero_rt.image import load_image
from segzero_rt.mask import decode_rle
from segzero_rt.readers.coco import CocoInstances, CocoReader
from training.command import TRAIN
from training.mask_points import box_and_points
from training.prepare import Segmenter
from training.rewards import check_seg_zero_row, check_vision_reasoner_row
from training.rows import TrainingRow, read_rows

PHOTO = Path(__file__).resolve().parents[1] / ".." / "shared" / "assets" / "images" / "coco_000000039769"
NEEDS_PHOTO = pytest.mark.skipif(not PHOTO.exists(), reason=f"the COCO photo is not at {PHOTO}")


def run(source: Path, out: Path, *options: object) -> dict[str, TrainingRow]:
    arguments = make_parser(TRAIN).parse_args(["prepare", str(source), "--out", str(out), *map(str, options)])
    assert TRAIN.execute(arguments) == 0
    return {row.row_id: row for row in read_rows(out)}


# --- a mask's box and points


@pytest.mark.parametrize(
    ("name", "pixels", "box", "points"),
    [
        ("one pixel", [(3, 2)], (3, 2, 4, 3), ((3, 2), (3, 2))),
        ("in the corner", [(0, 0)], (0, 0, 1, 1), ((0, 0), (0, 0))),
        ("two pixels", [(3, 2), (5, 2)], (3, 2, 6, 3), ((3, 2), (5, 2))),
    ],
)
def test_box_and_points_of_few_pixels(name: str, pixels: list[tuple[int, int]], box: Any, points: Any) -> None:
    mask = np.zeros((6, 9), bool)
    for x, y in pixels:
        mask[y, x] = True
    assert box_and_points(mask) == (box, points)


def test_points_are_centres_of_inscribed_circles() -> None:
    mask = np.zeros((60, 100), np.uint8)
    cv2.circle(mask, (25, 30), 20, 1, -1)
    cv2.circle(mask, (75, 30), 12, 1, -1)
    cv2.rectangle(mask, (25, 28), (75, 32), 1, -1)
    box, (first, second) = box_and_points(mask.astype(bool))
    assert box == (5, 10, 88, 51)
    assert np.hypot(first[0] - 25, first[1] - 30) <= 1.5
    assert np.hypot(second[0] - 75, second[1] - 30) <= 1.5
    with pytest.raises(ValueError, match="at least one pixel"):
        box_and_points(np.zeros((3, 3), bool))


def test_the_edge_of_the_picture_bounds_an_object() -> None:
    mask = np.zeros((40, 80), bool)
    mask[:, :20] = True
    _, ((x, y), _) = box_and_points(mask)
    assert abs(x - 9.5) <= 1 and 8 <= y <= 31, "not at the picture's edge, however deep the object goes on beyond it"


# --- each layout


def test_coco(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, images = write_coco(tmp_path, coco_tables())
    rows = run(path, tmp_path / "rows", "--images", images, "--input-side", 120)
    assert list(rows) == ["139-17", "139-75"]
    cat = rows["139-17"]
    assert (cat.question, cat.kind, cat.input_size_hw) == ("cat", "name", (120, 120))
    assert cat.objects[0].box_xyxy == (10.0, 30.0, 50.0, 90.0), "60 x 40 pixels to 120 x 120"
    for x, y in cat.objects[0].points_xy:
        assert 10 < x < 50 and 30 < y < 90
    assert decode_rle(cat.objects[0].mask_rle or {}).sum() == 400
    assert cat.image.read_bytes() == (images / "000000000139.png").read_bytes()
    assert len(rows["139-75"].objects) == 2
    check_vision_reasoner_row(rows["139-75"])
    check_seg_zero_row(cat)
    said = capsys.readouterr().out
    assert "2 rows on 1 pictures" in said and "left out: 1 questions for a crowd" in said
    assert sorted(one.name for one in tmp_path.iterdir()) == ["instances.json", "pictures", "rows"]
    assert sorted(one.name for one in (tmp_path / "rows").iterdir()) == ["images", "rows.jsonl"]


def test_refcoco(tmp_path: Path) -> None:
    path, images = write_coco(tmp_path, coco_tables())
    refs = write_refs(
        tmp_path / "refs(unc).p", [ref(1, 139, 11, "grey cat", "the animal"), ref(2, 139, [-1], "the dog")]
    )
    rows = run(path, tmp_path / "rows", "--images", images, "--refs", refs, "--all-sentences")
    assert [(row.question, len(row.objects), row.kind) for row in rows.values()] == [
        ("grey cat", 1, "name"), ("the animal", 1, "name"), ("the dog", 0, "none"),
    ]  # fmt: skip


def test_reasonseg(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "train"
    write_reasonseg(source, "a", [shape("target", (10, 10), (40, 10), (40, 30), (10, 30))], text=("x", "y"))
    write_reasonseg(source, "b", [])
    with pytest.raises(DatasetError, match=r"b.json: .*leave it out"):
        run(source, tmp_path / "rows")
    rows = run(source, tmp_path / "rows", "--leave-out", "b", "--json")
    assert [row.question for row in rows.values()] == ["x", "y"]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {
        "num_pictures": 1, "num_rows": 2, "num_without_object": 0, "left_out": {},
    }  # fmt: skip
    assert len(list((tmp_path / "rows" / "images").iterdir())) == 1
    assert rows["a-0"].extra == {"is_sentence": False}


def test_authors_training_parquet(tmp_path: Path) -> None:
    single, several = (
        "<box>(10,20),(50,60)</box><points>(30,40),(20,50)</points>",
        '[{"bbox_2d": [10, 20, 50, 60], "point_2d": [30, 40]}, {"bbox_2d": [0, 0, 84, 84], "point_2d": [5, 5]}]',
    )
    path = write_parquet(
        tmp_path / "train.parquet",
        [train_row("a", single), train_row("a", several, problem="mugs", seed=1), train_row("c", "[]", seed=1)],
        TRAIN_SCHEMA,
    )
    rows = run(path, tmp_path / "rows", "--input-side", 84)
    assert list(rows) == ["a", "a#2", "c"], "an id that is given twice gets a number"
    assert rows["a"].objects[0].box_xyxy == (10, 20, 50, 60)
    assert rows["a"].objects[0].points_xy == ((30, 40), (20, 50))
    assert len(rows["a#2"].objects) == 2 and rows["c"].objects == ()
    assert rows["a#2"].image == rows["c"].image, "equal pictures are stored once"
    check_seg_zero_row(rows["a"])
    scaled = run(path, tmp_path / "scaled", "--input-side", 168)
    assert scaled["a"].objects[0].box_xyxy == (20, 40, 100, 120)


def test_authors_mask_parquet(tmp_path: Path) -> None:
    mask = np.zeros((40, 60), bool)
    mask[10:20, 30:45] = True
    path = write_parquet(tmp_path / "test.parquet", [mask_row("what barks", mask)], MASK_SCHEMA)
    (row,) = run(path, tmp_path / "rows").values()
    assert row.objects[0].box_xyxy == (420, 210, 630, 420)
    np.testing.assert_array_equal(decode_rle(row.objects[0].mask_rle or {}), mask)


# --- the real photo


def photo_set(folder: Path) -> tuple[Path, Path]:
    names = {17: "cat", 63: "couch", 65: "bed", 75: "remote"}
    tables = {
        "images": [{"id": 39769, "file_name": "000000039769.png", "height": 480, "width": 640}],
        "categories": [{"id": number, "name": name} for number, name in names.items()],
        "annotations": json.loads((PHOTO / "coco_annotations.txt").read_text()),
    }
    path = folder / "instances_val2017.json"
    path.write_text(json.dumps(tables))
    return path, PHOTO


@NEEDS_PHOTO
def test_real_photo(tmp_path: Path) -> None:
    path, images = photo_set(tmp_path)
    rows = run(path, tmp_path / "rows", "--images", images)
    assert {row.question: len(row.objects) for row in rows.values()} == {"cat": 2, "couch": 1, "bed": 1, "remote": 2}
    annotated = json.loads((PHOTO / "coco_annotations.txt").read_text())
    scale_xy = np.array([840 / 640, 840 / 480] * 2)
    left_over = [np.array([x, y, x + width, y + height]) for x, y, width, height in (one["bbox"] for one in annotated)]
    for one in (one for row in rows.values() for one in row.objects):
        box = np.array(one.box_xyxy) / scale_xy
        nearest = min(range(len(left_over)), key=lambda index: np.abs(left_over[index] - box).max())
        np.testing.assert_allclose(box, left_over.pop(nearest), atol=1.5)
        mask = decode_rle(one.mask_rle or {})
        for x, y in np.array(one.points_xy) / scale_xy[:2]:
            assert mask[int(y), int(x)], "points lie in the object"
    assert not left_over
    for row in rows.values():
        check_vision_reasoner_row(row)


@NEEDS_PHOTO
def test_only_what_the_segmenter_can_draw_is_kept(
    tmp_path: Path, bundle_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, images = photo_set(tmp_path)
    segmenter = Segmenter(Bundle.open(bundle_path), threads=1)
    ((_, load),) = CocoReader(CocoInstances(path, images), max_objects=10).pictures()
    embedding = segmenter.look(load_image(images / "000000039769.png"))
    worst = {one.text: min(segmenter.ious(embedding, one.masks)) for one in load().questions}
    threshold = round(float(np.median(list(worst.values()))), 3)
    options = ("--images", images, "--bundle", bundle_path, "--threads", 1)
    rows = run(path, tmp_path / "rows", *options, "--min-iou", threshold)
    kept = {row.question for row in rows.values()}
    assert kept == {name for name, iou in worst.items() if iou >= threshold} and 0 < len(kept) < 4
    assert f"left out: {4 - len(kept)} questions for the segmenter below IoU {threshold}" in capsys.readouterr().out
    with pytest.raises(DatasetError, match=r"at least one row.*the segmenter below IoU 0\.999"):
        run(path, tmp_path / "none", *options, "--min-iou", 0.999)
    assert not (tmp_path / "none").exists()


def test_boxes_alone_cannot_be_compared_with_the_segmenter(tmp_path: Path, bundle_path: Path) -> None:
    row = train_row("a", '[{"bbox_2d": [1, 2, 9, 9], "point_2d": [4, 4]}]')
    path = write_parquet(tmp_path / "a.parquet", [row], TRAIN_SCHEMA)
    with pytest.raises(DatasetError, match=r"row 0: expected masks to compare"):
        run(path, tmp_path / "rows", "--min-iou", 0.6, "--bundle", bundle_path, "--threads", 1)


# --- what is left out, and what is wrong


def test_small_objects_take_their_question_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    thin, gone = rectangle(5, 5, 6, 30), rectangle(5.1, 5.1, 5.2, 5.2)
    annotations = [
        annotation(1, 139, 17, [rectangle(5, 5, 30, 30)]), annotation(2, 139, 75, [thin]),
        annotation(3, 139, 90, [gone]),
    ]  # fmt: skip
    path, images = write_coco(tmp_path, coco_tables(annotations=annotations))
    rows = run(path, tmp_path / "rows", "--images", images, "--input-side", 60)
    assert [row.question for row in rows.values()] == ["cat"]
    assert "left out: 2 questions for an object below 2 px" in capsys.readouterr().out
    rows = run(path, tmp_path / "more", "--images", images, "--input-side", 60, "--min-side", 1)
    assert [row.question for row in rows.values()] == ["cat", "remote"]


def test_pictures_that_a_tag_would_turn_stay_as_they_are_annotated(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer turns it by a quarter
    path, images = write_coco(tmp_path, coco_tables())
    data = encoded(picture(40, 60), "JPEG", exif=exif, quality=95)
    (images / "000000000139.png").write_bytes(data)
    rows = run(path, tmp_path / "rows", "--images", images)
    with Image.open(rows["139-17"].image) as stored, Image.open(images / "000000000139.png") as original:
        assert stored.size == (60, 40) and stored.getexif().get(0x0112, 1) == 1
        np.testing.assert_array_equal(np.asarray(stored), np.asarray(original.convert("RGB")))


@pytest.mark.parametrize(
    ("name", "solution", "message"),
    [
        ("box outside", "<box>(10,20),(85,60)</box><points>(30,40),(20,50)</points>", "inside 84 x 84"),
        ("point outside", "<box>(10,20),(50,60)</box><points>(30,40),(20,90)</points>", "inside 84 x 84"),
        ("negative box", "<box>(-1,20),(50,60)</box><points>(30,40),(20,50)</points>", "inside 84 x 84"),
    ],
)
def test_coordinates_outside_the_picture_stop(tmp_path: Path, name: str, solution: str, message: str) -> None:
    good = train_row("a", "<box>(10,20),(50,60)</box><points>(30,40),(20,50)</points>")
    path = write_parquet(tmp_path / "a.parquet", [good, {**good, "solution": solution}], TRAIN_SCHEMA)
    with pytest.raises(DatasetError, match=message) as caught:
        run(path, tmp_path / "rows")
    assert str(caught.value).startswith(f"{path}: row 1: ")
    assert not (tmp_path / "rows").exists()


@pytest.mark.parametrize("data", [b"", b"no picture", encoded(picture(84, 84))[:2000]], ids=["empty", "text", "cut"])
def test_pictures_that_do_not_load_stop(tmp_path: Path, data: bytes) -> None:
    row = train_row("a", "[]")
    path = write_parquet(tmp_path / "a.parquet", [row, {**row, "image": {"bytes": data, "path": None}}], TRAIN_SCHEMA)
    with pytest.raises(DatasetError, match=r"row 1: picture cannot be read"):
        run(path, tmp_path / "rows")


def test_masks_of_another_size_stop(tmp_path: Path) -> None:
    row = mask_row("x", np.ones((40, 60), bool))
    row["image"] = {"bytes": encoded(picture(41, 60)), "path": None}
    path = write_parquet(tmp_path / "a.parquet", [row], MASK_SCHEMA)
    with pytest.raises(DatasetError, match=r"row 0: expected masks of the picture's size \(41, 60\)"):
        run(path, tmp_path / "rows")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("no pictures", (), "--images"),
        ("pictures nowhere", ("--images", "nowhere"), "--images"),
        ("split without refs", ("--images", ".", "--split", "val"), "--split belongs to --refs"),
        ("refs missing", ("--images", ".", "--refs", "nowhere.p"), "nowhere.p: cannot be read"),
        ("absent with refs", ("--images", ".", "--refs", "x.p", "--absent", "1"), "--absent belongs"),
        ("seed without absent", ("--images", ".", "--seed", "0"), "--seed belongs to --absent"),
        ("seed with refs", ("--images", ".", "--refs", "x.p", "--seed", "3"), "--seed belongs to instances without"),
        ("objects with refs", ("--images", ".", "--refs", "x.p", "--max-objects", "3"), "--max-objects belongs to"),
        ("unknown picture left out", ("--images", "pictures", "--leave-out", "7"), "leave out, it has no 7"),
        ("iou of 1", ("--images", "pictures", "--min-iou", "1"), "IoU from 0 to below 1"),
    ],
)
def test_options_that_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: tuple[str, ...], message: str
) -> None:
    path, _ = write_coco(tmp_path, coco_tables())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetError, match=message):
        run(path, tmp_path / "rows", *options)


@pytest.mark.parametrize("name", ["nothing there", "a text file", "an empty folder", "images for a folder"])
def test_sources_of_no_known_layout(tmp_path: Path, name: str) -> None:
    source = tmp_path / "source"
    options: tuple[object, ...] = ()
    if name == "a text file":
        source.write_text("x")
    elif name != "nothing there":
        source.mkdir()
        options = ("--images", tmp_path) if name == "images for a folder" else ()
    with pytest.raises(DatasetError, match=r"expected|belongs"):
        run(source, tmp_path / "rows", *options)


# --- stopped runs


def ten_rows(folder: Path, bad: int | None = None) -> Path:
    rows = [train_row(f"r{n}", "[]" if n != bad else "?", seed=n, problem=f"question {n}") for n in range(10)]
    return write_parquet(folder / "ten.parquet", rows, TRAIN_SCHEMA)


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    path = ten_rows(tmp_path, bad=6)
    out = tmp_path / "rows"
    with pytest.raises(DatasetError, match="row 6"):
        run(path, out)
    assert not out.exists()
    journal = tmp_path / ".rows.partial" / "done.jsonl"
    assert len(journal.read_text().splitlines()) == 6
    with journal.open("a") as file:
        file.write('{"key": "ten.parquet#6", "ro')  # killed while it wrote
    stored = sorted((tmp_path / ".rows.partial" / "rows" / "images").iterdir())
    times = [one.stat().st_mtime_ns for one in stored]
    resumed = run(path, out, "--leave-out", "ten.parquet#6")
    assert [row.row_id for row in resumed.values()] == [f"r{n}" for n in range(10) if n != 6]
    kept = [out / "images" / one.name for one in stored]
    assert [one.stat().st_mtime_ns for one in kept] == times, "what was done is not done again"
    assert not (tmp_path / ".rows.partial").exists()
    straight = run(path, tmp_path / "straight", "--leave-out", "ten.parquet#6")
    assert (tmp_path / "straight" / "rows.jsonl").read_bytes() == (out / "rows.jsonl").read_bytes()
    assert len(straight) == 9


def test_a_stopped_run_is_not_mixed_with_another(tmp_path: Path) -> None:
    path = ten_rows(tmp_path, bad=6)
    with pytest.raises(DatasetError, match="row 6"):
        run(path, tmp_path / "rows")
    with pytest.raises(DatasetError, match=r"stopped run with input_size_hw \[840, 840\]"):
        run(path, tmp_path / "rows", "--input-side", 280)
    assert len(run(path, tmp_path / "rows", "--limit", 4)) == 4, "fewer rows of the same are fine"


def test_refuses_to_overwrite(tmp_path: Path) -> None:
    path = ten_rows(tmp_path)
    run(path, tmp_path / "rows", "--limit", 2)
    before = (tmp_path / "rows" / "rows.jsonl").read_bytes()
    with pytest.raises(DatasetError, match="exists already"):
        run(path, tmp_path / "rows")
    assert (tmp_path / "rows" / "rows.jsonl").read_bytes() == before

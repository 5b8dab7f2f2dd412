"""Readers of published annotations: what they give, and which file and entry they name when something is wrong."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published_sets import (
    MASK_SCHEMA,
    annotation,
    coco_tables,
    encoded,
    load_all,
    mask_row,
    picture,
    rectangle,
    ref,
    shape,
    write_coco,
    write_parquet,
    write_reasonseg,
    write_refs,
)

from segzero_rt.errors import DatasetError, MissingPackageError
from segzero_rt.mask import decode_rle, encode_rle
from segzero_rt.readers.coco import CocoInstances, CocoReader
from segzero_rt.readers.parquet import ParquetReader
from segzero_rt.readers.reasonseg import ReasonSegReader
from segzero_rt.readers.refcoco import RefCocoReader
from segzero_rt.readers.source import SourcePicture

# --- ReasonSeg

TARGET = shape("target", (10, 10), (40, 10), (40, 30), (10, 30))


def test_reasonseg_polygons(tmp_path: Path) -> None:
    hole = shape("ignore", (20, 15), (30, 15), (30, 20), (20, 20))
    core = shape("target", (24, 16), (26, 16), (26, 18), (24, 18))
    # written from small to large: the order of the file does not count, the sizes do
    shapes = [core, hole, TARGET, shape("flag", (0, 0), (59, 0), (59, 39))]
    write_reasonseg(tmp_path, "a", shapes, text=("what to drink from", "the vessel"), is_sentence=True)
    write_reasonseg(tmp_path, "b", [TARGET, shape("Target", (50, 5), (55, 5), (55, 9))], text="one wording")
    pictures = load_all(ReasonSegReader(tmp_path))
    first, second = pictures["a"], pictures["b"]
    assert [one.row_id for one in first.questions] == ["a-0", "a-1"]
    assert [one.text for one in first.questions] == ["what to drink from", "the vessel"]
    (mask,) = first.questions[0].masks
    expected = np.zeros((40, 60), bool)
    expected[10:31, 10:41] = True  # the outline belongs to the polygon
    expected[15:21, 20:31] = False
    expected[16:19, 24:27] = True
    np.testing.assert_array_equal(mask, expected)
    ignored = decode_rle(first.questions[0].extra["ignore_rle"])
    assert ignored.sum() == 11 * 6 - 9 and not (ignored & mask).any()
    assert first.questions[0].extra["is_sentence"] is True
    assert "ignore_rle" not in second.questions[0].extra
    assert second.questions[0].text == "one wording" and second.questions[0].masks[0][6, 54]


def test_reasonseg_file_of_windows_1252(tmp_path: Path) -> None:
    file = write_reasonseg(tmp_path, "a", [TARGET], text=("the man’s hat",))
    file.write_bytes(file.read_text().encode().decode("unicode_escape").encode("cp1252"))
    assert load_all(ReasonSegReader(tmp_path))["a"].questions[0].text == "the man’s hat"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("no text", {"text": None}, "`text`"),
        ("empty text", {"text": []}, "`text`"),
        ("text a number", {"text": ["x", 7]}, "`text`"),
        ("no shapes", {"shapes": None}, "`shapes`"),
        ("no target", {"shapes": []}, "`target` polygon"),
        ("ignored alone", {"shapes": [shape("ignore", (1, 1), (9, 1), (9, 9))]}, "`target` polygon"),
        ("shape without label", {"shapes": [{"points": [[1, 2]]}]}, r"shapes\[0\].*`label`"),
        ("shape without points", {"shapes": [{"label": "target"}]}, r"shapes\[0\].*`points`"),
        ("no points", {"shapes": [shape("target")]}, r"shapes\[0\].*pairs"),
        ("point of three", {"shapes": [{"label": "target", "points": [[1, 2, 3]]}]}, r"shapes\[0\].*pairs"),
        (
            "point outside",
            {"shapes": [TARGET, shape("target", (10, 10), (62, 10), (9, 9))]},
            r"shapes\[1\].*inside 60 x 40",
        ),
        ("endless point", {"shapes": [shape("target", (10, 10), (float("inf"), 10), (9, 9))]}, "inside 60 x 40"),
        ("is_sentence missing", {"is_sentence": "no"}, "`is_sentence`"),
    ],
)
def test_reasonseg_names_the_file(tmp_path: Path, name: str, changes: dict[str, Any], message: str) -> None:
    write_reasonseg(tmp_path, "a", [TARGET])
    file = write_reasonseg(tmp_path, "b", **{"shapes": [TARGET], **changes})
    with pytest.raises(DatasetError, match=message) as caught:
        load_all(ReasonSegReader(tmp_path))
    assert str(caught.value).startswith(str(file))


def test_reasonseg_for_evaluation_takes_the_first_wording_and_pictures_without_a_target(tmp_path: Path) -> None:
    write_reasonseg(tmp_path, "a", [TARGET], text=("first", "second"))
    write_reasonseg(tmp_path, "b", [shape("ignore", (1, 1), (9, 1), (9, 9))], text=("", "x"))
    pictures = load_all(ReasonSegReader(tmp_path, all_sentences=False, without_target=True))
    assert [one.text for one in pictures["a"].questions] == ["first"]
    assert [(one.text, one.masks) for one in pictures["b"].questions] == [("", ())]
    assert decode_rle(pictures["b"].questions[0].extra["ignore_rle"]).any()


def test_reasonseg_pictures_must_be_there(tmp_path: Path) -> None:
    write_reasonseg(tmp_path, "a", [TARGET])
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(DatasetError, match=r"a.json: picture .*a.jpg does not exist"):
        load_all(ReasonSegReader(tmp_path))
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(DatasetError, match=r"a.json: cannot read picture"):
        load_all(ReasonSegReader(tmp_path))
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(DatasetError, match=r"a.json: expected JSON"):
        load_all(ReasonSegReader(tmp_path))
    (tmp_path / "a.json").unlink()
    with pytest.raises(DatasetError, match="found no JSON file"):
        ReasonSegReader(tmp_path)


# --- COCO-style instances


def read_coco(folder: Path, *, max_objects: int = 10, num_absent: int = 0, **changes: Any) -> dict[str, SourcePicture]:
    instances = CocoInstances(*write_coco(folder, coco_tables(**changes)))
    return load_all(CocoReader(instances, max_objects=max_objects, num_absent=num_absent))


def test_coco_questions_are_categories(tmp_path: Path) -> None:
    pictures = read_coco(tmp_path)
    assert list(pictures) == ["139"]
    cat, remotes = pictures["139"].questions
    assert (cat.row_id, cat.text, cat.kind) == ("139-17", "cat", "name")
    assert (remotes.row_id, remotes.text, remotes.kind) == ("139-75", "remote", "several")
    expected = np.zeros((40, 60), bool)
    expected[10:30, 5:25] = True
    np.testing.assert_array_equal(cat.masks[0], expected)
    assert [int(mask.sum()) for mask in remotes.masks] == [20 * 6, 2 * 4 * 16]
    assert pictures["139"].left_out == {"a crowd": 1}
    assert read_coco(tmp_path / "fewer", max_objects=1)["139"].left_out == {"a crowd": 1, "more than 1 objects": 1}


def test_coco_absent_categories(tmp_path: Path) -> None:
    pictures = read_coco(tmp_path, num_absent=2)
    absent = {key: [one.text for one in loaded.questions if one.kind == "none"] for key, loaded in pictures.items()}
    assert absent["139"] == ["toothbrush"], "people are there, in a crowd"
    assert len(set(absent["285"])) == 2, "a picture without annotations can be asked for what it has not"
    again = read_coco(tmp_path / "again", num_absent=2)
    assert absent == {
        key: [one.text for one in loaded.questions if one.kind == "none"] for key, loaded in again.items()
    }
    negatives = [{**coco_tables()["images"][0], "neg_category_ids": [90, 17]}]
    lvis = read_coco(tmp_path / "lvis", num_absent=5, images=negatives)
    assert [one.text for one in lvis["139"].questions if one.kind == "none"] == ["toothbrush"]


def test_lvis_names_pictures_by_their_address(tmp_path: Path) -> None:
    path, images = write_coco(tmp_path, coco_tables())
    tables = json.loads(path.read_text())
    for entry in tables["images"]:
        entry["coco_url"] = f"http://images.cocodataset.org/pictures/{entry.pop('file_name')}"
    path.write_text(json.dumps(tables))
    pictures = load_all(CocoReader(CocoInstances(path, tmp_path), max_objects=9))
    assert pictures["139"].image == images / "000000000139.png"


@pytest.mark.parametrize(
    "segmentation",
    [
        [rectangle(5, 10, 25, 30)],
        {"counts": [5 * 40 + 10] + [20, 20] * 19 + [20, 60 * 40 - 24 * 40 - 30], "size": [40, 60]},
        encode_rle(np.pad(np.ones((20, 20), bool), ((10, 10), (5, 35)))),
    ],
    ids=["polygon", "run lengths", "compressed run lengths"],
)
def test_coco_segmentations(tmp_path: Path, segmentation: Any) -> None:
    pictures = read_coco(tmp_path, annotations=[annotation(1, 139, 17, segmentation)])
    np.testing.assert_array_equal(
        pictures["139"].questions[0].masks[0], np.pad(np.ones((20, 20), bool), ((10, 10), (5, 35)))
    )


def cat(**changes: Any) -> list[dict[str, Any]]:
    good = annotation(11, 139, 17, [rectangle(5, 10, 25, 30)])
    return [good, {**good, "id": 12, **changes}]


IMAGE = {"id": 139, "height": 40, "width": 60}
RUNS_PAST_MEMORY = {"counts": [10**18], "size": [10**9, 10**9]}
RUNS_PAST_64_BITS = {"counts": [2**62, 2**62, 2**62, 2**62 + 2400], "size": [40, 60]}
"""They add up to 40 x 60 in 64 bits."""
BAD_TABLES: list[tuple[str, dict[str, Any], str]] = [
    ("no images", {"images": None}, "`images`"),
    ("no categories", {"categories": 5}, "`categories`"),
    ("no annotations", {"annotations": {}}, "`annotations`"),
    ("image without id", {"images": [{"file_name": "a.png", "height": 4, "width": 6}]}, r"images\[0\].*`id`"),
    ("image without name", {"images": [{"id": 1, "height": 4, "width": 6}]}, r"images\[0\].*`file_name`"),
    ("image without size", {"images": [{"id": 1, "file_name": "a.png"}]}, r"images\[0\].*`height`"),
    ("category without name", {"categories": [{"id": 1}]}, r"categories\[0\].*`name`"),
    ("annotation a number", {"annotations": [5]}, r"annotations\[0\]"),
    ("unknown image", {"annotations": cat(image_id=5)}, r"annotations\[1\].*`image_id` 5"),
    ("unknown category", {"annotations": cat(category_id=5)}, r"annotations\[1\].*`category_id` 5"),
    ("id a boolean", {"annotations": cat(id=True)}, r"annotations\[1\].*`id`"),
    ("no segmentation", {"annotations": cat(segmentation=None)}, "annotation 12.*`segmentation`"),
    ("no polygon", {"annotations": cat(segmentation=[])}, "annotation 12.*at least one polygon"),
    ("polygon of two points", {"annotations": cat(segmentation=[[1, 2, 3, 4]])}, "annotation 12.*polygons"),
    ("polygon of text", {"annotations": cat(segmentation=[["1"] * 6])}, "annotation 12.*polygons"),
    ("odd polygon", {"annotations": cat(segmentation=[[1, 2, 3, 4, 5, 6, 7]])}, "annotation 12.*polygons"),
    ("polygon outside", {"annotations": cat(segmentation=[rectangle(5, 10, 62, 30)])}, "annotation 12.*inside"),
    ("endless polygon", {"annotations": cat(segmentation=[rectangle(5, 10, float("inf"), 30)])}, "12.*inside"),
    ("box outside", {"annotations": cat(bbox=[50, 10, 20, 20])}, "annotation 12: `bbox`.*inside the picture"),
    ("box of three", {"annotations": cat(bbox=[50, 10, 20])}, "annotation 12.*`bbox`"),
    ("mask of another size", {"annotations": cat(segmentation=encode_rle(np.ones((6, 4), bool)))}, r"12.*\(40, 60\)"),
    ("run lengths of text", {"annotations": cat(segmentation={"counts": ["x"], "size": [40, 60]})}, "12.*decode"),
    ("run lengths without size", {"annotations": cat(segmentation={"counts": [5]})}, "annotation 12.*`size`"),
    ("run lengths too short", {"annotations": cat(segmentation={"counts": [5], "size": [40, 60]})}, "12.*decode"),
    ("run lengths beyond memory", {"annotations": cat(segmentation=RUNS_PAST_MEMORY)}, r"12.*\(40, 60\)"),
    ("run lengths that overflow", {"annotations": cat(segmentation=RUNS_PAST_64_BITS)}, "12.*decode"),
    ("picture beyond memory", {"images": [{**IMAGE, "file_name": "a.png", "height": 10**9}]}, r"images\[0\].*pixels"),
    ("picture of no height", {"images": [{**IMAGE, "file_name": "a.png", "height": 0}]}, r"images\[0\].*pixels"),
    ("compressed nonsense", {"annotations": cat(segmentation={"counts": "é", "size": [40, 60]})}, "12.*decode"),
    ("picture twice", {"images": [{**IMAGE, "file_name": "a.png"}] * 2}, r"images\[1\].*139 stood earlier"),
    ("category twice", {"categories": [*coco_tables()["categories"], {"id": 17, "name": "dog"}]}, "17 stood earlier"),
    ("annotation twice", {"annotations": cat(id=11)}, r"annotations\[1\].*11 stood earlier"),
    ("picture missing", {"images": [{**IMAGE, "file_name": "sub/a.png"}]}, "139.*does not exist"),
    ("picture outside", {"images": [{**IMAGE, "file_name": "../a.png"}]}, "139.*lies outside"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), [row[1:] for row in BAD_TABLES], ids=[row[0] for row in BAD_TABLES])
def test_coco_names_the_entry(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    tables = {**changes}
    if "images" in changes and "annotations" not in changes and isinstance(changes["images"], list):
        tables["annotations"] = cat() if changes["images"][0].get("id") == 139 else []
    with pytest.raises(DatasetError, match=message) as caught:
        read_coco(tmp_path, **tables)
    assert str(caught.value).startswith(str(tmp_path / "instances.json"))


# --- referring expressions

REFS = [
    ref(1, 139, 11, "grey cat", "animal on the left"),
    ref(2, 139, 12, "upper remote"),
    ref(3, 139, 13, "lower remote", split="val"),
]


def read_refs(folder: Path, refs: list[Any], **options: Any) -> dict[str, SourcePicture]:
    instances = CocoInstances(*write_coco(folder, coco_tables()))
    return load_all(RefCocoReader(instances, write_refs(folder / "refs(unc).p", refs), **{"split": "train", **options}))


def test_refcoco(tmp_path: Path) -> None:
    (loaded,) = read_refs(tmp_path / "first", REFS).values()
    assert [(one.row_id, one.text) for one in loaded.questions] == [("ref1-0", "grey cat"), ("ref2-0", "upper remote")]
    assert [int(one.masks[0].sum()) for one in loaded.questions] == [400, 120]
    (loaded,) = read_refs(tmp_path / "all", REFS, all_sentences=True).values()
    assert [one.text for one in loaded.questions] == ["grey cat", "animal on the left", "upper remote"]
    (loaded,) = read_refs(tmp_path / "val", REFS, split="val").values()
    assert [one.text for one in loaded.questions] == ["lower remote"]


def test_grefcoco_has_several_and_none(tmp_path: Path) -> None:
    refs = [
        ref(1, 139, [12, 13], "both remotes"),
        ref(2, 139, [-1], "the dog", no_target=True),
        ref(3, 139, [11], "cat"),
    ]
    (loaded,) = read_refs(tmp_path, refs).values()
    assert [(one.text, len(one.masks), one.kind) for one in loaded.questions] == [
        ("both remotes", 2, "several"), ("the dog", 0, "none"), ("cat", 1, "name"),
    ]  # fmt: skip


def test_two_refs_can_be_asked_for_together(tmp_path: Path) -> None:
    refs = [
        ref(1, 139, 11, "grey cat", "animal"), ref(2, 139, 12, "upper remote"),
        ref(3, 139, [13], "the long one"), ref(4, 139, [13, 12], "remotes"),  # share an object: not joined
        ref(5, 139, 11, "cat"),
    ]  # fmt: skip
    (loaded,) = read_refs(tmp_path, refs, join_refs=True).values()
    assert len(loaded.questions) == 6
    joined = loaded.questions[-1]
    assert (joined.row_id, joined.text, joined.kind) == ("ref1-0+ref2-0", "'grey cat' and 'upper remote'", "several")
    assert [int(mask.sum()) for mask in joined.masks] == [400, 120]


def test_refs_as_json(tmp_path: Path) -> None:
    instances = CocoInstances(*write_coco(tmp_path, coco_tables()))
    path = tmp_path / "grefs(unc).json"
    path.write_text(json.dumps(REFS))
    assert len(load_all(RefCocoReader(instances, path, split="train"))) == 1


@pytest.mark.parametrize(
    ("name", "refs", "message"),
    [
        ("no list", [], "list of refs"),
        ("no split", [{**REFS[0], "split": None}], r"refs\[0\].*`split`"),
        ("another split", [REFS[2]], "expected refs of split 'train', it has val"),
        ("unknown image", [REFS[0], {**REFS[1], "image_id": 5}], r"refs\[1\].*`image_id` 5"),
        ("unknown annotation", [ref(1, 139, 99, "x")], r"refs\[0\].*annotation 99"),
        ("annotation of another picture", [ref(1, 285, 11, "x")], r"refs\[0\].*annotation 11"),
        ("annotation a text", [ref(1, 139, ["11"], "x")], r"refs\[0\].*`ann_id`"),
        ("no sentence", [ref(1, 139, 11)], r"refs\[0\].*at least one sentence"),
        ("sentence without text", [{**REFS[0], "sentences": [{"raw": "x"}]}], r"refs\[0\]: sentences\[0\].*`sent`"),
        ("no id", [{**REFS[0], "ref_id": "1"}], r"refs\[0\].*`ref_id`"),
    ],
)
def test_refcoco_names_the_ref(tmp_path: Path, name: str, refs: list[Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message) as caught:
        read_refs(tmp_path, refs)
    assert str(caught.value).startswith(str(tmp_path / "refs(unc).p"))


class _Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (self.target,))


def test_refs_that_would_run_something_are_refused(tmp_path: Path) -> None:
    instances = CocoInstances(*write_coco(tmp_path, coco_tables()))
    path = tmp_path / "refs(unc).p"
    path.write_bytes(pickle.dumps([_Attack(tmp_path / "touched")]))
    with pytest.raises(DatasetError, match="plain data"):
        RefCocoReader(instances, path, split="train")
    assert not (tmp_path / "touched").exists()
    for damaged in (b"", b"\x80\x02]q\x00(", b"no pickle at all"):
        path.write_bytes(damaged)
        with pytest.raises(DatasetError, match=r"refs\(unc\)\.p"):
            RefCocoReader(instances, path, split="train")


def test_pictures_of_these_sets_are_png_files() -> None:
    assert encoded(picture(4, 6))[:4] == b"\x89PNG"


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", [mask_row("x", np.ones((4, 6), bool))], MASK_SCHEMA)
    for name in ("pyarrow", "pyarrow.parquet", "pycocotools", "pycocotools.mask"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackageError, match=r"pyarrow.*pip install 'segzero-rt\[eval\]'"):
        ParquetReader(path)
    with pytest.raises(MissingPackageError, match=r"pycocotools.*pip install 'segzero-rt\[eval\]'"):
        read_coco(tmp_path / "coco")

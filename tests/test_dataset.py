"""A dataset folder reads back as written, appears whole or not at all, and names the line of whatever is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from segzero_rt.dataset import DatasetWriter, LabeledObject, group_by_image, read_dataset
from segzero_rt.errors import DatasetError
from segzero_rt.mask import encode_rle

MASK = np.array(
    [
        [0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 1, 0, 0],
    ],
    dtype=bool,
)
PICTURE = np.arange(3 * 5 * 3, dtype=np.uint8).reshape(3, 5, 3)


def write_folder(folder: Path) -> Path:
    with DatasetWriter(folder) as writer:
        name = writer.add_image(PICTURE)
        writer.add_question(
            name,
            "the “größte” mug\u2028?",  # U+2028 ends a line for str.splitlines, not in JSONL
            kind="name",
            objects=[LabeledObject.from_mask("mug", MASK)],
            extra={"split": "test", "scene_objects": [{"kind": "mug", "where": "upper left"}]},
        )
        other = writer.add_image(PICTURE[:1, :1], name="single_pixel")
        writer.add_question(other, "a pixel", kind="none")
        mug = LabeledObject.from_mask("mug", MASK)
        writer.add_question(name, "something to drink from", kind="function", objects=[mug])
    return folder


def test_reads_back_what_was_written(tmp_path: Path) -> None:
    samples = read_dataset(write_folder(tmp_path / "set"))
    assert [sample.kind for sample in samples] == ["name", "none", "function"]
    first, single, _ = samples
    assert first.text == "the “größte” mug\u2028?"
    assert first.extra == {"split": "test", "scene_objects": [{"kind": "mug", "where": "upper left"}]}
    assert first.objects[0].box_xyxy == (1.0, 1.0, 3.0, 3.0)
    assert first.boxes_xyxy.dtype == np.float32
    np.testing.assert_array_equal(first.masks, MASK[None])
    np.testing.assert_array_equal(first.image_rgb, PICTURE)
    assert single.size_hw == (1, 1) and single.masks.shape == (0, 1, 1) and single.boxes_xyxy.shape == (0, 4)
    assert [len(group) for group in group_by_image(samples)] == [2, 1]
    assert len(read_dataset(tmp_path / "set", limit=2)) == 2


def test_is_byte_identical_when_written_twice(tmp_path: Path) -> None:
    first, second = write_folder(tmp_path / "a"), write_folder(tmp_path / "b")
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(files) == 3
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)


def test_refuses_to_overwrite(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set")
    before = (folder / "annotations.jsonl").read_bytes()
    with pytest.raises(DatasetError, match="exists already"):
        DatasetWriter(folder)
    assert (folder / "annotations.jsonl").read_bytes() == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(DatasetError, match="exists already"):
        DatasetWriter(tmp_path / "file")


@pytest.mark.parametrize("name", ["file/set", "file/deep/set", "n" * 300], ids=["below a file", "deep", "long"])
def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DatasetError, match=r"no folder can be made|too long"), DatasetWriter(tmp_path / name):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_leaves_nothing_behind_when_stopped_half_way(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), DatasetWriter(tmp_path / "set") as writer:
        writer.add_question(writer.add_image(PICTURE), "the mug", kind="name")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DatasetError, match="at least one question"), DatasetWriter(tmp_path / "set"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "add", "message"),
    [
        ("float picture", lambda w: w.add_image(PICTURE.astype(np.float32)), "uint8"),
        ("grey picture", lambda w: w.add_image(PICTURE[..., 0]), r"\[H, W, 3\]"),
        ("empty picture", lambda w: w.add_image(PICTURE[:0]), r"\[H, W, 3\]"),
        ("name with folder", lambda w: w.add_image(PICTURE, name="../out"), "without folders"),
        ("picture not added", lambda w: w.add_question("images/9.png", "x", kind="name"), "was not added"),
        ("empty question", lambda w: w.add_question(w.add_image(PICTURE), " ", kind="name"), "`text`"),
        ("half a surrogate", lambda w: w.add_question(w.add_image(PICTURE), "\ud800", kind="name"), "surrogate"),
        (
            "mask of another size",
            lambda w: w.add_question(
                w.add_image(PICTURE[:2, :2]), "x", kind="name", objects=[LabeledObject.from_mask("mug", MASK)]
            ),
            "box_xyxy",
        ),
        (
            "reserved extra key",
            lambda w: w.add_question(w.add_image(PICTURE), "x", kind="name", extra={"objects": []}),
            "extra keys",
        ),
        ("empty mask", lambda w: LabeledObject.from_mask("mug", np.zeros((3, 5), dtype=bool)), "at least one pixel"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)
def test_writer_refuses(tmp_path: Path, name: str, add: Callable[[DatasetWriter], Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message), DatasetWriter(tmp_path / "set") as writer:
        add(writer)
    assert list(tmp_path.iterdir()) == []


GOOD_OBJECT = {"label": "mug", "box_xyxy": [1, 1, 3, 3], "mask_rle": encode_rle(MASK)}
GOOD_ROW = {"image": "images/0.png", "text": "the mug", "kind": "name", "objects": [GOOD_OBJECT]}


def row(**changes: Any) -> bytes:
    return json.dumps({**GOOD_ROW, **changes}).encode()


def with_object(**changes: Any) -> bytes:
    return row(objects=[GOOD_OBJECT, {**GOOD_OBJECT, **changes}])


BAD_LINES = [
    ("truncated", row()[:-5], "JSON object per line"),
    ("not utf-8", b'{"image": "\xff"}', "JSON object per line"),
    ("a list", b"[]", "expected a JSON object"),
    ("not a number", row(extra=1).replace(b"[1, 1, 3, 3]", b"[NaN, 1, 3, 3]"), "NaN"),
    ("deep nesting", b"[" * 100_000, "JSON object per line"),
    ("endless integer", row().replace(b"[1, 1,", b"[1, " + b"1" * 5000 + b","), "JSON object per line"),
    ("no image", row(image=None), "`image`"),
    ("image is a number", row(image=7), "`image`"),
    ("image with NUL", row(image="images/\0.png"), "`image`"),
    ("image missing", row(image="images/1.png"), "does not exist"),
    ("image leaves the folder", row(image="../secret.png"), "outside the dataset folder"),
    ("absolute image", row(image="/etc/hostname"), "outside the dataset folder"),
    ("image is no picture", row(image="images/broken.png"), "cannot read picture"),
    ("text missing", row(text=None), "`text`"),
    ("text empty", row(text=""), "`text`"),
    ("kind is a list", row(kind=[]), "`kind`"),
    ("objects missing", row(objects=None), "`objects`"),
    ("object is a string", row(objects=["mug"]), r"objects\[0\]"),
    ("label missing", with_object(label=None), r"objects\[1\]"),
    ("swapped corners", with_object(box_xyxy=[3, 1, 1, 3]), "box_xyxy"),
    ("box without area", with_object(box_xyxy=[1, 1, 1, 3]), "box_xyxy"),
    ("box outside", with_object(box_xyxy=[1, 1, 3, 4]), "box_xyxy"),
    ("box negative", with_object(box_xyxy=[-1, 1, 3, 3]), "box_xyxy"),
    ("box of three", with_object(box_xyxy=[1, 1, 3]), "box_xyxy"),
    ("box of booleans", with_object(box_xyxy=[False, False, True, True]), "box_xyxy"),
    ("box huge", with_object(box_xyxy=[1, 1, 10**400, 3]), "box_xyxy"),
    ("box infinite", with_object(box_xyxy=[1, 1, 777, 3]).replace(b"777", b"1e999"), "box_xyxy"),
    ("mask missing", with_object(mask_rle=None), "mask_rle"),
    ("mask of another size", with_object(mask_rle=encode_rle(np.ones((5, 3), dtype=bool))), "mask_rle"),
    ("mask size a number", with_object(mask_rle={"size": 15, "counts": ""}), "mask_rle"),
    ("mask counts a number", with_object(mask_rle={"size": [3, 5], "counts": 5}), "does not decode"),
    ("mask counts short", with_object(mask_rle={"size": [3, 5], "counts": "1"}), "does not decode"),
    ("mask empty", with_object(mask_rle=encode_rle(np.zeros((3, 5), dtype=bool))), "no pixel"),
]


@pytest.mark.parametrize(("line", "message"), [case[1:] for case in BAD_LINES], ids=[case[0] for case in BAD_LINES])
def test_names_file_and_line_of_what_is_wrong(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "secret.png").write_bytes(b"")
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    Image.fromarray(PICTURE).save(folder / "images/0.png")
    (folder / "images/broken.png").write_bytes(b"\x89PNG\r\n")
    (folder / "annotations.jsonl").write_bytes(row() + b"\n\n" + line + b"\n" + row() + b"\n")
    with pytest.raises(DatasetError, match=message) as caught:
        read_dataset(folder)
    assert str(caught.value).startswith(f"{folder / 'annotations.jsonl'}:3: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", ["no folder", "no annotations", "empty annotations", "limit 0"])
def test_refuses_a_folder_without_questions(tmp_path: Path, case: str) -> None:
    folder = tmp_path / "set"
    if case != "no folder":
        folder.mkdir()
    if case == "empty annotations":
        (folder / "annotations.jsonl").write_text("\n\n")
    with pytest.raises(DatasetError):
        read_dataset(folder, limit=0 if case == "limit 0" else None)


def test_a_picture_cut_short_is_an_error_when_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set")
    whole = (folder / "images/000000.png").read_bytes()
    (folder / "images/000000.png").write_bytes(whole[:50])
    with pytest.raises(DatasetError, match=r"annotations.jsonl:1: cannot decode"):
        _ = read_dataset(folder)[0].image_rgb

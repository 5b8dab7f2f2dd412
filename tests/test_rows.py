"""A folder of training rows reads back as written, appears whole or not at all, and names the line of what is wrong."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from segzero_rt.errors import DatasetError
from segzero_rt.mask import encode_rle
from training.rows import COLUMNS, PROMPT, RowObject, TrainingRow, read_rows, write_rows

MASK = np.array([[0, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 0, 0]], dtype=bool)
PICTURE = np.arange(3 * 5 * 3, dtype=np.uint8).reshape(3, 5, 3)
MUG = RowObject(box_xyxy=(10.0, 20.0, 30.5, 60.0), points_xy=((15.0, 40.0), (25.0, 30.0)), mask_rle=encode_rle(MASK))


def make_rows(folder: Path) -> list[TrainingRow]:
    folder.mkdir(exist_ok=True)
    paths = [folder / "first.png", folder / "second.jpg"]
    for path in paths:
        Image.fromarray(PICTURE).save(path)
    size_hw = (60, 50)
    return [
        TrainingRow(
            row_id="a", question="the “größte” mug\u2028?", image=paths[0], input_size_hw=size_hw, objects=(MUG,)
        ),
        TrainingRow(
            row_id="b", question="a pear", image=paths[1], input_size_hw=size_hw, objects=(), kind="none",
            extra={"thinking": "There is none.", "split": "train"},
        ),
        TrainingRow(
            row_id="c", question="two things", image=paths[0], input_size_hw=(60, 70), kind="several",
            objects=(MUG, RowObject(box_xyxy=(0.0, 0.0, 70.0, 60.0))),
        ),
    ]  # fmt: skip


def test_reads_back_what_was_written(tmp_path: Path) -> None:
    written = make_rows(tmp_path / "pictures")
    write_rows(tmp_path / "set", written)
    read = read_rows(tmp_path / "set")
    assert [path.name for path in sorted((tmp_path / "set" / "images").iterdir())] == ["000000.png", "000001.jpg"]
    for before, after in zip(written, read, strict=True):
        assert after.image.read_bytes() == before.image.read_bytes()
        for name in ("row_id", "question", "input_size_hw", "objects", "kind", "extra"):
            assert getattr(after, name) == getattr(before, name), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures", "set"]
    assert len(read_rows(tmp_path / "set", limit=2)) == 2


def test_columns_are_those_that_rewards_get(tmp_path: Path) -> None:
    row = make_rows(tmp_path)[0]
    columns = row.to_columns()
    assert {PROMPT, *columns} == set(COLUMNS)
    assert [RowObject.from_json(entry) for entry in columns["objects"]] == [MUG]
    assert json.loads(json.dumps(columns)) == columns


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("no row", lambda rows: [], "at least one row"),
        ("an id twice", lambda rows: [rows[0], rows[0]], "ids are unique"),
        ("reserved extra key", lambda rows: [_changed(rows[0], extra={"objects": 1})], "extra keys"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)
def test_leaves_nothing_behind_when_it_cannot_write(
    tmp_path: Path, name: str, rows: Callable[[list[TrainingRow]], list[TrainingRow]], message: str
) -> None:
    made = rows(make_rows(tmp_path / "pictures"))
    with pytest.raises(DatasetError, match=message):
        write_rows(tmp_path / "set", made)
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


def test_refuses_to_overwrite(tmp_path: Path) -> None:
    rows = make_rows(tmp_path / "pictures")
    write_rows(tmp_path / "set", rows)
    with pytest.raises(DatasetError, match="exists already"):
        write_rows(tmp_path / "set", rows[:1])
    assert len(read_rows(tmp_path / "set")) == 3


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("empty id", {"row_id": " "}, "`row_id`"),
        ("empty question", {"question": ""}, "`question`"),
        ("size of zero", {"input_size_hw": (0, 5)}, "`input_size_hw`"),
        ("size of floats", {"input_size_hw": (60.0, 50)}, "`input_size_hw`"),
        ("box outside", {"objects": (RowObject(box_xyxy=(0.0, 0.0, 50.5, 60.0)),)}, r"objects\[0\].*inside 50 x 60"),
        ("box above", {"objects": (RowObject(box_xyxy=(0.0, -1.0, 50.0, 60.0)),)}, "inside 50 x 60"),
        ("point outside", {"objects": (RowObject(box_xyxy=(0, 0, 9, 9), points_xy=((1, 61),)),)}, "inside 50 x 60"),
    ],
)
def test_a_row_refuses(tmp_path: Path, name: str, changes: dict[str, Any], message: str) -> None:
    row = make_rows(tmp_path)[0]
    with pytest.raises(DatasetError, match=message):
        _changed(row, **changes)


@pytest.mark.parametrize(
    ("name", "box_xyxy", "points_xy"),
    [
        ("empty box", (5, 5, 5, 9), ()),
        ("swapped corners", (9, 5, 5, 9), ()),
        ("box of three", (1, 2, 3), ()),
        ("box with NaN", (1, 2, 3, float("nan")), ()),
        ("endless box", (1, 2, float("inf"), 4), ()),
        ("point of three", (1, 2, 3, 4), ((1, 2, 3),)),
        ("point with NaN", (1, 2, 3, 4), ((1, float("nan")),)),
    ],
)
def test_an_object_refuses(name: str, box_xyxy: Any, points_xy: Any) -> None:
    with pytest.raises(DatasetError):
        RowObject(box_xyxy=box_xyxy, points_xy=points_xy)


GOOD_OBJECT = MUG.to_json()
GOOD = {
    "row_id": "x", "question": "the mug", "image": "images/0.png", "input_size_hw": [60, 50], "kind": "name",
    "objects": [GOOD_OBJECT],
}  # fmt: skip


def line(**changes: Any) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


def with_object(**changes: Any) -> bytes:
    return line(objects=[GOOD_OBJECT, {**GOOD_OBJECT, **changes}])


def without(key: str) -> bytes:
    return json.dumps({name: value for name, value in GOOD.items() if name != key}).encode()


BAD_LINES = [
    ("cut off", line()[:-5], "JSON object per line"),
    ("not utf-8", b'{"row_id": "\xff"}', "JSON object per line"),
    ("a list", b"[]", "expected a JSON object"),
    ("deep nesting", b"[" * 100_000, "JSON object per line"),
    ("NaN", line().replace(b"20.0", b"NaN"), "NaN"),
    *((f"no {key}", without(key), key) for key in ("row_id", "question", "image", "input_size_hw", "objects")),
    ("id twice", line(row_id="first"), "first.*stands at .*:1"),
    ("id a number", line(row_id=7), "`row_id`"),
    ("question a list", line(question=[]), "`question`"),
    ("kind a number", line(kind=7), "`kind`"),
    ("size a number", line(input_size_hw=840), "`input_size_hw`"),
    ("size of three", line(input_size_hw=[1, 2, 3]), "`input_size_hw`"),
    ("size of text", line(input_size_hw=["60", "50"]), "`input_size_hw`"),
    ("image a number", line(image=7), "`image`"),
    ("image with NUL", line(image="images/\0.png"), "`image`"),
    ("image missing", line(image="images/9.png"), "does not exist"),
    ("image leaves the folder", line(image="../secret.png"), "outside the folder"),
    ("image no picture", line(image="images/broken.png"), "cannot decode"),
    ("image cut short", line(image="images/cut.png"), "cannot decode"),
    ("objects null", line(objects=None), "`objects`"),
    ("object a string", line(objects=["mug"]), r"objects\[0\]"),
    ("box missing", line(objects=[{"points_xy": []}]), r"objects\[0\]"),
    ("points missing", line(objects=[{"box_xyxy": [1, 2, 3, 4]}]), r"objects\[0\]"),
    ("unknown key", with_object(mask="…"), r"objects\[1\].*mask"),
    ("box of booleans", with_object(box_xyxy=[False, False, True, True]), "box_xyxy"),
    ("box huge", with_object(box_xyxy=[1, 1, 10**400, 3]), "box_xyxy"),
    ("box outside", with_object(box_xyxy=[1, 1, 51, 3]), r"objects\[1\].*inside 50 x 60"),
    ("points a number", with_object(points_xy=3), "points_xy"),
    ("point outside", with_object(points_xy=[[51, 3]]), "inside 50 x 60"),
    ("mask a string", with_object(mask_rle="x"), "mask_rle"),
    ("mask broken", with_object(mask_rle={"size": [3, 5], "counts": "1"}), r"objects\[1\].*does not decode"),
    ("mask of another size", with_object(mask_rle=encode_rle(np.ones((5, 3), dtype=bool))), "picture's size"),
    ("mask empty", with_object(mask_rle=encode_rle(np.zeros((3, 5), dtype=bool))), "no pixel"),
]


@pytest.mark.parametrize(("text", "message"), [case[1:] for case in BAD_LINES], ids=[case[0] for case in BAD_LINES])
def test_names_file_and_line_of_what_is_wrong(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "secret.png").write_bytes(b"")
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    picture = Image.fromarray(PICTURE)
    picture.save(folder / "images/0.png")
    (folder / "images/broken.png").write_bytes(b"\x89PNG\r\n")
    (folder / "images/cut.png").write_bytes((folder / "images/0.png").read_bytes()[:50])
    first, last = line(row_id="first"), line(row_id="last")
    (folder / "rows.jsonl").write_bytes(b"\n".join((first, b"", text, last)) + b"\n")
    with pytest.raises(DatasetError, match=message) as caught:
        read_rows(folder)
    assert str(caught.value).startswith(f"{folder / 'rows.jsonl'}:3: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", ["no folder", "no rows", "empty rows", "limit 0"])
def test_refuses_a_folder_without_rows(tmp_path: Path, case: str) -> None:
    folder = tmp_path / "set"
    if case != "no folder":
        folder.mkdir()
    if case == "empty rows":
        (folder / "rows.jsonl").write_text("\n\n")
    with pytest.raises(DatasetError):
        read_rows(folder, limit=0 if case == "limit 0" else None)


def _changed(row: TrainingRow, **changes: Any) -> TrainingRow:
    return dataclasses.replace(row, **changes)

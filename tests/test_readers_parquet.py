"""The authors' parquet files: what their readers give, and which file and row they name when something is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from published_sets import (
    MASK_SCHEMA,
    TRAIN_SCHEMA,
    load_all,
    mask_row,
    train_row,
    write_parquet,
)

from segzero_rt.errors import DatasetError
from segzero_rt.readers.parquet import ParquetReader, parse_solution
from training.rows import RowObject

SEG_ZERO_SOLUTION = "<box>(10,20),(50,60)</box><points>(30,40),(20,50)</points>"
LIST_SOLUTION = '[{"bbox_2d": [10, 20, 50, 60], "point_2d": [30, 40]}, {"bbox_2d": [1, 2, 9, 9], "point_2d": [5, 5]}]'
MUG = RowObject(box_xyxy=(10, 20, 50, 60), points_xy=((30, 40), (20, 50)))


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("seg-zero", SEG_ZERO_SOLUTION, (MUG,)),
        ("seg-zero with blanks", "<box>( 10, 20 ) , (50 ,60) </box>\n <points>(30,40),(20,50)</points>", (MUG,)),
        (
            "list",
            LIST_SOLUTION,
            (
                RowObject(box_xyxy=(10, 20, 50, 60), points_xy=((30, 40),)),
                RowObject(box_xyxy=(1, 2, 9, 9), points_xy=((5, 5),)),
            ),
        ),
        ("empty list", " []", ()),
    ],
)
def test_solutions_of_both_families(name: str, text: str, expected: tuple[RowObject, ...]) -> None:
    assert parse_solution(text, "here") == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("empty", "", "<box>"),
        ("box alone", "<box>(10,20),(50,60)</box>", "<box>"),
        ("one point", "<box>(10,20),(50,60)</box><points>(30,40)</points>", "<box>"),
        ("fractions", "<box>(10.5,20),(50,60)</box><points>(30,40),(20,50)</points>", "<box>"),
        ("box without width", "<box>(50,20),(50,60)</box><points>(30,40),(20,50)</points>", "left < right"),
        ("broken JSON", "[{", "JSON"),
        ("an object", '{"bbox_2d": [1, 2, 3, 4]}', "<box>"),
        ("no point", '[{"bbox_2d": [1, 2, 3, 4]}]', r"solution\[0\].*point_2d"),
        ("box of three", '[{"bbox_2d": [1, 2, 3], "point_2d": [1, 2]}]', r"solution\[0\]"),
        ("text in a box", '[{"bbox_2d": ["1", 2, 3, 4], "point_2d": [1, 2]}]', r"solution\[0\]"),
        ("corners swapped", '[{"bbox_2d": [9, 2, 3, 4], "point_2d": [1, 2]}]', r"solution\[0\].*left < right"),
        ("item no object", "[7]", r"solution\[0\]"),
    ],
)
def test_solutions_that_are_none(name: str, text: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        parse_solution(text, "here")


def test_training_parquet(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    rows = [train_row(f"refcocog_{n}", SEG_ZERO_SOLUTION, seed=n, problem=f"mug {n}") for n in range(11)]
    write_parquet(folder / "train-00000-of-00002.parquet", rows, TRAIN_SCHEMA)
    write_parquet(folder / "train-00001-of-00002.parquet", [train_row("multi", LIST_SOLUTION)], TRAIN_SCHEMA)
    pictures = load_all(ParquetReader(folder))
    assert len(pictures) == 12
    tenth = pictures["train-00000-of-00002.parquet#10"]
    assert tenth.questions[0].row_id == "refcocog_10" and tenth.questions[0].text == "mug 10"
    assert tenth.questions[0].objects == (MUG,) and tenth.questions[0].masks == ()
    assert tenth.image == rows[10]["image"]["bytes"]
    assert len(pictures["train-00001-of-00002.parquet#0"].questions[0].objects) == 2


def test_plain_bytes_are_a_picture_column_too(tmp_path: Path) -> None:
    schema = pyarrow.schema([(f.name, pyarrow.binary() if f.name == "image" else f.type) for f in TRAIN_SCHEMA])
    row = train_row("a", SEG_ZERO_SOLUTION)
    row["image"] = row["image"]["bytes"]
    (loaded,) = load_all(ParquetReader(write_parquet(tmp_path / "a.parquet", [row], schema))).values()
    assert loaded.image == row["image"]


def test_mask_parquet(tmp_path: Path) -> None:
    mask = np.zeros((40, 60), bool)
    mask[10:20, 30:50] = True
    rows = [mask_row("what barks", mask, ann_id="1"), mask_row("what meows", ~mask, ann_id="2")]
    pictures = load_all(ParquetReader(write_parquet(tmp_path / "test.parquet", rows, MASK_SCHEMA)))
    first, second = (one.questions[0] for one in pictures.values())
    assert (first.row_id, first.text, second.row_id) == ("7-1", "what barks", "7-2")
    np.testing.assert_array_equal(first.masks[0], mask)
    np.testing.assert_array_equal(second.masks[0], ~mask)


def test_mask_parquet_of_refcoco_has_a_box_besides(tmp_path: Path) -> None:
    schema = MASK_SCHEMA.append(pyarrow.field("bbox", pyarrow.list_(pyarrow.float64())))
    row = {**mask_row("left man", np.ones((4, 6), bool)), "bbox": [0.0, 0.0, 6.0, 4.0]}
    (loaded,) = load_all(ParquetReader(write_parquet(tmp_path / "testA.parquet", [row], schema))).values()
    assert loaded.questions[0].masks[0].all()


GOOD_TRAIN, GOOD_MASK = train_row("a", SEG_ZERO_SOLUTION), mask_row("x", np.ones((4, 6), bool))


@pytest.mark.parametrize(
    ("name", "schema", "changes", "message"),
    [
        ("no id", TRAIN_SCHEMA, {"id": None}, "row 1: expected `id`"),
        ("no problem", TRAIN_SCHEMA, {"problem": " "}, "row 1: expected `problem`"),
        ("no solution", TRAIN_SCHEMA, {"solution": None}, "row 1: expected `solution`"),
        ("bad solution", TRAIN_SCHEMA, {"solution": "?"}, r"row 1 \(id a\): expected `solution`"),
        ("no picture", TRAIN_SCHEMA, {"image": None}, "row 1: expected `image`"),
        ("picture elsewhere", TRAIN_SCHEMA, {"image": {"bytes": None, "path": "a.png"}}, "row 1: expected `image`"),
        ("no text", MASK_SCHEMA, {"text": None}, "row 1: expected `text`"),
        ("id a blank", MASK_SCHEMA, {"ann_id": " "}, "row 1: expected `ann_id`"),
        ("no image id", MASK_SCHEMA, {"image_id": None}, "row 1: expected `image_id`"),
        ("no mask", MASK_SCHEMA, {"mask": None}, "row 1: expected `mask`"),
        ("empty mask", MASK_SCHEMA, {"mask": []}, "row 1: expected `mask`"),
        ("ragged mask", MASK_SCHEMA, {"mask": [[True], [True, False]]}, "row 1: expected `mask`"),
        ("mask with a hole", MASK_SCHEMA, {"mask": [[True, None]]}, "row 1: expected `mask`"),
    ],
)
def test_parquet_names_the_row(tmp_path: Path, name: str, schema: Any, changes: dict[str, Any], message: str) -> None:
    good = GOOD_TRAIN if schema is TRAIN_SCHEMA else GOOD_MASK
    path = write_parquet(tmp_path / "a.parquet", [good, {**good, **changes}], schema)
    with pytest.raises(DatasetError, match=message) as caught:
        load_all(ParquetReader(path))
    assert str(caught.value).startswith(f"{path}: row 1")


def test_parquet_of_another_layout_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"x": 1}], pyarrow.schema([("x", pyarrow.int64())]))
    with pytest.raises(DatasetError, match=r"expected the columns id, image, problem, solution or .*got x"):
        ParquetReader(path)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DatasetError, match=r"b.parquet: expected a parquet file"):
        ParquetReader(tmp_path / "b.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="found none"):
        ParquetReader(tmp_path / "empty")
    integers = pyarrow.schema(
        [(f.name, pyarrow.list_(pyarrow.int64()) if f.name == "mask" else f.type) for f in MASK_SCHEMA]
    )
    path = write_parquet(tmp_path / "c.parquet", [{**GOOD_MASK, "mask": [1, 0]}], integers)
    with pytest.raises(DatasetError, match="row 0: expected `mask` as rows of booleans"):
        load_all(ParquetReader(path))


@pytest.mark.parametrize("cut", [0.2, 0.5, 0.9])
def test_a_truncated_parquet_file_is_named(tmp_path: Path, cut: float) -> None:
    rows = [mask_row("x", np.ones((40, 60), bool), ann_id=str(n)) for n in range(20)]
    path = write_parquet(tmp_path / "a.parquet", rows, MASK_SCHEMA)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * cut)])
    with pytest.raises(DatasetError, match=r"a.parquet: expected a parquet file, it cannot be opened.*fetch it again"):
        load_all(ParquetReader(path))
    # the footer whole and a page damaged: told when its rows are asked for
    path.write_bytes(data[:4] + bytes(len(data) // 4) + data[4 + len(data) // 4 :])
    with pytest.raises(DatasetError, match=r"a.parquet.*row 0"):
        load_all(ParquetReader(path))

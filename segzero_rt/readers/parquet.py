"""The parquet files that Seg-Zero's and VisionReasoner's authors publish, pictures embedded.

Training sets (`refCOCOg_2k_840`, `refCOCOg_9k_840`, `VisionReasoner_multi_object_*_840`): columns `id`, `problem`,
`solution`, `image`, `img_height`, `img_width`; the picture is already 840 x 840, and `solution` is, in its pixels,

    <box>(10,100),(200,210)</box><points>(30,110),(35,180)</points>                             (Seg-Zero)
    [{"bbox_2d": [10, 100, 200, 210], "point_2d": [30, 110]}, …]                                (VisionReasoner)

Evaluation sets (`ReasonSeg_val`, `ReasonSeg_test`, `refcoco_testA` …): columns `image`, `text`, `mask` (rows of
booleans), `image_id`, `ann_id`, `img_height`, `img_width`. Their ReasonSeg masks count the pixels that LISA ignores as
the object's; the JSON files of ReasonSeg keep them apart (`reasonseg`).

A picture column is `{bytes, path}` as the `datasets` library writes it, or plain bytes.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from segzero_rt.errors import DatasetError
from segzero_rt.readers.row_object import RowObject
from segzero_rt.readers.source import Load, Mask, SourcePicture, SourceQuestion, optional_package, required

_TRAIN_COLUMNS = frozenset({"id", "problem", "solution", "image"})
_MASK_COLUMNS = frozenset({"image", "text", "mask", "image_id", "ann_id"})
_BATCH_ROWS = 8  # a row holds a picture; a batch must fit in memory beside its arrays

_PAIR = r"\(\s*(-?\d+)\s*,\s*(-?\d+)\s*\)"
_BOX = re.compile(rf"<box>\s*{_PAIR}\s*,\s*{_PAIR}\s*</box>")
_POINTS = re.compile(rf"<points>\s*{_PAIR}\s*,\s*{_PAIR}\s*</points>")


class ParquetReader:
    """One parquet file, or a folder of them in the order of their names. Which of the two layouts, its columns tell."""

    def __init__(self, path: Path) -> None:
        self.files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not self.files:
            raise DatasetError(f"{path}: expected a parquet file or a folder of them, found none")
        self._sizes = []
        for file in self.files:
            with _opened(file) as table:
                self._sizes.append(int(table.metadata.num_rows))
                columns = set(table.schema_arrow.names)
            if not (columns >= _TRAIN_COLUMNS or columns >= _MASK_COLUMNS):
                raise DatasetError(
                    f"{file}: expected the columns {', '.join(sorted(_TRAIN_COLUMNS))} or "
                    f"{', '.join(sorted(_MASK_COLUMNS))}, got {', '.join(sorted(columns))}"
                )

    def __len__(self) -> int:
        return sum(self._sizes)

    def pictures(self) -> Iterator[tuple[str, Load]]:
        for file in self.files:
            yield from self._rows_of(file)

    def _rows_of(self, file: Path) -> Iterator[tuple[str, Load]]:
        with _opened(file) as table:
            trains = set(table.schema_arrow.names) >= _TRAIN_COLUMNS
            columns = sorted(_TRAIN_COLUMNS if trains else _MASK_COLUMNS)
            number = 0
            for batch in _batches(table, columns, file):
                for position in range(batch.num_rows):
                    source = f"{file}: row {number}"
                    make = _training_picture if trains else _mask_picture
                    yield f"{file.name}#{number}", functools.partial(make, batch, position, source)
                    number += 1


def parse_solution(text: str, source: str) -> tuple[RowObject, ...]:
    """The objects of a `solution`, in either family's notation.

    Raises:
        DatasetError: neither notation, or a box that is none.
    """
    if text.lstrip().startswith("["):
        return _list_solution(text, source)
    box, points = _BOX.search(text), _POINTS.search(text)
    if box is None or points is None:
        raise DatasetError(
            f"{source}: expected `solution` as <box>(x1,y1),(x2,y2)</box><points>(x1,y1),(x2,y2)</points> or as a "
            f"JSON list, got {text!r:.80}"
        )
    left, top, right, bottom = (float(number) for number in box.groups())
    x1, y1, x2, y2 = (float(number) for number in points.groups())
    return (_row_object((left, top, right, bottom), ((x1, y1), (x2, y2)), source),)


def _list_solution(text: str, source: str) -> tuple[RowObject, ...]:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{source}: expected `solution` as JSON: {error}") from error
    objects = []
    for index, entry in enumerate(entries):
        where = f"{source}: solution[{index}]"
        box, point = required(entry, "bbox_2d", where, list), required(entry, "point_2d", where, list)
        numbers = [*box, *point]
        if len(box) != 4 or len(point) != 2 or any(type(number) not in (int, float) for number in numbers):
            raise DatasetError(f"{where}: expected a box of 4 and a point of 2 numbers, got {entry!r:.80}")
        left, top, right, bottom, x, y = (float(number) for number in numbers)
        objects.append(_row_object((left, top, right, bottom), ((x, y),), where))
    return tuple(objects)


def _row_object(
    box: tuple[float, float, float, float], points: tuple[tuple[float, float], ...], source: str
) -> RowObject:
    try:
        return RowObject(box_xyxy=box, points_xy=points)
    except DatasetError as error:
        raise DatasetError(f"{source}: {error}") from error


def _training_picture(batch: Any, position: int, source: str) -> SourcePicture:
    row_id = _text(batch, "id", position, source)
    question = SourceQuestion(
        row_id=row_id,
        text=_text(batch, "problem", position, source),
        objects=parse_solution(_text(batch, "solution", position, source), f"{source} (id {row_id})"),
    )
    return SourcePicture(source=source, image=_image_bytes(batch, position, source), questions=(question,))


def _mask_picture(batch: Any, position: int, source: str) -> SourcePicture:
    image_id, ann_id = (_text(batch, name, position, source) for name in ("image_id", "ann_id"))
    mask = _mask(batch, position, source)
    text = _text(batch, "text", position, source, blank=True)  # whose question is empty is for the caller to judge
    question = SourceQuestion(row_id=f"{image_id}-{ann_id}", text=text, masks=(mask,))
    image = _image_bytes(batch, position, source)
    return SourcePicture(source=source, image=image, questions=(question,), name=image_id)


def _text(batch: Any, name: str, position: int, source: str, *, blank: bool = False) -> str:
    value = batch.column(name)[position].as_py()
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not (blank or value.strip()):
        raise DatasetError(f"{source}: expected `{name}` as text, got {value!r:.80}")
    return value


def _image_bytes(batch: Any, position: int, source: str) -> bytes:
    value = batch.column("image")[position].as_py()
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise DatasetError(f"{source}: expected `image` with the picture's bytes inside the file, got {value!r:.80}")
    return data


def _mask(batch: Any, position: int, source: str) -> Mask:
    """Rows of booleans as bool [H, W]; through Arrow's own buffers, since a picture has a million of them."""
    scalar = batch.column("mask")[position]
    rows = scalar.values if scalar.is_valid else None
    pyarrow = _pyarrow()
    if rows is None or not pyarrow.types.is_list(rows.type) or not pyarrow.types.is_boolean(rows.type.value_type):
        raise DatasetError(f"{source}: expected `mask` as rows of booleans, got {scalar.type}")
    lengths = {len(row) for row in rows}
    flat = rows.flatten()
    if len(lengths) != 1 or flat.null_count:
        raise DatasetError(f"{source}: expected `mask` with rows of one length, got lengths {sorted(lengths)!r:.80}")
    return np.asarray(flat.to_numpy(zero_copy_only=False), np.bool_).reshape(len(rows), -1)


def _pyarrow() -> Any:
    optional_package("pyarrow.parquet", "parquet files")
    return optional_package("pyarrow", "parquet files")


def _opened(file: Path) -> Any:
    pyarrow = _pyarrow()
    try:
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise _damaged(file, "it cannot be opened", error) from error


def _batches(table: Any, columns: list[str], file: Path) -> Iterator[Any]:
    pyarrow = _pyarrow()
    batches = table.iter_batches(batch_size=_BATCH_ROWS, columns=columns)
    number = 0
    while True:
        try:
            batch = next(batches, None)
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise _damaged(file, f"it cannot be read from row {number} on", error) from error
        if batch is None:
            return
        number += batch.num_rows
        yield batch


def _damaged(file: Path, what: str, error: Exception) -> DatasetError:
    reason = " ".join(str(error).split())[:120]
    return DatasetError(f"{file}: expected a parquet file, {what}: {reason}; fetch it again")

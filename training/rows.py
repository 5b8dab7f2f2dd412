"""The training row that readers write, trainers read and rewards score: one question on one picture.

A folder of rows holds `images/` and `rows.jsonl`, one JSON object a line:

    {"row_id": "…", "question": "…", "image": "images/000000.jpg", "input_size_hw": [840, 840], "kind": "…",
     "objects": [{"box_xyxy": [l, t, r, b], "points_xy": [[x, y], …], "mask_rle": {"size": [H, W], "counts": "…"}}]}

Boxes and points are pixels of the picture that the policy sees (`input_size_hw`); the stored picture may have another
size, and masks have that one. No objects means that there is no such object. Further keys are kept as `extra`.

A folder is read in full before training begins: the first bad row stops with its file and line number, none is skipped.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segzero_rt.errors import DatasetError, ImageError
from segzero_rt.image import load_image
from segzero_rt.mask import decode_rle
from segzero_rt.readers.row_object import RowObject as RowObject

ROWS_NAME = "rows.jsonl"
IMAGES_NAME = "images"

PROMPT, IMAGE, OBJECTS = "prompt", "image", "objects"
INPUT_SIZE_HW, ROW_ID, KIND = "input_size_hw", "row_id", "kind"
IMAGE_PATH = "image_path"
"""Column of the stored picture's file, where a trainer's `image` holds the resized picture itself."""
COLUMNS = (PROMPT, IMAGE, OBJECTS, INPUT_SIZE_HW, ROW_ID, KIND)
"""Columns of the data set that TRL trains on. All but the prompt reach every reward as keyword lists."""

_QUESTION = "question"
_RESERVED_KEYS = frozenset({ROW_ID, _QUESTION, IMAGE, INPUT_SIZE_HW, OBJECTS, KIND})


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRow:
    """One question on one picture with its true objects.

    Raises:
        DatasetError: an empty id or question, a size that is none, or an object outside the picture.
    """

    row_id: str
    """Unique within a folder."""
    question: str
    image: Path
    """Picture file of any size; the policy sees it resized to `input_size_hw`."""
    input_size_hw: tuple[int, int]
    """Size of the picture that the policy sees; all boxes and points are its pixels."""
    objects: tuple[RowObject, ...]
    """Empty: there is no such object."""
    kind: str = ""
    """Kind of question, for reports and curricula."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Every further key of the line, as it stood (a templated thinking, a split)."""

    def __post_init__(self) -> None:
        for name, text in ((ROW_ID, self.row_id), (_QUESTION, self.question)):
            if not isinstance(text, str) or not text.strip():
                raise DatasetError(f"row {self.row_id!r:.60}: expected `{name}` as text, got {text!r:.80}")
        size = self.input_size_hw
        if len(size) != 2 or any(type(length) is not int or length < 1 for length in size):
            raise DatasetError(
                f"row {self.row_id!r:.60}: expected `input_size_hw` as [height, width], got {size!r:.60}"
            )
        for index, one in enumerate(self.objects):
            try:
                one.check_inside(size)
            except DatasetError as error:
                raise DatasetError(f"row {self.row_id!r:.60}: objects[{index}]: {error}") from error

    def to_columns(self) -> dict[str, Any]:
        """The row as TRL's columns, without the prompt, which is the trainer's; the picture as its path."""
        return {
            ROW_ID: self.row_id,
            IMAGE: str(self.image),
            INPUT_SIZE_HW: list(self.input_size_hw),
            OBJECTS: [one.to_json() for one in self.objects],
            KIND: self.kind,
        }

    def to_json(self, image: str) -> dict[str, Any]:
        """The row as one line of `rows.jsonl`; `image` is the picture's path inside the folder.

        Raises:
            DatasetError: an extra key has a meaning of its own.
        """
        if overlap := _RESERVED_KEYS & self.extra.keys():
            raise DatasetError(f"row {self.row_id!r:.60}: extra keys {sorted(overlap)} have a meaning; rename them")
        return {**self.to_columns(), _QUESTION: self.question, IMAGE: image, **self.extra}


def read_rows(folder: str | Path, *, check_pictures: bool = True, limit: int | None = None) -> list[TrainingRow]:
    """Reads and checks a folder of rows; `limit` keeps the first so many.

    Args:
        folder: with `rows.jsonl` and `images/`.
        check_pictures: decode each picture once, on all cores: a damaged one stops here instead of during training.
            Pictures and masks are compared in size then, too.
        limit: at least 1; the rows behind it are not looked at.

    Raises:
        DatasetError: the folder is missing or empty, or a row is wrong; the message begins with `file:line`.
    """
    path = Path(folder) / ROWS_NAME
    if limit is not None and limit < 1:
        raise DatasetError(f"expected a limit of at least 1 row, got {limit}")
    if not path.is_file():
        raise DatasetError(f"expected a folder of training rows with {ROWS_NAME} and {IMAGES_NAME}/, found no {path}")
    rows: dict[str, TrainingRow] = {}
    sources: dict[str, str] = {}
    with path.open("rb") as lines:  # bytes: a line that is not UTF-8 must name its number, and only \n ends a line
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            source = f"{path}:{number}"
            row = _read_line(path.parent, line, source)
            if row.row_id in rows:
                raise DatasetError(f"{source}: row_id {row.row_id!r:.60} stands at {sources[row.row_id]} already")
            rows[row.row_id], sources[row.row_id] = row, source
            if len(rows) == limit:
                break
    if not rows:
        raise DatasetError(f"{path}: expected at least one row, the file has none")
    if check_pictures:
        _check_pictures(list(rows.values()), sources)
    return list(rows.values())


def write_rows(folder: str | Path, rows: Iterable[TrainingRow]) -> None:
    """Writes a folder that appears whole or not at all; pictures are copied as they are, each file once.

    Raises:
        DatasetError: the folder exists and is not empty, two rows share an id, or there is no row.
    """
    folder = Path(folder)
    check_new_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the final rename stays within one file system.
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        (partial / IMAGES_NAME).mkdir()
        names: dict[Path, str] = {}
        lines: dict[str, str] = {}
        for row in rows:
            if row.row_id in lines:
                raise DatasetError(f"row_id {row.row_id!r:.60} was added already; ids are unique")
            if row.image not in names:
                names[row.image] = f"{IMAGES_NAME}/{len(names):06d}{row.image.suffix}"
                shutil.copyfile(row.image, partial / names[row.image])
            lines[row.row_id] = row_line(row, names[row.image])
        finish_folder(partial, folder, lines.values())
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new_folder(folder: Path) -> None:
    """Raises `DatasetError` unless `folder` can be made: nothing is there, or an empty folder."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise DatasetError(f"{folder} exists already; remove it or choose another folder")


def row_line(row: TrainingRow, image: str) -> str:
    """The row as one line of JSON without its line feed; `image` is the picture's path inside the folder."""
    return json.dumps(row.to_json(image), ensure_ascii=False, allow_nan=False)


def finish_folder(partial: Path, folder: Path, lines: Iterable[str]) -> None:
    """Writes `rows.jsonl` into `partial`, which has its pictures, and gives it its name.

    Raises:
        DatasetError: there is no line.
    """
    text = "".join(f"{line}\n" for line in lines)
    if not text:
        raise DatasetError(f"{folder}: expected at least one row, none was made")
    (partial / ROWS_NAME).write_text(text, encoding="utf-8")
    partial.chmod(0o755)  # mkdtemp makes a folder private to its owner; a data set is as readable as any folder
    partial.replace(folder)


def _read_line(folder: Path, line: bytes, source: str) -> TrainingRow:
    try:
        entry = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{source}: expected one JSON object per line: {error}") from error
    if not isinstance(entry, dict):
        raise DatasetError(f"{source}: expected a JSON object, got {type(entry).__name__}")
    if missing := [key for key in (ROW_ID, _QUESTION, IMAGE, INPUT_SIZE_HW, OBJECTS) if key not in entry]:
        raise DatasetError(f"{source}: expected the fields {', '.join(missing)}, which are missing")
    try:
        return TrainingRow(
            row_id=entry[ROW_ID],
            question=entry[_QUESTION],
            image=_image_path(folder, entry[IMAGE]),
            input_size_hw=_size_hw(entry[INPUT_SIZE_HW]),
            objects=_objects(entry[OBJECTS]),
            kind=_kind(entry.get(KIND, "")),
            extra={key: value for key, value in entry.items() if key not in _RESERVED_KEYS},
        )
    except DatasetError as error:
        raise DatasetError(f"{source}: {error}") from error


def _check_pictures(rows: Sequence[TrainingRow], sources: Mapping[str, str]) -> None:
    by_image: dict[Path, list[TrainingRow]] = {}
    for row in rows:
        by_image.setdefault(row.image, []).append(row)

    def check(of_one_picture: list[TrainingRow]) -> None:
        first = of_one_picture[0]
        try:
            size_hw = load_image(first.image).shape[:2]
        except ImageError as error:
            raise DatasetError(f"{sources[first.row_id]}: cannot decode {error}; replace it") from error
        for row in of_one_picture:
            for index, one in enumerate(row.objects):
                _check_mask(one.mask_rle, size_hw, f"{sources[row.row_id]}: objects[{index}]")

    with ThreadPoolExecutor() as threads:  # Pillow lets go of the interpreter while it decodes
        for _ in threads.map(check, by_image.values()):
            pass


def _check_mask(mask_rle: Mapping[str, Any] | None, size_hw: tuple[int, ...], where: str) -> None:
    if mask_rle is None:
        return
    try:
        mask = decode_rle(mask_rle)
    except ValueError as error:
        raise DatasetError(f"{where}: `mask_rle` does not decode: {error}") from error
    if mask.shape != size_hw:
        raise DatasetError(f"{where}: expected a mask of the picture's size {size_hw}, got {mask.shape}")
    if not mask.any():
        raise DatasetError(f"{where}: `mask_rle` has no pixel; an object that cannot be seen is left out")


def _image_path(folder: Path, image: object) -> Path:
    if not isinstance(image, str) or not image or "\0" in image:
        raise DatasetError(f"expected `{IMAGE}` as a path inside the folder, got {image!r:.80}")
    path = folder / image
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DatasetError(f"picture {image!r:.80} lies outside the folder; copy it into {IMAGES_NAME}/")
    if not path.is_file():
        raise DatasetError(f"picture {path} does not exist")
    return path


def _size_hw(value: object) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise DatasetError(f"expected `{INPUT_SIZE_HW}` as [height, width], got {value!r:.60}")
    return value[0], value[1]


def _objects(value: object) -> tuple[RowObject, ...]:
    if not isinstance(value, list):
        raise DatasetError(f"expected `{OBJECTS}` as a list (empty when there is none), got {value!r:.80}")
    objects = []
    for index, entry in enumerate(value):
        try:
            objects.append(RowObject.from_json(entry))
        except DatasetError as error:
            raise DatasetError(f"objects[{index}]: {error}") from error
    return tuple(objects)


def _kind(value: object) -> str:
    if not isinstance(value, str):
        raise DatasetError(f"expected `{KIND}` as text, got {value!r:.60}")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")

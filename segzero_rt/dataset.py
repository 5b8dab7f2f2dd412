"""Dataset folders: `images/*.png` and `annotations.jsonl`, one question per line.

A line is a JSON object with `image` (path inside the folder), `text` (the question), `kind` (query kind), `objects`
(list of `{label, box_xyxy, mask_rle}`, empty when there is no such object). Further keys are allowed and kept.
Questions on one picture are separate lines that name the same `image`.

A folder is read in full before it is used: one bad line stops with its file and line number, none is skipped.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segzero_rt.errors import DatasetError, ImageError
from segzero_rt.image import load_image
from segzero_rt.mask import decode_rle, encode_rle, tight_boxes

ANNOTATIONS_NAME = "annotations.jsonl"
IMAGES_NAME = "images"
_RESERVED_KEYS = frozenset({"image", "text", "kind", "objects"})


@dataclass(frozen=True, kw_only=True, slots=True)
class LabeledObject:
    """One object that a question asks for, in pixels of its picture."""

    label: str
    box_xyxy: tuple[float, float, float, float]
    """Left, top, right, bottom, half-open: a single pixel at (3, 5) is `(3, 5, 4, 6)`."""
    mask_rle: Mapping[str, Any]
    """COCO RLE: `{"size": [H, W], "counts": str}`."""

    @classmethod
    def from_mask(cls, label: str, mask: NDArray[np.bool_]) -> LabeledObject:
        """The object that covers `mask` (bool [H, W], at least one pixel); its box is the tight one.

        Raises:
            DatasetError: the mask is not a 2-D bool array or is empty.
        """
        if mask.dtype != np.bool_ or mask.ndim != 2 or not mask.any():
            raise DatasetError(
                f"expected a bool [H, W] mask with at least one pixel for {label!r}, got {mask.dtype} {mask.shape} "
                f"with {int(np.count_nonzero(mask))} pixels; leave objects out that cannot be seen"
            )
        left, top, right, bottom = (float(value) for value in tight_boxes(mask[None])[0])
        return cls(label=label, box_xyxy=(left, top, right, bottom), mask_rle=encode_rle(mask))

    @property
    def mask(self) -> NDArray[np.bool_]:
        """bool [H, W], decoded anew at each call."""
        return decode_rle(self.mask_rle)

    def to_json(self) -> dict[str, Any]:
        return {"label": self.label, "box_xyxy": list(self.box_xyxy), "mask_rle": dict(self.mask_rle)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One question on one picture, with its true objects."""

    image_path: Path
    text: str
    kind: str
    size_hw: tuple[int, int]
    """Of the picture, from its header."""
    objects: tuple[LabeledObject, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Every further key of the line, as it stood."""
    source: str = ""
    """`file:line`, for messages and records."""
    sample_id: str = ""
    """What the data set calls this question; not every set keeps them unique."""
    image_data: bytes | None = None
    """The picture's file where it stands inside another one (parquet); `image_path` then only names it."""
    as_stored: bool = False
    """Pixels are taken as they are stored, whatever the picture's EXIF tag says."""
    ignore_rle: Mapping[str, Any] | None = None
    """COCO RLE of pixels that count neither as found nor as missed."""

    @property
    def picture(self) -> tuple[Path, bytes | None]:
        """Equal for two samples exactly when their picture is the same."""
        return self.image_path, self.image_data

    @property
    def image_rgb(self) -> NDArray[np.uint8]:
        """uint8 [H, W, 3], read anew at each call.

        Raises:
            DatasetError: the file cannot be decoded.
        """
        try:
            source = self.image_path if self.image_data is None else self.image_data
            image_rgb = load_image(source, upright=not self.as_stored)
        except ImageError as error:
            raise DatasetError(f"{self.source}: cannot decode {error}; replace it") from error
        if image_rgb.shape[:2] != self.size_hw:  # turned by an EXIF tag, which the masks know nothing of
            raise DatasetError(
                f"{self.source}: expected {self.image_path} to be {self.size_hw} as its header says, got "
                f"{image_rgb.shape[:2]} once turned upright; store it upright"
            )
        return image_rgb

    @property
    def masks(self) -> NDArray[np.bool_]:
        """bool [N, H, W], one per object; N may be 0."""
        if not self.objects:
            return np.zeros((0, *self.size_hw), dtype=bool)
        return np.stack([one.mask for one in self.objects])

    @property
    def ignored(self) -> NDArray[np.bool_]:
        """bool [H, W]: pixels that count neither as found nor as missed."""
        return np.zeros(self.size_hw, np.bool_) if self.ignore_rle is None else decode_rle(self.ignore_rle)

    @property
    def boxes_xyxy(self) -> NDArray[np.float32]:
        """float32 [N, 4]."""
        return np.array([one.box_xyxy for one in self.objects], dtype=np.float32).reshape(-1, 4)


def read_dataset(folder: str | Path, *, limit: int | None = None) -> list[Sample]:
    """Reads and checks a dataset folder; `limit` keeps the first so many questions.

    Raises:
        DatasetError: the folder or its annotations are missing or empty, or a line is wrong; the message begins with
            `file:line` where there is one.
    """
    folder = Path(folder)
    if limit is not None and limit < 1:
        raise DatasetError(f"expected a limit of at least 1 sample, got {limit}")
    path = folder / ANNOTATIONS_NAME
    samples: list[Sample] = []
    try:
        if not path.is_file():
            raise DatasetError(f"expected a dataset folder with {ANNOTATIONS_NAME} and {IMAGES_NAME}/, found no {path}")
        # Bytes, not text: a line that is not UTF-8 must name its number, and only \n ends a line of JSONL.
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    samples.append(_read_line(folder, line, f"{path}:{number}"))
                if limit is not None and len(samples) == limit:
                    break
    except OSError as error:
        raise DatasetError(f"{str(path)[:200]}: cannot be read: {error.strerror}") from error
    if not samples:
        raise DatasetError(f"{path}: expected at least one question, the file has none")
    return samples


def group_by_image(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Groups of the samples that share a picture, in order of first appearance."""
    groups: dict[Path, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.image_path, []).append(sample)
    yield from groups.values()


class DatasetWriter:
    """Writes a dataset folder that appears whole or not at all.

    Everything goes to a temporary folder beside the target; leaving the `with` block without an error renames it.

        with DatasetWriter("out") as writer:
            name = writer.add_image(image_rgb)
            writer.add_question(name, "the red mug", kind="attribute", objects=[LabeledObject.from_mask("mug", mask)])

    Raises:
        DatasetError: the target exists and is not an empty folder, or what is added would not be readable again.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            taken = self.folder.exists() and not (self.folder.is_dir() and not any(self.folder.iterdir()))
        except OSError as error:
            raise DatasetError(f"{str(self.folder)[:200]}: cannot be read: {error.strerror}") from error
        if taken:
            raise DatasetError(f"{self.folder} exists already; remove it or choose another folder")
        self._sizes_hw: dict[str, tuple[int, int]] = {}
        self._lines: list[str] = []
        self._partial: Path | None = None

    def __enter__(self) -> DatasetWriter:
        parent = self.folder.parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            # Beside the target, so that the final rename stays within one file system.
            self._partial = Path(tempfile.mkdtemp(prefix=f".{self.folder.name}.", suffix=".partial", dir=parent))
        except OSError as error:
            raise DatasetError(f"{str(self.folder)[:200]}: no folder can be made there: {error.strerror}") from error
        (self._partial / IMAGES_NAME).mkdir()
        return self

    def add_image(self, image_rgb: NDArray[np.uint8], name: str | None = None) -> str:
        """Stores uint8 [H, W, 3] as PNG; returns its path for `add_question`. `name` has no folder and no suffix."""
        if image_rgb.dtype != np.uint8 or image_rgb.ndim != 3 or image_rgb.shape[2] != 3 or 0 in image_rgb.shape:
            raise DatasetError(f"expected a uint8 [H, W, 3] picture, got {image_rgb.dtype} {image_rgb.shape}")
        relative = f"{IMAGES_NAME}/{name if name is not None else f'{len(self._sizes_hw):06d}'}.png"
        if Path(relative).parent != Path(IMAGES_NAME) or relative in self._sizes_hw:
            raise DatasetError(f"expected a new picture name without folders, got {name!r}")
        Image.fromarray(image_rgb).save(self._open_folder() / relative, compress_level=4)
        self._sizes_hw[relative] = (image_rgb.shape[0], image_rgb.shape[1])
        return relative

    def add_question(
        self,
        image: str,
        text: str,
        *,
        kind: str,
        objects: Sequence[LabeledObject] = (),
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Adds one line; `image` is what `add_image` returned, `extra` any further JSON keys."""
        where = f"{self.folder / ANNOTATIONS_NAME}:{len(self._lines) + 1}"
        if image not in self._sizes_hw:
            raise DatasetError(f"{where}: picture {image!r} was not added")
        extra = dict(extra or {})
        if overlap := _RESERVED_KEYS & extra.keys():
            raise DatasetError(f"{where}: extra keys {sorted(overlap)} have a meaning of their own; rename them")
        row = {"image": image, "text": text, "kind": kind, "objects": [one.to_json() for one in objects], **extra}
        _check_row(row, self._sizes_hw[image], where)
        self._lines.append(json.dumps(row, ensure_ascii=False, allow_nan=False))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        partial = self._open_folder()
        try:
            if kind is None:
                if not self._lines:
                    raise DatasetError(f"{self.folder}: expected at least one question, none was added")
                (partial / ANNOTATIONS_NAME).write_text("\n".join(self._lines) + "\n", encoding="utf-8")
                # mkdtemp makes the folder private to its owner; a dataset is as readable as any folder.
                partial.chmod(0o755)
                partial.replace(self.folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            self._partial = None

    def _open_folder(self) -> Path:
        if self._partial is None:
            raise DatasetError("a DatasetWriter works inside its `with` block only")
        return self._partial


def _read_line(folder: Path, line: bytes, where: str) -> Sample:
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{where}: expected one JSON object per line: {error}") from error
    if not isinstance(row, dict):
        raise DatasetError(f"{where}: expected a JSON object, got {type(row).__name__}")
    image_path = _image_path(folder, row.get("image"), where)
    size_hw = _picture_size_hw(image_path, where)
    objects = _check_row(row, size_hw, where)
    extra = {key: value for key, value in row.items() if key not in _RESERVED_KEYS}
    return Sample(
        image_path=image_path,
        text=row["text"],
        kind=row["kind"],
        size_hw=size_hw,
        objects=objects,
        extra=extra,
        source=where,
    )


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _image_path(folder: Path, image: object, where: str) -> Path:
    if not isinstance(image, str) or not image or "\0" in image:
        raise DatasetError(f"{where}: expected `image` as a path inside the folder, got {image!r}")
    path = folder / image
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DatasetError(f"{where}: picture {image!r} lies outside the dataset folder; copy it into {IMAGES_NAME}/")
    if not path.is_file():
        raise DatasetError(f"{where}: picture {path} does not exist")
    return path


def _picture_size_hw(path: Path, where: str) -> tuple[int, int]:
    try:
        return _header_size_hw(path, path.stat().st_mtime_ns)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{where}: cannot read picture {path}: {error}; replace it") from error


@lru_cache(maxsize=4096)  # Questions on one picture follow one another.
def _header_size_hw(path: Path, modified_ns: int) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.height, picture.width


def _check_row(row: Mapping[str, Any], size_hw: tuple[int, int], where: str) -> tuple[LabeledObject, ...]:
    for key in ("text", "kind"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise DatasetError(f"{where}: expected `{key}` as text, got {row.get(key)!r:.80}")
        try:
            row[key].encode("utf-8")
        except UnicodeEncodeError as error:
            raise DatasetError(f"{where}: `{key}` holds half a surrogate pair: {error}") from error
    objects = row.get("objects")
    if not isinstance(objects, list):
        raise DatasetError(f"{where}: expected `objects` as a list (empty when there is none), got {objects!r:.80}")
    return tuple(_check_object(one, size_hw, f"{where}: objects[{index}]") for index, one in enumerate(objects))


def _check_object(one: object, size_hw: tuple[int, int], where: str) -> LabeledObject:
    if not isinstance(one, dict) or not isinstance(one.get("label"), str):
        raise DatasetError(f"{where}: expected {{label, box_xyxy, mask_rle}}, got {one!r:.80}")
    box = _box(one.get("box_xyxy"), size_hw, where)
    rle = one.get("mask_rle")
    if not isinstance(rle, dict) or rle.get("size") not in (list(size_hw), size_hw):
        raise DatasetError(f"{where}: expected `mask_rle` of size {list(size_hw)}, the picture's, got {rle!r:.80}")
    try:
        mask = decode_rle(rle)
    except ValueError as error:
        raise DatasetError(f"{where}: `mask_rle` does not decode: {error}") from error
    if not mask.any():
        raise DatasetError(f"{where}: `mask_rle` has no pixel; an object that cannot be seen is left out")
    return LabeledObject(label=one["label"], box_xyxy=box, mask_rle=rle)


def _box(box: object, size_hw: tuple[int, int], where: str) -> tuple[float, float, float, float]:
    if isinstance(box, (list, tuple)) and len(box) == 4 and all(type(value) in (int, float) for value in box):
        left, top, right, bottom = box
        # NaN and infinities fail the comparisons.
        if 0 <= left < right <= size_hw[1] and 0 <= top < bottom <= size_hw[0]:
            return float(left), float(top), float(right), float(bottom)
    raise DatasetError(
        f"{where}: expected `box_xyxy` as 4 numbers left < right <= {size_hw[1]}, top < bottom <= {size_hw[0]}, "
        f"got {box!r:.80}"
    )

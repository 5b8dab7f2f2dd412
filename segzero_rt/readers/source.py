"""What every reader of a published data set gives: pictures with questions, before they are scored or become rows.

A reader knows its pictures by key without opening them, so that its callers can skip what is done and name what is
wrong. Truth comes as masks, from which boxes and points are then derived, or as finished boxes and points, as the
authors of Seg-Zero publish them; both in pixels of the stored picture.
"""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segzero_rt.errors import DatasetError, MissingPackageError
from segzero_rt.readers.row_object import RowObject

Mask = NDArray[np.bool_]

NONE_KIND, SEVERAL_KIND, NAME_KIND = "none", "several", "name"
"""Kinds of questions as `questions.py` calls them, where a data set tells them apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceQuestion:
    """One question as the data set has it. `masks` and `objects` are not both given; neither: no such object."""

    row_id: str
    text: str
    masks: tuple[Mask, ...] = ()
    """bool [H, W] of the stored picture, one per object."""
    objects: tuple[RowObject, ...] = ()
    """In pixels of the stored picture."""
    kind: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class SourcePicture:
    """One picture with its questions."""

    source: str
    """Where it stands, for messages: `file: row`."""
    image: Path | bytes
    """A picture file, or its bytes."""
    questions: tuple[SourceQuestion, ...]
    name: str = ""
    """Of a picture that is bytes: equal for rows on one picture, where the data set tells."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """How many questions the reader left out by its own options, by reason."""


Load = Callable[[], SourcePicture]


class Reader(Protocol):
    """A published data set."""

    def __len__(self) -> int:
        """How many pictures."""

    def pictures(self) -> Iterator[tuple[str, Load]]:
        """Key and loader of each picture, always in the same order. A loader is called before the next is asked for.

        Raises:
            DatasetError: the data set is not what its layout says; loaders raise it for their own picture.
        """


def read_json_file(path: Path) -> Any:
    """A JSON file of UTF-8, or of Windows-1252 where it is not (some files of ReasonSeg).

    Raises:
        DatasetError: not there, or not JSON.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror}") from error
    for encoding in ("utf-8", "cp1252"):
        try:
            return json.loads(data.decode(encoding))
        except UnicodeDecodeError:
            continue
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{path}: expected JSON: {error}") from error
    raise DatasetError(f"{path}: expected JSON as UTF-8 or Windows-1252, got neither")


def required(entry: object, name: str, source: str, *kinds: type) -> Any:
    """The field `name` of a JSON object, of one of the `kinds`.

    Raises:
        DatasetError: no JSON object, the field is missing, or of another type (a boolean is no number).
    """
    if not isinstance(entry, Mapping):
        raise DatasetError(f"{source}: expected a JSON object with `{name}`, got {entry!r:.80}")
    if name not in entry:
        raise DatasetError(f"{source}: expected the field `{name}`, it is missing")
    value = entry[name]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise DatasetError(f"{source}: expected `{name}` of another type, got {value!r:.80}")
    return value


def picture_path(folder: Path, name: str, source: str) -> Path:
    """A picture inside `folder`.

    Raises:
        DatasetError: it lies outside, or is not there.
    """
    path = folder / name
    if "\0" in name or not path.resolve().is_relative_to(folder.resolve()):
        raise DatasetError(f"{source}: picture {name!r:.80} lies outside {folder}")
    if not path.is_file():
        raise DatasetError(f"{source}: picture {path} does not exist")
    return path


def stored_size_hw(image: Path | bytes, source: str) -> tuple[int, int]:
    """Height and width of a picture file as it is stored, whatever its EXIF tag says: what annotations mean.

    Raises:
        DatasetError: no picture.
    """
    name = "inside the file" if isinstance(image, bytes) else image
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as picture:
            return picture.height, picture.width
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{source}: cannot read picture {name}: {error}; replace it") from error


def optional_package(name: str, what: str) -> Any:
    """An optional package's module.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"expected the package {name.split('.')[0]}, which reads {what}, it is not installed; "
            "pip install 'segzero-rt[eval]'"
        ) from error

"""From JSON values to the objects of an answer, in numbers as the policy wrote them, before any geometry.

One function per reading rule: `canonical_objects` (the format's own keys and shapes, nothing else),
`vision_reasoner_objects` and `seg_zero_objects` (what those authors' scripts take), `tolerant_objects` (what real
policies write). Each returns None where the value is not an answer, and an empty list where it says "no such object".
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

from segzero_rt.answer_format import AnswerFormat
from segzero_rt.json_reader import JsonValue

RawPoint = tuple[float, float]
RawBox = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class RawObject:
    """One object as written: pixels of the policy's picture, any finite or infinite numbers, corners in any order."""

    box: RawBox
    points: tuple[RawPoint, ...]


_PLAIN_NUMBER = re.compile(r"[+-]?[0-9]{1,16}(?:\.[0-9]{0,16})?", re.ASCII)

BOX_NAMES = frozenset({"bbox2d", "bbox", "box", "box2d", "bboxxyxy", "boxxyxy", "xyxy", "boundingbox", "boundingbox2d"})
"""Keys of a left, top, right, bottom box in lower case without `_`, `-` and blanks. Other conventions are no box."""
_SUFFIXES = ["", "2d", "xy", *"123456789", *(f"2d{digit}" for digit in range(1, 10))]
POINT_NAMES = frozenset(f"{stem}{suffix}" for stem in ("point", "points") for suffix in _SUFFIXES)
"""Keys of a point or a list of points, in the same spelling."""
_JOINERS = str.maketrans("", "", "_- ")
MAX_KEYS = 32
"""Keys with points that are looked at in one object, and keys of an object that may be a wrapper; bounds the work."""


def canonical_objects(value: JsonValue, answer_format: AnswerFormat) -> list[RawObject] | None:
    """Takes exactly the format's answer: its keys, 4 and 2 plain numbers. Further keys are allowed."""
    if not answer_format.multiple:
        if value is None or value == {}:
            return []
        value = [value]
    if not isinstance(value, list):
        return None
    objects = []
    for entry in value:
        if not isinstance(entry, dict):
            return None
        box = _numbers(entry.get(answer_format.box_key), 4)
        points = [_numbers(entry.get(key), 2) for key in answer_format.point_keys]
        if box is None or None in points:
            return None
        objects.append(RawObject(box=_as_box(box), points=tuple(_as_point(point) for point in points if point)))
    return objects


def vision_reasoner_objects(value: JsonValue) -> list[RawObject] | None:
    """Takes a list of objects with `bbox_2d` and `point_2d`; the first 4 and 2 numbers count, as in the script."""
    if value == {} or value == "":
        return []  # the script loops over them, zero times
    if not isinstance(value, list):
        return None
    objects = []
    for entry in value:
        if not isinstance(entry, dict):
            return None
        box, point = _first_numbers(entry.get("bbox_2d"), 4), _first_numbers(entry.get("point_2d"), 2)
        if box is None or point is None:
            return None
        objects.append(RawObject(box=_as_box(box), points=(_as_point(point),)))
    return objects


def seg_zero_objects(value: JsonValue) -> list[RawObject] | None:
    """Takes the first key with `bbox` (4 numbers) and the first two with `points` (2 or more) in their names."""
    if not isinstance(value, dict):
        return None
    box_key = next((key for key in value if "bbox" in key.lower()), None)
    point_keys = [key for key in value if "points" in key.lower()][:2]
    box = _numbers(value[box_key], 4, quoted=True) if box_key is not None else None
    points = [_first_numbers(value[key], 2, quoted=True) for key in point_keys]
    if box is None or len(points) != 2 or None in points:
        return None
    return [RawObject(box=_as_box(box), points=tuple(_as_point(point) for point in points if point))]


def tolerant_objects(value: JsonValue, answer_format: AnswerFormat) -> list[RawObject] | None:
    """Takes every object with a box under a name of `BOX_NAMES`, in nested lists and single-entry wrappers too.

    An object whose box is not 4 numbers is passed over; None if none is left and the value was not empty.
    """
    if value is None or value == [] or value == {}:
        return []
    objects: list[RawObject] = []
    _collect(value, answer_format, objects)
    return objects or None


def _collect(value: JsonValue, answer_format: AnswerFormat, objects: list[RawObject]) -> None:
    if isinstance(value, list):
        for entry in value:
            _collect(entry, answer_format, objects)
    elif isinstance(value, dict):
        box_keys = [key for key in value if plain_name(key) in BOX_NAMES]
        if box_keys:
            own_key = answer_format.box_key if answer_format.box_key in value else box_keys[0]
            box = _box_numbers(value[own_key])
            if box is not None:
                point_keys = [key for key in value if plain_name(key) in POINT_NAMES][:MAX_KEYS]
                points = [point for key in point_keys for point in _points(value[key])]
                objects.append(RawObject(box=box, points=tuple(points)))
            return
        inner = [entry for entry in value.values() if isinstance(entry, (dict, list))]
        if (
            len(inner) == 1 and len(value) <= MAX_KEYS
        ):  # {"objects": [...]}; with several, which one is meant is a guess
            _collect(inner[0], answer_format, objects)


@functools.lru_cache(maxsize=256)
def plain_name(key: str) -> str:
    """Returns a key in the spelling of `BOX_NAMES`. Longer keys than any of those are no name of anything."""
    return key.lower().translate(_JOINERS) if len(key) <= 32 else ""


def _box_numbers(value: JsonValue) -> RawBox | None:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    box = _numbers(value, 4, quoted=True)
    return None if box is None else _as_box(box)


def _points(value: JsonValue) -> list[RawPoint]:
    """Returns the point, or the points, under one key; what has another shape is no point."""
    if not isinstance(value, list):
        return []
    point = _numbers(value, 2, quoted=True)
    if point is not None:
        return [_as_point(point)]
    found = [_numbers(entry, 2, quoted=True) for entry in value]
    return [_as_point(point) for point in found if point is not None]


def _numbers(value: JsonValue, count: int, *, quoted: bool = False) -> list[float] | None:
    if not isinstance(value, list) or len(value) != count:
        return None
    return _first_numbers(value, count, quoted=quoted)


def _first_numbers(value: JsonValue, count: int, *, quoted: bool = False) -> list[float] | None:
    if not isinstance(value, list) or len(value) < count:
        return None
    numbers = [_number(entry, quoted) for entry in value[:count]]
    return None if any(math.isnan(number) for number in numbers) else numbers


def _number(value: JsonValue, quoted: bool) -> float:
    """Returns a coordinate, NaN for what is none. True and False are none; `quoted` takes `"12"` for 12."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if quoted and isinstance(value, str) and _PLAIN_NUMBER.fullmatch(value.strip(" ")):
        return float(value)
    return math.nan


def _as_box(numbers: list[float]) -> RawBox:
    left, top, right, bottom = numbers
    return left, top, right, bottom


def _as_point(numbers: list[float]) -> RawPoint:
    x, y = numbers
    return x, y

"""One true object as a box, points and a mask: what training rows hold, and some published sets instead of masks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from segzero_rt.errors import DatasetError

_OBJECT_KEYS = frozenset({"box_xyxy", "points_xy", "mask_rle"})


@dataclass(frozen=True, kw_only=True, slots=True)
class RowObject:
    """One object that a question asks for, in pixels of the picture that the policy sees.

    Raises:
        DatasetError: a box that is empty, swapped or not finite, or a point that is no pair of finite numbers.
    """

    box_xyxy: tuple[float, float, float, float]
    """Left, top, right, bottom; `left < right`, `top < bottom`."""
    points_xy: tuple[tuple[float, float], ...] = ()
    """Points inside the object, the most central one first. A family writes as many as its format has keys for."""
    mask_rle: Mapping[str, Any] | None = None
    """COCO RLE in the size of the stored picture; only the mask reward needs it."""

    def __post_init__(self) -> None:
        if len(self.box_xyxy) != 4 or not all(math.isfinite(value) for value in self.box_xyxy):
            raise DatasetError(f"expected a box of 4 finite numbers, got {self.box_xyxy!r:.80}")
        left, top, right, bottom = self.box_xyxy
        if left >= right or top >= bottom:
            raise DatasetError(f"expected a box with left < right and top < bottom, got {self.box_xyxy!r:.80}")
        for point in self.points_xy:
            if len(point) != 2 or not all(math.isfinite(value) for value in point):
                raise DatasetError(f"expected points of 2 finite numbers, got {point!r:.80}")

    def check_inside(self, size_hw: tuple[int, int]) -> None:
        """Raises `DatasetError` unless box and points lie in a picture of `size_hw`, its far edges included."""
        height, width = size_hw
        left, top, right, bottom = self.box_xyxy
        if left < 0 or top < 0 or right > width or bottom > height:
            raise DatasetError(f"expected a box inside {width} x {height} pixels, got {self.box_xyxy}")
        for x, y in self.points_xy:
            if not (0 <= x <= width and 0 <= y <= height):
                raise DatasetError(f"expected points inside {width} x {height} pixels, got {(x, y)}")

    def to_json(self) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "box_xyxy": [float(value) for value in self.box_xyxy],  # one type, also where Arrow infers it
            "points_xy": [[float(x), float(y)] for x, y in self.points_xy],
        }
        if self.mask_rle is not None:
            entry["mask_rle"] = dict(self.mask_rle)
        return entry

    @classmethod
    def from_json(cls, entry: object) -> RowObject:
        """Reads what `to_json` wrote, also after a detour through Arrow (absent masks as None).

        Raises:
            DatasetError: a field is missing or has another shape.
        """
        if not isinstance(entry, Mapping) or not entry.keys() >= {"box_xyxy", "points_xy"}:
            raise DatasetError(f"expected an object as {{box_xyxy, points_xy[, mask_rle]}}, got {entry!r:.80}")
        if unknown := entry.keys() - _OBJECT_KEYS:
            raise DatasetError(f"expected an object of {sorted(_OBJECT_KEYS)}, got {sorted(unknown)!r:.80} besides")
        points = entry["points_xy"]
        if not isinstance(points, (list, tuple)):
            raise DatasetError(f"expected `points_xy` as a list of points, got {points!r:.80}")
        mask_rle = entry.get("mask_rle")
        if mask_rle is not None and not isinstance(mask_rle, Mapping):
            raise DatasetError(f"expected `mask_rle` as {{size, counts}}, got {mask_rle!r:.80}")
        left, top, right, bottom = _numbers(entry["box_xyxy"], 4, "box_xyxy")
        pairs = [_numbers(point, 2, "points_xy") for point in points]
        return cls(box_xyxy=(left, top, right, bottom), points_xy=tuple((x, y) for x, y in pairs), mask_rle=mask_rle)


def _numbers(value: object, count: int, name: str) -> list[float]:
    if (
        not isinstance(value, (list, tuple))
        or len(value) != count
        or any(type(one) not in (int, float) for one in value)
    ):
        raise DatasetError(f"expected `{name}` in groups of {count} numbers, got {value!r:.80}")
    try:
        return [float(one) for one in value]
    except OverflowError as error:
        raise DatasetError(f"expected `{name}` as numbers of a picture, got one of {len(str(value))} digits") from error

"""A small canvas for drawing one object seen from above: parts with a colour and a height, antialiased.

Coordinates are in object units: x to the right, y down, both in [-1, 1] over the drawing area. A `Canvas` keeps three
float32 planes of side `SIDE`: colour [S, S, 3] in [0, 1], alpha [S, S] in [0, 1] and height [S, S] in pixels. The
height is what `scenes.py` turns into shading once the object lies in the scene, so light falls on all objects from one
side.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.float32]
Point = tuple[float, float]

SIDE = 144
"""Pixels per side of the drawing area; larger than any object is drawn in a scene, so that scaling only shrinks."""
_SHIFT = 4
"""Fractional bits of OpenCV's fixed-point coordinates: 1/16 pixel."""
_HALF = SIDE / 2 - 4
"""Pixels per object unit; a margin of four pixels keeps antialiased edges inside."""


def thrice(plane: Plane) -> Plane:
    """[H, W] as [H, W, 3], one for each colour: faster written out than where NumPy repeats it number by number."""
    return np.asarray(cv2.merge((plane, plane, plane)), np.float32)


def touched(plane: Plane) -> tuple[slice, slice]:
    """The smallest window of [H, W] with everything that is not 0; all of it where there is nothing else."""
    rows, columns = np.flatnonzero(plane.any(1)), np.flatnonzero(plane.any(0))
    if not rows.size:
        return slice(None), slice(None)
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


@functools.cache
def _circle() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Cosines and sines of 72 angles."""
    angles = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    return np.cos(angles), np.sin(angles)


@functools.cache
def _quarter(start_deg: int) -> tuple[Point, ...]:
    """Cosine and sine of seven angles of a quarter turn."""
    return tuple((np.cos(angle), np.sin(angle)) for angle in np.deg2rad(np.linspace(start_deg, start_deg + 90, 7)))


def _fixed(values: NDArray[np.float64]) -> NDArray[np.int32]:
    return np.asarray(np.round((values * _HALF + SIDE / 2) * (1 << _SHIFT)), dtype=np.int32)


class Canvas:
    """Draws parts from back to front. Every `*_mask` method returns a coverage plane; `paint` lays it down."""

    def __init__(self) -> None:
        self.colour: Plane = np.zeros((SIDE, SIDE, 3), np.float32)
        self.alpha: Plane = np.zeros((SIDE, SIDE), np.float32)
        self.height: Plane = np.zeros((SIDE, SIDE), np.float32)

    @staticmethod
    def polygon_mask(points: Sequence[Point] | NDArray[np.float64]) -> Plane:
        mask = np.zeros((SIDE, SIDE), np.uint8)
        cv2.fillPoly(mask, [_fixed(np.asarray(points, np.float64))], 255, cv2.LINE_AA, _SHIFT)
        return mask.astype(np.float32) / np.float32(255)

    @staticmethod
    def ellipse_mask(centre: Point, radii: Point, angle_deg: float = 0.0) -> Plane:
        cosines, sines = _circle()
        turn = np.deg2rad(angle_deg)
        x, y = radii[0] * cosines, radii[1] * sines
        ring = np.stack(
            [x * np.cos(turn) - y * np.sin(turn) + centre[0], x * np.sin(turn) + y * np.cos(turn) + centre[1]], 1
        )
        return Canvas.polygon_mask(ring)

    @staticmethod
    def stroke_mask(points: Sequence[Point], width: float) -> Plane:
        """A round-ended line of `width` object units through `points`."""
        mask = np.zeros((SIDE, SIDE), np.uint8)
        thickness = max(1, round(width * _HALF))
        cv2.polylines(mask, [_fixed(np.asarray(points, np.float64))], False, 255, thickness, cv2.LINE_AA, _SHIFT)
        return mask.astype(np.float32) / np.float32(255)

    @staticmethod
    def rectangle_mask(left: float, top: float, right: float, bottom: float, radius: float = 0.0) -> Plane:
        """Axis-aligned, with corners rounded by `radius`."""
        if radius <= 0:
            return Canvas.polygon_mask([(left, top), (right, top), (right, bottom), (left, bottom)])
        corners = [
            (right - radius, top + radius, -90), (right - radius, bottom - radius, 0),
            (left + radius, bottom - radius, 90), (left + radius, top + radius, 180),
        ]  # fmt: skip
        points: list[Point] = []
        for x, y, start in corners:
            points += [(float(x + radius * cosine), float(y + radius * sine)) for cosine, sine in _quarter(start)]
        return Canvas.polygon_mask(points)

    def paint(self, mask: Plane, colour: Sequence[float] | Plane, *, bulge: float = 0.0, opacity: float = 1.0) -> None:
        """Lay `colour` (RGB in [0, 1], one or per pixel) over `mask`.

        `bulge` is the roundness of the part: 0 keeps the height below it (paint), 0.1 is a bevelled sheet, 1 a full
        tube or ball.
        """
        window = touched(mask)  # parts are small beside the drawing area
        part = mask[window]
        weight = thrice(part * opacity)
        over = np.asarray(colour, np.float32)
        over = over[window] if over.ndim == 3 else np.tile(over, (part.shape[1], 1))  # a row of it, as `thrice` says
        self.colour[window] += (over - self.colour[window]) * weight
        self.alpha[window] = np.maximum(self.alpha[window], part)
        if bulge > 0:
            self.height[window] = np.where(part > 0.5, self._bulged(part, bulge), self.height[window])

    @staticmethod
    def _bulged(mask: Plane, bulge: float) -> Plane:
        solid = cv2.copyMakeBorder((mask > 0.5).astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
        distance = cv2.distanceTransform(solid, cv2.DIST_L2, 3)[1:-1, 1:-1]
        radius = max(float(distance.max()) * bulge, 1.5)
        inside = 1 - np.minimum(distance / radius, 1)
        height = np.sqrt(np.maximum(1 - inside * inside, 0)) * radius + 2
        return np.asarray(height, np.float32)

    def cut(self, mask: Plane) -> None:
        """Make a hole."""
        self.alpha = self.alpha * (1 - mask)
        self.height = self.height * (1 - mask)

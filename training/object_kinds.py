"""The kinds of everyday objects that lie on the table: names, colours, materials, and how each is drawn.

A drawing routine takes a `Canvas`, a random generator and the `Look` (colour and material) and draws the object
upright; `scenes.py` turns, scales and lights it. Shapes vary within a kind (proportions, details), never beyond
recognition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .canvas import Canvas, Plane, Point

Rgb = tuple[float, float, float]

COLOURS: dict[str, Rgb] = {
    "red": (0.80, 0.10, 0.10),
    "orange": (0.95, 0.50, 0.08),
    "yellow": (0.95, 0.82, 0.15),
    "green": (0.15, 0.58, 0.20),
    "blue": (0.12, 0.28, 0.78),
    "purple": (0.48, 0.18, 0.62),
    "pink": (0.95, 0.52, 0.68),
    "brown": (0.46, 0.28, 0.14),
    "black": (0.09, 0.09, 0.10),
    "white": (0.94, 0.94, 0.92),
    "silver": (0.70, 0.72, 0.75),
    "gold": (0.80, 0.62, 0.20),
}
"""Base colours, RGB in [0, 1]; every object gets a slightly different shade."""

MATERIAL_SHINE: dict[str, float] = {
    "metal": 0.9, "glass": 0.9, "ceramic": 0.55, "plastic": 0.4, "wood": 0.08, "rubber": 0.2, "paper": 0.05,
    "wax": 0.2, "food": 0.25,
}  # fmt: skip
"""Strength of the highlight in [0, 1]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    colour: str
    material: str
    rgb: Rgb


Drawer = Callable[[Canvas, np.random.Generator, Look], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectKind:
    name: str
    plural: str
    synonyms: tuple[str, ...]
    draw: Drawer
    looks: tuple[tuple[str, str], ...]
    """(colour, material) pairs that occur."""
    size: tuple[float, float]
    """Half-length range of the drawing area, as a share of the picture's height."""
    tall: bool = False
    """Standing things lean only a little; lying things turn freely."""


def _shade(rgb: Rgb, factor: float) -> Rgb:
    """Darker below 1, towards white above 1."""
    if factor <= 1:
        return (rgb[0] * factor, rgb[1] * factor, rgb[2] * factor)
    blend = factor - 1
    return (rgb[0] + (1 - rgb[0]) * blend, rgb[1] + (1 - rgb[1]) * blend, rgb[2] + (1 - rgb[2]) * blend)


def _grain(rng: np.random.Generator, rgb: Rgb, side: int = 144) -> Plane:
    """Wood: streaks along y."""
    streaks = np.cumsum(rng.normal(0, 1, side))
    streaks = (streaks - streaks.mean()) / (streaks.std() + 1e-6) * 0.06
    wave = np.sin(np.arange(side)[:, None] / 9 + rng.uniform(0, 6) + streaks[None, :] * 20) * 0.03
    tone = 1 + streaks[None, :, None] + wave[..., None]
    return np.asarray(np.clip(np.asarray(rgb, np.float32) * tone, 0, 1), np.float32)


def _surface(rng: np.random.Generator, look: Look) -> Rgb | Plane:
    return _grain(rng, look.rgb) if look.material == "wood" else look.rgb


def _mug(c: Canvas, rng: np.random.Generator, look: Look) -> None:
    width, top, bottom = rng.uniform(0.48, 0.56), rng.uniform(-0.72, -0.6), rng.uniform(0.66, 0.78)
    taper = rng.uniform(0.82, 0.98)
    left = -width - 0.12
    right = left + 2 * width
    middle = (top + bottom) / 2
    ring = c.ellipse_mask((right, middle), (0.36, rng.uniform(0.36, 0.44)))
    hole = c.ellipse_mask((right, middle), (0.21, 0.24))
    body = c.polygon_mask(
        [(left, top), (right, top), (right - (1 - taper) * width, bottom), (left + (1 - taper) * width, bottom)]
    )
    c.paint(ring, _shade(look.rgb, 0.9), bulge=0.4)
    c.cut(hole)
    centre = (left + right) / 2
    c.paint(np.maximum(body, c.ellipse_mask((centre, bottom), (width * taper, 0.12))), look.rgb, bulge=0.9)
    if rng.random() < 0.35:
        band = c.rectangle_mask(left, middle - 0.12, right, middle + 0.12) * body
        c.paint(band, _shade(look.rgb, 1.6 if look.colour != "white" else 0.6))
    c.paint(c.ellipse_mask((centre, top), (width, 0.2)), _shade(look.rgb, 1.25), bulge=0.2)
    inside = (0.22, 0.12, 0.06) if rng.random() < 0.6 else _shade(look.rgb, 0.45)
    c.paint(c.ellipse_mask((centre, top + 0.01), (width * 0.86, 0.145)), inside)


def _plate(c: Canvas, rng: np.random.Generator, look: Look) -> None:
    squash = rng.uniform(0.78, 1.0)
    c.paint(c.ellipse_mask((0, 0), (0.96, 0.96 * squash)), _surface(rng, look), bulge=0.12)
    c.paint(c.ellipse_mask((0, 0), (0.68, 0.68 * squash)), _shade(look.rgb, 0.82))
    c.paint(c.ellipse_mask((0, 0.01), (0.63, 0.63 * squash)), _shade(look.rgb, 1.12), bulge=0.08)
    if rng.random() < 0.5 and look.material != "wood":
        rim = c.ellipse_mask((0, 0), (0.9, 0.9 * squash)) - c.ellipse_mask((0, 0), (0.84, 0.84 * squash))
        c.paint(np.clip(rim, 0, 1), _shade(look.rgb, 0.5))


def _bottle(c: Canvas, rng: np.random.Generator, look: Look) -> None:
    width, shoulder, neck = rng.uniform(0.27, 0.34), rng.uniform(-0.38, -0.2), rng.uniform(0.09, 0.13)
    body = c.rectangle_mask(-width, shoulder, width, 0.97, 0.07)
    slope = c.polygon_mask(
        [(-width, shoulder + 0.08), (-neck, shoulder - 0.25), (neck, shoulder - 0.25), (width, shoulder + 0.08)]
    )
    throat = c.rectangle_mask(-neck, -0.86, neck, shoulder)
    shape = np.maximum(np.maximum(body, slope), throat)
    c.paint(shape, look.rgb, bulge=1.0)
    gleam = c.rectangle_mask(-width * 0.62, shoulder + 0.1, -width * 0.36, 0.85, 0.05)
    c.paint(gleam, _shade(look.rgb, 1.7), opacity=0.7 if look.material == "glass" else 0.3)
    if rng.random() < 0.75:
        c.paint(
            c.rectangle_mask(-width, 0.1, width, rng.uniform(0.45, 0.62)),
            (0.92, 0.9, 0.84) if look.colour != "white" else (0.3, 0.4, 0.7),
        )
    c.paint(c.rectangle_mask(-neck * 1.3, -0.97, neck * 1.3, -0.78, 0.03), _shade(look.rgb, 0.4), bulge=0.6)


def _fork(c: Canvas, rng: np.random.Generator, look: Look) -> None:
    colour = _surface(rng, look)
    width = rng.uniform(0.2, 0.24)
    c.paint(
        c.polygon_mask([(-0.05, -0.3), (0.05, -0.3), (0.1, 0.85), (0.06, 0.97), (-0.06, 0.97), (-0.1, 0.85)]),
        colour,
        bulge=0.9,
    )
    head = c.polygon_mask(
        [(-width, -0.52), (width, -0.52), (width * 0.8, -0.3), (0.05, -0.14), (-0.05, -0.14), (-width * 0.8, -0.3)]
    )
    c.paint(head, colour, bulge=0.5)
    for tine in np.linspace(-width * 0.85, width * 0.85, 4):
        c.paint(c.stroke_mask([(float(tine), -0.93), (float(tine), -0.5)], 0.075), colour, bulge=0.9)


def _spoon(c: Canvas, rng: np.random.Generator, look: Look) -> None:
    colour = _surface(rng, look)
    c.paint(
        c.polygon_mask([(-0.045, -0.4), (0.045, -0.4), (0.1, 0.85), (0.06, 0.97), (-0.06, 0.97), (-0.1, 0.85)]),
        colour,
        bulge=0.9,
    )
    rx, ry = rng.uniform(0.24, 0.29), rng.uniform(0.34, 0.4)
    c.paint(c.ellipse_mask((0, -0.58), (rx, ry)), colour, bulge=0.35)
    c.paint(c.ellipse_mask((0, -0.58), (rx * 0.72, ry * 0.76)), _shade(look.rgb, 0.7))
    c.paint(c.ellipse_mask((0.03, -0.53), (rx * 0.5, ry * 0.52)), _shade(look.rgb, 1.1), opacity=0.7)


def _scissors(c: Canvas, rng: np.random.Generator, look: Look) -> None:
    spread = rng.uniform(0.13, 0.3)
    steel = _shade(COLOURS["silver"], rng.uniform(0.85, 1.1))
    for side in (-1.0, 1.0):
        tip = (-side * spread, -0.96)
        c.paint(
            c.polygon_mask([tip, (-side * 0.02 + 0.07, 0.0), (side * 0.12, 0.22), (-side * 0.02 - 0.07, 0.05)]),
            steel,
            bulge=0.4,
        )
    for side in (-1.0, 1.0):
        centre = (side * (0.26 + spread * 0.4), 0.6)
        c.paint(c.stroke_mask([(side * 0.04, 0.1), (side * 0.16, 0.32)], 0.12), look.rgb, bulge=0.9)
        ring = c.ellipse_mask(centre, (0.25, 0.35), side * -14)
        hole = c.ellipse_mask(centre, (0.14, 0.23), side * -14)
        c.paint(ring, look.rgb, bulge=0.35)
        c.cut(hole)
    c.paint(c.ellipse_mask((0, 0.06), (0.05, 0.05)), _shade(steel, 0.5))


def _crescent(bend: float, thickness: float, count: int = 24) -> list[Point]:
    t = np.linspace(-1, 1, count)
    x, y = 0.94 * t, bend * (t * t) - bend / 2
    half = thickness * np.clip(1 - np.abs(t) ** 3.2, 0.12, None)
    slope = 2 * bend * t / 0.94
    nx, ny = -slope / np.hypot(slope, 1), 1 / np.hypot(slope, 1)
    upper = [(float(a), float(b)) for a, b in zip(x - nx * half, y - ny * half, strict=True)]
    lower = [(float(a), float(b)) for a, b in zip(x + nx * half, y + ny * half, strict=True)]
    return upper + lower[::-1]


def _banana(c: Canvas, rng: np.random.Generator, look: Look) -> None:
    bend, thickness = rng.uniform(-0.75, -0.5), rng.uniform(0.21, 0.27)
    c.paint(c.polygon_mask(_crescent(bend, thickness)), look.rgb, bulge=0.8)
    ridge = [(float(t * 0.85), float(bend * t * t - bend / 2 - 0.02)) for t in np.linspace(-1, 1, 16)]
    c.paint(c.stroke_mask(ridge, 0.05), _shade(look.rgb, 0.78), opacity=0.6)
    for end in (-1.0, 1.0):
        c.paint(c.ellipse_mask((end * 0.93, bend / 2), (0.055, 0.07)), (0.28, 0.2, 0.08))


def _apple(c: Canvas, rng: np.random.Generator, look: Look) -> None:
    wide = rng.uniform(0.74, 0.82)
    lobes = np.maximum(
        c.ellipse_mask((-0.2, 0.08), (wide * 0.76, 0.74)), c.ellipse_mask((0.2, 0.08), (wide * 0.76, 0.74))
    )
    c.paint(lobes, look.rgb, bulge=1.0)
    if look.colour != "green":
        c.paint(c.ellipse_mask((0.25, 0.3), (0.3, 0.36)), (0.9, 0.75, 0.25), opacity=0.3)
    c.paint(c.ellipse_mask((0, -0.5), (0.18, 0.1)), _shade(look.rgb, 0.4), opacity=0.8)
    c.paint(c.stroke_mask([(0, -0.5), (0.05, -0.75), (0.12, -0.9)], 0.08), (0.3, 0.2, 0.1), bulge=0.9)
    if rng.random() < 0.7:
        c.paint(c.ellipse_mask((0.34, -0.76), (0.22, 0.1), -24), (0.25, 0.55, 0.18), bulge=0.4)


def _carrot(c: Canvas, rng: np.random.Generator, look: Look) -> None:
    wide = rng.uniform(0.24, 0.3)
    for lean in rng.uniform(-0.3, 0.3, 4):
        c.paint(
            c.stroke_mask([(0, -0.45), (float(lean) * 0.6, -0.7), (float(lean), -0.93)], 0.1),
            (0.2, 0.52, 0.16),
            bulge=0.9,
        )
    c.paint(
        c.polygon_mask(
            [
                (-wide * 0.8, -0.52),
                (wide * 0.8, -0.52),
                (wide, -0.38),
                (0.06, 0.9),
                (0, 0.97),
                (-0.06, 0.9),
                (-wide, -0.38),
            ]
        ),
        look.rgb,
        bulge=1.0,
    )
    for y in rng.uniform(-0.3, 0.5, 5):
        reach = wide * (0.65 - float(y)) * 0.6
        side = rng.choice([-1.0, 1.0])
        c.paint(
            c.stroke_mask([(side * reach, float(y)), (side * reach * 0.3, float(y) + 0.03)], 0.035),
            _shade(look.rgb, 0.65),
        )


def _book(c: Canvas, rng: np.random.Generator, look: Look) -> None:
    wide = rng.uniform(0.58, 0.7)
    c.paint(c.rectangle_mask(-wide, -0.86, wide + 0.06, 0.92, 0.02), (0.9, 0.88, 0.8), bulge=0.1)
    c.paint(c.rectangle_mask(-wide, -0.9, wide, 0.86, 0.03), look.rgb, bulge=0.07)
    c.paint(c.rectangle_mask(-wide, -0.9, -wide + 0.13, 0.86), _shade(look.rgb, 0.65))
    ink = _shade(look.rgb, 1.75) if look.colour not in ("white", "yellow") else _shade(look.rgb, 0.35)
    c.paint(c.rectangle_mask(-wide + 0.28, -0.6, wide - 0.14, -0.42), ink)
    if rng.random() < 0.6:
        c.paint(c.rectangle_mask(-wide + 0.38, -0.32, wide - 0.24, -0.24), ink)
    if rng.random() < 0.5:
        c.paint(c.ellipse_mask((0.08, 0.3), (0.2, 0.2)), ink, opacity=0.8)


def _pencil(c: Canvas, rng: np.random.Generator, look: Look) -> None:
    wide = rng.uniform(0.085, 0.11)
    c.paint(c.polygon_mask([(-wide, -0.68), (0, -0.98), (wide, -0.68)]), (0.86, 0.68, 0.45), bulge=0.9)
    c.paint(c.polygon_mask([(-wide * 0.33, -0.88), (0, -0.98), (wide * 0.33, -0.88)]), (0.12, 0.12, 0.13))
    c.paint(c.rectangle_mask(-wide, -0.7, wide, 0.8), look.rgb, bulge=0.9)
    c.paint(c.rectangle_mask(-wide * 0.35, -0.7, wide * 0.35, 0.8), _shade(look.rgb, 1.25))
    c.paint(c.rectangle_mask(-wide * 1.05, 0.72, wide * 1.05, 0.84), COLOURS["silver"], bulge=0.9)
    c.paint(c.rectangle_mask(-wide, 0.82, wide, 0.97, 0.04), (0.88, 0.48, 0.5), bulge=0.9)


def _key(c: Canvas, rng: np.random.Generator, look: Look) -> None:
    radius = rng.uniform(0.3, 0.36)
    c.paint(c.rectangle_mask(-0.07, -0.3, 0.07, 0.95), look.rgb, bulge=0.9)
    for y, reach in ((0.5, 0.26), (0.68, 0.2), (0.85, 0.28)):
        c.paint(c.rectangle_mask(0.0, y, reach * rng.uniform(0.9, 1.15), y + 0.1), look.rgb, bulge=0.5)
    c.paint(c.ellipse_mask((0, -0.6), (radius, radius)), look.rgb, bulge=0.3)
    c.cut(c.ellipse_mask((0, -0.64), (radius * 0.42, radius * 0.42)))


def _phone(c: Canvas, rng: np.random.Generator, look: Look) -> None:
    wide = rng.uniform(0.44, 0.5)
    c.paint(c.rectangle_mask(-wide, -0.95, wide, 0.95, 0.12), look.rgb, bulge=0.1)
    top = np.asarray(rng.uniform(0.05, 0.45, 3), np.float32)
    bottom = np.asarray(rng.uniform(0.25, 0.7, 3), np.float32)
    ramp = np.linspace(0, 1, 144, dtype=np.float32)[:, None, None]
    c.paint(
        c.rectangle_mask(-wide + 0.07, -0.86, wide - 0.07, 0.86, 0.07),
        top * (1 - ramp) + bottom * ramp + np.zeros((144, 144, 3), np.float32),
    )
    if rng.random() < 0.75:
        for row in range(3):
            for column in (-0.24, 0.0, 0.24):
                icon = tuple(float(v) for v in rng.uniform(0.3, 1.0, 3))
                c.paint(
                    c.rectangle_mask(column - 0.07, -0.55 + row * 0.3, column + 0.07, -0.41 + row * 0.3, 0.03), icon
                )
    c.paint(c.rectangle_mask(-0.1, -0.9, 0.1, -0.87), (0.05, 0.05, 0.05))


def _clock(c: Canvas, rng: np.random.Generator, look: Look) -> None:
    for side in (-1.0, 1.0):
        if look.material == "metal":
            c.paint(c.ellipse_mask((side * 0.5, -0.78), (0.2, 0.17), side * 35), _shade(look.rgb, 0.85), bulge=0.8)
    c.paint(c.ellipse_mask((0, 0.06), (0.86, 0.86)), look.rgb, bulge=0.22)
    face = (0.96, 0.95, 0.9) if look.colour != "white" else (0.85, 0.88, 0.92)
    c.paint(c.ellipse_mask((0, 0.06), (0.68, 0.68)), face)
    ink = (0.08, 0.08, 0.1)
    for hour in range(12):
        x, y = np.cos(hour * np.pi / 6), np.sin(hour * np.pi / 6)
        c.paint(c.stroke_mask([(0.53 * x, 0.06 + 0.53 * y), (0.61 * x, 0.06 + 0.61 * y)], 0.05), ink)
    for reach, width in ((0.32, 0.09), (0.5, 0.055)):
        angle = rng.uniform(0, 2 * np.pi)
        c.paint(c.stroke_mask([(0, 0.06), (reach * np.cos(angle), 0.06 + reach * np.sin(angle))], width), ink)


def _glasses(c: Canvas, rng: np.random.Generator, look: Look) -> None:
    tall, round_ = rng.uniform(0.28, 0.36), rng.random() < 0.5
    for side in (-1.0, 1.0):
        x = side * 0.5
        c.paint(
            c.stroke_mask([(side * 0.88, -0.1), (side * 0.97, -0.3), (side * 0.8, -0.62)], 0.09), look.rgb, bulge=0.8
        )
        if round_:
            outer, inner = c.ellipse_mask((x, 0), (0.42, tall)), c.ellipse_mask((x, 0), (0.33, tall - 0.09))
        else:
            outer = c.rectangle_mask(x - 0.42, -tall, x + 0.42, tall, 0.12)
            inner = c.rectangle_mask(x - 0.33, -tall + 0.09, x + 0.33, tall - 0.09, 0.08)
        c.paint(outer, look.rgb, bulge=0.25)
        c.paint(inner, (0.62, 0.74, 0.82))
        c.paint(
            c.polygon_mask(
                [(x - 0.2, tall * 0.4), (x - 0.02, -tall * 0.5), (x + 0.08, -tall * 0.5), (x - 0.1, tall * 0.4)]
            )
            * inner,
            (0.9, 0.95, 0.98),
            opacity=0.7,
        )
    c.paint(c.stroke_mask([(-0.12, -0.08), (0, -0.15), (0.12, -0.08)], 0.1), look.rgb, bulge=0.8)


def _ball(c: Canvas, rng: np.random.Generator, look: Look) -> None:
    disc = c.ellipse_mask((0, 0), (0.93, 0.93))
    c.paint(disc, look.rgb, bulge=1.0)
    mark = _shade(look.rgb, 1.8) if look.colour not in ("white", "yellow") else _shade(look.rgb, 0.3)
    style = rng.integers(3)
    if style == 0:
        c.paint(
            c.stroke_mask(
                [(-0.9, rng.uniform(-0.3, 0.3)), (0, rng.uniform(-0.2, 0.2)), (0.9, rng.uniform(-0.3, 0.3))], 0.24
            )
            * disc,
            mark,
        )
    elif style == 1:
        for angle in np.linspace(0, 2 * np.pi, 6)[:-1]:
            c.paint(c.ellipse_mask((0.55 * np.cos(angle), 0.55 * np.sin(angle)), (0.16, 0.16)) * disc, mark)
    else:
        for x in (-0.55, 0.55):
            c.paint(c.stroke_mask([(x, -0.8), (x * 0.35, 0), (x, 0.8)], 0.07) * disc, _shade(look.rgb, 0.35))


def _hammer(c: Canvas, rng: np.random.Generator, look: Look) -> None:
    c.paint(c.rectangle_mask(-0.095, -0.6, 0.095, 0.97, 0.06), _surface(rng, look), bulge=0.9)
    if look.material != "wood":
        c.paint(c.rectangle_mask(-0.11, 0.4, 0.11, 0.97, 0.07), _shade(look.rgb, 0.6), bulge=0.9)
    steel = _shade(COLOURS["silver"], rng.uniform(0.55, 0.85))
    c.paint(c.rectangle_mask(-0.16, -0.92, 0.3, -0.56, 0.04), steel, bulge=0.6)
    c.paint(c.rectangle_mask(0.28, -0.97, 0.5, -0.51, 0.05), steel, bulge=0.5)
    c.paint(c.polygon_mask([(-0.12, -0.9), (-0.62, -0.62), (-0.56, -0.52), (-0.12, -0.6)]), steel, bulge=0.5)


def _candle(c: Canvas, rng: np.random.Generator, look: Look) -> None:
    wide, top = rng.uniform(0.24, 0.32), rng.uniform(-0.3, -0.15)
    c.paint(
        c.ellipse_mask((0, 0.84), (0.5, 0.14)), COLOURS["gold"] if rng.random() < 0.5 else COLOURS["silver"], bulge=0.4
    )
    c.paint(c.rectangle_mask(-wide, top, wide, 0.85, 0.05), look.rgb, bulge=0.9)
    c.paint(c.ellipse_mask((0, top), (wide, 0.09)), _shade(look.rgb, 1.3))
    c.paint(c.stroke_mask([(0, top), (0, top - 0.14)], 0.05), (0.1, 0.08, 0.08))
    flame = top - 0.34
    c.paint(
        c.polygon_mask(
            [(0, flame - 0.3), (0.13, flame + 0.02), (0.08, flame + 0.18), (-0.08, flame + 0.18), (-0.13, flame + 0.02)]
        ),
        (1.0, 0.62, 0.12),
    )
    c.paint(c.ellipse_mask((0, flame + 0.07), (0.06, 0.11)), (1.0, 0.95, 0.6))


def _paired(colours: str, *materials: str) -> tuple[tuple[str, str], ...]:
    return tuple((colour, material) for material in materials for colour in colours.split())


KINDS: dict[str, ObjectKind] = {
    kind.name: kind
    for kind in (
        ObjectKind(name="mug", plural="mugs", synonyms=("cup",), draw=_mug, size=(0.12, 0.19), tall=True,
                   looks=(*_paired("red green blue yellow white black purple orange pink", "ceramic"),
                          ("silver", "metal"))),
        ObjectKind(name="plate", plural="plates", synonyms=("dish",), draw=_plate, size=(0.15, 0.24),
                   looks=_paired("white blue green pink red yellow", "ceramic") + _paired("brown", "wood")),
        ObjectKind(name="bottle", plural="bottles", synonyms=(), draw=_bottle, size=(0.16, 0.25), tall=True,
                   looks=_paired("green brown blue", "glass") + _paired("red white purple orange", "plastic")),
        ObjectKind(name="fork", plural="forks", synonyms=(), draw=_fork, size=(0.16, 0.24),
                   looks=_paired("silver gold", "metal") + _paired("brown", "wood") + _paired("black red", "plastic")),
        ObjectKind(name="spoon", plural="spoons", synonyms=(), draw=_spoon, size=(0.16, 0.24),
                   looks=_paired("silver gold", "metal") + _paired("brown", "wood") + _paired("black red", "plastic")),
        ObjectKind(name="scissors", plural="scissors", synonyms=("shears",), draw=_scissors, size=(0.15, 0.22),
                   looks=_paired("red blue green black orange purple", "plastic")),
        ObjectKind(name="banana", plural="bananas", synonyms=(), draw=_banana, size=(0.15, 0.22),
                   looks=_paired("yellow green", "food")),
        ObjectKind(name="apple", plural="apples", synonyms=(), draw=_apple, size=(0.10, 0.16), tall=True,
                   looks=_paired("red green yellow", "food")),
        ObjectKind(name="carrot", plural="carrots", synonyms=(), draw=_carrot, size=(0.15, 0.23),
                   looks=_paired("orange purple yellow", "food")),
        ObjectKind(name="book", plural="books", synonyms=(), draw=_book, size=(0.16, 0.24),
                   looks=_paired("red blue green yellow purple brown black orange pink white", "paper")),
        ObjectKind(name="pencil", plural="pencils", synonyms=(), draw=_pencil, size=(0.18, 0.26),
                   looks=_paired("yellow red blue green black purple", "wood")),
        ObjectKind(name="key", plural="keys", synonyms=(), draw=_key, size=(0.13, 0.19),
                   looks=_paired("silver gold black brown", "metal")),
        ObjectKind(name="phone", plural="phones", synonyms=("smartphone",), draw=_phone, size=(0.14, 0.21),
                   looks=_paired("black white blue red pink gold", "plastic")),
        ObjectKind(name="clock", plural="clocks", synonyms=(), draw=_clock, size=(0.12, 0.19), tall=True,
                   looks=_paired("red blue green", "metal") + _paired("white black orange pink", "plastic")),
        ObjectKind(name="glasses", plural="glasses", synonyms=("spectacles",), draw=_glasses, size=(0.14, 0.21),
                   looks=_paired("black red blue brown purple", "plastic") + _paired("gold", "metal")),
        ObjectKind(name="ball", plural="balls", synonyms=("toy ball",), draw=_ball, size=(0.10, 0.17),
                   looks=_paired("red blue yellow green orange white purple pink", "rubber")),
        ObjectKind(name="hammer", plural="hammers", synonyms=("mallet",), draw=_hammer, size=(0.17, 0.25),
                   looks=_paired("brown", "wood") + _paired("red yellow black blue", "plastic")),
        ObjectKind(name="candle", plural="candles", synonyms=(), draw=_candle, size=(0.13, 0.2), tall=True,
                   looks=_paired("white red yellow purple green blue", "wax")),
    )
}  # fmt: skip
"""All kinds by name, in a fixed order (class indices of the read-outs are positions in it)."""

PAIR_NOUNS = frozenset({"scissors", "glasses"})
"""Nouns that are plural in form: `a pair of scissors`, and no other plural."""

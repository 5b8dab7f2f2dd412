"""Procedural, photo-like pictures of things on a table, with exact instance masks (numpy and OpenCV only).

A scene is planned first (which objects, where, how large), then drawn back to front: shadow, object, light. Everything
is a function of `(split, seed, index)`. The split's name enters the random state, so no seed asked for under one split
can reproduce a picture of another: what was trained on cannot come out as test.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

from .canvas import SIDE, Canvas, Plane, thrice, touched
from .draws import pick
from .mask_points import box_and_points
from .object_kinds import COLOURS, KINDS, MATERIAL_SHINE, Look
from .table_tops import draw_table_top

SPLITS = (
    "train", "validation", "test", "ood_colour", "ood_relation", "ood_wording", "ood_function",
)  # fmt: skip
"""In-distribution splits, then those that hold out a combination (see `questions.py` for the last three)."""

DEFAULT_SIZE_HW = (360, 480)

HELD_OUT_LOOKS = frozenset({
    ("mug", "purple"), ("plate", "pink"), ("bottle", "orange"), ("apple", "yellow"), ("book", "orange"),
    ("fork", "red"), ("pencil", "purple"), ("phone", "pink"), ("clock", "orange"), ("glasses", "red"),
    ("ball", "purple"), ("hammer", "blue"), ("candle", "green"), ("scissors", "orange"), ("key", "brown"),
    ("carrot", "yellow"),
})  # fmt: skip
"""(kind, colour) pairs drawn in the split `ood_colour` alone."""

MIN_VISIBLE_SHARE = 0.62
"""An object that others cover more than this allows is not placed there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedObject:
    """One object before it is drawn. Centre and half-length in pixels of the scene, angle in degrees."""

    kind: str
    colour: str
    material: str
    centre_xy: tuple[float, float]
    half_length: float
    angle_deg: float
    mirrored: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneObject:
    """One object as it lies in the finished picture; all geometry is of its visible part, in source pixels."""

    kind: str
    colour: str
    material: str
    box_xyxy: tuple[int, int, int, int]
    """Tight: left, top inclusive; right, bottom exclusive."""
    points_xy: tuple[tuple[int, int], tuple[int, int]]
    """Maximum of the distance transform, and the maximum among pixels farther than the median from the first."""
    area_px: int
    mask: NDArray[np.bool_] = field(repr=False)

    @property
    def centre_xy(self) -> tuple[float, float]:
        left, top, right, bottom = self.box_xyxy
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    image_rgb: NDArray[np.uint8]
    """[H, W, 3]."""
    objects: tuple[SceneObject, ...]

    @property
    def size_hw(self) -> tuple[int, int]:
        height, width = self.image_rgb.shape[:2]
        return height, width


def random_state(split: str, seed: int, index: int, attempt: int = 0) -> np.random.Generator:
    """The generator of one picture.

    Raises:
        ValueError: unknown split, or a negative number.
    """
    if split not in SPLITS:
        raise ValueError(f"expected a split among {', '.join(SPLITS)}, got {split!r}")
    if min(seed, index) < 0:
        raise ValueError(f"expected seed and index of at least 0, got {seed} and {index}")
    return np.random.default_rng([zlib.crc32(split.encode()), seed, index, attempt])


def allowed_looks(kind: str, split: str) -> list[tuple[str, str]]:
    """(colour, material) pairs that may occur for `kind` in `split`."""
    looks = KINDS[kind].looks
    if split == "ood_colour":
        return list(looks)
    return [look for look in looks if (kind, look[0]) not in HELD_OUT_LOOKS]


def plan_scene(
    rng: np.random.Generator, wanted: Sequence[tuple[str, str, str]], size_hw: tuple[int, int]
) -> list[PlannedObject] | None:
    """Poses for objects given as (kind, colour, material), near each other, some overlapping.

    None when there is no room. The crowd is scaled down a little as it grows. `render` has the last word on how much
    may be covered.
    """
    scale = 1.1 - 0.035 * len(wanted)
    crowding = float(rng.uniform(0.5, 0.85))
    placed: list[PlannedObject] = []
    for kind, colour, material in wanted:
        for _ in range(25):
            candidate = _plan_object(rng, kind, (colour, material), size_hw, scale)
            if all(_apart(candidate, other) > crowding for other in placed):
                placed.append(candidate)
                break
        else:
            return None
    return placed


def random_scene(
    split: str,
    seed: int,
    index: int,
    *,
    num_objects: tuple[int, int] = (4, 9),
    size_hw: tuple[int, int] = DEFAULT_SIZE_HW,
) -> Scene:
    """A scene without a question in mind: kinds at random, often a second one of the same kind or colour.

    Args:
        num_objects: smallest and largest number of objects, both inclusive.

    Raises:
        ValueError: unknown split or negative numbers.
    """
    for attempt in range(100):
        rng = random_state(split, seed, index, attempt)
        wanted = random_company(rng, split, int(rng.integers(num_objects[0], num_objects[1] + 1)))
        plan = plan_scene(rng, wanted, size_hw)
        scene = render(rng, plan, size_hw) if plan else None
        if scene is not None:
            return scene
    raise RuntimeError(f"no scene of {num_objects} objects fits a picture of {size_hw} after 100 attempts")


def random_company(
    rng: np.random.Generator, split: str, count: int, present: Sequence[tuple[str, str, str]] = ()
) -> list[tuple[str, str, str]]:
    """`count` objects (kind, colour, material), beginning with `present`; likes to repeat a kind or a colour."""
    names = list(KINDS)
    company = list(present)
    while len(company) < count:
        kind = pick(rng, names)
        looks = allowed_looks(kind, split)
        like = rng.random()
        if company and like < 0.3:
            kind = pick(rng, company)[0]
            looks = allowed_looks(kind, split)
        elif company and like < 0.5:
            colour = pick(rng, company)[1]
            looks = [look for look in looks if look[0] == colour] or looks
        company.append((kind, *pick(rng, looks)))
    return company


def _apart(one: PlannedObject, other: PlannedObject) -> float:
    """Distance of the centres in units of the summed half-lengths."""
    gap = np.hypot(one.centre_xy[0] - other.centre_xy[0], one.centre_xy[1] - other.centre_xy[1])
    return float(gap) / (one.half_length + other.half_length)


def _plan_object(
    rng: np.random.Generator, kind: str, look: tuple[str, str], size_hw: tuple[int, int], scale: float
) -> PlannedObject:
    height, width = size_hw
    spec = KINDS[kind]
    half = float(rng.uniform(*spec.size)) * height * scale
    margin = half * 0.85
    angle = float(rng.normal(0, 9)) if spec.tall else float(rng.uniform(-180, 180))
    centre = (float(rng.uniform(margin, width - margin)), float(rng.uniform(margin, height - margin)))
    return PlannedObject(
        kind=kind, colour=look[0], material=look[1], centre_xy=centre, half_length=half, angle_deg=angle,
        mirrored=bool(rng.random() < 0.5),
    )  # fmt: skip


def render(rng: np.random.Generator, plan: Sequence[PlannedObject], size_hw: tuple[int, int]) -> Scene | None:
    """Draw a plan back to front; None when some object ends up too much covered."""
    layers = [_place(rng, planned, size_hw) for planned in plan]
    masks = _visible_masks(layers)
    for layer, mask in zip(layers, masks, strict=True):
        if mask.sum() < max(60.0, MIN_VISIBLE_SHARE * float((layer.alpha > 0.5).sum())):
            return None
    light = _Light.random(rng)
    picture = draw_table_top(rng, size_hw)
    for layer in layers:
        _cast_shadow(picture, layer, light)
        _lay(picture, layer, light)
    image = _photograph(rng, picture, light)
    objects = tuple(_describe(planned, layer, mask) for planned, layer, mask in zip(plan, layers, masks, strict=True))
    return Scene(image_rgb=image, objects=objects)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Light:
    direction_xy: tuple[float, float]
    softness_px: float
    reach_px: float
    darkness: float
    tint_rgb: NDArray[np.float32]
    slope_xy: tuple[float, float]

    @staticmethod
    def random(rng: np.random.Generator) -> _Light:
        angle = rng.uniform(0, 2 * np.pi)
        warm = rng.normal(0, 0.035)
        return _Light(
            direction_xy=(float(np.cos(angle)), float(np.sin(angle))),
            softness_px=float(rng.uniform(2.5, 7)),
            reach_px=float(rng.uniform(4, 12)),
            darkness=float(rng.uniform(0.25, 0.55)),
            tint_rgb=np.asarray([1 + warm, 1.0, 1 - warm], np.float32) * np.float32(rng.uniform(0.78, 1.12)),
            slope_xy=(float(rng.uniform(-0.2, 0.2)), float(rng.uniform(-0.2, 0.2))),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layer:
    """One object warped into the scene: planes over the window `[top:bottom, left:right]`."""

    window: tuple[int, int, int, int]
    colour: Plane
    alpha: Plane
    height: Plane
    shine: float
    size_hw: tuple[int, int]


def _place(rng: np.random.Generator, planned: PlannedObject, size_hw: tuple[int, int]) -> _Layer:
    base = np.asarray(COLOURS[planned.colour], np.float32)
    shade = base * rng.uniform(0.86, 1.1) + rng.normal(0, 0.02, 3)
    red, green, blue = (float(value) for value in np.clip(shade, 0.03, 0.98))
    look = Look(colour=planned.colour, material=planned.material, rgb=(red, green, blue))
    canvas = Canvas()
    KINDS[planned.kind].draw(canvas, rng, look)
    scale = planned.half_length / (SIDE / 2)
    reach = int(np.ceil(planned.half_length * 1.45)) + 2
    centre = (round(planned.centre_xy[0]), round(planned.centre_xy[1]))
    matrix = np.asarray(cv2.getRotationMatrix2D((SIDE / 2, SIDE / 2), planned.angle_deg, scale), np.float64)
    if planned.mirrored:
        matrix = matrix @ np.array([[-1, 0, SIDE], [0, 1, 0], [0, 0, 1]], np.float64)
    matrix[:, 2] += reach - SIDE / 2
    side = 2 * reach
    planes = np.dstack(
        [canvas.colour * thrice(canvas.alpha), canvas.alpha, cv2.GaussianBlur(canvas.height, (0, 0), 2.0)]
    )
    if scale < 0.75:
        planes = cv2.GaussianBlur(planes, (0, 0), 0.35 / scale)  # a photograph's antialiasing, before shrinking
    warped = np.asarray(cv2.warpAffine(planes, matrix, (side, side), flags=cv2.INTER_LINEAR), np.float32)
    top, left = max(0, centre[1] - reach), max(0, centre[0] - reach)
    bottom, right = min(size_hw[0], centre[1] + reach), min(size_hw[1], centre[0] + reach)
    crop = warped[
        top - centre[1] + reach : bottom - centre[1] + reach, left - centre[0] + reach : right - centre[0] + reach
    ]
    alpha = crop[..., 3]
    colour = crop[..., :3] / thrice(np.maximum(alpha, np.float32(1e-3)))
    return _Layer(
        window=(top, left, bottom, right), colour=colour, alpha=alpha, height=crop[..., 4] * scale,
        shine=MATERIAL_SHINE[planned.material], size_hw=size_hw,
    )  # fmt: skip


def _visible_masks(layers: Sequence[_Layer]) -> list[NDArray[np.bool_]]:
    """Each object's pixels that no later object covers; a pixel belongs to at most one."""
    if not layers:
        return []
    owner = np.full(layers[0].size_hw, -1, np.int16)
    for number, layer in enumerate(layers):
        top, left, bottom, right = layer.window
        owner[top:bottom, left:right][layer.alpha > 0.5] = number
    return [owner == number for number in range(len(layers))]


def _cast_shadow(picture: Plane, layer: _Layer, light: _Light) -> None:
    height, width = layer.size_hw
    top, left, bottom, right = layer.window
    pad = int(light.reach_px + 3 * light.softness_px)
    canvas = np.pad(layer.alpha, pad)
    shift = np.array([[1, 0, light.direction_xy[0] * light.reach_px], [0, 1, light.direction_xy[1] * light.reach_px]])
    moved = cv2.warpAffine(canvas, shift, canvas.shape[::-1])
    soft = cv2.blur(cv2.blur(moved, (int(light.softness_px),) * 2), (int(light.softness_px) + 2,) * 2)
    shadow = np.asarray(soft, np.float32)
    y0, x0, y1, x1 = max(0, top - pad), max(0, left - pad), min(height, bottom + pad), min(width, right + pad)
    part = shadow[y0 - top + pad : y1 - top + pad, x0 - left + pad : x1 - left + pad]
    dark = touched(part)
    picture[y0:y1, x0:x1][dark] *= thrice(1 - light.darkness * part[dark])


def _lay(picture: Plane, layer: _Layer, light: _Light) -> None:
    top, left, bottom, right = layer.window
    gy = cv2.Sobel(layer.height, cv2.CV_32F, 0, 1, scale=1 / 8)
    gx = cv2.Sobel(layer.height, cv2.CV_32F, 1, 0, scale=1 / 8)
    drawn = touched(layer.alpha)  # the rest of the window stays as it is
    gx, gy = gx[drawn], gy[drawn]
    norm = 1 / np.sqrt(gx * gx + gy * gy + 1)
    towards = (gx * light.direction_xy[0] + gy * light.direction_xy[1]) * norm  # > 0: faces the light
    shading = 0.8 + 0.2 * norm + 0.32 * towards
    gleam = np.clip(towards * 0.62 + norm * 0.78, 0, 1) ** 24 * layer.shine * 0.55
    lit = layer.colour[drawn] * thrice(shading) + thrice(gleam)
    alpha = thrice(layer.alpha[drawn])
    window = picture[top:bottom, left:right][drawn]
    window *= 1 - alpha
    window += lit * alpha


def _photograph(rng: np.random.Generator, picture: Plane, light: _Light) -> NDArray[np.uint8]:
    """Uneven light, white balance, lens blur, vignette, sensor noise, 8 bits."""
    height, width = picture.shape[:2]
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    field_of_light = 1 + light.slope_xy[0] * x + light.slope_xy[1] * y - rng.uniform(0, 0.14) * (x * x + y * y)
    exposed = picture * thrice(np.asarray(field_of_light, np.float32))
    exposed *= np.tile(light.tint_rgb, (width, 1))
    blur = rng.uniform(0, 0.9)
    if blur > 0.35:
        exposed = np.asarray(cv2.GaussianBlur(exposed, (0, 0), blur), np.float32)
    grain = rng.standard_normal((height, width), np.float32) * np.float32(rng.uniform(0.004, 0.022))
    exposed += thrice(grain)
    exposed *= 255
    exposed += 0.5
    return np.clip(exposed, 0, 255, out=exposed).astype(np.uint8)


def _describe(planned: PlannedObject, layer: _Layer, mask: NDArray[np.bool_]) -> SceneObject:
    box, points = box_and_points(mask)
    return SceneObject(
        kind=planned.kind, colour=planned.colour, material=planned.material, box_xyxy=box, points_xy=points,
        area_px=int(mask.sum()), mask=mask,
    )  # fmt: skip

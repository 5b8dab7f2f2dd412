"""Training pictures for the segmenter: things made of random shapes and real texture, laid over real texture.

A picture is `(image, instances, parts)`: uint8 [S, S, 3] RGB, and two uint8 [S, S] maps. `instances` numbers the
visible pixels of each thing (0 is background); `parts` numbers the pieces that things are made of, so that points can
mean a part and boxes around parts can be asked for.

What makes it carry over to real photographs, in the order that was found to matter: things of several materials,
things that share their material with what lies behind them, cast shadows that do not belong to the thing, occlusion,
and the camera's blur, noise and compression.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from .scenes import random_scene
from .segmenter_shapes import body, cut_lines, simple_shape
from .segmenter_textures import PhotoBank, paint, shade, smooth_noise

Picture = tuple[np.ndarray, np.ndarray, np.ndarray]

SCENE_SEED = 90_001
"""Of the scenes' training split; the policy's pictures come from other seeds."""

SMALLEST_VISIBLE_SHARE = 0.002
"""Things and parts of which less of the picture can be seen are not asked for."""


def _cast_shadow(rng: np.random.Generator, image: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    side = alpha.shape[0]
    strength = rng.uniform(0.15, 0.8)
    lean = np.array([[1, rng.normal(0, 0.25), 0], [rng.normal(0, 0.1), rng.uniform(0.6, 1.1), 0]], np.float32)
    rows, columns = np.nonzero(alpha > 0.5)
    foot = np.array([columns.mean(), rows.max()]) if rng.random() < 0.5 else np.array([columns.mean(), rows.mean()])
    lean[:, 2] = foot - lean[:, :2] @ foot + rng.normal(0, 0.04 * side, 2)
    shadow = cv2.warpAffine(alpha, lean, (side, side))
    shadow = cv2.GaussianBlur(shadow, (0, 0), float(np.exp(rng.uniform(np.log(0.6), np.log(10)))))
    return image * (1 - strength * shadow[..., None])


def _thing(
    rng: np.random.Generator, side: int, sizes: tuple[float, float], body_share: float
) -> tuple[list[np.ndarray], bool]:
    """Masks of a thing's pieces (their union is the thing) and whether it is a body of several shapes.

    `sizes` bounds its length over the picture's side.
    """
    size = side * np.exp(rng.uniform(np.log(sizes[0]), np.log(sizes[1])))
    centre_xy = rng.uniform(-0.02, 1.02, 2) * side
    if size > 0.6 * side:
        centre_xy = side / 2 + (centre_xy - side / 2) * 0.6
    if rng.random() < body_share:
        return body(rng, side, centre_xy, size), True
    whole = simple_shape(rng, side, centre_xy, size)
    return (cut_lines(rng, whole), False) if rng.random() < 0.5 else ([whole], False)


def _soften(rng: np.random.Generator, pieces: list[np.ndarray]) -> list[np.ndarray]:
    sigma = float(max(0.0, rng.normal(0.2, 0.5)))
    return pieces if sigma < 0.25 else [cv2.GaussianBlur(piece, (0, 0), sigma) for piece in pieces]


def compose_picture(rng: np.random.Generator, bank: PhotoBank, side: int, *, portrait: bool = False) -> Picture:
    """One picture of 2 to 12 things, drawn back to front. See the file's head for the three arrays.

    A portrait has one or two large bodies before everything else, as photos of animals, people and vehicles do.
    """
    image = _background(rng, bank, side)
    instances = np.zeros((side, side), np.uint8)
    parts = np.zeros((side, side), np.uint8)
    next_part = 1
    large = int(rng.integers(1, 3)) if portrait else 0
    count = large + int(rng.integers(0, 6) if portrait else rng.integers(2, 13))
    backdrop = image.copy()
    for number in range(1, count + 1):
        if number > count - large:
            pieces, is_body = _thing(rng, side, (0.45, 1.15), 0.85)
        else:
            pieces, is_body = _thing(rng, side, (0.09, 0.4 if portrait else 1.1), 0.5)
        pieces = _soften(rng, pieces)
        whole = np.maximum.reduce(pieces)
        if (whole > 0.5).mean() < SMALLEST_VISIBLE_SHARE:
            continue
        if rng.random() < 0.6:
            image = _cast_shadow(rng, image, whole)
        window = _window(whole)
        _dress(rng, bank, image[window], backdrop[window], [piece[window] for piece in pieces], is_body)
        for piece in pieces:
            if next_part < 255:
                parts[piece > 0.5] = next_part
                next_part += 1
        instances[whole > 0.5] = number
    parts[instances == 0] = 0
    return _camera(rng, image), instances, parts


def _window(whole: np.ndarray) -> tuple[slice, slice]:
    """The rows and columns that a thing covers, so that paint is mixed for these alone."""
    rows, columns = np.flatnonzero(whole.any(1)), np.flatnonzero(whole.any(0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _dress(
    rng: np.random.Generator,
    bank: PhotoBank,
    image: np.ndarray,
    backdrop: np.ndarray,
    pieces: list[np.ndarray],
    is_body: bool,
) -> None:
    """Paints a thing's pieces with materials and light and lays it over `image`, in place. All cut to one window."""
    whole = np.maximum.reduce(pieces)
    height, width = whole.shape
    side = max(height, width)
    material = _material(rng, bank, side, backdrop)[:height, :width]
    alike = rng.random() < 0.4
    fresh = np.zeros((height, width, 3), np.float32)
    for index, piece in enumerate(pieces):
        if index and not alike:
            colour = paint(rng, bank, side)[:height, :width]
        else:
            colour = np.clip(material * rng.uniform(0.8, 1.2), 0, 255) if index else material
        colour = shade(rng, colour, piece) if is_body or index == 0 else colour
        fresh += (colour - fresh) * (piece / np.maximum(whole, 1e-3))[..., None].clip(0, 1)
    if not is_body or rng.random() < 0.3:
        fresh = shade(rng, fresh, whole)
    if rng.random() < 0.08:  # an inked outline
        rim = cv2.morphologyEx((whole > 0.5).astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
        fresh = fresh * (1 - 0.7 * rim[..., None])
    image += (fresh - image) * whole[..., None]


def _material(rng: np.random.Generator, bank: PhotoBank, side: int, backdrop: np.ndarray) -> np.ndarray:
    """Mostly a fresh paint; now and then the backdrop's own texture, shifted, so that only the edge tells."""
    if rng.random() < 0.12:
        rolled = np.roll(backdrop, rng.integers(0, side, 2), (0, 1))
        return np.clip(rolled * rng.uniform(0.6, 1.4) + rng.normal(0, 20, 3), 0, 255).astype(np.float32)
    return paint(rng, bank, side)


def _background(rng: np.random.Generator, bank: PhotoBank, side: int) -> np.ndarray:
    image = bank.crop(rng, side, 0.3) if rng.random() < 0.55 else paint(rng, bank, side)
    for _ in range(int(rng.integers(0, 3))):  # walls, table tops, floors
        region = cut_lines(rng, np.ones((side, side), np.float32))[-1][..., None]
        image = image + (paint(rng, bank, side) - image) * region
    return image


def _camera(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Light, white balance, blur, sensor noise and compression: float32 in, uint8 out."""
    side = image.shape[0]
    if rng.random() < 0.4:
        image = image * (1 + smooth_noise(rng, side, 2)[..., None] * 0.12)
    if rng.random() < 0.4:
        image = image * np.exp(rng.normal(0, 0.1, 3)).astype(np.float32)
    if rng.random() < 0.5:
        image = 255 * (np.clip(image, 0, 255) / 255) ** np.float32(np.exp(rng.normal(0, 0.3)))
    if rng.random() < 0.1:
        image = np.repeat(image.mean(2, keepdims=True), 3, 2)
    if rng.random() < 0.35:
        image = cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.4, 1.5)))
    if rng.random() < 0.6:
        image = image + rng.normal(0, rng.uniform(1, 9), image.shape).astype(np.float32)
    image = np.clip(image, 0, 255).astype(np.uint8)
    if rng.random() < 0.4:
        _, coded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(25, 95))])
        image = cv2.imdecode(coded, cv2.IMREAD_COLOR)
    return image


def shape_pictures(side: int) -> Callable[[int], Picture]:
    """A function from seed to picture: the form in which the cache takes a source of pictures."""
    bank = PhotoBank.from_scikit_image()
    return lambda seed: compose_picture(np.random.default_rng(seed), bank, side)


def portrait_pictures(side: int) -> Callable[[int], Picture]:
    """As `shape_pictures`, of large bodies."""
    bank = PhotoBank.from_scikit_image()
    return lambda seed: compose_picture(np.random.default_rng((2, seed)), bank, side, portrait=True)


def scene_pictures(side: int) -> Callable[[int], Picture]:
    """Tabletop scenes of the training split, resized as the runtime resizes pictures; things have no parts here."""

    def render(seed: int) -> Picture:
        scene = random_scene("train", SCENE_SEED, seed)
        image = np.asarray(Image.fromarray(scene.image_rgb).resize((side, side), Image.Resampling.BILINEAR))
        instances = np.zeros((side, side), np.uint8)
        for number, thing in enumerate(scene.objects, 1):
            share = cv2.resize(thing.mask.astype(np.float32), (side, side), interpolation=cv2.INTER_AREA)
            instances[share > 0.5] = number
        return image, instances, np.zeros_like(instances)

    return render


def write_shard(path: Path, source: Callable[[int], Picture], seeds: range) -> None:
    """Renders one picture per seed into a uint8 array [n, S, S, 5] (RGB, instances, parts), written atomically."""
    packed = [np.dstack(source(seed)) for seed in seeds]
    temporary = path.with_suffix(".partial")
    with temporary.open("wb") as file:
        np.save(file, np.stack(packed))
    temporary.replace(path)


def fill_cache(folder: Path, source: Callable[[int], Picture], *, shards: int, per_shard: int, seed: int) -> None:
    """Renders what is missing of `shards` shard files into `folder`; kill it at any time and call it again."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        path = folder / f"shard-{shard:05d}.npy"
        if not path.exists():
            first = seed * 10_000_000 + shard * per_shard
            write_shard(path, source, range(first, first + per_shard))

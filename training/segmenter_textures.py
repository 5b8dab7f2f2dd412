"""Where the segmenter's training pictures get their pixels: crops of real photos, flat and patterned paint, light.

The photos are the samples that come inside the scikit-image package (no download, nothing copied into this
repository). Every function draws from the generator it is given, so a seed fixes a picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

PHOTO_NAMES = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "coffee.png", "coins.png", "grass.png",
    "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "motorcycle_right.png",
    "page.png", "retina.jpg", "rocket.jpg", "text.png",
)  # fmt: skip
"""Real photographs among scikit-image's samples; drawings and test charts are left out."""

EVERYDAY_PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "motorcycle_right.png")
"""Photos of things people have around them; asked for more often than microscope and sky pictures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhotoBank:
    """Photos to cut texture from, uint8 [H, W, 3] RGB each, with the probability of drawing each."""

    photos: tuple[np.ndarray, ...]
    weights: np.ndarray

    @classmethod
    def from_scikit_image(cls) -> PhotoBank:
        """Reads the sample photos of the installed scikit-image.

        Raises:
            FileNotFoundError: a photo is missing from the installed package.
        """
        import skimage  # heavy, and needed for its folder only

        folder = Path(skimage.__file__).parent / "data"
        photos = []
        for name in PHOTO_NAMES:
            photo_bgr = cv2.imread(str(folder / name), cv2.IMREAD_COLOR)
            if photo_bgr is None:
                raise FileNotFoundError(
                    f"expected scikit-image's sample photo {folder / name}; install scikit-image 0.26"
                )
            photos.append(np.ascontiguousarray(photo_bgr[..., ::-1]))
        weights = np.array([3.0 if name in EVERYDAY_PHOTOS else 1.0 for name in PHOTO_NAMES])
        return cls(photos=tuple(photos), weights=weights / weights.sum())

    def crop(self, rng: np.random.Generator, side: int, smallest: float = 0.12) -> np.ndarray:
        """A random cut of a random photo, scaled, turned and re-coloured: float32 [side, side, 3], 0..255."""
        photo = self.photos[rng.choice(len(self.photos), p=self.weights)]
        height, width = photo.shape[:2]
        fraction = np.exp(rng.uniform(np.log(smallest), 0.0))
        crop_height = max(24, int(height * fraction))
        crop_width = max(24, int(min(width, crop_height * rng.uniform(0.7, 1.4))))
        crop_height, crop_width = min(crop_height, height), min(crop_width, width)
        top = rng.integers(0, height - crop_height + 1)
        left = rng.integers(0, width - crop_width + 1)
        piece = photo[top : top + crop_height, left : left + crop_width]
        method = cv2.INTER_AREA if crop_height > side else cv2.INTER_LINEAR
        piece = cv2.resize(piece, (side, side), interpolation=method)
        piece = np.rot90(piece, rng.integers(4))
        if rng.random() < 0.5:
            piece = piece[:, ::-1]
        return recolour(rng, np.ascontiguousarray(piece, dtype=np.float32))


def recolour(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Random channel mixing, gain and offset, so that one photo gives many materials. float32 in, float32 out."""
    kind = rng.random()
    if kind < 0.35:
        mixing = np.eye(3) + rng.normal(0, 0.08, (3, 3))
    elif kind < 0.7:
        mixing = np.eye(3)[rng.permutation(3)] * 0.7 + rng.dirichlet(np.ones(3), 3) * 0.3
    else:  # tinted grey
        mixing = np.outer(np.exp(rng.normal(0, 0.25, 3)), [0.3, 0.59, 0.11])
    gain, offset = np.exp(rng.normal(0, 0.25)), rng.normal(0, 25)
    return np.clip(image @ (mixing.T * gain).astype(np.float32) + np.float32(offset), 0, 255)


def random_colour(rng: np.random.Generator) -> np.ndarray:
    """A colour as objects have them: sometimes vivid, often greyish. float32 [3], 0..255."""
    hue, saturation, value = rng.uniform(0, 360), rng.beta(1.2, 1.5), rng.uniform(0.08, 1.0)
    hsv = np.array([[[hue, saturation, value]]], np.float32)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0] * 255


def smooth_noise(rng: np.random.Generator, side: int, cells: int) -> np.ndarray:
    """Noise that varies over about `side / cells` pixels: float32 [side, side], mean 0, deviation about 1."""
    coarse = rng.normal(0, 1, (cells + 1, cells + 1)).astype(np.float32)
    return cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)


def paint(rng: np.random.Generator, bank: PhotoBank, side: int) -> np.ndarray:
    """One material over the whole canvas, float32 [side, side, 3], 0..255."""
    kind = rng.random()
    if kind < 0.38:
        return bank.crop(rng, side)
    colour = random_colour(rng)
    if kind < 0.62:  # a dyed material: one colour, with the light and dark of a photo
        grain = bank.crop(rng, side).mean(axis=2, keepdims=True)
        grain = (grain - grain.mean()) / (grain.std() + 8.0)
        return np.clip(colour * (1 + grain * rng.uniform(0.03, 0.3)), 0, 255).astype(np.float32)
    if kind < 0.8:  # nearly flat, with faint mottling
        mottle = smooth_noise(rng, side, int(rng.integers(3, 40)))[..., None]
        return np.clip(colour + mottle * rng.uniform(0, 10), 0, 255).astype(np.float32)
    if kind < 0.9:  # a gradient between two colours
        other = random_colour(rng)
        ramp = _ramp(rng, side)[..., None]
        return (colour * (1 - ramp) + other * ramp).astype(np.float32)
    return _pattern(rng, side, colour, random_colour(rng))


def _ramp(rng: np.random.Generator, side: int) -> np.ndarray:
    angle = rng.uniform(0, 2 * np.pi)
    rows, columns = np.mgrid[0:side, 0:side].astype(np.float32) / side - 0.5
    return np.clip(0.5 + (columns * np.cos(angle) + rows * np.sin(angle)) * rng.uniform(0.6, 2.5), 0, 1)


def _pattern(rng: np.random.Generator, side: int, colour: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Stripes, checks or dots in two colours."""
    angle, period = rng.uniform(0, np.pi), rng.uniform(5, 50)
    rows, columns = np.mgrid[0:side, 0:side].astype(np.float32)
    along = (columns * np.cos(angle) + rows * np.sin(angle)) * (2 * np.pi / period)
    across = (-columns * np.sin(angle) + rows * np.cos(angle)) * (2 * np.pi / period)
    kind = rng.integers(3)
    wave = np.sin(along) if kind == 0 else np.sin(along) * np.sin(across)
    level = rng.uniform(0.3, 0.6) if kind == 2 else rng.uniform(-0.3, 0.3)
    share = np.clip((wave - level) * 4 + 0.5, 0, 1)[..., None]
    return (colour * (1 - share) + other * share).astype(np.float32)


def shade(rng: np.random.Generator, image: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Light on a body: a gradient across it, darker rims, now and then a highlight. Same shapes and units as given."""
    height, width = alpha.shape
    side = max(height, width)
    light = np.ones((height, width), np.float32)
    if rng.random() < 0.6:
        light *= 1 + (_ramp(rng, side)[:height, :width] - 0.5) * rng.uniform(0.1, 1.0)
    if rng.random() < 0.4:
        inside = cv2.distanceTransform((alpha > 0.5).astype(np.uint8), cv2.DIST_L2, 3)
        rim = np.clip(inside / max(2.0, float(inside.max()) * rng.uniform(0.3, 1.0)), 0, 1)
        light *= 1 - rng.uniform(0.1, 0.6) * (1 - np.sqrt(rim))
    if rng.random() < 0.3:
        light *= 1 + smooth_noise(rng, side, int(rng.integers(2, 8)))[:height, :width] * rng.uniform(0.03, 0.2)
    image = image * light[..., None]
    if rng.random() < 0.25:
        rows, columns = np.nonzero(alpha > 0.5)
        if len(rows):
            pick = rng.integers(len(rows))
            spot = np.zeros((height, width), np.float32)
            cv2.circle(
                spot, (int(columns[pick]), int(rows[pick])), int(rng.integers(2, 14)), float(rng.uniform(30, 160)), -1
            )
            image = image + cv2.GaussianBlur(spot, (0, 0), float(rng.uniform(1, 6)))[..., None]
    return np.clip(image, 0, 255)

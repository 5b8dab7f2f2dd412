"""Backgrounds: what the things lie on. Float RGB in [0, 1], any size, nothing repeated from picture to picture."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from .canvas import Plane

Surface = NDArray[np.floating[Any]]
"""[H, W, 3], float32 or float64."""


def draw_table_top(rng: np.random.Generator, size_hw: tuple[int, int]) -> Plane:
    """One of: planks, cloth, checked cloth, stone, terrazzo, plain board. [H, W, 3] in [0, 1]."""
    surfaces = (_planks, _cloth, _checked_cloth, _stone, _terrazzo, _board)
    surface = surfaces[int(rng.integers(len(surfaces)))](rng, size_hw)
    return np.clip(surface, 0.02, 0.98).astype(np.float32)


def _clouds(rng: np.random.Generator, size_hw: tuple[int, int], cells: int) -> Plane:
    """Smooth noise of zero mean and unit deviation; `cells` sets how fine it is."""
    small = rng.standard_normal((max(2, cells * size_hw[0] // size_hw[1]), cells)).astype(np.float32)
    return np.asarray(cv2.resize(small, size_hw[::-1], interpolation=cv2.INTER_CUBIC), np.float32)


def _base(rng: np.random.Generator, low: float = 0.25, high: float = 0.85, chroma: float = 0.12) -> Plane:
    return (rng.uniform(low, high) + rng.normal(0, chroma, 3)).astype(np.float32)


def _planks(rng: np.random.Generator, size_hw: tuple[int, int]) -> Surface:
    height, width = size_hw
    base = np.asarray([0.58, 0.40, 0.25], np.float32) * rng.uniform(0.5, 1.4) + rng.normal(0, 0.03, 3).astype(
        np.float32
    )
    streaks = cv2.resize(
        rng.standard_normal((height, 6)).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC
    )
    tone = 1 + 0.07 * streaks + 0.05 * _clouds(rng, size_hw, 8)
    count = int(rng.integers(3, 8))
    row = (np.arange(height) * count / height).astype(int)
    tone = tone * (1 + rng.normal(0, 0.07, count + 1))[row][:, None]
    seam = np.abs((np.arange(height) * count / height) % 1 - 0.5) > 0.5 - 1.2 * count / height
    tone[seam] *= 0.7
    picture = base * tone[..., None]
    return np.ascontiguousarray(
        picture if rng.random() < 0.6 else cv2.resize(picture.transpose(1, 0, 2), (width, height))
    )


def _cloth(rng: np.random.Generator, size_hw: tuple[int, int]) -> Surface:
    y, x = np.arange(size_hw[0])[:, None], np.arange(size_hw[1])[None, :]
    period = rng.uniform(3, 6)
    weave = 0.025 * (np.sin(2 * np.pi * x / period) + np.sin(2 * np.pi * y / period))
    folds = 0.06 * _clouds(rng, size_hw, int(rng.integers(3, 7)))
    cloth: Surface = _base(rng) * (1 + weave + folds)[..., None]
    return cloth


def _checked_cloth(rng: np.random.Generator, size_hw: tuple[int, int]) -> Surface:
    y, x = np.arange(size_hw[0])[:, None], np.arange(size_hw[1])[None, :]
    period, other = rng.uniform(26, 60), _base(rng, 0.35, 0.85)
    stripes = 0.5 * ((x / period) % 1 < 0.5) + 0.5 * ((y / period) % 1 < 0.5)
    blend = (stripes * rng.uniform(0.3, 0.8))[..., None]
    folds = 1 + 0.05 * _clouds(rng, size_hw, 5)
    cloth: Surface = (_base(rng, 0.5, 0.9) * (1 - blend) + other * blend) * folds[..., None]
    return cloth


def _stone(rng: np.random.Generator, size_hw: tuple[int, int]) -> Surface:
    veins = np.abs(_clouds(rng, size_hw, 6) + 0.5 * _clouds(rng, size_hw, 17))
    tone = 1 - 0.25 * np.exp(-veins * 6) + 0.04 * _clouds(rng, size_hw, 30)
    stone: Surface = _base(rng, 0.3, 0.88, 0.05) * tone[..., None]
    return stone


def _terrazzo(rng: np.random.Generator, size_hw: tuple[int, int]) -> Surface:
    specks = _clouds(rng, size_hw, 90)
    picture: Surface = _base(rng, 0.35, 0.8, 0.06) * (1 + 0.04 * _clouds(rng, size_hw, 7))[..., None]
    for threshold in (1.3, -1.3):
        speck = np.clip((specks - threshold) * np.sign(threshold) * 4, 0, 1)[..., None] * 0.5
        picture = picture * (1 - speck) + _base(rng) * speck
    return picture


def _board(rng: np.random.Generator, size_hw: tuple[int, int]) -> Surface:
    return (
        _base(rng, 0.2, 0.9, 0.1) * (1 + 0.03 * _clouds(rng, size_hw, 4) + 0.015 * _clouds(rng, size_hw, 60))[..., None]
    )

"""Random outlines for the segmenter's training pictures: single shapes and bodies made of several.

All masks are float32 [side, side] coverage in 0..1, antialiased.
"""

from __future__ import annotations

import cv2
import numpy as np

_SHIFT = 4  # OpenCV's fixed-point bits: corners are placed to 1/16 pixel


def _fill(canvas: np.ndarray, points_xy: np.ndarray, value: int = 255) -> None:
    cv2.fillPoly(canvas, [np.round(points_xy * (1 << _SHIFT)).astype(np.int32)], value, cv2.LINE_AA, _SHIFT)


def _place(rng: np.random.Generator, points_xy: np.ndarray, centre_xy: np.ndarray, size: float) -> np.ndarray:
    """Unit outline -> pixels: stretched, turned and moved."""
    stretch = np.exp(rng.normal(0, 0.35))
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return (points_xy * [stretch, 1 / stretch]) @ turn.T * (size / 2) + centre_xy


def _blob(rng: np.random.Generator) -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    radius = np.ones_like(angles)
    wildness = rng.uniform(0.03, 0.4)
    for wave in range(2, int(rng.integers(4, 9))):
        radius += wildness / wave**0.8 * rng.normal() * np.cos(wave * angles + rng.uniform(0, 2 * np.pi))
    return np.stack([np.cos(angles), np.sin(angles)], 1) * np.clip(radius, 0.15, 2)[:, None]


def _polygon(rng: np.random.Generator) -> np.ndarray:
    corners = int(rng.integers(3, 9))
    angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
    return np.stack([np.cos(angles), np.sin(angles)], 1) * rng.uniform(0.4, 1.1, corners)[:, None]


def _star(rng: np.random.Generator) -> np.ndarray:
    tips = int(rng.integers(3, 9))
    angles = np.linspace(0, 2 * np.pi, 2 * tips, endpoint=False)
    radius = np.where(np.arange(2 * tips) % 2, rng.uniform(0.3, 0.8), 1.0)
    return np.stack([np.cos(angles), np.sin(angles)], 1) * radius[:, None]


def _superellipse(rng: np.random.Generator) -> np.ndarray:
    """From diamond over ellipse to rounded box, sometimes tapering like a cup."""
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    power = 2 / rng.choice([1.2, 2, 2, 3, 6, 12])
    x = np.sign(np.cos(angles)) * np.abs(np.cos(angles)) ** power
    y = np.sign(np.sin(angles)) * np.abs(np.sin(angles)) ** power
    return np.stack([x * (1 + rng.uniform(-0.35, 0.35) * y), y], 1) * 0.9


def _stroke(rng: np.random.Generator, thickest: float = 0.3) -> np.ndarray:
    """A curved band: tails, handles, cables, legs, letters."""
    steps = np.linspace(0, 1, 24)
    heading = rng.uniform(0, 2 * np.pi) + rng.normal(0, 1.2) * steps * 2 + rng.normal(0, 0.8) * np.sin(steps * 6)
    path = np.cumsum(np.stack([np.cos(heading), np.sin(heading)], 1), 0)
    path = (path - path.mean(0)) / (np.abs(path - path.mean(0)).max() + 1e-6)
    normal = np.stack([-np.sin(heading), np.cos(heading)], 1)
    width = rng.uniform(0.2 * thickest, thickest) * np.interp(steps, [0, 0.5, 1], rng.uniform(0.5, 1.3, 3))
    return np.concatenate([path + normal * width[:, None], (path - normal * width[:, None])[::-1]])


_OUTLINES = (_blob, _blob, _polygon, _star, _superellipse, _superellipse, _superellipse, _stroke)


def simple_shape(rng: np.random.Generator, side: int, centre_xy: np.ndarray, size: float) -> np.ndarray:
    """One outline of about `size` pixels across at `centre_xy`; now and then with a hole."""
    outline = _OUTLINES[rng.integers(len(_OUTLINES))]
    canvas = np.zeros((side, side), np.uint8)
    _fill(canvas, _place(rng, outline(rng), centre_xy, size))
    if rng.random() < 0.08 and outline is not _stroke:
        hole = _OUTLINES[rng.integers(5)](rng)
        _fill(canvas, _place(rng, hole, centre_xy + rng.normal(0, size * 0.05, 2), size * rng.uniform(0.25, 0.6)), 0)
    return canvas.astype(np.float32) / 255


def body(rng: np.random.Generator, side: int, centre_xy: np.ndarray, size: float) -> list[np.ndarray]:
    """A thing made of several shapes that hang together (trunk, limbs, handle, lid), as the masks of its pieces.

    Later pieces lie on earlier ones; the thing is the union of all.
    """
    if rng.random() < 0.35:  # curled up
        canvas = np.zeros((side, side), np.uint8)
        _fill(canvas, _place(rng, _stroke(rng, 0.6), centre_xy, size * 0.8))
        trunk = canvas.astype(np.float32) / 255
    else:
        trunk = simple_shape(rng, side, centre_xy, size * rng.uniform(0.55, 0.9))
    pieces = [trunk]
    rim_rows, rim_columns = np.nonzero((trunk > 0.3) & (trunk < 0.99))
    if len(rim_rows) == 0:
        return pieces
    for _ in range(int(rng.integers(1, 6))):
        pick = rng.integers(len(rim_rows))
        anchor = np.array([rim_columns[pick], rim_rows[pick]], np.float64)
        anchor = anchor + (centre_xy - anchor) * rng.uniform(0, 0.4)
        piece = simple_shape(rng, side, anchor, size * rng.uniform(0.12, 0.5))
        behind = rng.random() < 0.4
        pieces.insert(0, piece) if behind else pieces.append(piece)
    return pieces


def cut_lines(rng: np.random.Generator, alpha: np.ndarray) -> list[np.ndarray]:
    """Divides a mask into 2 to 4 bands by parallel or free lines: labels, stripes, lids, liquid levels."""
    side = alpha.shape[0]
    rows, columns = np.nonzero(alpha > 0.5)
    if len(rows) < 30:
        return [alpha]
    parts = [alpha]
    grid_rows, grid_columns = np.mgrid[0:side, 0:side].astype(np.float32)
    angle = rng.uniform(0, np.pi)
    for _ in range(int(rng.integers(1, 4))):
        if rng.random() < 0.4:
            angle = rng.uniform(0, np.pi)
        pick = rng.integers(len(rows))
        distance = (grid_columns - columns[pick]) * np.cos(angle) + (grid_rows - rows[pick]) * np.sin(angle)
        if rng.random() < 0.4:
            distance = distance + np.sin((grid_rows - grid_columns) * rng.uniform(0.02, 0.15)) * rng.uniform(1, 8)
        parts.append(alpha * np.clip(distance + 0.5, 0, 1))
    return parts

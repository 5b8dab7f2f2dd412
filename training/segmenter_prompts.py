"""From a picture's label maps to training prompts: which thing is asked for, by what box and which points."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from .segmenter_data import SMALLEST_VISIBLE_SHARE

SMALLEST_ASKED_BACKGROUND = 0.2
"""Of the picture; less is scraps between things."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptKind:
    """How one training step asks: the same for the whole step, so that no prompt needs padding."""

    with_box: bool
    num_points: int

    def __post_init__(self) -> None:
        if not self.with_box and self.num_points == 0:
            raise ValueError("expected a box, points or both; got neither")


PROMPT_KINDS = (
    (0.50, PromptKind(with_box=True, num_points=0)),
    (0.30, PromptKind(with_box=True, num_points=1)),
    (0.08, PromptKind(with_box=True, num_points=2)),
    (0.08, PromptKind(with_box=False, num_points=1)),
    (0.04, PromptKind(with_box=False, num_points=3)),
)
"""Share of steps and kind; boxes weigh most, since that is what policies answer with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One prompt with its truth. `mask` is bool [S, S]; all false when nothing is there."""

    points_xy: np.ndarray  # float32 [P, 2], box corners first
    labels: np.ndarray  # int64 [P]: 1 inside, 2 and 3 box corners
    mask: np.ndarray


def draw_kind(rng: np.random.Generator) -> PromptKind:
    """A prompt kind for one step, by the shares of `PROMPT_KINDS`."""
    shares = np.array([share for share, _ in PROMPT_KINDS])
    return PROMPT_KINDS[rng.choice(len(PROMPT_KINDS), p=shares / shares.sum())][1]


def draw_targets(
    rng: np.random.Generator, instances: np.ndarray, parts: np.ndarray, kind: PromptKind, count: int
) -> list[Target]:
    """`count` prompts on one picture: mostly whole things, some parts, a few on nothing or what things lie on."""
    things = _Queue(rng, instances, thin_first=not bool(parts.any()))  # scenes have no parts
    pieces = _Queue(rng, parts, thin_first=False)
    targets = []
    for _ in range(count):
        choice = rng.random()
        if choice < 0.04 and kind.with_box:
            nothing = _empty_target(rng, instances, kind)
            if nothing is not None:
                targets.append(nothing)
                continue
        if not things:
            mask = np.ones_like(instances, bool)  # an empty picture: the whole of it
        elif choice < 0.06 and kind.with_box and (instances == 0).mean() > SMALLEST_ASKED_BACKGROUND:
            mask = instances == 0  # a table, a couch: its box is mostly the whole picture
        elif choice < 0.16 and pieces:
            mask = parts == pieces.next()
        else:
            mask = instances == things.next()
        targets.append(prompt_for(rng, mask, kind))
    return targets


class _Queue:
    """The numbers of a label map: each once, then large ones again.

    First come, by chance, those that fill little of their box, or else large ones: thin things of scenes are learnt
    last, whereas among composed shapes thin ones are stray strokes, and bodies are what photos show.

    The image encoder costs more than its prompts, so a picture's prompts should not ask the same thing twice while
    another waits. Large things of photos come out with holes unless they are asked for often.
    """

    def __init__(self, rng: np.random.Generator, labels: np.ndarray, *, thin_first: bool) -> None:
        areas = np.bincount(labels.ravel(), minlength=256).astype(np.float64)
        areas[0] = 0
        self._rng = rng
        self._numbers = np.flatnonzero(areas >= SMALLEST_VISIBLE_SHARE * labels.size)
        self._areas = areas[self._numbers]
        self._waiting: list[int] = []
        if len(self._numbers):
            weights = self._areas**0.5
            if thin_first:
                weights = np.array([_box_area(labels == number) for number in self._numbers]) / self._areas**0.75
            order = rng.choice(self._numbers, len(self._numbers), replace=False, p=weights / weights.sum())
            self._waiting = order.tolist()[::-1]

    def __bool__(self) -> bool:
        return len(self._numbers) > 0

    def next(self) -> int:
        """The next number to ask for."""
        if self._waiting:
            return self._waiting.pop()
        weights = self._areas**0.5
        return int(self._rng.choice(self._numbers, p=weights / weights.sum()))


def _box_area(mask: np.ndarray) -> int:
    return int((np.ptp(np.flatnonzero(mask.any(1))) + 1) * (np.ptp(np.flatnonzero(mask.any(0))) + 1))


def prompt_for(rng: np.random.Generator, mask: np.ndarray, kind: PromptKind) -> Target:
    """Box (usually a little off) and points (usually well inside) for a mask that is not empty."""
    side = mask.shape[0]
    points: list[np.ndarray] = []
    labels: list[int] = []
    if kind.with_box:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float64)
        points += list(_jitter(rng, box, side).reshape(2, 2))
        labels += [2, 3]
    if kind.num_points:
        points += list(_inner_points(rng, mask, kind.num_points))
        labels += [1] * kind.num_points
    return Target(points_xy=np.array(points, np.float32), labels=np.array(labels, np.int64), mask=mask)


def _jitter(rng: np.random.Generator, box: np.ndarray, side: int) -> np.ndarray:
    """Most boxes nearly tight, the others off by up to 15 % of their sides; inside the picture, never inverted."""
    width, height = box[2] - box[0], box[3] - box[1]
    spread = 0.01 if rng.random() < 0.7 else 0.06
    limit = 0.15 * np.array([width, height, width, height])
    moved = box + np.clip(rng.normal(0, spread, 4) * [width, height, width, height], -limit, limit)
    moved += rng.uniform(-0.7, 0.7, 4)
    moved = np.clip(moved, 0, side)
    centre = (moved[:2] + moved[2:]) / 2
    return np.concatenate([np.minimum(moved[:2], centre - 0.5), np.maximum(moved[2:], centre + 0.5)])


def _inner_points(rng: np.random.Generator, mask: np.ndarray, count: int) -> np.ndarray:
    """Pixels of the mask: half of the time the deep ones only."""
    inside = mask
    if rng.random() < 0.5:
        depth = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 3)[1:-1, 1:-1]
        inside = depth >= 0.5 * depth.max()
    rows, columns = np.nonzero(inside)
    picks = rng.integers(0, len(rows), count)
    return np.stack([columns[picks], rows[picks]], 1).astype(np.float64)


def _empty_target(rng: np.random.Generator, instances: np.ndarray, kind: PromptKind) -> Target | None:
    """A box on bare background, for the object score's sake; None when five tries find no room."""
    side = instances.shape[0]
    for _ in range(5):
        width, height = rng.uniform(0.1, 0.4, 2) * side
        left, top = rng.uniform(0, side - width), rng.uniform(0, side - height)
        box = np.array([left, top, left + width, top + height])
        if not instances[int(top) : int(top + height) + 1, int(left) : int(left + width) + 1].any():
            inside = rng.uniform(box[:2], box[2:], (kind.num_points, 2))
            points = np.concatenate([box.reshape(2, 2), inside]).astype(np.float32)
            labels = np.array([2, 3] + [1] * kind.num_points, np.int64)
            return Target(points_xy=points, labels=labels, mask=np.zeros_like(instances, bool))
    return None
